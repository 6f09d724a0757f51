"""A release may ask for a shadow: the new model computes, the old one answers, until both have agreed often enough."""

import contextlib
import types

import numpy as np
import pytest
from fakes.bundles import mlp_bundle, mlp_numpy, null_bundle
from fakes.fleets import NOW
from fakes.traffic import Traffic, X

from edgekit.cli.ota._serving import HostServing
from edgekit.errors import HealthError, ResourceError, UsageError
from edgekit.ota.release import Limits, Release, from_custom, to_custom
from edgekit.ota.server import publisher
from edgekit.runtime import memory

OLD, NEW = mlp_numpy(X, 0), mlp_numpy(X, 3)


def release_of(made, **limits):
    defaults = {"probation_requests": 5, "probation_seconds": 20.0, "shadow_requests": 8, "shadow_seconds": 20.0}
    return Release(
        model="mlp", profile="x86-64", version=2, bundle=made.digest, limits=Limits(**{**defaults, **limits})
    )


@pytest.fixture
def serving():
    with contextlib.closing(HostServing("x86-64", threads=1)) as made:
        yield made


@pytest.fixture
def old(tmp_path, serving):
    made = mlp_bundle(tmp_path / "old", seed=0)
    serving.activate(made)
    return made


@pytest.fixture
def new(tmp_path):
    return mlp_bundle(tmp_path / "new", seed=3, version="2")


class Listening(Traffic):
    """Keeps each answer, and who gave it."""

    def __init__(self, serving):
        super().__init__(serving)
        self.heard = []

    def ask(self, host):
        answer = host.run(self.inputs)
        self.heard.append((answer.digest, answer.outputs["scores"]))


def test_no_caller_sees_an_answer_of_the_new_model_until_it_has_agreed_often_enough(serving, old, new):
    with Listening(serving) as traffic:
        figures = serving.try_out(new, release_of(new))
        shadowed = len(traffic.heard)
        assert serving.vitals().requests > 0  # of the model that answers
        assert serving.host.digest == old.digest
        serving.activate(new)
        taken_over = len(traffic.heard)
        after = serving.probation(release_of(new))
    assert traffic.errors == []
    assert shadowed >= 8 <= figures["shadow_compared"]
    assert (figures["shadow_error_rate"], figures["sqnr_db"] > 40) == (0.0, True)
    assert {digest for digest, _ in traffic.heard[:taken_over]} == {old.digest}
    np.testing.assert_allclose(
        np.concatenate([scores for _, scores in traffic.heard[:shadowed]]), OLD.repeat(shadowed, 0), atol=1e-4
    )
    assert after["requests"] >= 5
    assert traffic.heard[-1][0] == new.digest
    np.testing.assert_allclose(traffic.heard[-1][1], NEW, atol=1e-4)
    assert not serving.host.is_paired


def test_one_that_disagrees_is_given_up_with_nobody_hurt(serving, old, new):
    bare = {"shadow_agreement", "shadow_compared", "shadow_error_rate", "shadow_requests", "sqnr_db"}
    with Listening(serving) as traffic:
        with pytest.raises(
            HealthError, match=r"in the shadow shadow_agreement is 0, at least 0\.9 is wanted"
        ) as caught:
            serving.try_out(new, release_of(new, min_agreement=0.9))
        assert bare <= set(caught.value.measured)
        assert not serving.host.is_paired
        serving.activate(old)
    assert traffic.errors == []
    assert {digest for digest, _ in traffic.heard} == {old.digest}


@pytest.mark.parametrize("how", ["fails", "nan"])
def test_one_that_fails_on_live_requests_in_the_shadow_is_given_up(serving, old, new, monkeypatch, how):
    load = serving._load

    def touched(bundle):
        session = load(bundle)
        outputs = {"y": np.full((1, 10), np.nan, np.float32)}
        if how == "fails":
            session._engine.close()
        else:
            session._engine = types.SimpleNamespace(engine="x", run=lambda _: outputs, close=lambda: None)
        return session

    monkeypatch.setattr(serving, "_load", touched)
    told = r"shadow_error_rate is 1, at most 0\.02 is wanted"
    with Listening(serving) as traffic, pytest.raises(HealthError, match=told):
        serving.try_out(new, release_of(new))
    assert traffic.errors == []
    assert {digest for digest, _ in traffic.heard} == {old.digest}


def test_where_nobody_asks_the_shadow_ends_with_its_time(serving, old, new):
    figures = serving.try_out(new, release_of(new, shadow_seconds=0.1, min_agreement=1.0))
    assert (figures["shadow_requests"], "shadow_agreement" in figures) == (0.0, False)
    serving.activate(new)
    assert np.allclose(serving.host.run({"image": X}).outputs["scores"], NEW, atol=1e-4)


def test_one_that_passed_and_could_not_be_written_down_never_answers(serving, old, new, tmp_path):
    serving.try_out(new, release_of(new, shadow_seconds=0.0))
    assert np.allclose(serving.host.run({"image": X}).outputs["scores"], OLD, atol=1e-4)
    serving.activate(old)  # as after a restart of the update
    assert not serving.host.is_paired
    serving.try_out(new, release_of(new, shadow_seconds=0.0))
    other = mlp_bundle(tmp_path / "other", seed=5, version="3")
    serving.try_out(other, release_of(other, shadow_seconds=0.0))
    assert serving.host.digest == old.digest
    assert not serving.host.is_paired or serving.host._serving.session.digest == other.digest
    serving.activate(other)
    assert serving.host.digest == other.digest


def test_a_roll_back_after_the_shadow_brings_the_old_model_back_at_once(serving, old, new, monkeypatch):
    serving.try_out(new, release_of(new, shadow_seconds=0.0))
    serving.activate(new)
    monkeypatch.setattr(serving, "_load", pytest.fail)  # it is there
    serving.activate(old)
    assert np.allclose(serving.host.run({"image": X}).outputs["scores"], OLD, atol=1e-4)


def test_a_stop_in_the_shadow_is_no_fault_of_the_release(serving, old, new):
    serving.stop()
    with pytest.raises(ResourceError, match="stopped while the new model ran in the shadow"):
        serving.try_out(new, release_of(new))
    assert (serving.host.digest, serving.host.is_paired) == (old.digest, False)


def test_a_device_whose_memory_holds_one_model_says_that_it_has_no_shadow(serving, old, new, monkeypatch):
    monkeypatch.setattr(memory, "available_mib", lambda: 1.0)
    with pytest.raises(HealthError, match="it was to run in the shadow, and the memory holds one model alone"):
        serving.try_out(new, release_of(new))


def test_the_first_model_has_no_shadow(serving, new):
    assert "shadow_requests" not in serving.try_out(new, release_of(new))


def test_a_shadow_is_signed_and_agents_from_before_read_releases_without_one(tmp_path):
    made = mlp_bundle(tmp_path / "b")
    release = release_of(made)
    assert from_custom(to_custom(release)) == release
    assert "shadow" not in str(to_custom(Release(model="m", profile="p", version=1, bundle=made.digest)))
    publisher.init(fleet := tmp_path / "fleet", NOW)
    text = null_bundle(tmp_path / "text", text=True, name="echo")
    with pytest.raises(UsageError, match="shadow_requests cannot be measured: echo answers in text"):
        publisher.publish(fleet, text, now=NOW, limits=Limits(shadow_requests=5))
