"""Files for ARM on an ARM processor: a small system under QEMU with the same engines."""

import shutil

import pytest
from click.testing import CliRunner
from fakes.planted import bright_inputs

from edgekit import bundle, device_profiles
from edgekit.cli.emulator import COMMAND as EMULATOR
from edgekit.compress.passes.quantize import Quantize
from edgekit.errors import HealthError, ResourceError
from edgekit.export import export
from edgekit.progress import silent
from edgekit.runtime import arm64
from edgekit.runtime.arm64 import build

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def arm64_system(request, tmp_path_factory):
    """The system, built once and kept beside pytest's own cache."""
    missing = [name for name in build.PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: {build.PROGRAM_PACKAGES}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(arm64, "place", lambda: request.config.cache.mkdir("arm64"))
        if arm64.lacking():
            try:
                build.build(silent)
            except ResourceError as error:
                pytest.skip(f"no arm64 packages here: {error.message}")
        yield


@pytest.mark.slow
def test_files_for_arm_are_run_by_an_arm_processor(arm64_system, tmp_path):
    model = Quantize().apply(bright_inputs(strong=False), silent)
    done = export(model, [device_profiles.load(name) for name in ("raspberry-pi-5", "pixel-8")], tmp_path / "b")
    assert done.first_error is None
    found = {variant.name: variant.elsewhere for variant in bundle.read(tmp_path / "b").manifest.variants}
    assert {name: (told.isa, told.status, told.samples) for name, told in found.items()} == {
        "raspberry-pi-5": ("cortex-a76", "checked", 8),
        "pixel-8": ("armv9", "checked", 8),
    }
    assert all(told.sqnr_db > 25 for told in found.values())


@pytest.mark.slow
def test_what_fails_there_is_told_in_its_own_words(arm64_system):
    with pytest.raises(HealthError, match=r"a job does not run on cortex-a76: .*No module named edgekit.nothing"):
        arm64.run("edgekit.nothing", {"given": b"1"}, cpu="cortex-a76", answer="found", doing="a job")


def test_what_is_lacking_is_said_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(arm64, "EMULATOR", "no-such-emulator")
    assert "apt-get install qemu-system-arm" in arm64.lacking()
    monkeypatch.setattr(arm64, "EMULATOR", "sh")
    monkeypatch.setattr(arm64, "place", lambda: tmp_path)
    assert arm64.lacking() == "the arm64 system is not built: edgekit emulator"
    (tmp_path / arm64.RECORD).write_bytes(b'{"versions": {"numpy": "0.1"}}')
    assert "has other versions than this machine" in arm64.lacking()
    (tmp_path / arm64.RECORD).write_bytes(b"{")
    assert "is damaged" in arm64.lacking()
    with pytest.raises(HealthError, match="is damaged"):
        arm64.run("edgekit", {}, cpu="cortex-a76", answer="a", doing="a job")


def test_the_command_names_the_program_that_it_needs_and_leaves_the_old_system(tmp_path, monkeypatch):
    monkeypatch.setattr(arm64, "place", lambda: tmp_path / "arm64")
    (tmp_path / "arm64").mkdir()
    (tmp_path / "arm64" / arm64.KERNEL).write_bytes(b"old")
    monkeypatch.setattr(build, "PROGRAMS", ("no-such-program",))
    told = CliRunner().invoke(EMULATOR, [])
    assert told.exit_code == 12
    assert "no-such-program not found" in told.output
    assert (tmp_path / "arm64" / arm64.KERNEL).read_bytes() == b"old"


def test_a_mirror_without_packages_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    broken = tmp_path / "bin"
    broken.mkdir()
    for name in ("apt-get", "dpkg-deb", "cpio", arm64.EMULATOR):
        (broken / name).write_text("#!/bin/sh\necho E: no such mirror >&2\nexit 100\n")
        (broken / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(broken), prepend=":")
    monkeypatch.setattr(arm64, "place", lambda: tmp_path / "cache" / "arm64")
    with pytest.raises(ResourceError, match="reading the mirrors of apt for arm64 failed: E: no such mirror"):
        build.build(silent)
    assert list((tmp_path / "cache").iterdir()) == []
