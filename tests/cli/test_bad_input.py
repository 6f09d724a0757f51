"""Bad input to every command: the exit code says what to do next, the message says how, nothing is half-written."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import bundles, digits

from edgekit.cli import cli

HIDE = (
    "from importlib.machinery import PathFinder\nreal = PathFinder.find_spec\n"
    "def find(name, path=None, target=None):\n"
    "    return None if name.partition('.')[0] in {hidden!r} else real(name, path, target)\n"
    "PathFinder.find_spec = find\n"
)
NOISE = bytes(range(256)) * 16


def picture(count=32):
    return np.random.default_rng(0).random((count, 1, 8, 8), np.float32)


def arrays(folder, **splits):
    path = folder / "d.npz"
    np.savez(path, **{name.replace("__", "."): array for name, array in splits.items()})
    return path


def real(*arguments, cwd, hidden=(), **settings):
    """Run the command line in a process of its own, with some packages hidden."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if hidden:
        (cwd / "hide").mkdir()
        (cwd / "hide" / "sitecustomize.py").write_text(HIDE.format(hidden=hidden))
        environment["PYTHONPATH"] = str(cwd / "hide")
    environment.update(settings.pop("env", {}))
    line = [sys.executable, "-m", "edgekit", *map(str, arguments)]
    return subprocess.run(
        line,
        capture_output=True,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=60,
        **settings,
    )


def refused(done, code, *words):
    """Check an answer: the code, what it names, a way out, no trace."""
    out, err = (s.decode(errors="replace") if isinstance(s, bytes) else s for s in (done.stdout, done.stderr))
    assert (done.exit_code if hasattr(done, "exit_code") else done.returncode) == code, err
    for word in (*words, "hint: "):
        assert word in err
    assert "Traceback" not in out + err
    assert "internal error" not in err


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed") / "mlp"
    bundles.mlp_bundle(folder)
    return folder


def compress(folder, data=None, *more, source=digits.BUILD, weights=True):
    line = ["compress", source, "--data", str(data or digits.DATA), "-o", str(folder / "out"), *map(str, more)]
    return CliRunner().invoke(cli, line + (["--checkpoint", str(digits.checkpoint())] if weights else []))


CODE = {
    "asserts": ("def build(): assert False, 'why'", 2, "AssertionError: why"),
    "divides": ("def build(): return 1 / 0", 2, "ZeroDivisionError"),
    "leaves": ("def build(): raise SystemExit('bye')", 2, "bye"),
    "opens": ("def build(): open('gone.bin')", 2, "gone.bin"),
    "no-python": ("def build(:", 2, "SyntaxError"),
    "imports": ("import nobody_has_this", 2, "install the package that brings nobody_has_this"),
    "returns": ("def build(): return 7", 2, "returned int"),
}


@pytest.mark.parametrize("fault", CODE)
def test_a_workload_that_fails_is_told_as_the_persons_own(tmp_path, fault):
    pytest.importorskip("torch")
    text, code, word = CODE[fault]
    (tmp_path / "mine.py").write_text(text)
    refused(compress(tmp_path, source=f"{tmp_path}/mine.py:build", weights=False), code, word)
    assert "out" not in left(tmp_path)


@pytest.mark.parametrize("source", [":", "..up:build", "torch:", ":build"])
def test_a_source_that_names_no_function_is_refused(tmp_path, source):
    pytest.importorskip("torch")
    refused(compress(tmp_path, source=source, weights=False), 2, f"{source!r} names no function")


def test_a_function_that_is_not_there_offers_the_nearest_few(tmp_path):
    pytest.importorskip("torch")
    done = compress(tmp_path, source="torch:sttack", weights=False)
    refused(done, 2, "'sttack'", "it has: ")
    assert len(done.stderr) < 400


NPZ = {
    "an array on its own": (lambda f: np.save((f / "d.npz").open("wb"), picture()), 2, "no .npz file"),
    "noise": (lambda f: (f / "d.npz").write_bytes(NOISE), 2, "no .npz file"),
    "empty": (lambda f: (f / "d.npz").write_bytes(b""), 2, "no .npz file"),
    "objects": (lambda f: arrays(f, calibration__image=np.array([{}, []], object)), 2, "no .npz file"),
    "one number": (lambda f: arrays(f, calibration__image=np.float32(1)), 2, "calibration.image"),
    "label of all": (
        lambda f: arrays(f, calibration__image=picture(), test__image=picture(), test__labels=np.int64(1)),
        2,
        "test.labels",
    ),
    "no sample": (lambda f: arrays(f, calibration__image=picture(0)), 2, "empty"),
    "one sample": (lambda f: arrays(f, calibration__image=picture(1)), 4, "1 sample"),
    "wrong shape": (lambda f: arrays(f, calibration__image=picture()[:, 0, 0]), 2, "float32[32, 8]"),
    "wrong type": (lambda f: arrays(f, calibration__image=picture().astype("f8")), 2, "float64[32, 1, 8, 8]"),
    "NaN": (lambda f: arrays(f, calibration__image=picture() * np.nan), 2, "NaN"),
    "labels too high": (
        lambda f: arrays(
            f, calibration__image=picture(), validation__image=picture(2) + 1, validation__labels=np.array([0, 10])
        ),
        2,
        "from 0 to 10",
    ),
    "labels of halves": (
        lambda f: arrays(f, calibration__image=picture(), test__image=picture(2) + 1, test__labels=np.array([0.5, 1])),
        2,
        "test split are float64[2]",
    ),
}


@pytest.mark.parametrize("fault", NPZ)
def test_calibration_data_that_teach_nothing_are_refused(tmp_path, fault):
    pytest.importorskip("torch")
    write, code, word = NPZ[fault]
    write(tmp_path)
    done = compress(tmp_path, tmp_path / "d.npz")
    refused(done, code, word)
    assert "unsafe" not in done.stderr  # NumPy's advice for a file that may be a pickle
    assert left(tmp_path) == ["d.npz"]


@pytest.mark.parametrize(("name", "content"), [("c.pt", NOISE), ("c.pt", b""), ("c.safetensors", NOISE)])
def test_a_damaged_checkpoint_is_refused_without_advice_to_trust_it(tmp_path, name, content):
    pytest.importorskip("torch")
    (tmp_path / name).write_bytes(content)
    done = compress(tmp_path, None, "--checkpoint", tmp_path / name, weights=False)
    refused(done, 2, f"{name} is no checkpoint")
    assert "weights_only" not in done.stderr


@pytest.mark.parametrize(
    ("text", "word", "hint"),
    [
        ('name = "quantise"', "'quantise'", "did you mean quantize"),
        ('name = "quantize"\nbist = 4', "'bist'", "did you mean bits?"),
        ('name = "prune"\nratio = nan', "'prune'", "ratio takes numbers above 0"),
        ('name = "distill"', "teacher", "its options: "),
    ],
)
def test_a_wrong_recipe_names_what_is_known(tmp_path, text, word, hint):
    (tmp_path / "r.toml").write_text(f"\ufeffversion = 1\n[[pass]]\n{text}\n", encoding="utf-8")
    refused(compress(tmp_path, None, "--recipe", tmp_path / "r.toml", weights=False), 2, word, hint)


def test_what_another_program_wrote_under_our_names_is_not_replaced(tmp_path):
    pytest.importorskip("torch")
    for name in ("model.json", "manifest.json"):
        folder = tmp_path / name / "out"
        folder.mkdir(parents=True)
        (folder / name).write_text('{"format": "layers-model"}')
        (folder / "weights.bin").write_bytes(NOISE)
    refused(compress(tmp_path / "model.json"), 2, "not replaced")
    line = ["export", str(digits.onnx_file()), "--data", digits.DATA, "--target", "x86-64"]
    refused(CliRunner().invoke(cli, [*line, "-o", str(tmp_path / "manifest.json" / "out")]), 2, "not replaced")
    assert all((tmp_path / name / "out" / "weights.bin").is_file() for name in ("model.json", "manifest.json"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Write the digits network as `edgekit compress` would, without compressing it."""
    pytest.importorskip("torch")
    from edgekit import workload

    folder = tmp_path_factory.mktemp("small") / "net"
    workload.save(digits.model(), folder)
    return folder


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(NOISE), lambda p: p.write_bytes(b""), lambda p: p.unlink()])
def test_a_damaged_network_is_refused_quietly(tmp_path, small, damage):
    shutil.copytree(small, tmp_path / "net")
    damage(tmp_path / "net" / "network.pt2")
    line = ["export", str(tmp_path / "net"), "--target", "x86-64", "-o", str(tmp_path / "b")]
    refused(CliRunner().invoke(cli, line), 2, "network.pt2 is damaged", "run edgekit compress again")
    assert left(tmp_path) == ["net"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--target", "raspbery-pi-5"], "did you mean raspberry-pi-5 or"),
        (["--target", "x86-64", "--version", "../1"], "'../1' cannot be a version"),
        (["--target", "x86-64", "--name", "../x"], "'../x' cannot name"),
        (["--target", "x86-64", "--precision", "int3"], "int3"),
    ],
)
def test_export_refuses_a_wrong_call_before_it_writes(tmp_path, small, options, word):
    refused(CliRunner().invoke(cli, ["export", str(small), *options, "-o", str(tmp_path / "b")]), 2, word)
    assert left(tmp_path) == []


def damaged(folder, kind):
    model, manifest = folder / "x86-64" / "model.onnx", folder / "manifest.json"
    data = model.read_bytes()
    {
        "flipped": lambda: model.write_bytes(data[:-1] + bytes([data[-1] ^ 1])),
        "short": lambda: model.write_bytes(data[:9]),
        "gone": model.unlink,
        "noise": lambda: manifest.write_bytes(NOISE),
        "empty": lambda: manifest.write_bytes(b""),
        "deep": lambda: manifest.write_text("[" * 100_000),
        "more": lambda: (folder / "more.bin").write_bytes(b""),
    }[kind]()
    return folder


COMMANDS = {
    "inspect": [],
    "run": ["x.npy"],
    "bench": ["--requests", "1"],
    "serve": ["--port", "0"],
}


KINDS = ["flipped", "short", "gone", "noise", "empty", "deep", "more"]
OPENED = [(name, kind) for name in ("inspect", "run", "serve") for kind in KINDS]


@pytest.mark.parametrize(("name", "kind"), [*OPENED, ("bench", "flipped"), ("bench", "gone")])
def test_a_damaged_bundle_is_never_opened(tmp_path, sealed, name, kind):
    damaged(shutil.copytree(sealed, tmp_path / "b"), kind)
    refused(CliRunner().invoke(cli, [name, str(tmp_path / "b"), *COMMANDS[name]]), 7)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_path_that_is_no_bundle_is_a_wrong_call(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "gone", tmp_path / "file", tmp_path):
        refused(CliRunner().invoke(cli, [name, str(path), *COMMANDS[name]]), 2, f"{path} is no bundle")


RUN_INPUTS = {
    "noise.npz": lambda p: p.write_bytes(NOISE),
    "archive.npz": lambda p: p.write_bytes(b"PK\3\4" + NOISE),
    "single.npz": lambda p: np.save(p.open("wb"), picture()),
    "objects.npz": lambda p: np.savez(p, image=np.array([{}], object)),
    "noise.npy": lambda p: p.write_bytes(NOISE),
    "empty.npy": lambda p: p.write_bytes(b""),
    "shape.npy": lambda p: np.save(p, picture(1)),
    "type.npy": lambda p: np.save(p, np.zeros((1, 64))),
}


@pytest.mark.parametrize("name", RUN_INPUTS)
def test_run_refuses_arrays_that_are_none(tmp_path, sealed, name):
    RUN_INPUTS[name](tmp_path / name)
    done = CliRunner().invoke(cli, ["run", str(sealed), str(tmp_path / name), "-o", str(tmp_path / "out.npz")])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert "unsafe" not in done.stderr
    assert left(tmp_path) == [name]


@pytest.mark.parametrize("content", [NOISE, b""])
def test_run_refuses_a_picture_that_is_none(tmp_path, content):
    pytest.importorskip("PIL")
    bundles.brightness_bundle(tmp_path / "b")
    (tmp_path / "p.png").write_bytes(content)
    done = CliRunner().invoke(cli, ["run", str(tmp_path / "b"), str(tmp_path / "p.png")])
    assert done.exit_code == 2, done.output


@pytest.mark.parametrize("seconds", ["nan", "inf"])
def test_numbers_that_are_not_finite_are_no_durations(sealed, seconds):
    done = CliRunner().invoke(cli, ["bench", str(sealed), "--seconds", seconds])
    assert done.exit_code == 2
    assert "no finite number" in done.stderr


def test_a_request_larger_than_the_memory_is_told_as_such(sealed):
    done = CliRunner().invoke(cli, ["bench", str(sealed), "--requests", "1", "--batch", str(10**12)])
    refused(done, 12, "out of memory")


@pytest.mark.parametrize(
    "line",
    [["compres"], ["compress"], ["serve", "b", "--port", "70000"], ["run", "b", "x", "--bogus"], ["inspect", "gone"]],
)
def test_every_wrong_call_is_one_document_under_json(tmp_path, line):
    done = real(*line, "--json", cwd=tmp_path)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["exit_code"]) == (2, 2)
    assert error["message"] in done.stderr.decode()


MISSING = [  # the call, the package that is hidden, the extra that brings it
    (["compress", digits.BUILD, "-o", "o", "--data", digits.DATA], "torch", "compress"),
    (["export", "NET", "-o", "o", "--target", "x86-64"], "torch", "compress"),
    (["run", "SEALED", "x.npy"], "onnxruntime", "onnx"),
    (["bench", "SEALED"], "onnxruntime", "onnx"),
    (["serve", "SEALED", "--port", "0"], "httptools", "device"),
    (["ota", "init", "o"], "tuf", "fleet"),
    (["ota", "init", "o"], "cryptography", "fleet"),
]


@pytest.mark.parametrize("case", MISSING, ids=lambda case: f"{case[0][0]}-{case[1]}")
def test_a_missing_package_is_told_with_the_command_that_installs_it(tmp_path, sealed, small, case):
    line, module, extra = case
    places = {"SEALED": sealed, "NET": small}
    np.save(tmp_path / "x.npy", np.zeros((1, 64), np.float32))
    done = real(*[places.get(word, word) for word in line], cwd=tmp_path, hidden=(module,))
    refused(done, 3, module, f"pip install 'edgekit[{extra}]'")


@contextmanager
def taken():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


def fleet_in(folder):
    pytest.importorskip("tuf")
    assert CliRunner().invoke(cli, ["ota", "init", str(folder / "fleet")]).exit_code == 0
    return folder / "fleet"


def test_a_port_that_is_taken_is_named(tmp_path, sealed):
    fleet = fleet_in(tmp_path)
    root = fleet / "repository" / "metadata" / "1.root.json"
    agent = ["--state", tmp_path / "s", "--root", root, "--device", "d", "--target", "x86-64"]
    with taken() as port:
        for line in (
            ["serve", sealed],
            ["ota", "server", fleet],
            ["ota", "agent", *agent, "--broker", "mqtt://127.0.0.1:1"],
        ):
            refused(CliRunner().invoke(cli, [*map(str, line), "--port", str(port)]), 12, str(port))


@pytest.mark.slow
def test_a_broker_that_is_away_is_tried_again_and_then_told(tmp_path):
    fleet = fleet_in(tmp_path)
    with taken() as port:
        pass
    started = time.monotonic()
    refused(real("ota", "server", fleet, "--broker", f"mqtt://127.0.0.1:{port}", cwd=tmp_path), 8, str(port))
    assert time.monotonic() - started > 5


@pytest.mark.parametrize("command", [["status"], ["rollout", "list"], ["publish"]])
def test_a_mistyped_fleet_leaves_no_folder(tmp_path, sealed, command):
    bundle = [str(sealed)] if command == ["publish"] else []
    refused(CliRunner().invoke(cli, ["ota", *command, str(tmp_path / "gone"), *bundle]), 2, "holds no fleet")
    assert left(tmp_path) == []


def test_an_output_below_a_file_is_named_and_the_file_stays(tmp_path, small):
    (tmp_path / "mine").write_text("mine")
    line = ["export", str(small), "--target", "x86-64", "-o"]
    for path in (tmp_path / "mine", tmp_path / "mine" / "below"):
        refused(CliRunner().invoke(cli, [*line, str(path)]), 2, str(tmp_path / "mine"))
    refused(CliRunner().invoke(cli, ["demo", "-o", str(tmp_path / "mine")]), 2, str(tmp_path / "mine"))
    assert (tmp_path / "mine").read_text() == "mine"


@contextmanager
def disk(folder, size="256k"):
    """Mount a small disk in memory, below a temporary folder only."""
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "edgekit-test", folder], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"mounting a small disk needs root: {mounted.stderr.decode(errors='replace').strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_nothing_and_a_second_run_works(tmp_path, small):
    with disk(tmp_path / "disk") as full:
        (full / "filler").write_bytes(bytes(200_000))
        line = ["export", str(small), "--target", "x86-64", "-o", str(full / "b")]
        refused(CliRunner().invoke(cli, line), 12, "has no room for the bundle", str(full), "free space there")
        assert left(full) == ["filler"]
        (full / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", full], check=True)
        assert CliRunner().invoke(cli, line).exit_code == 0


@pytest.mark.parametrize("place", ["output", "cache"])
def test_compress_on_a_full_disk_leaves_no_folder_and_a_full_cache_costs_only_the_cache(tmp_path, place):
    with disk(tmp_path / "disk") as full:
        (full / "filler").write_bytes(bytes(220_000))
        out = full / "net" if place == "output" else tmp_path / "net"
        cache = full / "cache" if place == "cache" else tmp_path / "cache"
        line = ["compress", digits.BUILD, "--data", digits.DATA, "--no-latency", "-o", out, "--cache", cache]
        done = CliRunner().invoke(cli, [str(word) for word in line])
        if place == "cache":
            assert done.exit_code == 0, done.output
            assert "not kept for a later run" in done.stderr
            assert (out / "weights.safetensors").exists()
            return
        refused(done, 12, "No space left on device", "free disk space")
        assert left(full) == ["filler"]


@pytest.mark.slow
def test_a_full_disk_does_not_end_the_process_that_saves_a_network(tmp_path, small):
    with disk(tmp_path / "disk") as full:
        (full / "filler").write_bytes(bytes(200_000))
        code = f"from edgekit import workload as w; w.save(w.load({str(small)!r}), __import__('pathlib').Path('net'))"
        done = subprocess.run([sys.executable, "-c", code], cwd=full, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr  # and no signal
        assert "No space left on device" in done.stderr.splitlines()[-1]
        assert left(full) == ["filler"]


@pytest.mark.parametrize("line", [["devices", "list", "--json"], ["devices", "list"], ["--help"]])
def test_standard_output_on_a_full_disk_is_told(tmp_path, line):
    with disk(tmp_path / "disk", "64k") as full, (full / "out").open("wb") as out:
        with suppress(OSError), (full / "filler").open("wb", buffering=0) as filler:
            for _ in range(1000):
                filler.write(bytes(4096))
        call = [sys.executable, "-m", "edgekit", *line]
        done = subprocess.run(call, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 12
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_cannot_be_written_is_named(tmp_path, small):
    with disk(tmp_path / "disk", "8m") as kept:
        subprocess.run(["mount", "-o", "remount,ro", kept], check=True)
        line = ["export", str(small), "--target", "x86-64", "-o", str(kept / "b")]
        refused(CliRunner().invoke(cli, line), 12, "Read-only", str(kept), "choose a folder")


@pytest.mark.slow
def test_names_of_any_bytes_and_a_narrow_terminal_do_no_harm(tmp_path, small, sealed):
    from edgekit import workload

    odd = os.fsdecode(b"o \xff \xe7\x8c\xab")
    workload.save(digits.model(), tmp_path / odd)  # torch ended the process here
    assert workload.load(str(tmp_path / odd)).precision == "fp32"
    shutil.copytree(sealed, tmp_path / (odd + "2"))
    for words in (["inspect", tmp_path / (odd + "2")], ["doctor"]):
        assert real(*words, cwd=tmp_path, env={"COLUMNS": "20", "LC_ALL": "C"}).returncode == 0
    gone = real("inspect", odd, "--json", cwd=tmp_path)
    assert json.loads(gone.stdout)["error"]["exit_code"] == 2


def test_a_link_as_output_is_followed(tmp_path, small):
    from edgekit import workload

    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "net")
    for _ in range(2):
        workload.save(workload.load(str(small)), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert left(tmp_path / "disk") == ["net"]
    assert left(tmp_path) == ["disk", "link"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 1.5), (signal.SIGKILL, 2.5)])
def test_an_export_cut_short_leaves_the_old_bundle_or_the_new(tmp_path, small, sealed, number, seconds):
    from edgekit import bundle

    out = tmp_path / "b"
    shutil.copytree(sealed, out)
    line = ["export", str(small), "--target", "x86-64", "-o", str(out)]
    child = subprocess.Popen(
        [sys.executable, "-m", "edgekit", *line], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    child.send_signal(number)
    said = child.communicate(timeout=30)[1]
    assert child.returncode in (0, 130, -signal.SIGKILL)
    assert "Traceback" not in said
    assert bundle.read(out).manifest.name in ("mlp", "net", "digits")
    assert CliRunner().invoke(cli, line).exit_code == 0
    assert left(tmp_path) == ["b"]
