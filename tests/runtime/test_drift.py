"""Drift is told where it was planted, and not where there is none. Every case is a story of something that happens."""

import threading
import types
from dataclasses import dataclass

import numpy as np
import pytest
from fakes import bundles
from fakes.drifting import always, ask_many, watched_bundle

import edgekit
from edgekit import baseline as baselines
from edgekit.errors import HealthError, InputError
from edgekit.export.baselines import baseline_of
from edgekit.manifest import Classification
from edgekit.model import Data, Model, Split
from edgekit.runtime import drift as drifts
from edgekit.runtime.drift import Drift
from edgekit.runtime.host import Host
from edgekit.runtime.repository import Repository
from edgekit.runtime.server import metrics
from edgekit.runtime.server.gate import Gate, Limits
from edgekit.runtime.session import Contract
from edgekit.runtime.sketches import HALF
from edgekit.runtime.telemetry import WINDOW, Telemetry
from edgekit.runtime.watch import KINDS, Watch
from edgekit.tensors import TensorSpec

CLASSES = 4


def scenes(chance, count):
    """Return pictures of a blue sky over green ground, normalized as ImageNet's: [count, 3, 32, 32]."""
    sky = chance.normal([0.45, 0.6, 0.85], 0.08, (count, 3))
    ground = chance.normal([0.35, 0.5, 0.2], 0.08, (count, 3))
    horizon = chance.integers(8, 24, count)
    above = np.arange(32)[None, :] < horizon[:, None]
    light = chance.uniform(0.6, 1.1, (count, 1, 1, 1))
    flat = np.where(above[:, None, :, None], sky[:, :, None, None], ground[:, :, None, None])
    pixels = np.clip(light * flat + chance.normal(0, 0.05, (count, 3, 32, 32)), 0, 1)
    return normalized(pixels)


def normalized(pixels):
    mean, std = (np.array(v).reshape(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return ((pixels - mean) / std).astype(np.float32)


def pixels_of(images):
    mean, std = (np.array(v).reshape(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return images * std + mean


@dataclass(frozen=True)
class Sorter:
    """A network that sorts scenes by the place of their horizon, more or less surely."""

    def run(self, inputs):
        rows = inputs["image"][:, 2].mean(2)
        horizon = (rows > rows.mean(1, keepdims=True)).sum(1)
        centres = np.array([10.0, 14.0, 18.0, 22.0])
        return {"scores": (-((horizon[:, None] - centres) ** 2) / 6).astype(np.float32)}


CONTRACT = Contract(
    inputs=(TensorSpec("image", "float32", (-1, 3, 32, 32)),),
    outputs=(TensorSpec("scores", "float32", (-1, CLASSES)),),
    postprocess=Classification(output="scores", labels=tuple("abcd")),
)


def watched(contract, network, data, variant="x86-64"):
    """Return a drift of a model with that data, which looks at everything it is shown, and its session."""
    model = Model(name="m", task="tensor", network=network, inputs=contract.inputs, outputs=contract.outputs, data=data)
    found = Drift(baseline_of(model, contract), variant)
    found.clock = lambda: 0.0
    return found, types.SimpleNamespace(contract=contract)


@pytest.fixture(scope="module")
def data():
    return Data(Split({"image": scenes(np.random.default_rng(7), 512)}))


@pytest.fixture
def watch(data):
    return watched(CONTRACT, Sorter(), data)


def feed(watch, images, answers=None):
    """Show the pictures four by four, with the network's answers or others; return the alerts of each window."""
    found, session = watch
    windows, before = [], found.findings
    for start in range(0, len(images) - 3, 4):
        inputs = {"image": images[start : start + 4]}
        outputs = Sorter().run(inputs) if answers is None else {"scores": answers[start : start + 4]}
        found.observe(session, inputs, outputs)
        if found.findings is not before:
            before = found.findings
            windows.append({one.kind for one in before.above})
    return windows


@pytest.mark.slow
def test_three_hundred_windows_of_the_same_world_raise_no_alert(watch):
    chance = np.random.default_rng(100)
    windows = [kinds for _ in range(30) for kinds in feed(watch, scenes(chance, 10 * HALF))]
    assert len(windows) == 300
    assert set().union(*windows) == set()


def test_fifty_other_baselines_of_few_samples_raise_none_either():
    for seed in range(50):
        chance = np.random.default_rng(seed)
        watch = watched(CONTRACT, Sorter(), Data(Split({"image": scenes(chance, 64)})))
        windows = feed(watch, scenes(chance, 4 * HALF))
        assert windows == [set()] * 4, seed


def blurred(images):
    return sum(np.roll(images, (y, x), (2, 3)) for y in (-1, 0, 1) for x in (-1, 0, 1)).astype(np.float32) / 9


PLANTED = {
    "the lamp at half its power": (lambda i: normalized(pixels_of(i) * 0.5), "input-drift"),
    "nobody divided by the deviation": (lambda i: (pixels_of(i) - 0.45).astype(np.float32), "input-drift"),
    "pixels from 0 to 255": (lambda i: (pixels_of(i) * 255).astype(np.float32), "out-of-range"),
    "blue and red exchanged": (lambda i: normalized(pixels_of(i)[:, ::-1]), "input-drift"),
    "dirt on the lens": (blurred, "input-drift"),
    "a camera that is dark": (lambda i: normalized(pixels_of(i) * 0), "input-drift"),
}


@pytest.mark.parametrize("story", PLANTED)
def test_a_planted_shift_is_told_by_the_first_window(watch, story):
    change, kind = PLANTED[story]
    windows = feed(watch, change(scenes(np.random.default_rng(3), HALF)))
    assert len(windows) == 1
    assert kind in windows[0]


def test_one_class_only_is_a_mix_that_drifted(watch):
    images = scenes(np.random.default_rng(5), 20 * HALF)
    best = Sorter().run({"image": images})["scores"].argmax(1)
    assert "class-mix" in feed(watch, images[best == 2][:HALF])[0]


def test_answers_less_sure_than_they_were_are_told(watch):
    images = scenes(np.random.default_rng(6), HALF)
    answers = Sorter().run({"image": images})["scores"]
    assert feed(watch, images, answers)[-1] == set()
    (kinds,) = feed(watch, images, answers / 4)[-1:]
    assert kinds == {"confidence"}


def test_how_far_rounding_moves_the_answers_is_no_drift(data):
    model = Model(
        name="m", task="tensor", network=Sorter(), inputs=CONTRACT.inputs, outputs=CONTRACT.outputs, data=data
    )
    told = baseline_of(model, CONTRACT)
    images = scenes(np.random.default_rng(6), HALF)
    answers = Sorter().run({"image": images})["scores"] / 4
    apart = {"x86-64": {"scores: confidence": 0.9}}
    for variant, kinds in (("x86-64", set()), ("pixel-8", {"confidence"})):
        found = Drift(baselines.Baseline(samples=told.samples, split="", tensors=told.tensors, shifts=apart), variant)
        found.clock = lambda: 0.0
        assert feed((found, types.SimpleNamespace(contract=CONTRACT)), images, answers) == [kinds]


def test_what_was_mended_is_told_no_more(watch):
    chance = np.random.default_rng(8)
    dark = normalized(pixels_of(scenes(chance, 2 * HALF)) * 0.5)
    assert all("input-drift" in kinds for kinds in feed(watch, dark))
    well = feed(watch, scenes(chance, 3 * HALF))
    assert well[1:] == [set(), set()]  # the first window is half of the dark time


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_counted_apart_and_says_nothing_of_the_rest(watch, value):
    images = scenes(np.random.default_rng(9), HALF)
    answers = Sorter().run({"image": images})["scores"]
    images[5, 1, 16] = answers[7] = value
    assert feed(watch, images, answers) == [{"non-finite-input"}]
    assert [one.non_finite for one in watch[0].findings.tensors] == [1 / HALF] * 2


def test_a_constant_in_the_data_takes_no_other_value():
    table = np.random.default_rng(0).normal(size=(512, 3)).astype(np.float32)
    table[:, 1] = 0.1
    contract = Contract(inputs=(TensorSpec("x", "float32", (-1, 3)),), outputs=(TensorSpec("y", "float32", (-1, 3)),))
    network = types.SimpleNamespace(run=lambda inputs: {"y": inputs["x"]})
    watch, session = watched(contract, network, Data(Split({"x": table})))

    def show(column):
        for row in table[:HALF]:
            given = np.array([[row[0], column, row[2]]], np.float32)
            watch.observe(session, {"x": given}, {"y": given})
        return {one.kind for one in watch.findings.above}

    assert show(0.1) == set()
    assert show(0.1 * (1 + 1e-6)) == set()
    assert "out-of-range" in show(0.2)


def test_a_large_batch_counts_as_a_few_samples_of_it(watch):
    found, session = watch
    images = scenes(np.random.default_rng(2), 1000)
    for _ in range(HALF // 4):
        found.observe(session, {"image": images}, Sorter().run({"image": images}))
    assert found.findings.samples == HALF


def test_an_empty_batch_is_passed_by(watch):
    found, session = watch
    found.observe(session, {"image": np.zeros((0, 3, 32, 32), np.float32)}, {"scores": np.zeros((0, 4), np.float32)})
    assert len(feed(watch, scenes(np.random.default_rng(2), HALF))) == 1


def test_looking_takes_no_more_than_its_share_of_a_core(data):
    found, session = watched(CONTRACT, Sorter(), data)
    now, looks = [0.0], []
    shown = {"image": scenes(np.random.default_rng(2), 1)}
    answer = Sorter().run(shown)

    def clock():
        now[0] += 0.0005  # each look takes as long: it asks twice
        return now[0]

    found.clock = clock
    found._look = lambda *_: looks.append(now[0])
    while now[0] < 10:
        found.observe(session, shown, answer)
    assert len(looks) * 0.0005 / now[0] == pytest.approx(drifts.SHARE, rel=0.1)


def test_many_threads_count_every_sample_once(watch):
    found, session = watch
    images = scenes(np.random.default_rng(2), 4)
    answers = Sorter().run({"image": images})
    looks, look = [], found._look
    found._look = lambda *given: (looks.append(1), look(*given))

    def work():
        for _ in range(400):
            found.observe(session, {"image": images}, answers)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 400 <= len(looks) <= 4 * 400
    assert found._samples == 4 * len(looks)
    assert found.findings.samples == found._samples // HALF * HALF


# --- on a host -----------------------------------------------------------------------------------------------------


def shown(host):
    """Return the metrics of the model that serves, without its digest."""
    text = metrics.text(Repository.of(host), [Gate(Limits())]).decode().replace(f'digest="{host.digest}",', "")
    lines = text.replace(f'{{digest="{host.digest}"}}', "").splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}


def test_a_host_tells_of_drift_in_its_metrics_and_its_alerts(tmp_path):
    watched_bundle(tmp_path)
    host = Host(edgekit.load(tmp_path / "b"))
    before = shown(host)
    assert before["edgekit_drift_samples_total"] == 0
    assert [before[f'edgekit_alert{{kind="{kind}"}}'] for kind in KINDS] == [0] * len(KINDS)
    ask_many(host, 1.0)
    well = shown(host)
    assert host.alerts == ()
    assert 0 < well['edgekit_drift_ks{input="image"}'] < 0.3
    assert well['edgekit_drift_psi{input="image"}'] < 0.25
    assert well['edgekit_out_of_range_share{input="image"}'] < 0.05
    assert 0.1 < well['edgekit_confidence_mean{output="scores"}'] < 1
    ask_many(host, 0.25, 2 * HALF)
    ill = shown(host)
    assert ill['edgekit_drift_ks{input="image"}'] > 0.9
    assert ill['edgekit_alert{kind="input-drift"}'] == 1
    (alert,) = [one for one in host.alerts if one.kind == "input-drift"]
    assert alert.what == "image: spread"
    assert alert.value > 0.9 > alert.limit
    assert host.alerts[0].since == alert.since  # which does not grow younger
    host.close()


def test_each_bundle_is_held_against_its_own_baseline(tmp_path):
    watched_bundle(tmp_path)
    host = Host(edgekit.load(tmp_path / "b"))
    first = host.digest
    ask_many(host, 0.25)
    assert {one.kind for one in host.alerts} >= {"input-drift"}
    bundles.mlp_bundle(tmp_path / "without", version="2")
    host.swap(edgekit.load(tmp_path / "without"))
    host.run({"image": np.zeros((1, 64), np.float32)})
    assert host.alerts == ()
    assert host.watch.findings(first).above
    host.close()


def test_a_trained_network_on_its_own_digits_raises_no_alert_and_inverted_ones_do(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from fakes import digits

    from edgekit import device_profiles
    from edgekit.export import export

    model = digits.model()
    made = export(model, [device_profiles.load("x86-64")], tmp_path / "bundle").bundle
    host = Host(edgekit.load(made.folder))
    test = model.data.test.inputs["image"]
    order = np.random.default_rng(0).permutation(len(test))
    for i in order[: 2 * HALF]:
        host.run({"image": test[i : i + 1]})
        always(host)
    assert host.watch.findings(host.digest).samples >= HALF
    assert host.alerts == ()
    for i in order[: 2 * HALF]:
        host.run({"image": test.max() - test[i : i + 1]})
        always(host)
    assert {one.kind for one in host.alerts} >= {"input-drift"}
    host.close()


# --- the service itself --------------------------------------------------------------------------------------------


def kinds_of(telemetry):
    return {one.kind for one in Watch().alerts(telemetry.statistics())}


def test_errors_raise_an_alert_where_there_are_enough_and_a_callers_mistakes_none():
    telemetry = Telemetry("")
    for _ in range(40):
        telemetry.failed(HealthError.__name__, by_caller=False)
    assert kinds_of(telemetry) == set()
    for _ in range(960):
        telemetry.answered(0.001)
        telemetry.failed(InputError.__name__, by_caller=True)
    assert kinds_of(telemetry) == set()
    for _ in range(20):
        telemetry.failed(HealthError.__name__, by_caller=False)
    assert kinds_of(telemetry) == {"errors"}
    for _ in range(WINDOW):
        telemetry.answered(0.001)
    assert kinds_of(telemetry) == set()


def test_a_model_that_grows_slow_raises_an_alert():
    telemetry = Telemetry("")
    for _ in range(WINDOW - 1):
        telemetry.answered(0.001)
    assert telemetry.statistics().usual_p95_ms == 0
    telemetry.answered(0.001)
    for _ in range(100):
        telemetry.answered(0.0021)
    assert kinds_of(telemetry) == {"latency"}
    telemetry.forget_latencies()
    assert kinds_of(telemetry) == set()


def test_a_throttled_device_raises_an_alert(monkeypatch):
    from edgekit.runtime import sensors

    monkeypatch.setattr(sensors, "read", lambda: sensors.Readings({}, {}, {}, throttled=True))
    (alert,) = Watch().alerts(Telemetry("").statistics())
    assert (alert.kind, alert.value) == ("throttled", 1.0)
