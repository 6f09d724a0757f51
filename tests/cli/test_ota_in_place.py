"""Where memory does not hold a candidate beside the serving model, it is tried out in its place, and that is said."""

import contextlib
import logging
import re

import numpy as np
import pytest
from fakes.bundles import mlp_bundle, mlp_numpy
from fakes.homes import CLASS, Home
from fakes.traffic import Traffic, X

from edgekit.cli.ota._serving import HostServing
from edgekit.errors import HealthError, ResourceError
from edgekit.ota.device import slots
from edgekit.ota.device.update import MAX_TRIES
from edgekit.ota.messages import Installed
from edgekit.ota.release import Limits, Release
from edgekit.runtime import acceptance, memory
from edgekit.runtime.sandbox import warden

CRAMPED, ROOMY = 20.0, 4000.0
"""MiB: no interpreter fits into the one, all that is tried here into the other."""


def release_of(made, **limits):
    defaults = {"probation_requests": 5, "probation_seconds": 20.0}
    return Release(model="mlp", profile=CLASS, version=2, bundle=made.digest, limits=Limits(**{**defaults, **limits}))


@pytest.fixture
def serving(tmp_path):
    with contextlib.closing(HostServing(CLASS, threads=1)) as made:
        made.said = []
        made.tell = made.said.append
        made.activate(mlp_bundle(tmp_path / "old", seed=0))
        yield made


@pytest.fixture
def device(serving, monkeypatch):
    """A device of little memory: the serving model takes what a candidate would need, until it is unloaded."""
    monkeypatch.setattr(acceptance, "LEAST_MIB", 1.0)
    monkeypatch.setattr(memory, "available_mib", lambda: CRAMPED if serving.host.is_loaded else ROOMY)
    return serving


@pytest.fixture
def hopeless(serving, monkeypatch):
    monkeypatch.setattr(acceptance, "LEAST_MIB", 1.0)
    monkeypatch.setattr(memory, "available_mib", lambda: CRAMPED)
    return serving


def still_serves_the_old(serving):
    return np.allclose(serving.host.run({"image": X}).outputs["scores"], mlp_numpy(X, 0), atol=1e-4)


def test_it_is_tried_out_in_the_place_of_what_serves_and_no_request_fails(device, tmp_path, caplog):
    new = mlp_bundle(tmp_path / "new", seed=3, version="2")
    first = device.host.session
    with Traffic(device) as traffic, caplog.at_level(logging.WARNING):
        figures = device.try_out(new, release_of(new))
        assert device.host.session is not first  # it was unloaded, and is back
        assert still_serves_the_old(device)
        device.activate(new)
        device.probation(release_of(new))
    assert traffic.errors == []
    assert figures["sqnr_db"] > 40
    assert figures["in_place_seconds"] > 0
    told = "new needs more than the 18 MiB of memory that are free: version 2 is tried out in the serving model's place"
    assert any(line.startswith(told) for line in device.said)
    assert told in caplog.text
    assert any(re.match(r"requests waited for \d+\.\d s", line) for line in device.said)
    assert any("the memory holds one model alone" in line for line in device.said)  # the swap knows it, too
    assert device.host.digest == new.digest


def test_one_that_fails_in_its_place_gives_it_back_and_is_to_blame(device, tmp_path):
    wrong = mlp_bundle(tmp_path / "wrong", wrong_golden=True)
    with Traffic(device) as traffic, pytest.raises(HealthError, match="sqnr_db is -6") as caught:
        device.try_out(wrong, release_of(wrong))
    assert traffic.errors == []
    assert caught.value.measured["in_place_seconds"] > 0
    assert still_serves_the_old(device)


def test_what_the_memory_holds_in_no_way_is_not_to_blame_and_costs_one_gap_only(hopeless, tmp_path):
    new = mlp_bundle(tmp_path / "new", seed=3)
    for _ in range(3):
        with pytest.raises(ResourceError, match="needs more than the 18 MiB of memory that are free"):
            hopeless.try_out(new, release_of(new))
        assert still_serves_the_old(hopeless)
    assert sum("in the serving model's place" in line for line in hopeless.said) == 1


def test_a_signed_limit_is_the_releases_own_fault_however_much_is_free(device, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_mib", lambda: ROOMY)
    new = mlp_bundle(tmp_path / "new", seed=3)
    with pytest.raises(HealthError, match="took more memory than the 20 MiB that it may have"):
        device.try_out(new, release_of(new, max_rss_mib=20.0))
    assert not any("place" in line for line in device.said)


def test_a_signed_limit_above_what_is_free_does_not_blame_the_release_either(device, tmp_path):
    new = mlp_bundle(tmp_path / "new", seed=3)
    assert device.try_out(new, release_of(new, max_rss_mib=2000.0))["in_place_seconds"] > 0


def test_the_first_model_finds_nothing_to_unload(tmp_path, monkeypatch):
    monkeypatch.setattr(acceptance, "LEAST_MIB", 1.0)
    monkeypatch.setattr(memory, "available_mib", lambda: CRAMPED)
    with contextlib.closing(HostServing(CLASS, threads=1)) as bare, pytest.raises(acceptance.NoRoom):
        bare.try_out(new := mlp_bundle(tmp_path / "new"), release_of(new))


def test_an_old_model_that_does_not_come_back_at_once_comes_with_a_later_request(device, tmp_path, monkeypatch):
    load, fails = device._load, iter([True])

    def sometimes(bundle):
        if next(fails, False):
            raise HealthError("the engine had no memory")
        return load(bundle)

    monkeypatch.setattr(device, "_load", sometimes)
    device._back.keywords.clear()
    device._back = lambda back=device._back.args[0]: device._load(back)
    new = mlp_bundle(tmp_path / "new", seed=3)
    with pytest.raises(ResourceError, match="the model that served does not open again yet: the engine had no memory"):
        device.try_out(new, release_of(new))
    assert still_serves_the_old(device)


@pytest.mark.parametrize(
    ("code", "peak", "stdout"),
    [
        (-9, 300.0, b""),  # the system's own end of who takes most
        (0, 100.0, b'{"kind": "Unrunnable", "message": "model.onnx: std::bad_alloc"}'),
    ],
    ids=["killed by the system", "its engine says so"],
)
def test_all_ways_of_running_out_are_known(tmp_path, monkeypatch, code, peak, stdout):
    monkeypatch.setattr(memory, "available_mib", lambda: 250.0)
    monkeypatch.setattr(warden, "run", lambda *_, **__: warden.Ended(code, stdout, b"", peak))
    made = mlp_bundle(tmp_path / "b")
    with pytest.raises(acceptance.NoRoom, match="needs more than the 256 MiB"):
        acceptance.try_out(made.folder)
    with pytest.raises(HealthError):
        acceptance.try_out(made.folder, allowed=acceptance.Allowance(memory_mib=200.0))


def test_a_release_that_finds_no_room_is_installed_once_there_is_some(tmp_path, monkeypatch):
    home = Home(tmp_path)
    serving, device = home.start()
    home.update(device, home.publish(mlp_bundle(tmp_path / "old", seed=0), probation_requests=0))
    second = home.publish(mlp_bundle(tmp_path / "new", seed=3, version="2"), probation_requests=0)
    monkeypatch.setattr(acceptance, "LEAST_MIB", 1.0)
    free = iter([CRAMPED] * 2 * (MAX_TRIES + 1))
    monkeypatch.setattr(memory, "available_mib", lambda: next(free, ROOMY))
    word = None
    for _ in range(30):
        with contextlib.suppress(ResourceError):
            word = home.update(device, second)
            break
        assert slots.failures(slots.load(home.state), second.path) == 0
    assert isinstance(word, Installed)
    serving.close()
