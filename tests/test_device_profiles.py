"""Hardware classes: each file is valid and true to what runs, detection reads the machine's own signs."""

import pytest

from edgekit import device_profiles, plugins
from edgekit.device_profiles import RuntimeSettings, detect, load, names
from edgekit.errors import UnknownName, UsageError


@pytest.mark.parametrize("name", names())
def test_every_profile_is_whole(name):
    profile = load(name)
    assert profile.name == name
    assert profile.format == profile.formats[0]
    assert set(profile.formats) <= set(plugins.names("edgekit.export.targets")), "an exporter writes every format"
    assert profile.source.startswith("https://")
    assert 1 <= profile.threads <= 64
    assert profile.memory_mb >= 64


def test_the_classes_of_the_tour_are_known():
    wanted = {"raspberry-pi-5", "jetson-orin-nano", "iphone-15", "pixel-8", "x86-64", "llama-cpp"}
    assert wanted <= set(names())


def test_an_unknown_class_offers_the_nearest():
    with pytest.raises(UnknownName) as caught:
        load("raspberry-pi5")
    assert "raspberry-pi-5" in caught.value.hint


def test_a_profile_of_ones_own_is_read_by_its_path(tmp_path):
    own = tmp_path / "toaster.toml"
    own.write_text(
        'title = "T"\nsummary = "s"\narch = "any"\nmemory_mb = 64\nthreads = 1\nformats = ["onnx"]\nsource = "me"\n'
    )
    assert load(str(own)).name == "toaster"


WHOLE = 'title = "T"\nsummary = "s"\narch = "any"\nmemory_mb = 64\nthreads = 1\nformats = ["onnx"]\nsource = "me"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("title = ", "no device profile"), ('title = "T"', "missing required field"), ("\x00", "no device profile"),
        ('title = "T"\nsummary = "s"\narch = "vax"\nmemory_mb = 1\nthreads = 1\nformats = []\nsource = ""', "arch"),
        ('title = "T"\nturbo = true', "turbo"),
        (WHOLE + '[runtime]\nproviders = ["cudda"]', "cudda"), (WHOLE + "[runtime]\nspeed = 3", "speed"),
        (WHOLE + '[runtime]\ndelegate = "npu"', "delegate"),
    ],
)  # fmt: skip
def test_a_broken_profile_is_refused_with_the_reason(tmp_path, text, says):
    own = tmp_path / "own.toml"
    own.write_text(text)
    with pytest.raises(UsageError, match=says):
        load(str(own))


def test_a_missing_profile_is_told(tmp_path):
    with pytest.raises(UsageError, match="no profile at"):
        load(str(tmp_path / "none.toml"))


def machine(folder, **files):
    for relative, text in files.items():
        path = folder / relative.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_raspberry_pi_5_is_recognized_by_its_device_tree(tmp_path):
    root = machine(tmp_path)
    (root / "proc/device-tree").mkdir(parents=True)
    (root / "proc/device-tree/model").write_text("Raspberry Pi 5 Model B Rev 1.0\0")
    assert detect(root, "aarch64").name == "raspberry-pi-5"


def test_a_jetson_is_recognized_by_its_release_file(tmp_path):
    assert detect(machine(tmp_path, etc__nv_tegra_release="# R36"), "aarch64").name == "jetson-orin-nano"


def test_a_pc_is_recognized_and_a_stranger_is_not(tmp_path):
    assert detect(tmp_path, "x86_64").name == "x86-64"
    assert detect(tmp_path, "aarch64") is None


def test_this_machine_is_asked_when_none_is_given(monkeypatch):
    monkeypatch.setattr(device_profiles.platform, "machine", lambda: "vax")
    assert detect() is None


def test_a_mac_and_a_pi_zero_are_recognized(tmp_path):
    assert detect(tmp_path, "arm64").name == "mac-m1"
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("Raspberry Pi Zero 2 W Rev 1.0\0")
    assert detect(tmp_path, "aarch64").name == "raspberry-pi-zero-2"


def test_a_class_says_how_its_engines_run_and_else_the_usual_holds(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text(
        WHOLE + '[runtime]\nproviders = ["tensorrt", "cuda"]\ndelegate = "edgetpu"\ncompute_units = "cpu-only"'
    )
    said = load(str(own)).runtime
    assert (said.providers, said.arena, said.delegate) == (("tensorrt", "cuda"), True, "edgetpu")
    own.write_text(WHOLE)
    assert load(str(own)).runtime == RuntimeSettings(providers=None, arena=True, delegate="", compute_units="all")
