"""A limit that is signed holds, or the release goes: what nobody could measure has not held."""

import contextlib

import numpy as np
import pytest
from fakes.bundles import mlp_bundle, null_bundle
from fakes.fleets import NOW
from fakes.homes import CLASS, Home
from fakes.traffic import Traffic, X

from edgekit.cli.ota import _judging
from edgekit.cli.ota._serving import HostServing
from edgekit.errors import HealthError, ResourceError, UsageError
from edgekit.ota.device import slots
from edgekit.ota.device.update import recover
from edgekit.ota.messages import Installed, RolledBack
from edgekit.ota.release import Limits, Release
from edgekit.ota.server import publisher
from edgekit.runtime import memory
from edgekit.runtime.backends import Sampling


def release_of(made, **limits):
    defaults = {"probation_requests": 5, "probation_seconds": 20.0}
    return Release(model="mlp", profile=CLASS, version=1, bundle=made.digest, limits=Limits(**{**defaults, **limits}))


@pytest.fixture
def serving():
    with contextlib.closing(HostServing(CLASS, threads=1)) as made:
        yield made


def pair(serving, tmp_path, **limits):
    """Let an old model serve and a new one be tried out; return the new one and its release."""
    serving.activate(mlp_bundle(tmp_path / "old", seed=0))
    new = mlp_bundle(tmp_path / "new", seed=3, version="2")
    release = release_of(new, **limits)
    serving.try_out(new, release)
    return new, release


def test_agreement_that_the_memory_lets_nobody_measure_has_not_held(serving, tmp_path, monkeypatch):
    new, release = pair(serving, tmp_path, min_agreement=0.1)
    monkeypatch.setattr(memory, "available_mib", lambda: 1.0)
    serving.activate(new)
    told = r"agreement was not measured \(the memory holds one model alone\), at least 0\.1 is wanted \(requests \d"
    with Traffic(serving) as traffic, pytest.raises(HealthError, match=told) as caught:
        serving.probation(release)
    assert not traffic.errors
    assert caught.value.measured["requests"] >= 5
    assert "agreement" not in caught.value.measured


def test_a_device_that_nobody_asks_keeps_the_release_all_the_same(serving, tmp_path, monkeypatch):
    new, release = pair(serving, tmp_path, min_agreement=0.1, probation_seconds=0.1)
    monkeypatch.setattr(memory, "available_mib", lambda: 1.0)
    serving.activate(new)
    assert serving.probation(release) == {"requests": 0.0}


def test_the_first_model_of_a_device_has_none_to_agree_with(serving, tmp_path):
    first = mlp_bundle(tmp_path / "first")
    release = release_of(first, min_agreement=1.0)
    serving.try_out(first, release)
    serving.activate(first)
    with Traffic(serving):
        assert "agreement" not in serving.probation(release)


def test_a_new_release_of_the_very_same_bundle_agrees_with_itself(serving, tmp_path, monkeypatch):
    new, release = pair(serving, tmp_path)
    monkeypatch.setattr(memory, "available_mib", lambda: 1.0)
    serving.activate(new)
    serving.probation(release_of(new, probation_requests=0))
    serving.try_out(new, release)
    serving.activate(new)
    with Traffic(serving):
        assert serving.probation(release_of(new, min_agreement=1.0))["requests"] >= 5


def test_one_request_is_enough_and_is_waited_for_until_it_is_compared(serving, tmp_path):
    new, release = pair(serving, tmp_path, min_agreement=0.0, probation_requests=1)
    serving.activate(new)
    old, gone = serving.host._pair.old.session._engine, []
    run = old.run
    old.run = lambda inputs: gone.append(_judging.time.sleep(0.3)) or run(inputs)  # counted long before it is compared
    asked = iter([lambda: serving.host.run({"image": X})])
    serving._stopping.is_set = lambda: next(asked, bool)() is None  # asks once, while it is on probation
    figures = serving.probation(release)
    assert (figures["compared"], len(gone)) == (1.0, 1)
    assert figures["agreement"] in (0.0, 1.0)


def test_an_old_model_that_fails_on_all_requests_leaves_the_agreement_unmeasured(serving, tmp_path):
    new, release = pair(serving, tmp_path, min_agreement=0.0)
    serving.activate(new)
    serving.host._pair.old.session._engine.close()
    with (
        Traffic(serving),
        pytest.raises(HealthError, match=r"agreement was not measured \(the old model was busy, fail"),
    ):
        serving.probation(release)


def test_answers_in_text_are_not_compared_and_that_is_said(tmp_path):
    with contextlib.closing(HostServing("any")) as serving:
        old, new = (null_bundle(tmp_path / name, text=True, version=name) for name in ("1", "2"))
        serving.activate(old)
        release = release_of(new, min_agreement=0.5, probation_requests=2)
        serving.try_out(new, release)
        serving.activate(new)

        def ask():
            with serving.host.lease() as session:
                assert list(session.complete("one two", Sampling(max_tokens=2)))

        serving._stopping.is_set = ask
        with pytest.raises(HealthError, match=r"agreement was not measured \(.*answers in text"):
            serving.probation(release)


def test_a_signed_latency_without_golden_inputs_was_not_measured(tmp_path):
    with contextlib.closing(HostServing("any")) as serving:
        made = null_bundle(tmp_path / "b")
        serving.try_out(made, release_of(made))
        with pytest.raises(
            HealthError, match=r"p95 of the try-out was not measured \(.*no golden inputs\), limit 50 ms"
        ):
            serving.try_out(made, release_of(made, max_p95_ms=50.0))


def test_a_latency_that_no_answer_was_given_for_was_not_measured(serving, tmp_path):
    serving.activate(old := mlp_bundle(tmp_path / "old"))
    serving.host.session._engine.run = lambda _: (_ for _ in ()).throw(HealthError("the engine failed"))
    release = release_of(old, max_error_rate=1.0, max_p95_ms=1000.0)
    with Traffic(serving), pytest.raises(HealthError, match="p95_live_ms was not measured, at most 1000 is wanted"):
        serving.probation(release)


def test_nobody_signs_a_limit_that_a_bundle_can_never_be_measured_by(tmp_path):
    publisher.init(fleet := tmp_path / "fleet", NOW)
    tensors, text = null_bundle(tmp_path / "tensors"), null_bundle(tmp_path / "text", text=True, name="echo")
    for made, limits, told in (
        (tensors, Limits(max_p95_ms=5.0), "max_p95_ms cannot be measured in the try-out: null has no golden inputs"),
        (text, Limits(min_agreement=0.5), "min_agreement cannot be measured: echo answers in text"),
    ):
        with pytest.raises(UsageError, match=told):
            publisher.publish(fleet, made, now=NOW, limits=limits)
    assert publisher.releases(fleet) == []
    publisher.publish(fleet, tensors, now=NOW, limits=Limits(min_agreement=0.5))


@pytest.mark.parametrize(("least", "word"), [(0.0, Installed), (0.999, RolledBack)])
def test_a_restart_in_the_probation_does_not_let_the_agreement_go_unmeasured(tmp_path, least, word):
    home = Home(tmp_path)
    serving, device = home.start()
    old, new = mlp_bundle(tmp_path / "old", seed=0), mlp_bundle(tmp_path / "new", seed=3, version="2")
    home.update(device, home.publish(old, probation_requests=0))
    second = home.publish(new, min_agreement=least, probation_requests=40)
    serving.stop()
    with pytest.raises(ResourceError, match="stopped during the probation"):
        home.update(device, second)
    serving.close()
    assert slots.load(home.state).trial is not None
    serving, device = home.start()
    with Traffic(serving) as traffic:
        outcome = recover(device)
    assert traffic.errors == []
    assert isinstance(outcome, word)
    assert outcome.measured["compared"] >= 1
    assert serving.host.digest == (new if word is Installed else old).digest
    assert np.isfinite(serving.host.run({"image": X}).outputs["scores"]).all()
    serving.close()
