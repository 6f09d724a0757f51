"""Requests that wait together are computed together: each gets its own answer, and none waits for nobody."""

import threading
import time
import types

import numpy as np
import pytest
from fakes import bundles
from fakes.requests_to import ask, post_json
from hypothesis import given, settings
from hypothesis import strategies as st

import edgekit
from edgekit.errors import HealthError, InputError
from edgekit.runtime import batching
from edgekit.runtime.batching import Batcher, Batching, batcher_for
from edgekit.runtime.host import Host
from edgekit.runtime.server import Limits, Options, serve_in_thread
from edgekit.runtime.session import Contract, Session
from edgekit.tensors import TensorSpec

CONTRACT = Contract(
    inputs=(TensorSpec("image", "float32", (-1, 3)),), outputs=(TensorSpec("scores", "float32", (-1, 3)),), digest="d"
)


class Recording:
    """An engine that doubles what it gets, remembers the sizes, and may be held, slow or poisoned."""

    engine = "recording"

    def __init__(self, seconds=0.0, hold=False):
        self.sizes, self.seconds = [], seconds
        self.go, self.entered = threading.Event(), threading.Semaphore(0)
        if not hold:
            self.go.set()

    def run(self, inputs):
        self.entered.release()
        assert self.go.wait(20)
        time.sleep(self.seconds)
        x = inputs["image"]
        self.sizes.append(len(x))
        if (x == 13).any():
            raise HealthError("poison")
        return {"scores": 2 * x}

    def close(self):
        pass


def session_of(engine, contract=CONTRACT):
    return Session(engine, bundles.variant("any", "null", batch=-1), contract)


def given_of(value, count=1):
    return {"image": np.full((count, 3), value, np.float32)}


class Asking:
    """Requests in threads of their own; each notes what it got."""

    def __init__(self, run):
        self.run, self.answers, self.threads = run, {}, []

    def ask(self, value, count=1):
        def work():
            try:
                self.answers[value] = self.run(given_of(value, count))["scores"]
            except (HealthError, InputError) as error:
                self.answers[value] = error

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    def wait(self):
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()
        return self.answers


def queued(batcher, count):
    deadline = time.monotonic() + 10
    while len(batcher._queue) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_waits_while_the_engine_computes_is_computed_together_and_each_gets_its_own():
    engine = Recording(hold=True)
    batcher = Batcher(session_of(engine), Batching(most=8))
    asking = Asking(batcher.run)
    asking.ask(0)
    engine.entered.acquire()
    for value in range(1, 7):
        asking.ask(value, count=1 + value % 2)
    queued(batcher, 6)
    engine.go.set()
    for value, scores in asking.wait().items():
        np.testing.assert_array_equal(scores, np.full((1 + value % 2 if value else 1, 3), 2 * value, np.float32))
    assert engine.sizes[0] == 1
    assert sum(engine.sizes) == 10
    assert len(engine.sizes) == 3  # 1, then at most 8, then the rest
    assert max(engine.sizes) <= 8
    assert batcher.sizes() == {size: engine.sizes.count(size) for size in engine.sizes}


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=12), most=st.integers(2, 8), lanes=st.integers(1, 3))
def test_no_requests_are_mixed_lost_or_joined_beyond_the_bound(counts, most, lanes):
    engine = Recording()
    batcher = Batcher(session_of(engine), Batching(most=most, lanes=lanes))
    asking = Asking(batcher.run)
    for value, count in enumerate(counts, 20):
        asking.ask(value, count)
    answers = asking.wait()
    for value, count in enumerate(counts, 20):
        np.testing.assert_array_equal(answers[value], np.full((count, 3), 2 * value, np.float32))
    assert sum(engine.sizes) == sum(counts)
    assert all(size <= max(most, *counts) for size in engine.sizes)


def test_one_poisoned_request_fails_alone():
    engine = Recording(hold=True)
    batcher = Batcher(session_of(engine), Batching(most=8))
    asking = Asking(batcher.run)
    asking.ask(0)
    engine.entered.acquire()
    for value in (12, 13, 14):
        asking.ask(value)
    queued(batcher, 3)
    engine.go.set()
    answers = asking.wait()
    assert isinstance(answers[13], HealthError)
    np.testing.assert_array_equal(answers[12], np.full((1, 3), 24, np.float32))
    np.testing.assert_array_equal(answers[14], np.full((1, 3), 28, np.float32))


def test_a_request_that_does_not_fit_is_refused_before_it_joins_others():
    batcher = Batcher(session_of(Recording()), Batching())
    with pytest.raises(InputError, match="float64"):
        batcher.run({"image": np.zeros((1, 3))})
    assert batcher.sizes() == {}


def test_a_lone_request_never_waits():
    """The window is an hour; whoever is alone would notice."""
    engine = Recording()
    batcher = Batcher(session_of(engine), Batching(most=8, window_ms=3_600_000))
    batcher._seconds = 3600.0  # as if a batch took an hour, of which a quarter may be waited
    began = time.perf_counter()
    for value in range(12):
        batcher.run(given_of(value))
    assert time.perf_counter() - began < 60
    assert engine.sizes == [1] * 12


def test_a_batch_waits_for_a_request_that_is_being_prepared_and_no_longer_than_its_window():
    engine = Recording()
    batcher = Batcher(session_of(engine), Batching(most=8, window_ms=60_000))
    batcher._seconds = 3600.0
    asking = Asking(batcher.run)
    with batcher.coming():
        asking.ask(1)
        time.sleep(0.2)
        assert not engine.sizes
        asking.ask(2)
    asking.wait()
    assert engine.sizes in ([2], [1, 1])  # the second joins where it came before the first heard of it
    batcher._seconds = 0.04
    with batcher.coming():  # it never comes: a quarter of a batch's time is waited
        batcher.run(given_of(3))
    assert engine.sizes[-1] == 1


def test_a_large_request_passes_nobody_and_holds_nobody_up():
    """In their order: a request that does not fit any more leads the next batch."""
    engine = Recording(hold=True)
    batcher = Batcher(session_of(engine), Batching(most=4))
    asking = Asking(batcher.run)
    asking.ask(0)
    engine.entered.acquire()
    for place, (value, count) in enumerate(((1, 3), (2, 4), (3, 1), (4, 1)), 1):
        asking.ask(value, count)
        queued(batcher, place)
    engine.go.set()
    asking.wait()
    assert engine.sizes == [1, 4, 4, 1]  # 1; 3 and the first of the ones; 4; the last


def test_a_model_whose_answers_depend_on_the_batch_is_not_batched(caplog):
    class Normalizing(Recording):
        def run(self, inputs):
            x = inputs["image"]
            scale = np.abs(x).max() / 127  # as dynamic quantization does
            return {"scores": (np.round(x / scale) * scale).astype(np.float32)}

    assert batcher_for(session_of(Normalizing()), Batching()) is None
    assert "depends on those beside it" in caplog.text


@pytest.mark.parametrize(("first", "each", "best"), [(0.0, 0.003, None), (0.002, 0.001, 8)])
def test_a_model_is_batched_only_where_its_own_time_says_so(monkeypatch, caplog, first, each, best):
    now = [0.0]
    monkeypatch.setattr(batching, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    class Timed(Recording):
        def run(self, inputs):
            now[0] += first + each * len(inputs["image"])
            return {"scores": inputs["image"]}

    made = batcher_for(session_of(Timed()), Batching(most=8))
    assert (made._how.most if made else None) == best
    assert ("takes no less time in company" in caplog.text) == (best is None)


def test_the_size_that_is_fastest_here_is_chosen(monkeypatch):
    times = {1: 0.010, 2: 0.012, 4: 0.016, 8: 0.020, 16: 0.080}
    monkeypatch.setattr(batching, "_seconds", lambda _, size: times[size])
    assert batcher_for(session_of(Recording()), Batching(most=16))._how.most == 8
    assert batcher_for(session_of(Recording()), Batching(most=4))._how.most == 4


def test_fixed_batches_and_open_shapes_are_left_alone(caplog):
    fixed = Session(Recording(), bundles.variant("any", "null", batch=1), CONTRACT)
    assert batcher_for(fixed, Batching()) is None
    open_ended = Contract(inputs=(TensorSpec("image", "float32", (-1, -1)),), outputs=CONTRACT.outputs)
    assert batcher_for(session_of(Recording(), open_ended), Batching()) is None
    assert "its batch is fixed" in caplog.text
    assert "no fixed size" in caplog.text


def test_a_real_model_under_http_load_answers_in_batches_what_it_answers_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "GAIN", 10.0)  # whatever this machine gains
    sealed = bundles.wide_bundle(tmp_path / "b", width=512)
    host = Host(edgekit.load(tmp_path / "b", threads=1), batching=Batching(most=8))
    chance = np.random.default_rng(0)
    samples = chance.normal(size=(64, 512)).astype(np.float32)
    alone = {i: edgekit_alone(host, samples[i : i + 1]) for i in range(64)}
    wrong = []

    def work(start):
        for i in range(start, 64, 8):
            tensor = {"name": "image", "shape": [1, 512], "datatype": "FP32", "data": samples[i].tolist()}
            status, answer = post_json(running.url, "/v2/models/wide/infer", {"inputs": [tensor]})
            got = np.array(answer["outputs"][0]["data"]) if status == 200 else np.zeros(512)
            if answer.get("parameters", {}).get("digest") != sealed.digest or not np.allclose(got, alone[i], atol=1e-4):
                wrong.append((i, status))

    with serve_in_thread(host, options=Options(limits=Limits(workers=8))) as running:
        threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        text = ask(running.url, path="/metrics")[2].decode()
    host.close()
    assert not wrong
    assert f'edgekit_batch_size_sum{{digest="{sealed.digest}"}} 64' in text


def edgekit_alone(host, sample):
    return host.session.run({"image": sample})["scores"][0]


def test_a_swapped_in_model_is_batched_too(tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "GAIN", 10.0)
    bundles.wide_bundle(tmp_path / "a", width=64)
    bundles.wide_bundle(tmp_path / "b", width=64, seed=1)
    host = Host(edgekit.load(tmp_path / "a"), batching=Batching())
    host.swap(edgekit.load(tmp_path / "b"))
    host.run({"image": np.zeros((1, 64), np.float32)})
    assert host.batch_sizes() == {1: 1}
    host.close()
