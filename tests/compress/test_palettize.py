"""Palettes: the tables are the best there are, zeros stay, and what comes after finds the weights as they are."""

import itertools

import numpy as np
import pytest
from fakes.exportable import tiny_model

from edgekit import grid
from edgekit.compress.layer import Layer
from edgekit.compress.passes.palettize import Palettize, _on_tables, means
from edgekit.compress.passes.quantize import Quantize
from edgekit.errors import CompressionError, UnknownName
from edgekit.plan import WeightRule
from edgekit.progress import silent

torch = pytest.importorskip("torch")


def noise(values, centres):
    return float(np.square(values[:, None] - centres).min(axis=1).sum())


def nearest(values, **options):
    """Return a weight on its tables, and these."""
    layer = Layer(kind="linear", weight="w", bias=None, node="n", source="x", values=values, offsets=None)
    tables = Palettize(**options)._tables(layer)
    return _on_tables(values, tables), tables


def weights(model):
    return {n: p.detach().numpy() for n, p in model.network.module.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_other_table_is_nearer(count):
    for seed in range(5):
        values = np.random.default_rng(seed).laplace(size=10).astype(np.float32)
        cuts = itertools.combinations(range(1, len(values)), count - 1)
        best = min(sum(((p - p.mean()) ** 2).sum() for p in np.split(np.sort(values), cut)) for cut in cuts)
        assert noise(values, means(values, np.ones(len(values)), count)) == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("shape", ["normal", "laplace", "uniform"])
def test_a_table_is_as_good_as_scikit_learns_best_of_ten(shape):
    cluster = pytest.importorskip("sklearn.cluster", reason="the peer is scikit-learn")
    values = getattr(np.random.default_rng(0), shape)(size=3000).astype(np.float32)
    peer = cluster.KMeans(16, n_init=10, random_state=0).fit(values[:, None]).inertia_
    assert noise(values, means(values, np.ones(len(values)), 16)) <= 1.0001 * peer


def test_a_table_of_sixteen_beats_sixteen_even_steps():
    values = np.random.default_rng(0).laplace(size=(8, 400)).astype(np.float32)
    made, tables = nearest(values)
    assert (len(np.unique(made)), tables.shape) == (16, (1, 16))
    even = grid.rounded(values, WeightRule(bits=4))
    assert np.square(made - values).sum() < 0.5 * np.square(even - values).sum()


def test_runs_of_channels_have_tables_of_their_own_and_what_they_do_not_divide_has_one():
    values = np.random.default_rng(0).normal(size=(8, 40)).astype(np.float32) * 2.0 ** np.arange(8)[:, None]
    made, tables = nearest(values, bits=2, group=2)
    assert tables.shape == (4, 4)
    assert [len(np.unique(run)) for run in made.reshape(4, -1)] == [4] * 4
    assert len(np.unique(made)) > 4
    assert nearest(values, bits=2, group=3)[1].shape == (1, 4)


def test_zeros_stay_and_count_among_the_values():
    values = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    values[np.abs(values) < 1] = 0
    made, _ = nearest(values, bits=2)
    assert np.array_equal(made == 0, values == 0)
    assert len(np.unique(made)) == 4
    assert np.array_equal(nearest(0 * values, bits=1)[0], 0 * values)


def test_the_network_keeps_its_floats_and_tells_what_it_lost():
    before = tiny_model()
    after = Palettize(bits=3, keep=("stem.weight",)).apply(before, silent)
    was, now = weights(before), weights(after)
    assert np.array_equal(was["stem.weight"], now["stem.weight"])
    assert {len(np.unique(now[n])) for n in now if n != "stem.weight"} == {8}
    assert after.plan is None
    step = after.lineage[-1]
    assert step.measured["layers"] == 3
    error = sum(((now[n] - was[n]) ** 2).sum() for n in now)
    signal = sum((was[n] ** 2).sum() for n in now if n != "stem.weight")
    assert step.measured["weight_sqnr_db"] == pytest.approx(10 * np.log10(signal / error), abs=0.01)
    count = sum(now[n].size for n in now if n != "stem.weight")
    assert step.measured["palette_bytes"] == count * 3 / 8 + 3 * 8 * 2


def test_what_each_weight_loses_the_others_make_up_for():
    model = tiny_model()
    with torch.no_grad():
        model.network.module.down.weight[:, :4] = 0
    images = model.data.calibration.inputs
    want = model.network.run(images)["scores"]
    noise = {}
    for rounding in ("nearest", "gptq"):
        made = Palettize(bits=3, group=4, rounding=rounding).apply(model, silent)
        noise[rounding] = np.square(made.network.run(images)["scores"] - want).sum()
        for name, weight in weights(made).items():
            runs = weight.reshape(len(weight) // 4 if len(weight) % 4 == 0 else 1, -1)
            assert max(len(np.unique(run)) for run in runs) <= 8
            assert not weight[weights(model)[name] == 0].any()
    assert noise["gptq"] < 0.25 * noise["nearest"]


def test_it_comes_before_the_plan_and_knows_its_weights():
    model = tiny_model()
    with pytest.raises(CompressionError, match="has a plan") as caught:
        Palettize().apply(Quantize(activations="none").apply(model, silent), silent)
    assert "before quantize" in caught.value.hint
    with pytest.raises(UnknownName, match="stem"):
        Palettize(keep=("stem",)).apply(model, silent)
    with pytest.raises(CompressionError, match="no weight to palettize"):
        Palettize(keep=tuple(weights(model))).apply(model, silent)
    model.network.module.stem.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(CompressionError, match=r"'stem.weight' holds NaN"):
        Palettize().apply(model, silent)
