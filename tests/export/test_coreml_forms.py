"""How weights lie in a Core ML package: in the shortest way that loses nothing, by operators that its system has."""

import struct

import msgspec
import numpy as np
import pytest
from fakes.exportable import tiny_model

pytest.importorskip("coremltools", reason="needs the export extra")

from edgekit import device_profiles, grid, plugins
from edgekit.compress.passes.palettize import Palettize
from edgekit.compress.passes.quantize import Quantize
from edgekit.errors import ExportError
from edgekit.export import PACKAGE, coreml_forms, mil
from edgekit.export.coreml_forms import Integers, Table, shortest
from edgekit.progress import silent

EXPORTER = plugins.load(PACKAGE, "coreml", "format")
WEIGHTS = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"


def write(model, folder, **options):
    profile = msgspec.structs.replace(device_profiles.load("iphone-15"), options=options)
    folder.mkdir(exist_ok=True)
    return EXPORTER.export(model, profile, folder, silent)


def network():
    """Return layers of every kind: outputs lie on the first axis, but for the transposed convolution.

    Their weights are bell-shaped, as training makes them.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 24, 2, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(384, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return made


def pruned(share):
    import torch

    made = network()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            with torch.no_grad():
                parameter.mul_(parameter.abs() > parameter.abs().flatten().quantile(share))
    return made


def in_file(folder, ios):
    """Return the decompressed weights and the operators of a package, after coremltools itself has read it."""
    import coremltools as ct

    package = folder / "model.mlpackage"
    ct.models.MLModel(str(package), skip_model_load=True)
    assert ct.utils.load_spec(str(package)).specificationVersion == {15: 6, 16: 7, 17: 8, 18: 9}[ios]
    program = mil._read(package)
    kinds = {op.op_type for op in program.operations if op.op_type.startswith("constexpr_")}
    stored = mil._stored(program)
    read = {v.name for op in program.operations if op.op_type in ("conv", "conv_transpose", "linear")
            for v in op.inputs.values() if hasattr(v, "name")}  # fmt: skip
    return [stored[name].numpy() for name in stored if name in read], kinds


def assert_holds(found, model):
    wanted = [p.detach().numpy() for p in model.network.module.parameters() if p.dim() > 1]
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got, want.astype(np.float16).astype(np.float32))


def compared(folder, artifact, model):
    inputs = model.data.calibration.head(2).inputs
    got, want = EXPORTER.evaluate(folder / artifact.main, inputs)["scores"], model.network.run(inputs)["scores"]
    return 10 * np.log10(np.square(want).sum() / np.square(got - want).sum())


@pytest.fixture(scope="module")
def palettized():
    return Palettize(group=8).apply(tiny_model(network()), silent)


@pytest.mark.parametrize("ios", [16, 18])
def test_the_file_holds_the_tables_of_the_pass(palettized, ios, tmp_path):
    artifact = write(palettized, tmp_path, ios=ios)
    found, kinds = in_file(tmp_path, ios)
    assert_holds(found, palettized)
    assert kinds == {"constexpr_lut_to_dense"}
    assert compared(tmp_path, artifact, palettized) > 50
    bits = 4 if ios == 18 else 6
    count = sum(w.size for w in found)
    assert count * bits / 8 < (tmp_path / WEIGHTS).stat().st_size < count * bits / 8 + 3000
    assert artifact.precision == "fp16"
    named = {name for name, weight in palettized.network.module.named_parameters() if weight.ndim > 1}
    assert set(artifact.weights) == named
    assert f"{bits}-bit indices into tables" in artifact.weights.values()
    assert any(note.startswith("weights are stored as ") and f"{bits}-bit indices" in note for note in artifact.notes)
    assert any("for iOS 18 they would take" in note for note in artifact.notes) == (ios == 16)


def test_zeros_are_left_out_of_floats_also_where_a_normalization_is_folded_in(tmp_path):
    import torch

    layers = pruned(0.8)
    model = tiny_model(torch.nn.Sequential(layers[0], torch.nn.BatchNorm2d(16, eps=0), *layers[1:]))
    artifact = write(model, tmp_path, ios=16)
    found, kinds = in_file(tmp_path, 16)
    assert_holds(found, model)
    assert kinds == {"constexpr_sparse_to_dense"}
    assert compared(tmp_path, artifact, model) > 50
    count = sum(w.size for w in found)
    assert (tmp_path / WEIGHTS).stat().st_size < count * (1 / 8 + 0.2 * 2) + 2000 < 0.4 * 2 * count


def test_zeros_are_left_out_of_tables(tmp_path):
    model = Palettize().apply(tiny_model(pruned(0.8)), silent)
    write(model, tmp_path, ios=18)
    found, kinds = in_file(tmp_path, 18)
    assert_holds(found, model)
    assert kinds == {"constexpr_sparse_to_dense", "constexpr_lut_to_sparse"}


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_are_left_out_of_integers(symmetric, tmp_path):
    model = Quantize(activations="none", bits=4, symmetric=symmetric).apply(tiny_model(pruned(0.9)), silent)
    artifact = write(model, tmp_path, macos=15)
    assert (artifact.precision, artifact.requires) == ("int4-weights", {"macos": ">=15"})
    found, kinds = in_file(tmp_path, 18)
    assert "constexpr_sparse_blockwise_shift_scale" in kinds
    parameters = dict(model.network.module.named_parameters())
    for got, (name, rule) in zip(found, model.plan.weights.items(), strict=True):
        weight = parameters[name].detach().numpy()
        exact = np.array_equal(got, weight.astype(np.float16).astype(np.float32))
        if not exact:  # the last layer is so small that its floats without zeros are shorter
            np.testing.assert_allclose(got, grid.rounded(weight, rule), rtol=2e-3, atol=1e-6)


def test_tables_survive_a_plan_of_integers_that_other_formats_need(palettized, tmp_path):
    model = Quantize().apply(palettized, silent)
    artifact = write(model, tmp_path, ios=18)
    assert artifact.precision == "int8"
    found, kinds = in_file(tmp_path, 18)
    assert kinds == {"constexpr_lut_to_dense"}
    assert_holds(found, palettized)


def test_four_bits_in_a_table_lose_less_than_four_bits_in_even_steps(tmp_path):
    """One table a layer, which iOS 16 reads, beside one scale a layer, which needs iOS 18."""
    model = tiny_model(network())
    even = Quantize(activations="none", bits=4, weights="mse", granularity="tensor").apply(model, silent)
    images = model.data.calibration.head(8).inputs
    want = model.network.run(images)["scores"]
    noise = {}
    for ios, made in ((18, even), (16, Palettize(rounding="nearest").apply(model, silent))):
        artifact = write(made, tmp_path / str(ios), ios=ios)
        assert artifact.requires == {"ios": f">={ios}"}
        noise[ios] = np.square(EXPORTER.evaluate(tmp_path / str(ios) / artifact.main, images)["scores"] - want).sum()
    assert noise[16] < 0.8 * noise[18]
    table, plain = ((tmp_path / ios / WEIGHTS).stat().st_size for ios in ("16", "18"))
    assert table <= plain + 4 * 128  # a table of 16 halves where a scale stood, in rows of 64 bytes


def test_the_bytes_of_a_table_are_as_apple_describes_them(tmp_path):
    """Read the weight file without coremltools: entries behind 64 bytes, indices with the lowest bit first."""
    import torch
    from coremltools.proto import Model_pb2

    model = Palettize(bits=2).apply(
        tiny_model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8))), silent
    )
    write(model, tmp_path, ios=16)
    spec = Model_pb2.Model.FromString((tmp_path / "model.mlpackage/Data/com.apple.CoreML/model.mlmodel").read_bytes())
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    (op,) = (op for op in block.operations if op.type == "constexpr_lut_to_dense")
    content = (tmp_path / WEIGHTS).read_bytes()

    def stored(name):
        value = op.attributes[name]
        if value.HasField("immediateValue"):
            return value.immediateValue.tensor.bytes.values
        sentinel, _, size, offset = struct.unpack_from("<IIQQ", content, value.blobFileValue.offset)
        assert sentinel == 0xDEADBEEF
        return content[offset : offset + size]

    entries = np.frombuffer(stored("lut"), np.float16)
    bits = np.unpackbits(np.frombuffer(stored("indices"), np.uint8), bitorder="little").reshape(-1, 2)
    weight = next(model.network.module.parameters()).detach().numpy()
    np.testing.assert_array_equal(entries[bits @ [1, 2]].reshape(weight.shape), weight.astype(np.float16))


def test_old_systems_get_floats_and_refuse_integers_in_words(palettized, tmp_path):
    artifact = write(palettized, tmp_path / "a", ios=15)
    assert in_file(tmp_path / "a", 15) == ([], set())
    assert any("for iOS 18 they would take" in note for note in artifact.notes)
    for bits, needed in ((8, "iOS 16"), (4, "iOS 18")):
        with pytest.raises(ExportError, match="iOS 15, which reads no weights of fewer than 16 bits") as caught:
            write(Quantize(activations="none", bits=bits).apply(palettized, silent), tmp_path / "b", ios=15)
        assert needed in caught.value.hint
    with pytest.raises(ExportError, match="macOS 16") as caught:
        write(palettized, tmp_path / "b", macos=16)
    assert "12, 13, 14, 15, 26" in caught.value.hint


def decoded(form):
    """Return the floats of a form, by the operators' definitions."""
    stored = form.stored
    if isinstance(stored, Integers):
        values = (
            stored.data.astype(int) - (0 if stored.offsets is None else stored.offsets.astype(int))
        ) * stored.scales
    elif isinstance(stored, Table):
        tables = stored.values
        for axis, size in enumerate(stored.indices.shape):
            tables = np.repeat(tables, size // tables.shape[axis], axis)
        values = np.take_along_axis(tables[..., 0], stored.indices[..., None].astype(int), -1)[..., 0]
    else:
        values = stored
    return values if form.mask is None else np.where(form.mask, values, 0)


@pytest.mark.parametrize("distinct", [2, 5, 30, 200, 4000])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_form_holds_the_weight(distinct, zeros, axis):
    random = np.random.default_rng(distinct)
    shape = [(12, 8, 3, 3), (8, 12, 3, 3)][axis]
    tables = random.normal(size=(4, distinct))
    runs = [random.choice(table, size=864 // 4) for table in tables]
    weight = np.moveaxis(np.concatenate(runs).reshape(12, 8, 3, 3), 0, axis).astype(np.float16).reshape(shape)
    weight = np.where(random.random(shape) < zeros, np.float16(0), weight)
    forms = [*coreml_forms._floats(weight), *coreml_forms._tables(weight)]
    for form in forms:
        np.testing.assert_array_equal(decoded(form), weight, err_msg=form.told)
    best, least = shortest(weight, None, 16)
    assert best.ios <= 16
    assert least.size == min(form.size for form in forms) <= best.size


def test_many_halves_of_few_values_are_counted_right_on_every_processor():
    """NumPy 2.3 leaves such an array unsorted on x86 with AVX-512 VBMI2; elsewhere this asks for nothing special."""
    random = np.random.default_rng(0)
    for seed in range(8):
        halves = random.normal(size=16).astype(np.float16)
        weight = halves[random.integers(0, 16, (32, 3125))]
        weight.flat[:16] = halves
        form, _ = shortest(weight, None, 16)
        assert form.stored.bits == 4, seed
        assert np.array_equal(form.stored.values.reshape(-1), sorted(halves.tolist()))
        assert np.array_equal(form.stored.values.reshape(-1)[form.stored.indices], weight)
