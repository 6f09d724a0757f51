"""What runs models under the agent: real bundles on a real engine, judged in their probation."""

import contextlib
import itertools
import json
import queue
import re
import socket
import threading
import time
import types
import urllib.request

import numpy as np
import pytest
from fakes.bundles import mlp_bundle, mlp_numpy, null_bundle
from fakes.drifting import ask_many, watched_bundle
from fakes.traffic import Traffic, X

from edgekit import bundle
from edgekit.cli.ota import _device
from edgekit.cli.ota._serving import HostServing
from edgekit.errors import HealthError, ResourceError, UsageError
from edgekit.ota.messages import Alert, Drift, Failed
from edgekit.ota.release import Limits, Release
from edgekit.runtime.decisions import DecisionLog
from edgekit.runtime.sandbox import warden
from edgekit.runtime.sketches import HALF
from edgekit.runtime.watch import Watch


def release_of(bundle, profile="x86-64", **limits):
    defaults = {"probation_requests": 5, "probation_seconds": 20.0}
    return Release(
        model="mlp", profile=profile, version=1, bundle=bundle.digest, limits=Limits(**{**defaults, **limits})
    )


@pytest.fixture
def serving():
    serving = HostServing("x86-64", port=0, threads=1)
    yield serving
    serving.close()


@pytest.fixture
def old(tmp_path):
    return mlp_bundle(tmp_path / "old", seed=0)


@pytest.fixture
def new(tmp_path):
    return mlp_bundle(tmp_path / "new", seed=3, version="2")


def test_a_bundle_is_tried_out_takes_over_and_passes_its_probation_while_requests_flow(serving, old, new):
    serving.activate(old)
    before = serving.host.session
    with Traffic(serving) as traffic:
        assert serving.try_out(new, release_of(new))["sqnr_db"] > 40
        serving.activate(new)
        figures = serving.probation(release_of(new))
    assert traffic.errors == []
    with pytest.raises(UsageError, match="is closed"):  # nothing shadows any more
        before.run({"image": X})
    assert figures["requests"] >= 5
    assert (figures["error_rate"], figures["non_finite"]) == (0.0, 0.0)
    assert 0.0 <= figures["agreement"] < 1.0
    assert np.allclose(serving.host.run({"image": X}).outputs["scores"], mlp_numpy(X, 3), atol=1e-4)


def test_the_http_server_stays_while_models_come_and_go(serving, old, new):
    serving.activate(old)
    url = serving.server.url
    serving.activate(new)
    assert serving.server.url == url
    with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=10) as answer:  # noqa: S310  # our own server
        assert answer.status == 200
    serving.activate(None)
    assert (serving.server, serving.host) == (None, None)


def test_wrong_golden_outputs_and_a_slow_try_out_are_health_errors(serving, tmp_path, old):
    wrong = mlp_bundle(tmp_path / "wrong", wrong_golden=True)
    with pytest.raises(HealthError, match="sqnr_db is -6"):
        serving.try_out(wrong, release_of(wrong))
    with pytest.raises(HealthError, match="p95 of the try-out"):
        serving.try_out(old, release_of(old, max_p95_ms=1e-6))


def test_a_bundle_that_no_engine_here_runs_is_a_health_error_and_the_old_one_serves_on(tmp_path):
    serving = HostServing("any")
    works, foreign = null_bundle(tmp_path / "works"), null_bundle(tmp_path / "foreign", file_format="nonesuch")
    serving.activate(works)
    with pytest.raises(HealthError, match="cannot run here: no engine runs nonesuch"):
        serving.try_out(foreign, release_of(foreign, "any"))
    with pytest.raises(HealthError, match="does not load"):
        serving.activate(foreign)
    assert serving.host.digest == works.digest
    serving.close()


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"min_agreement": 0.999}, "agreement is"),
        ({"max_p95_ms": 1e-6}, "p95_live_ms is"),
    ],
)
def test_a_broken_limit_is_told_with_its_figures_and_the_old_model_comes_back(serving, old, new, limits, told):
    serving.activate(old)
    serving.try_out(new, release_of(new))
    serving.activate(new)
    with Traffic(serving) as traffic, pytest.raises(HealthError, match=told) as caught:
        serving.probation(release_of(new, **limits, probation_requests=30))
    assert re.search(r"requests \d\d, error_rate 0, non_finite 0", str(caught.value))
    serving.activate(old)
    assert traffic.errors == []
    assert serving.host.digest == old.digest
    assert np.allclose(serving.host.run({"image": X}).outputs["scores"], mlp_numpy(X, 0), atol=1e-4)


def test_nan_ends_the_probation_at_once(serving, old):
    serving.activate(old)
    started = time.monotonic()
    with Traffic(serving, {"image": np.full((1, 64), 3e38, np.float32)}), pytest.raises(HealthError) as caught:
        serving.probation(release_of(old, probation_requests=10_000))
    assert "non_finite is" in str(caught.value)
    assert time.monotonic() - started < 10


def test_without_traffic_the_probation_ends_when_its_time_is_over(serving, old):
    serving.activate(old)
    figures = serving.probation(release_of(old, probation_seconds=0.1))
    assert figures == {"requests": 0.0}  # and no figure that nobody measured


def test_a_model_that_fails_on_live_requests_breaks_its_error_rate(serving, old):
    serving.activate(old)
    real, turn = serving.host.session._engine.run, itertools.count()

    def every_other(inputs):
        if next(turn) % 2:
            raise HealthError("the engine failed")
        return real(inputs)

    serving.host.session._engine.run = every_other
    with Traffic(serving), pytest.raises(HealthError, match=r"error_rate is 0\.\d+, at most 0\.02 is wanted"):
        serving.probation(release_of(old))


def test_a_try_out_runs_with_the_threads_that_will_serve(serving, old, monkeypatch):
    commands = []
    real = warden.run
    monkeypatch.setattr(
        warden, "run", lambda command, *how, **more: commands.append(command) or real(command, *how, **more)
    )
    serving.try_out(old, release_of(old))
    assert commands[0][commands[0].index("--threads") + 1] == "1"


def test_a_callers_mistakes_neither_end_a_probation_nor_dilute_its_errors(serving, old):
    serving.activate(old)
    with Traffic(serving, {"nonsense": X}) as traffic:
        figures = serving.probation(release_of(old, probation_seconds=0.3))
    assert len(traffic.errors) > 5
    assert figures == {"requests": 0.0}


def test_old_latencies_do_not_judge_a_release_that_is_tried_again(serving, old, new):
    serving.activate(old)
    for _ in range(2):
        serving.try_out(new, release_of(new))
        serving.activate(new)
        assert serving.host.statistics().p95_ms == 0.0
        serving.host._serving.telemetry.answered(10.0)
        serving.activate(old)


def test_a_port_that_is_taken_when_the_first_model_comes_is_tried_again_and_never_done_without(old):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        serving = HostServing("x86-64", port=other.getsockname()[1], threads=1)
        for _ in range(2):
            with pytest.raises(ResourceError, match="cannot listen"):
                serving.activate(old)
    serving.activate(old)
    assert serving.server is not None
    serving.close()


def test_a_signed_bundle_whose_golden_file_is_no_array_is_a_health_error(serving, tmp_path):
    sound = mlp_bundle(tmp_path / "sound")
    files = {e.path: sound.path(e.path).read_bytes() for e in sound.manifest.files}
    broken = bundle.seal(tmp_path / "broken", sound.manifest, {**files, "golden/image.npy": b"no array"})
    with pytest.raises(HealthError, match=r"cannot run here: image\.npy is no \.npy file"):
        serving.try_out(broken, release_of(broken))


def test_a_probation_is_cut_short_when_the_device_stops(serving, old):
    serving.activate(old)
    serving.stop()
    with pytest.raises(ResourceError, match="stopped during the probation"):
        serving.probation(release_of(old))


def test_nothing_installed_has_no_probation_and_no_vitals(serving, old):
    with pytest.raises(HealthError, match="nothing serves"):
        serving.probation(release_of(old))
    assert serving.vitals().requests == 0


def test_vitals_tell_of_drift_and_a_probation_does_not_end_by_it(serving, tmp_path):
    made = watched_bundle(tmp_path)
    serving.activate(made)
    ask_many(serving.host, 1.0)
    assert serving.vitals().alerts == ()
    ask_many(serving.host, 0.25, 2 * HALF)
    (alert,) = [one for one in serving.vitals().alerts if one.kind == "input-drift"]
    assert (alert.what, alert.value > 0.9 > alert.limit) == ("image: spread", True)
    inputs = {"image": (0.25 * X).astype(np.float32)}
    with Traffic(serving, inputs) as traffic:
        assert serving.probation(release_of(made))["error_rate"] == 0
    assert traffic.errors == []


def test_what_serves_under_the_agent_logs_its_decisions_across_a_swap(serving, old, new, tmp_path):
    with contextlib.closing(Watch(DecisionLog(tmp_path / "log"))) as serving.watch:
        for made in (old, new):
            serving.activate(made)
            serving.host.run({"image": X})
        serving.close()
    models = [json.loads(line)["model"] for line in (tmp_path / "log").read_text().splitlines()]
    assert models == [old.digest, new.digest]


def test_the_agents_command_warns_of_an_alert_once_while_it_stands(serving):
    dark = Alert(kind="input-drift", what="image: spread", value=0.6, limit=0.2, since=1.0)
    reports, warned, stopping = queue.SimpleQueue(), [], threading.Event()
    for alerts in ((dark,), (dark,), (), (dark,)):
        reports.put(Drift(device="pi-1", bundle="", alerts=alerts))
    terminal = types.SimpleNamespace(warn=warned.append, say=lambda _: stopping.set())
    reports.put(Failed(device="pi-1", deployment="d", attempt=1, version=1, reason="the end"))
    _device._narrate(terminal, serving, reports, stopping)
    assert warned == ["input-drift: image: spread is 0.6, limit 0.2"] * 2


def test_vitals_count_since_the_last_time_also_across_a_swap(serving, old, new):
    serving.activate(old)
    for _ in range(4):
        serving.host.run({"image": X})
    assert (serving.vitals().requests, serving.vitals().requests) == (4, 0)
    serving.activate(new)
    serving.host.run({"image": X})
    assert serving.vitals().requests == 1
    assert serving.vitals().rss_mib > 1


def test_activating_what_serves_already_changes_nothing(serving, old):
    serving.activate(old)
    session = serving.host.session
    serving.activate(old)
    assert serving.host.session is session


def test_where_memory_holds_one_model_alone_it_is_replaced_with_a_stated_gap_and_no_request_fails(
    serving, old, new, monkeypatch
):
    from edgekit.runtime import memory

    told = []
    serving.tell = told.append
    serving.activate(old)
    monkeypatch.setattr(memory, "available_mib", lambda: 1.0)
    first = serving.host.session
    load, open_at_load = serving._load, []

    def loaded(bundle):
        open_at_load.append(first._engine is not None)
        return load(bundle)

    monkeypatch.setattr(serving, "_load", loaded)
    serving.try_out(new, release_of(new))
    with Traffic(serving) as traffic:
        serving.activate(new)
        serving.probation(release_of(new))
    assert not traffic.errors
    assert open_at_load == [False]
    assert serving.host.digest == new.digest
    assert any("the memory holds one model alone: requests waited for" in line for line in told)
    serving.activate(old)  # as a rollback does
    assert serving.host.digest == old.digest


def test_a_replacement_that_does_not_load_brings_the_model_before_back(serving, old, tmp_path, monkeypatch):
    from edgekit.runtime import memory

    serving.activate(old)
    monkeypatch.setattr(memory, "available_mib", lambda: 1.0)
    other = null_bundle(tmp_path / "other")
    with pytest.raises(HealthError):
        serving.activate(other)
    np.testing.assert_allclose(serving.host.run({"image": X}).outputs["scores"], mlp_numpy(X), atol=1e-4)
    assert serving.host.digest == old.digest
