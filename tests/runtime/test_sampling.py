"""Raw inputs are kept where somebody said so, bounded, with the reason; and nowhere, never, where nobody did."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import bundles
from fakes.drifting import ask_many, watched_bundle
from fakes.requests_to import ask

import edgekit
from edgekit.cli import cli
from edgekit.errors import UsageError
from edgekit.runtime import sampling
from edgekit.runtime.host import Host
from edgekit.runtime.sampling import AFTER_ALERT, Samples
from edgekit.runtime.sketches import HALF
from edgekit.runtime.watch import Watch


@contextlib.contextmanager
def sampled(bundle, folder, rate, chance=None):
    """Give a host that keeps inputs, closed in order behind the block."""
    samples = Samples(folder, rate)
    samples.chance = chance or samples.chance
    with contextlib.closing(Watch(samples=samples)) as watch:
        host = Host(edgekit.load(bundle), watch=watch)
        yield host
        host.close()


def read(path):
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if name != sampling.ABOUT}
        return arrays, json.loads(file[sampling.ABOUT])


def picture(seed):
    return {"image": np.random.default_rng(seed).normal(size=(1, 64)).astype(np.float32)}


def test_requests_are_kept_at_random_as_they_came_and_for_nobody_else_to_read(tmp_path):
    made = bundles.mlp_bundle(tmp_path / "b")
    draws = iter([0.9, 0.009, 0.01, 0.0, 0.5])
    with sampled(made.folder, tmp_path / "kept", 0.01, lambda: next(draws)) as host:
        for seed in range(5):
            given = picture(seed)
            host.run(given)
            given["image"][:] = 0  # its owner goes on with it
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 2
    for path, seed in zip(files, (1, 3), strict=True):
        arrays, about = read(path)
        assert np.array_equal(arrays["image"], picture(seed)["image"])
        assert (about["reason"], about["model"], about["name"]) == ("random", made.digest, "mlp")
        assert path.name.startswith("random-")
        assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700


def test_some_requests_after_an_alert_are_kept_with_its_name_and_the_same_alert_counts_once(tmp_path):
    made = watched_bundle(tmp_path)
    with sampled(made.folder, tmp_path / "kept", 0.0) as host:
        ask_many(host, 1.0, 2 * HALF)
        assert host.watch.samples._stands == {}
        ask_many(host, 0.25, 6 * HALF)
    files = sorted((tmp_path / "kept").iterdir())
    reasons = [read(path)[1]["reason"] for path in files]
    assert "input-drift of image: spread" in reasons[0]
    assert {path.name[:6] for path in files} == {"alert-"}
    raised = len(set(reasons))
    assert AFTER_ALERT <= len(files) <= AFTER_ALERT * raised < 6 * HALF
    assert all(np.std(read(path)[0]["image"]) < 0.5 for path in files)


def test_files_and_bytes_are_bounded_the_oldest_go_and_chance_does_not_push_out_alerts(tmp_path, monkeypatch):
    made = bundles.mlp_bundle(tmp_path / "b")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "alert-00000000000000000001.npz").write_bytes(b"of an alert")
    (tmp_path / "kept" / "notes.txt").write_text("not ours")
    monkeypatch.setattr(sampling, "MAX_FILES", 5)
    with sampled(made.folder, tmp_path / "kept", 1.0) as host:
        for seed in range(12):
            host.run(picture(seed))
    kept = sorted((tmp_path / "kept").glob("random-*"))
    assert [
        np.array_equal(read(p)[0]["image"], picture(s)["image"]) for p, s in zip(kept, range(7, 12), strict=True)
    ] == [True] * 5
    monkeypatch.setattr(sampling, "MAX_BYTES", 3.5 * kept[0].stat().st_size)  # their lengths differ by digits of times
    with sampled(made.folder, tmp_path / "kept", 1.0) as host:
        host.run(picture(99))
    kept = sorted((tmp_path / "kept").glob("random-*"))
    assert len(kept) == 3
    assert np.array_equal(read(kept[-1])[0]["image"], picture(99)["image"])
    assert (tmp_path / "kept" / "alert-00000000000000000001.npz").exists()
    assert (tmp_path / "kept" / "notes.txt").exists()


def test_tensors_with_names_that_are_no_file_names_are_kept_by_number(tmp_path):
    about = {"reason": "random"}
    (tmp_path / "a.npz").write_bytes(sampling._packed({"../x": np.arange(3), "b": np.arange(2)}, about))
    arrays, told = read(tmp_path / "a.npz")
    assert told["tensors"] == {"tensor 0": "../x", "b": "b"}
    assert np.array_equal(arrays["tensor 0"], np.arange(3))


def test_a_disk_that_refuses_fails_no_request(tmp_path, monkeypatch, caplog):
    made = bundles.mlp_bundle(tmp_path / "b")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sampling, "write_file", refuse)
    with caplog.at_level(logging.WARNING), sampled(made.folder, tmp_path / "kept", 1.0) as host:
        for seed in range(3):
            assert host.run(picture(seed)).outputs["scores"].shape == (1, 10)
        samples = host.watch.samples
    assert (samples.kept, samples.dropped) == (0, 3)
    assert sum("inputs are not kept" in record.message for record in caplog.records) == 1


def test_a_folder_that_is_a_file_is_refused_at_the_start(tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(UsageError, match="inputs cannot be kept"):
        Samples(tmp_path / "kept", 0.1)


def serve(bundle, *flags, home=None):
    command = [sys.executable, "-m", "edgekit", "serve", str(bundle), "--port", "0", *map(str, flags)]
    others = {"HOME": str(home), "XDG_CACHE_HOME": str(home)} if home else {}
    inherited = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env={**inherited, **others})


def infer_and_stop(child, count):
    url = [child.stdout.readline(), child.stdout.readline()][1].split()[2]
    data = np.random.default_rng(0).normal(size=(count, 64)).round(6)
    for row in data:
        given = {"name": "image", "shape": [1, 64], "datatype": "FP32", "data": row.tolist()}
        assert ask(url, "POST", "/v2/models/mlp/infer", json.dumps({"inputs": [given]}))[0] == 200
    opened = opened_by(child.pid)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    return opened


def opened_by(pid):
    """Return the plain files that a process holds open for writing."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = entry.readlink()
            flags = int((Path(f"/proc/{pid}/fdinfo") / entry.name).read_text().split("flags:")[1].split()[0], 8)
            if target.is_absolute() and target.is_file() and flags & (os.O_WRONLY | os.O_RDWR):
                found.add(target)
    return found


def test_serve_keeps_inputs_with_the_flag(tmp_path):
    made = bundles.mlp_bundle(tmp_path / "b")
    with serve(made.folder, "--sample-inputs", tmp_path / "kept", "--sample-rate", 1) as child:
        infer_and_stop(child, 7)
    assert len(list((tmp_path / "kept").glob("random-*.npz"))) == 7


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux tells which files a process has open")
def test_nothing_of_an_input_is_written_anywhere_without_the_flag(tmp_path):
    made = watched_bundle(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    home = tmp_path.parent / f"{tmp_path.name}-home"
    home.mkdir()
    with serve(made.folder, "--decision-log", tmp_path / "log", "--access-log", home=home) as child:
        opened = infer_and_stop(child, 2 * HALF + 20)
    assert opened == {tmp_path / "log"}
    assert list(home.iterdir()) == []
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "log"}
    assert after == before
    row = np.random.default_rng(0).normal(size=(1, 64)).round(6)[0]
    logged = (tmp_path / "log").read_text()
    assert logged.count("\n") == 2 * HALF + 20
    assert not {str(value) for value in row} & set(re.findall(r"-?\d+\.\d+", logged))


def test_what_goes_to_the_fleet_are_figures_and_no_input(tmp_path):
    """The agent's whole traffic is read from the channel while a host raises alerts."""
    from edgekit.cli.ota._serving import HostServing
    from edgekit.ota import messages

    made = watched_bundle(tmp_path)
    serving = HostServing("x86-64", threads=1)
    serving.activate(made)
    ask_many(serving.host, 0.25, 2 * HALF)
    alerts = serving.vitals().alerts
    serving.close()
    drift = messages.Drift(device="pi-1", bundle=made.digest, alerts=alerts)
    assert alerts
    assert len(messages.encode(drift)) < 250 * (len(alerts) + 1)
    assert {type(getattr(alert, field)) for alert in alerts for field in alert.__struct_fields__} == {str, float}


def test_a_rate_without_a_folder_is_refused(tmp_path):
    made = bundles.mlp_bundle(tmp_path / "b")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        shown = CliRunner().invoke(cli, ["serve", str(made.folder), "--port", str(port), "--sample-rate", "0.5"])
    assert shown.exit_code == 2
    assert "--sample-inputs" in shown.output
