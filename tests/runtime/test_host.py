"""Swapping models while requests flow: none fails, none is answered by a model that does not match its digest."""

import threading
import time

import numpy as np
import pytest
from fakes import bundles
from hypothesis import given
from hypothesis import strategies as st

import edgekit
from edgekit.errors import InputError, UsageError
from edgekit.runtime.comparison import Agreement
from edgekit.runtime.host import Host
from edgekit.runtime.session import Contract, Session
from edgekit.runtime.telemetry import Telemetry, percentile
from edgekit.tensors import TensorSpec

ONE = {"image": np.zeros((1, 3), np.float32)}


@pytest.fixture
def load(tmp_path):
    def loaded(value):
        folder = tmp_path / f"v{value}"
        if not folder.exists():
            bundles.null_bundle(folder, value=value)
        return edgekit.load(folder)

    return loaded


class Gate:
    """An engine that holds each request until it is let through."""

    engine = "gate"

    def __init__(self, value=0.0):
        self.entered, self.leave, self.closed, self.value = threading.Event(), threading.Event(), False, value

    def run(self, inputs):
        self.entered.set()
        assert self.leave.wait(20)
        assert not self.closed, "closed under a request"
        return {"scores": np.full((1, 4), self.value, np.float32)}

    def close(self):
        self.closed = True


def gated(gate, digest):
    contract = Contract(
        inputs=(TensorSpec("image", "float32", (-1, 3)),),
        outputs=(TensorSpec("scores", "float32", (-1, 4)),),
        digest=digest,
    )
    return Session(gate, bundles.variant("any", "null"), contract)


def test_fifty_swaps_under_load_fail_no_request_and_mix_no_digest(load):
    values = [1.0, 2.0, 3.0]
    by_digest = {load(value).digest: value for value in values}
    coming = [load(values[turn % 3]) for turn in range(50)]
    host = Host(load(1.0))
    wrong, failed, counts = [], [], []
    stop = threading.Event()

    def ask():
        count = 0
        while not stop.is_set():
            try:
                answer = host.run(ONE)
            except Exception as error:  # noqa: BLE001  # whatever fails is what this test looks for
                failed.append(error)
                return
            if answer.outputs["scores"][0, 0] != by_digest[answer.digest]:
                wrong.append(answer)
            count += 1
        counts.append(count)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for turn, new in enumerate(coming):
        host.swap(new, shadow=turn % 5 == 0)
        time.sleep(0.005)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    assert not wrong
    assert sum(counts) > 500
    assert sum(host.statistics(digest).requests for digest in by_digest) == sum(counts)


def test_request_in_flight_ends_on_the_model_it_began_on_which_closes_after_it(load):
    gate = Gate(9.0)
    host = Host(gated(gate, "old"))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(host.run(ONE)))
    thread.start()
    assert gate.entered.wait(10)
    host.swap(load(1.0))
    assert not gate.closed
    assert host.run(ONE).outputs["scores"][0, 0] == 1.0
    gate.leave.set()
    thread.join()
    assert (answers[0].digest, answers[0].outputs["scores"][0, 0]) == ("old", 9.0)
    assert gate.closed


def test_model_that_nobody_uses_is_closed_at_once(load):
    old = load(1.0)
    Host(old).swap(load(2.0))
    with pytest.raises(UsageError, match="closed"):
        old.run(ONE)


def test_shadow_measures_how_often_both_choose_the_same(tmp_path):
    bundles.mlp_bundle(tmp_path / "old", seed=0)
    bundles.mlp_bundle(tmp_path / "new", seed=1)
    host = Host(edgekit.load(tmp_path / "old"))
    host.swap(edgekit.load(tmp_path / "new"), shadow=True)
    images = np.random.default_rng(3).normal(size=(40, 64)).astype(np.float32)
    for image in images:
        host.run({"image": image[None]})
        time.sleep(0.001)
    truth = bundles.mlp_numpy(images, 0).argmax(1) == bundles.mlp_numpy(images, 1).argmax(1)
    result = host.end_shadow()
    assert result.samples + result.skipped == 40
    assert result.samples > 0
    if not result.skipped:
        assert result.same == truth.sum()
    assert host.statistics().requests == 40


def test_same_model_agrees_with_itself_wholly(load):
    host = Host(load(1.0))
    host.swap(load(1.0), shadow=True)
    for _ in range(5):
        host.run(ONE)
    assert host.agreement().share == 1.0
    assert host.end_shadow() == Agreement(samples=5, same=5)
    assert host.end_shadow() == Agreement()


def test_slow_shadow_delays_no_answer(load):
    gate = Gate()
    host = Host(gated(gate, "old"))
    host.swap(load(1.0), shadow=True)
    started = time.perf_counter()
    for _ in range(50):
        host.run(ONE)
    assert time.perf_counter() - started < 5
    gate.leave.set()
    result = host.end_shadow()
    assert result.skipped >= 40
    assert result.samples + result.skipped == 50
    assert gate.closed


def test_shadow_that_fails_is_skipped_not_served(load):
    host = Host(load(1.0))
    host._serving.session._engine.close()
    host.swap(load(2.0), shadow=True)
    assert host.run(ONE).outputs["scores"][0, 0] == 2.0
    assert host.end_shadow() == Agreement(skipped=1, failed=1)


def test_roll_back_serves_the_old_model_again_and_closes_the_new_one(load):
    host = Host(load(1.0))
    new = load(2.0)
    host.swap(new, shadow=True)
    host.roll_back()
    assert host.run(ONE).outputs["scores"][0, 0] == 1.0
    with pytest.raises(UsageError, match="closed"):
        new.run(ONE)
    with pytest.raises(UsageError, match="no model to go back to"):
        host.roll_back()


@pytest.mark.parametrize(
    ("shares", "end", "answers"),
    [
        ({"share": 0}, Host.roll_back, 1.0),
        ({"share": 0}, Host.end_shadow, 1.0),
        ({"shadow": True}, Host.roll_back, 1.0),
    ],
)
def test_no_request_meets_a_model_that_is_given_up_while_the_comparison_ends(load, monkeypatch, shares, end, answers):
    host, seen = Host(load(1.0)), []
    host.swap(load(2.0), **shares)
    finish = host._pair.comparison.finish

    def finished():
        seen.append(host.run(ONE).outputs["scores"][0, 0])
        return finish()

    monkeypatch.setattr(host._pair.comparison, "finish", finished)
    end(host)
    assert seen == [answers]
    assert host.run(ONE).outputs["scores"][0, 0] == answers
    assert not host.is_paired


def test_swap_during_a_shadow_without_a_share_closes_the_one_that_never_served(load):
    host, shadowed, last = Host(load(1.0)), load(2.0), load(3.0)
    host.swap(shadowed, share=0)
    host.swap(last, share=0.5)
    assert {host.run(ONE).outputs["scores"][0, 0] for _ in range(4)} == {1.0, 3.0}
    with pytest.raises(UsageError, match="closed"):
        shadowed.run(ONE)


def test_closed_host_refuses_requests_and_closes_what_is_swapped_in(load):
    host = Host(load(1.0))
    host.close()
    with pytest.raises(UsageError, match="the host is closed"):
        host.run(ONE)
    late = load(2.0)
    with pytest.raises(UsageError, match="the host is closed"):
        host.swap(late)
    with pytest.raises(UsageError, match="closed"):
        late.run(ONE)


def test_errors_of_the_caller_and_of_the_model_are_counted_apart(load):
    host = Host(load(1.0))
    host.run(ONE)
    with pytest.raises(InputError):
        host.run({"image": np.zeros((1, 2), np.float32)})
    host._serving.session._engine.close()
    with pytest.raises(UsageError):
        host.run(ONE)
    counted = host.statistics()
    assert (counted.requests, counted.refused, counted.errors) == (3, 1, 1)
    assert counted.by_kind == {"InputError": 1, "UsageError": 1}
    assert sum(counted.buckets) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_counted(tmp_path, value):
    bundles.null_bundle(tmp_path / "b", value=0.0)
    host = Host(edgekit.load(tmp_path / "b"))
    host.run(ONE)
    engine = host.session._engine
    engine._file = __import__("msgspec").structs.replace(engine._file, value=value)
    host.run(ONE)
    assert host.statistics().non_finite == 1


def test_a_caller_that_sends_nan_does_not_make_the_model_look_ill(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    spec = host.session.contract.inputs[0]
    answer = host.run({spec.name: np.full((1, *spec.shape[1:]), np.nan, np.float32)})
    assert not all(np.isfinite(array).all() for array in answer.outputs.values())
    assert host.statistics().non_finite == 0


def test_statistics_are_kept_by_digest_for_a_bounded_number_of_models(load):
    host = Host(load(0.0))
    first = host.digest
    host.run(ONE)
    for value in range(1, 30):
        host.swap(load(float(value)))
    assert host.statistics(first).requests == 0
    assert len(host._known) <= 16


def test_language_model_takes_no_tensors(tmp_path):
    bundles.null_bundle(tmp_path / "t", text=True)
    host = Host(edgekit.load(tmp_path / "t"))
    with pytest.raises(InputError, match="is a language model"):
        host.run(ONE)
    with pytest.raises(InputError, match="is a language model"):
        host.run_raw(b"")


@given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_least_sample_that_enough_samples_do_not_exceed(samples, percent):
    value = percentile(sorted(samples), percent)
    assert value in samples
    assert sum(s <= value for s in samples) * 100 >= percent * len(samples)
    assert sum(s < value for s in samples) * 100 < percent * len(samples)


def test_percentiles_are_nearest_ranks():
    ordered = [i / 1000 for i in range(1, 101)]
    assert [percentile(ordered, p) for p in (50, 95, 99, 100)] == pytest.approx([0.050, 0.095, 0.099, 0.100])
    assert percentile([0.004], 50) == pytest.approx(0.004)
    assert percentile([], 99) == 0


def test_telemetry_forgets_old_latencies():
    telemetry = Telemetry("d")
    for _ in range(2000):
        telemetry.answered(100.0)
    for _ in range(1024):
        telemetry.answered(0.001)
    counted = telemetry.statistics()
    assert counted.p99_ms == pytest.approx(1)
    assert counted.requests == 3024
    assert counted.buckets[-1] == 2000
