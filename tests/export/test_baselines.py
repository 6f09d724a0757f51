"""What a bundle says of its data: of the right split, as an independent computation draws it, always the same."""

import dataclasses
import itertools
import math

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from fakes import bundles, detector, words
from fakes.exportable import tiny_model

from edgekit import baseline as baselines
from edgekit import bundle, device_profiles, runtime, workload
from edgekit.cli import cli
from edgekit.errors import BundleError
from edgekit.export import export
from edgekit.export.baselines import baseline_of
from edgekit.manifest import TextPreprocess
from edgekit.model import Data, Model, OnnxNetwork, Split, TextReading
from edgekit.runtime.session import Contract
from edgekit.runtime.tokens import TextReader
from edgekit.tensors import TensorSpec


def sealed(model, folder):
    made = export(model, [device_profiles.load("x86-64")], folder)
    assert made.first_error is None, made.first_error
    return made.bundle


def told_by(opened):
    manifest = opened.manifest
    data = opened.path(manifest.baseline).read_bytes()
    return baselines.decode(data, manifest.inputs, manifest.outputs)


def with_validation(count=200):
    """Return the small classifier with validation pictures that are brighter than those of calibration."""
    model = tiny_model()
    images = np.random.default_rng(1).random((count, 3, 8, 8), np.float32) * np.float32([[[[2]], [[1]], [[0.5]]]])
    return dataclasses.replace(model, data=dataclasses.replace(model.data, validation=Split({"image": images})))


def series_of(found, tensor):
    (observed,) = [one for one in found.tensors if one.tensor == tensor]
    return {one.name: one for one in observed.series}, observed


def counted(values, edges):
    """Count without NumPy's search: values up to an edge lie below it."""
    limits = [-math.inf, *edges, math.inf]
    return tuple(sum(low < v <= high for v in values) for low, high in itertools.pairwise(limits))


def test_pictures_are_told_by_channel_and_answers_by_class_and_confidence(tmp_path):
    model = with_validation()
    opened = sealed(model, tmp_path / "bundle")
    found = told_by(opened)
    images = model.data.validation.inputs["image"]
    assert (found.samples, found.split) == (200, "validation")
    own, observed = series_of(found, "image")
    for channel in range(3):
        for what, measured in (("mean", np.mean), ("spread", np.std)):
            one = own[f"{what} of channel {channel}"]
            assert len(one.edges) == 15
            assert one.counts == counted([measured(i[channel].astype(np.float64)) for i in images], one.edges)
            assert max(one.counts) <= 15  # 200 samples in 16 bins of quantiles
    balance = own["first channel minus last"]
    assert balance.counts == counted([i[0].mean() - i[2].mean() for i in images], balance.edges)
    assert min(balance.edges) > 0.3
    np.testing.assert_allclose(observed.least, images.min((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(observed.most, images.max((0, 2, 3)), rtol=1e-5)
    scores = model.network.run({"image": images})["scores"].astype(np.float64)
    answers, _ = series_of(found, "scores")
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert answers["confidence"].counts == counted(shares.max(1), answers["confidence"].edges)
    assert answers["class"].classes
    assert answers["class"].counts == counted(scores.argmax(1), answers["class"].edges)


def test_a_device_fetches_it_and_older_bundles_have_none(tmp_path):
    opened = sealed(with_validation(), tmp_path / "bundle")
    assert opened.manifest.baseline in {f.path for f in opened.manifest.files_of("x86-64")}
    with runtime.load(opened.folder) as session:
        assert session.contract.baseline == told_by(opened)
    old = bundles.mlp_bundle(tmp_path / "old")
    assert b"baseline" not in (tmp_path / "old" / "manifest.json").read_bytes()
    with runtime.load(old.folder) as session:
        assert session.contract.baseline is None


def test_the_same_data_give_the_same_bytes(tmp_path):
    first, second = (sealed(with_validation(), tmp_path / name) for name in ("a", "b"))
    path = first.manifest.baseline
    assert first.path(path).read_bytes() == second.path(path).read_bytes()
    assert first.digest == second.digest


def test_few_validation_samples_leave_it_to_calibration(tmp_path):
    found = told_by(sealed(with_validation(63), tmp_path / "bundle"))
    assert (found.samples, found.split) == (24, "calibration")


@pytest.mark.slow
def test_how_far_rounding_moved_the_answers_is_told_by_variant(tmp_path, tiny_int8):
    profiles = [device_profiles.load(name) for name in ("x86-64", "jetson-orin-nano")]
    found = told_by(export(tiny_int8, profiles, tmp_path / "bundle").bundle)
    assert 0.01 <= found.shifts["x86-64"]["scores: confidence"] < 0.5
    exact = told_by(sealed(tiny_model(), tmp_path / "float"))
    assert exact.shifts == {}


def onnx_model(folder, width, samples, names=("x", "y")):
    (folder / "m.onnx").write_bytes(bundles.gemm_onnx(np.eye(width), names=names))
    specs = [TensorSpec(name, "float32", (-1, width)) for name in names]
    return Model(
        name="m",
        task="tensor",
        network=OnnxNetwork(folder / "m.onnx"),
        inputs=(specs[0],),
        outputs=(specs[1],),
        data=Data(Split({names[0]: samples})),
    )


def test_few_numbers_are_told_one_by_one_and_many_by_mean_and_spread(tmp_path):
    chance = np.random.default_rng(0)
    table = np.stack([chance.integers(0, 2, 300), np.full(300, 0.1), chance.normal(size=300)], 1).astype(np.float32)
    own, observed = series_of(baseline_of(onnx_model(tmp_path, 3, table), contract_of("x", "y", 3)), "x")
    assert own["number 0"].edges == (0.5,)
    assert own["number 0"].counts == ((table[:, 0] == 0).sum(), (table[:, 0] == 1).sum())
    assert own["number 1"].edges == ()
    assert len(own["number 2"].edges) == 15
    assert observed.least[1] == observed.most[1] == pytest.approx(0.1)
    wide = chance.normal(size=(300, 64)).astype(np.float32)
    own, _ = series_of(baseline_of(onnx_model(tmp_path, 64, wide), contract_of("x", "y", 64)), "x")
    assert list(own) == ["mean", "spread"]
    assert own["mean"].counts == counted(wide.astype(np.float64).mean(1), own["mean"].edges)


def contract_of(first, second, width):
    return Contract(
        inputs=(TensorSpec(first, "float32", (-1, width)),), outputs=(TensorSpec(second, "float32", (-1, width)),)
    )


def test_objects_are_told_by_the_surest_candidate(tmp_path):
    model = workload.from_module("tiles", detector.network(), detector.data(80))
    opened = sealed(model, tmp_path / "bundle")
    own, _ = series_of(told_by(opened), "scores")
    images = model.data.calibration.inputs["image"]
    with runtime.load(opened.folder) as session:
        surest = [
            (*(one.label for one in found), "none")[0] for found in session.objects(session.run({"image": images}))
        ]
    numbers = [("none", "bright", "dark").index(label) - 1 for label in surest]
    assert own["confidence"].samples == 80
    assert len(set(numbers)) == 3
    assert own["class"].counts == counted(numbers, own["class"].edges)
    assert {one.tensor for one in told_by(opened).tensors} == {"image", "scores"}


def test_texts_are_told_by_length_unknown_tokens_and_words_of_one_text_alone(tmp_path):
    torch = pytest.importorskip("torch")
    folder = words.word_piece(tmp_path / "words")
    lines = ["good film", "bad film", "good good film", "bad", "film \u20ac", "q"]
    tokenizer = (folder / "tokenizer.json").read_bytes()
    reader = TextReader(folder / "tokenizer.json", TextPreprocess(tokenizer="tokenizer.json", tokens=8))
    rows = [reader.read((line,)) for line in lines]
    inputs = {name: np.concatenate([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}

    class Bag(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(64, 2)

        def forward(self, input_ids, attention_mask):
            return (self.table(input_ids) * attention_mask[..., None]).sum(1)

    data = Data(Split(inputs), text=TextReading(tokenizer, 8), labels=("a", "b"))
    model = workload.from_module("bag", Bag().eval(), data)
    found = told_by(sealed(model, tmp_path / "bundle"))
    own, observed = series_of(found, "input_ids")
    assert {one.tensor for one in found.tensors if one.role == "input"} == {"input_ids"}
    lengths = inputs["attention_mask"].sum(1)
    assert own["length"].counts == counted(lengths, own["length"].edges)
    assert observed.unknown == 1
    unknown = [0, 0, 0, 0, 1 / lengths[4], 0]
    assert own["share of unknown tokens"].counts == counted(unknown, own["share of unknown tokens"].edges)
    alone = [0, 0, 0, 0, 1 / lengths[4], 1 / lengths[5]]  # the euro sign and q stand in one text each
    assert own["share of new tokens"].counts == counted(alone, own["share of new tokens"].edges)
    seen = np.flatnonzero(np.unpackbits(np.frombuffer(observed.seen, np.uint8), bitorder="little"))
    assert set(seen) == set(np.unique(inputs["input_ids"]))


def test_a_damaged_baseline_does_not_load(tmp_path):
    opened = sealed(with_validation(), tmp_path / "bundle")
    draft, sources = opened.manifest, {f.path: opened.path(f.path) for f in opened.manifest.files}
    told = told_by(opened)
    fewer = msgspec.structs.replace(told.tensors[0], series=told.tensors[0].series[:-1])
    for content in (b"{}", baselines.encode(msgspec.structs.replace(told, tensors=(fewer,)))):
        bundle.seal(tmp_path / "damaged", draft, {**sources, draft.baseline: content})
        with pytest.raises(BundleError, match="baseline"):
            runtime.load(tmp_path / "damaged")
    missing = {path: source for path, source in sources.items() if path != draft.baseline}
    with pytest.raises(BundleError, match=r"uses 'baseline\.json' but does not list it"):
        bundle.seal(tmp_path / "without", draft, missing)


def test_inspect_shows_what_is_watched(tmp_path):
    sealed(with_validation(), tmp_path / "bundle")
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "bundle")])
    assert shown.exit_code == 0, shown.output
    assert "baseline of drift: 200 samples of the validation split" in shown.output
    assert "mean of channel 0" in shown.output
