"""Measuring bundles side by side: true figures, one process each, errors that come across."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from fakes.bundles import mlp_bundle, null_bundle

from edgekit import errors
from edgekit.errors import BundleError, HealthError, MissingExtra, UnknownName, UsageError
from edgekit.runtime import failures, measured
from edgekit.runtime import measure as measuring
from edgekit.runtime.measure import measure
from edgekit.runtime.measured import Contender, Settings, Turn

QUICK = Settings(seconds=0.2, warmup_seconds=0.02)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    mlp_bundle(folder / "real")
    null_bundle(folder / "nothing")
    null_bundle(folder / "text", text=True)
    return folder


def test_two_bundles_are_measured_in_one_run(two):
    real, nothing = measure([Contender(str(two / "real")), Contender(str(two / "nothing"))], QUICK)
    assert (real.name, nothing.name) == ("real:x86-64", "nothing:any")
    assert real.ratio == 1.0
    assert nothing.ratio == pytest.approx(nothing.p50_ms / real.p50_ms)
    for found in (real, nothing):
        assert 0 < found.p50_ms <= found.p90_ms <= found.p99_ms
        assert found.load_ms > 0
        assert 10 < found.rss_mib <= found.peak_rss_mib < 2000
        assert found.per_second == pytest.approx(1000 / found.p50_ms, rel=0.9)
    assert real.bytes == (two / "real/x86-64/model.onnx").stat().st_size
    assert real.engine.startswith("onnxruntime")


def test_the_memory_of_one_does_not_count_for_another(two):
    ballast = np.ones(300 << 17)  # 300 MiB in the parent, touched
    found = measure([Contender(str(two / "nothing"))], QUICK)[0]
    assert found.peak_rss_mib < 250
    assert ballast[-1] == 1


def test_as_many_requests_are_made_as_asked_for(two):
    found = measure([Contender(str(two / "real"))], Settings(requests=37, warmup_seconds=0.01))[0]
    assert found.requests == 37
    assert not found.has_reliable_p99


def test_a_language_model_is_measured_by_its_tokens(two):
    found = measure([Contender(str(two / "text"))], Settings(requests=6, warmup_seconds=0.01))[0]
    assert found.first_token_ms is not None
    assert found.requests >= 6
    assert found.variant == "any"


def test_batches_and_a_core_can_be_chosen(two):
    found = measure([Contender(str(two / "real"))], Settings(requests=3, batch=16, cpu=0, warmup_seconds=0.01))[0]
    assert found.requests == 3


def test_progress_reaches_its_end(two):
    seen = []
    measure([Contender(str(two / "nothing"))], QUICK, lambda *step: seen.append(step))
    assert seen[0] == ("loading", 0, 1)
    assert seen[-1][0] == "measuring"
    assert seen[-1][1] == seen[-1][2]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Settings(seconds=0), "out of range"), (Settings(threads=-1), "out of range"),
        (Settings(batch=0), "out of range"), (Settings(cpu=4096), "no CPU 4096"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(two, settings, says):
    with pytest.raises(UsageError, match=says):
        measure([Contender(str(two / "real"))], settings)


def test_nothing_to_measure_is_refused():
    with pytest.raises(UsageError, match="nothing to measure"):
        measure([])


def test_errors_of_the_child_arrive_as_themselves(two, tmp_path):
    with pytest.raises(UsageError, match="no bundle"):
        measure([Contender(str(tmp_path / "none"))])
    with pytest.raises(UnknownName, match="real: unknown variant 'toaster'") as caught:
        measure([Contender(str(two / "real"), "toaster")])
    assert "x86-64" in caught.value.hint


def test_a_changed_byte_is_noticed_before_anything_is_measured(tmp_path):
    mlp_bundle(tmp_path / "real")
    weights = tmp_path / "real/x86-64/model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        measure([Contender(str(tmp_path / "real"))])


@pytest.mark.parametrize("kind", ["MissingExtra", "HealthError", "UnknownName", "Nonsense"])
def test_any_error_survives_the_way_between_processes(kind):
    rebuilt = failures.rebuilt(failures.Failed(kind=kind, message="it broke", hint="mend it"), "cat")
    assert type(rebuilt) is getattr(errors, kind, errors.EdgekitError)
    assert (str(rebuilt), rebuilt.message, rebuilt.hint) == ("cat: it broke", "cat: it broke", "mend it")
    assert issubclass(MissingExtra, errors.EdgekitError)


def test_a_child_that_dies_is_told_with_its_last_words(two, monkeypatch, tmp_path):
    killer = tmp_path / "killer.py"
    killer.write_text(
        "import os, sys\nsys.stderr.write('illegal instruction in kernel x')\nsys.stderr.flush()\nos.abort()"
    )
    monkeypatch.setattr(measuring.measured, "__name__", "killer")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(HealthError, match="signal 6: illegal instruction in kernel x"):
        measure([Contender(str(two / "real"))])


def test_children_leave_when_the_measurement_fails(two, monkeypatch):
    started = []
    original = subprocess.Popen
    monkeypatch.setattr(measuring.subprocess, "Popen", lambda *a, **k: started.append(original(*a, **k)) or started[-1])
    with pytest.raises(UsageError):
        measure([Contender(str(two / "real")), Contender(str(two / "absent"))])
    assert [process.poll() is not None for process in started] == [True, True]


def test_a_child_that_hangs_is_killed(monkeypatch, tmp_path, two):
    (tmp_path / "sleeper.py").write_text(
        "import sys, time\nsys.stdin.readline()\n"
        'print(\'{"type":"failed","kind":"HealthError","message":"stuck","hint":""}\', flush=True)\ntime.sleep(600)'
    )
    monkeypatch.setattr(measuring.measured, "__name__", "sleeper")
    monkeypatch.setattr(measuring, "LEAVE_SECONDS", 0.2)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(HealthError, match="stuck"):
        measure([Contender(str(two / "real"))])
    assert time.monotonic() - began < 60


def test_what_an_engine_prints_does_not_disturb_the_answers(two, tmp_path):
    code = (
        "import os, sys\nfrom edgekit.runtime import measured\n"
        "original = measured._load\n"
        "measured._load = lambda start: (os.write(1, b'banner of an engine\\n'), original(start))[1]\n"
        "measured.main()"
    )
    start = measured.Start(contender=Contender(str(two / "nothing")), settings=QUICK)
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=measuring.msgspec.json.encode(start) + b"\n",
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["type"] == "ready"
    assert b"banner of an engine" in done.stderr


def test_slower_requests_give_larger_figures():
    def after(seconds):
        def request():
            time.sleep(seconds)
            return [1000 * seconds], []

        return request

    quick = measured._run(after(0.001), Turn(seconds=0.05))
    slow = measured._run(after(0.02), Turn(seconds=0.05))
    assert len(quick.samples_ms) > 2 * len(slow.samples_ms)


def test_a_model_that_says_too_little_cannot_be_measured():
    class Mute:
        def complete(self, prompt, sampling):
            return iter(())

    with pytest.raises(HealthError, match="gave 0 tokens"):
        measured._text_request(Mute(), "hello")()


def test_golden_inputs_are_cut_into_batches_that_wrap_around(tmp_path):
    bundle = mlp_bundle(tmp_path / "real")  # eight golden samples
    batches = measured._batches(tmp_path / "real", bundle.manifest, 3)
    assert [b["image"].shape for b in batches] == [(3, 64)] * 3
    assert np.array_equal(batches[2]["image"][2], batches[0]["image"][0])


def test_memory_is_read_without_proc(monkeypatch):
    def absent(*_arguments, **_settings):
        raise FileNotFoundError

    now, most = measured.memory_mib()
    assert 5 < now <= most
    monkeypatch.setattr(measured.Path, "read_text", absent)
    assert measured.memory_mib()[1] > 0
