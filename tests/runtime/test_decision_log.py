"""The decision log: what a line says, that none is lost in order, what a full disk costs, and what nobody asked for."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fakes import bundles, detector
from fakes.requests_to import ask

import edgekit
from edgekit import workload
from edgekit.errors import ResourceError, UsageError
from edgekit.runtime import afterwards, decisions, rotation
from edgekit.runtime.decisions import DecisionLog
from edgekit.runtime.host import Host
from edgekit.runtime.repository import Repository
from edgekit.runtime.server import serve_in_thread
from edgekit.runtime.watch import Watch

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@contextlib.contextmanager
def logged(bundle, path, **how):
    """Give a host that logs its decisions, closed in order behind the block."""
    with contextlib.closing(Watch(DecisionLog(path, **how))) as watch:
        host = Host(edgekit.load(bundle), watch=watch)
        yield host
        host.close()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def picture(seed=0, count=1):
    return {"image": np.random.default_rng(seed).normal(size=(count, 64)).astype(np.float32)}


@pytest.fixture
def bundle(tmp_path):
    return bundles.mlp_bundle(tmp_path / "b")


def test_a_line_tells_when_which_model_was_given_what_and_said_what(bundle, tmp_path):
    given, began = picture(), time.time()
    with logged(bundle.folder, tmp_path / "log") as host:
        outputs = host.run(given).outputs
        best = host.session.labels(outputs, 1)[0][0]
    (line,) = lines(tmp_path / "log")
    assert began <= line["time"] <= time.time()
    assert (line["model"], line["name"], line["version"], line["variant"]) == (bundle.digest, "mlp", "1", "x86-64")
    for key, name, array in (("input", "image", given["image"]), ("output", "scores", outputs["scores"])):
        shape = ",".join(map(str, array.shape))
        told = name.encode() + b"\0float32\0" + shape.encode() + b"\0" + array.astype("<f4").tobytes()
        assert line[key] == hashlib.sha256(told).hexdigest()
    assert line["answers"] == [{"label": best[0], "probability": pytest.approx(best[1], abs=1e-6)}]
    assert "trace_id" not in line
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_the_hash_of_an_input_depends_on_names_types_shapes_and_values_alone():
    one = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = [{"a": one, "b": one}, {"b": one, "a": one}, {"a": one.astype(">f4"), "b": np.asfortranarray(one)}]
    assert len({decisions.digest_of(arrays) for arrays in same}) == 1
    others = [{"a": one, "c": one}, {"a": one, "b": one.astype("f8")}, {"a": one, "b": one.reshape(3, 2)},
              {"a": one, "b": one + 1}, {"a": one}]  # fmt: skip
    assert len({decisions.digest_of(arrays) for arrays in [same[0], *others]}) == 6


def test_arrays_that_their_owner_changes_are_logged_as_they_were(bundle, tmp_path):
    given = picture()
    before = decisions.digest_of(given)
    with logged(bundle.folder, tmp_path / "log") as host:
        outputs = host.run(given).outputs
        told = decisions.digest_of(outputs)
        given["image"][:] = 0
        outputs["scores"][:] = 0
    (line,) = lines(tmp_path / "log")
    assert (line["input"], line["output"]) == (before, told)


def test_a_batch_is_one_line_that_names_its_first_answers(bundle, tmp_path):
    with logged(bundle.folder, tmp_path / "log") as host:
        host.run(picture(count=40))
    (line,) = lines(tmp_path / "log")
    assert (line["samples"], len(line["answers"])) == (40, decisions.TOLD_SAMPLES)


def test_outputs_without_labels_are_summed_up_and_nan_is_null(tmp_path):
    bundles.mlp_bundle(tmp_path / "b", task="tensor", postprocess=None)
    with logged(tmp_path / "b", tmp_path / "log") as host:
        scores = host.run(picture()).outputs["scores"].copy()
        host.run({"image": np.full((1, 64), np.nan, np.float32)})
    first, second = lines(tmp_path / "log")
    measured = {"least": scores.min(), "mean": scores.mean(), "most": scores.max()}
    assert first["summary"] == {"scores": {name: pytest.approx(float(value)) for name, value in measured.items()}}
    assert second["summary"] == {"scores": {"least": None, "mean": None, "most": None}}


def test_a_classifier_that_says_nan_is_logged_without_an_answer(bundle, tmp_path):
    with logged(bundle.folder, tmp_path / "log") as host:
        host.run({"image": np.full((1, 64), np.nan, np.float32)})
    (line,) = lines(tmp_path / "log")
    assert line["answers"] == []
    assert "NaN" in line["unread"]


def test_a_detector_tells_how_many_objects_and_the_best(tmp_path):
    pytest.importorskip("torch")
    from edgekit import device_profiles
    from edgekit.export import export

    model = workload.from_module("tiles", detector.network(), detector.data())
    export(model, [device_profiles.load("x86-64")], tmp_path / "b")
    with logged(tmp_path / "b", tmp_path / "log") as host:
        found, _ = host.detect(detector.scene())
    (line,) = lines(tmp_path / "log")
    best = {"label": found[0].label, "score": pytest.approx(found[0].score, abs=1e-6)}
    assert line["answers"] == [{"objects": len(found), "best": [best]}]


def test_many_threads_lose_no_line_and_cut_none(bundle, tmp_path):
    with logged(bundle.folder, tmp_path / "log") as host:

        def work(seed):
            for number in range(100):
                host.run(picture(1000 * seed + number))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        decision_log = host.watch.decisions
    found = lines(tmp_path / "log")
    wanted = {decisions.digest_of(picture(1000 * seed + number)) for seed in range(4) for number in range(100)}
    assert {line["input"] for line in found} == wanted
    assert (len(found), decision_log.written, decision_log.dropped) == (400, 400, 0)


def test_a_full_file_is_put_aside_and_the_oldest_goes(bundle, tmp_path):
    size = 8 * 2000
    with logged(bundle.folder, tmp_path / "log", size=size) as host:
        for number in range(200):
            host.run(picture(number))
    files = sorted(tmp_path.glob("log*"))
    assert [f.name for f in files] == ["log", *(f"log.{n}" for n in range(1, rotation.FILES))]
    assert all(0 < f.stat().st_size <= size // rotation.FILES for f in files)
    told = [line["input"] for f in (*reversed(files[1:]), files[0]) for line in lines(f)]
    everything = [decisions.digest_of(picture(number)) for number in range(200)]
    assert told == everything[-len(told) :]


def test_a_second_start_writes_on_behind_a_torn_line(bundle, tmp_path):
    (tmp_path / "log").write_text('{"time": 1}\n{"time": 2, "mod')
    with logged(bundle.folder, tmp_path / "log") as host:
        host.run(picture())
    first, torn, last = (tmp_path / "log").read_text().splitlines()
    assert json.loads(first) == {"time": 1}
    assert torn == '{"time": 2, "mod'
    assert json.loads(last)["name"] == "mlp"


def test_two_processes_do_not_write_one_file(tmp_path):
    with contextlib.closing(DecisionLog(tmp_path / "log")), pytest.raises(ResourceError, match="another process"):
        DecisionLog(tmp_path / "log")


def test_a_place_that_is_none_is_refused_at_the_start(tmp_path):
    with pytest.raises(UsageError, match="log cannot be written"):
        DecisionLog(tmp_path / "nowhere" / "log")


def test_a_full_disk_fails_no_request_is_counted_and_is_told_in_the_log(bundle, tmp_path, monkeypatch, caplog):
    write, full = os.write, threading.Event()

    def refusing(descriptor, data):
        if full.is_set() and data[:7] == b'{"time"':
            write(descriptor, data[: len(data) // 2])  # a disk takes what it still has room for
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(rotation.os, "write", refusing)
    with caplog.at_level(logging.WARNING), logged(bundle.folder, tmp_path / "log") as host:
        log = host.watch.decisions
        host.run(picture(0))
        wait_for(lambda: log.written == 1)
        full.set()
        for number in range(1, 6):
            assert host.run(picture(number)).outputs["scores"].shape == (1, 10)
        wait_for(lambda: log.dropped == 5)
        full.clear()
        host.run(picture(6))
    found = lines(tmp_path / "log")  # each is whole
    assert [line.get("dropped") for line in found] == [None, 5, None]
    assert (log.written, log.dropped) == (2, 5)
    assert sum("decisions are not logged" in record.message for record in caplog.records) == 1


def wait_for(what):
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_real_full_device_is_survived(bundle):
    with logged(bundle.folder, Path("/dev/full")) as host:
        for number in range(3):
            host.run(picture(number))
        log = host.watch.decisions
    assert (log.written, log.dropped) == (0, 3)


def test_a_disk_that_refuses_the_next_file_loses_none_that_are_there(tmp_path, monkeypatch):
    file = rotation.RotatingFile(tmp_path / "log", rotation.FILES * 10)
    for line in (b"0123456\n", b"1234567\n"):
        file.write(line)
    opened = os.open

    def refusing(path, *how):
        if str(path).endswith(".new"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *how)

    monkeypatch.setattr(rotation.os, "open", refusing)
    for _ in range(20):
        with pytest.raises(OSError, match="No space"):
            file.write(b"2345678\n")
    monkeypatch.setattr(rotation.os, "open", opened)
    file.write(b"3456789\n")
    file.close()
    names = ("log.2", "log.1", "log")
    assert [(tmp_path / name).read_bytes() for name in names] == [b"0123456\n", b"1234567\n", b"3456789\n"]


def test_what_waits_is_bounded_in_number_and_in_bytes():
    held = threading.Event()
    queue = afterwards.Afterwards("test")
    assert queue.put(held.wait, 0)
    assert not queue.put(lambda: None, afterwards.MAX_BYTES + 1)
    done = []
    taken = sum(queue.put(lambda: done.append(1), 1) for _ in range(afterwards.MAX_WAITING + 10))
    assert afterwards.MAX_WAITING - 1 <= taken <= afterwards.MAX_WAITING
    held.set()
    queue.close()
    assert len(done) == taken
    assert not queue.put(lambda: None, 0)


# --- served ------------------------------------------------------------------------------------------------------


def infer(url, headers=None):
    given = {"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}
    return ask(url, "POST", "/v2/models/mlp/infer", json.dumps({"inputs": [given]}), headers)


def test_the_callers_trace_stands_in_its_lines_and_in_no_others(bundle, tmp_path):
    with logged(bundle.folder, tmp_path / "log") as host, serve_in_thread(host) as running:
        for headers in ({"traceparent": TRACE}, None) * 20:
            assert infer(running.url, headers)[0] == 200
        text = ask(running.url, path="/metrics")[2].decode()
        assert "edgekit_decisions_dropped_total 0" in text
    traces = [line.get("trace_id") for line in lines(tmp_path / "log")]
    assert traces == ["4bf92f3577b34da6a3ce929d0e0e4736", None] * 20


def test_the_trace_reaches_the_log_over_one_kept_connection_too(bundle, tmp_path):
    import http.client

    body = json.dumps({"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]})
    with logged(bundle.folder, tmp_path / "log") as host, serve_in_thread(host) as running:
        connection = http.client.HTTPConnection(running.url.removeprefix("http://"))
        for headers in ({"traceparent": TRACE}, {}) * 20:
            connection.request("POST", "/v2/models/mlp/infer", body, headers)
            assert connection.getresponse().read()
        connection.close()
    traces = [line.get("trace_id") for line in lines(tmp_path / "log")]
    assert traces == ["4bf92f3577b34da6a3ce929d0e0e4736", None] * 20


def test_a_language_model_is_logged_by_the_hash_of_what_was_asked_and_said(tmp_path):
    bundles.null_bundle(tmp_path / "b", text=True)
    body = json.dumps({"model": "null", "messages": [{"role": "user", "content": "hello there"}]})
    with logged(tmp_path / "b", tmp_path / "log") as host, serve_in_thread(host) as running:
        status, _, answer = ask(running.url, "POST", "/v1/chat/completions", body)
        assert status == 200, answer
    said = json.loads(answer)["choices"][0]["message"]["content"]
    (line,) = lines(tmp_path / "log")
    assert line["input"] == hashlib.sha256(body.encode()).hexdigest()
    assert line["output"] == hashlib.sha256(said.encode()).hexdigest()
    assert line["characters"] == len(said)


def test_several_models_share_a_log(tmp_path):
    for name in ("one", "two"):
        bundles.mlp_bundle(tmp_path / name, name=name)
    with contextlib.closing(Watch(DecisionLog(tmp_path / "log"))) as watch:
        models = Repository(watch=watch)
        for name in ("one", "two"):
            models.add(lambda name=name: edgekit.load(tmp_path / name)).run(picture())
        models.close()
    assert [line["name"] for line in lines(tmp_path / "log")] == ["one", "two"]


def test_serve_logs_every_decision_until_it_is_stopped(bundle, tmp_path):
    flags = ["--port", "0", "--decision-log", str(tmp_path / "log"), "--decision-log-size", "1"]
    command = [sys.executable, "-m", "edgekit", "serve", str(bundle.folder), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        url = [child.stdout.readline(), child.stdout.readline()][1].split()[2]
        for _ in range(25):
            assert infer(url)[0] == 200
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    assert len(lines(tmp_path / "log")) == 25


def test_nothing_is_logged_that_nobody_asked_for(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    host = Host(edgekit.load(bundle.folder))
    host.run(picture())
    host.close()
    assert sorted(tmp_path.rglob("*")) == before
