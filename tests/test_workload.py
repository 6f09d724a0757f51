"""Models and data as people have them: what loads, what is refused and why, and a kill while saving."""

import json
import warnings
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from fakes import digits, kills

from edgekit import workload
from edgekit.errors import CompressionError, UsageError
from edgekit.model import Data, LlamaFolder, OnnxNetwork, Split
from edgekit.tensors import TensorSpec

torch = pytest.importorskip("torch")
IMAGES = np.zeros((4, 1, 8, 8), np.float32)
LABELS = np.array([0, 1, 2, 9])


def plain_data(**splits):
    return Data(**({"calibration": Split({"image": IMAGES})} | splits))


def code(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    return f"{tmp_path / 'mine.py'}:build"


# --- networks


def test_a_network_that_writes_into_its_input_leaves_the_data_as_it_is():
    from edgekit.compress.passes.quantize import Quantize
    from edgekit.progress import silent

    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(3, 2)

        def forward(self, x):
            x -= 0.5
            return self.inner(x)

    numbers = np.ones((4, 3), np.float32)
    model = workload.from_module("shifted", Shifted().eval(), Data(Split({"x": numbers})))
    first, again = (model.network.run({"x": numbers})["scores"] for _ in range(2))
    assert np.array_equal(first, again)
    limits = Quantize(observer="mse").apply(model, silent).plan.activations["x"]
    assert (numbers == 1).all()
    assert limits.high == pytest.approx(1, rel=0.01), "a second look sees the input, not what the first has left"


def test_a_network_that_returns_a_dictionary_is_refused_with_the_way_out(tmp_path):
    text = (
        "import torch\nclass build(torch.nn.Module):\n    def forward(self, image):\n        return {'scores': image}\n"
    )
    with pytest.raises(UsageError, match="the network returns a dict") as caught:
        workload.load(code(tmp_path, text), None, plain_data())
    assert "wrap it" in caught.value.hint


def test_a_workload_file_with_its_checkpoint_becomes_a_model():
    model = digits.model()
    assert (model.name, model.task, model.precision) == ("digits", "classification", "fp32")
    assert model.inputs == (TensorSpec("image", "float32", (-1, 1, 8, 8)),)
    assert model.outputs == (TensorSpec("scores", "float32", (-1, 10)),)
    assert model.lineage[0].options["source"] == "digits.py:build"
    assert len(model.lineage[0].options["checkpoint"]) == 64


def test_a_module_on_the_import_path_loads_too(tmp_path, monkeypatch):
    code(tmp_path, "import torch\nclass build(torch.nn.Flatten): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert workload.load("mine:build", None, plain_data()).outputs[0].shape == (-1, 64)


def test_two_inputs_and_two_outputs_keep_their_names_and_order(tmp_path):
    source = code(
        tmp_path,
        "import torch\nclass build(torch.nn.Module):\n"
        "    def forward(self, a, b):\n        return a - b, (a + b)[:, 0]\n",
    )
    split = Split({"left": np.full((3, 2), 5.0, np.float32), "right": np.ones((3, 2), np.float32)})
    model = workload.load(source, None, Data(split))
    assert [str(t) for t in model.inputs] == ["left: float32[?, 2]", "right: float32[?, 2]"]
    assert [str(t) for t in model.outputs] == ["output_0: float32[?, 2]", "output_1: float32[?]"]
    assert model.network.run(split.inputs)["output_0"].tolist() == [[4, 4]] * 3
    assert model.task == "tensor"


def test_inputs_go_to_the_network_by_name_whatever_their_order_in_the_data(tmp_path):
    source = code(
        tmp_path,
        "import torch\nclass build(torch.nn.Module):\n    def forward(self, tokens, scale):\n"
        "        return tokens * scale, tokens + 1\n",
    )
    split = Split({"scale": np.full((3, 2), 0.5, np.float32), "tokens": np.full((3, 2), 4)})
    model = workload.load(source, None, Data(split, outputs=("scaled", "next")))
    assert [str(t) for t in model.inputs] == ["tokens: int64[?, 2]", "scale: float32[?, 2]"]
    assert {n: a.tolist()[0] for n, a in model.network.run(split.inputs).items()} == {"scaled": [2, 2], "next": [5, 5]}
    with pytest.raises(UsageError, match=r"names 1 outputs \(scaled\), the network gives 2"):
        workload.load(source, None, Data(split, outputs=("scaled",)))


def exported(path, **how):
    torch.export.save(torch.export.export(digits.model().network.module, (torch.zeros(2, 1, 8, 8),), **how), path)
    return path


def test_an_exported_program_is_a_model_by_itself(tmp_path):
    path = exported(tmp_path / "m.pt2", dynamic_shapes=({0: torch.export.Dim("batch")},))
    model = workload.load(str(path), None, digits.model().data)
    images = digits.model().data.test.head(5).inputs
    np.testing.assert_allclose(
        model.network.run(images)["scores"], digits.model().network.run(images)["scores"], atol=1e-5
    )
    assert (model.name, model.task, len(model.lineage[0].options["checkpoint"])) == ("m", "classification", 64)
    workload.trace(model)
    with pytest.raises(UsageError, match="needs data"):
        workload.load(str(path))


def test_an_exported_program_of_one_batch_size_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(UsageError, match="exactly 2 samples at once") as caught:
        workload.load(str(exported(tmp_path / "m.pt2")), None, digits.model().data)
    assert "dynamic_shapes" in caught.value.hint


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"PK\x03\x04 but no archive", "half"])
def test_a_missing_or_corrupt_exported_program_is_refused(tmp_path, content):
    path = tmp_path / "m.pt2"
    if content is not None:
        whole = exported(path).read_bytes() if content == "half" else b""
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(UsageError, match="no exported program"):
        workload.load(str(path), None, digits.model().data)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".th", ".pt2"])
def test_checkpoints_of_every_kind_give_the_same_weights(tmp_path, suffix):
    state = digits.model().network.module.state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    elif suffix == ".pt2":
        exported(path)
    elif suffix == ".th":  # as data-parallel training writes it
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state, path)
    loaded = workload.load(digits.BUILD, path, digits.model().data).network.module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("", "has no function 'build'"),
        ("def biuld(): pass", r"has no function 'build'"),
        ("build = 3", "has no function 'build'"),
        ("def build(:", "cannot be imported: SyntaxError"),
        ("import nowhere_at_all", "cannot be imported: ModuleNotFoundError"),
        ("def build(): return 3", "returned int, not torch.nn.Module"),
        ("def build(width): return width", "failed with TypeError"),
        ("def build(): raise RuntimeError('out of ideas')", "failed with RuntimeError: out of ideas"),
    ],
)
def test_a_broken_workload_file_is_named_with_its_fault(tmp_path, text, message):
    source = f"{tmp_path / 'mine.py'}:build" if text is None else code(tmp_path, text)
    with pytest.raises(UsageError, match=message):
        workload.load(source, None, plain_data())


def test_a_misspelled_function_lists_what_is_there():
    with pytest.raises(UsageError) as caught:
        workload.load(digits.BUILD.replace(":build", ":bild"), None, plain_data())
    assert "build_student" in caught.value.hint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("model", "is no model"),
        ("model.tflite", "is no model"),
        ("model.onnx", "no ONNX file"),
        ("nowhere.deep:build", "no module 'nowhere.deep'"),
    ],
)
def test_what_is_no_model_is_refused(source, message):
    with pytest.raises(UsageError, match=message):
        workload.load(source, None, plain_data())


def test_a_network_without_data_does_not_know_its_shapes():
    with pytest.raises(UsageError, match="needs data") as caught:
        workload.load(digits.BUILD, None, None)
    assert "--data" in caught.value.hint


# --- checkpoints


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no checkpoint at .*gone\.pt"):
        workload.load(digits.BUILD, tmp_path / "gone.pt", plain_data())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 99, "half"])
def test_a_corrupt_checkpoint_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    if content == "half":
        if suffix == ".pt":
            torch.save(digits.model().network.module.state_dict(), path)
        whole = path.read_bytes() if suffix == ".pt" else digits.checkpoint().read_bytes()
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is no checkpoint"):
        workload.load(digits.BUILD, path, plain_data())


@pytest.mark.attack("pickle")
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UsageError, match="is no checkpoint"):
        workload.load(digits.BUILD, tmp_path / "evil.pt", plain_data())
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UsageError, match="is no checkpoint"):
        workload.load(digits.BUILD, tmp_path / "evil.pt", plain_data())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("down.weight"), r"lacks 'down\.weight'"),
        (lambda s: s.update(extra=torch.zeros(2)), "holds 'extra', which the network lacks"),
        (lambda s: s.update({"stem.weight": s["stem.weight"] / 0}), r"'stem\.weight' holds NaN or infinity"),
        (lambda s: s.update({"stem.weight": torch.zeros(7, 1, 3, 3)}), r"'stem\.weight' is \[7, 1, 3, 3\].*\[24, 1"),
    ],
)
def test_the_checkpoint_of_another_model_is_refused_by_tensor(tmp_path, change, message):
    state = dict(digits.model().network.module.state_dict())
    change(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=message) as caught:
        workload.load(digits.BUILD, tmp_path / "other.pt", plain_data())
    assert ("another model" in caught.value.hint) != ("NaN" in message)


def quantized(weight):
    with warnings.catch_warnings(action="ignore"):  # PyTorch will drop them, files that hold them stay
        return torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (quantized, "is quantized"),
        (lambda w: w.to_sparse(), "is sparse_coo, not dense"),
        (lambda w: torch.nested.nested_tensor(list(w)), "is nested, not dense"),
        (lambda w: w.to("meta"), "meta tensor"),
        (lambda w: w.to(torch.complex64), "is complex64, the network wants float32"),
        (lambda w: w.to(torch.int8), "is int8, the network wants float32"),
        (lambda w: w.to(torch.float8_e4m3fn), "is float8_e4m3fn, the network wants float32"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch, as it reads what it will drop
def test_weights_of_a_kind_that_the_network_does_not_take_are_refused_by_tensor(tmp_path, changed, message):
    state = dict(digits.model().network.module.state_dict())
    state["stem.weight"] = changed(state["stem.weight"])
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=rf"'stem\.weight'.*{message}"):
        workload.load(digits.BUILD, tmp_path / "other.pt", plain_data())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_of_narrower_or_wider_floats_is_taken(tmp_path, dtype):
    state = {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in digits.model().network.module.state_dict().items()
    }
    torch.save(state, tmp_path / "half.pt")
    module = workload.load(digits.BUILD, tmp_path / "half.pt", plain_data()).network.module
    assert module.stem.weight.dtype == torch.float32


def test_a_checkpoint_that_is_no_dictionary_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "list.pt")
    with pytest.raises(UsageError, match="is no checkpoint"):
        workload.load(digits.BUILD, tmp_path / "list.pt", plain_data())


def test_a_checkpoint_beside_a_model_that_brings_its_weights_is_refused(tmp_path):
    with pytest.raises(UsageError, match="brings its own weights"):
        workload.load(str(digits.onnx_file()), tmp_path / "w.pt", plain_data())


# --- data


def test_an_npz_becomes_splits(tmp_path):
    arrays = {"calibration.image": IMAGES, "test.image": IMAGES + 1, "test.labels": LABELS, "test.groups": list("abab")}
    np.savez(tmp_path / "d.npz", **arrays)
    data = workload.load_data(str(tmp_path / "d.npz"))
    assert (len(data.calibration), data.train, data.validation) == (4, None, None)
    assert data.test.labels.tolist() == LABELS.tolist()
    assert data.test.head(3).groups.tolist() == ["a", "b", "a"]
    assert workload.load(digits.BUILD, digits.checkpoint(), data).task == "classification"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"test.image": IMAGES}, "no calibration split"),
        ({"image": IMAGES}, "holds 'image'"),
        ({"calibration.": IMAGES}, r"holds 'calibration\.'"),
        ({"calibration.image": IMAGES, "calibration.labels": LABELS[:2]}, "arrays of one length"),
        ({"calibration.labels": LABELS}, "arrays of one length"),
        ({"calibration.image": np.array([object()])}, "is no .npz file"),
    ],
)
def test_an_npz_of_another_kind_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        workload.load_data(str(tmp_path / "d.npz"))


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"PK\x03\x04 but no zip"])
def test_a_missing_or_corrupt_npz_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(UsageError, match=r"no data at|is no \.npz file"):
        workload.load_data(str(tmp_path / "d.npz"))


def test_a_data_function_that_gives_something_else_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"returned list, not edgekit\.model\.Data"):
        workload.load_data(code(tmp_path, "def build(): return []"))
    with pytest.raises(UsageError, match="is no data"):
        workload.load_data("pictures")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(Split({"image": IMAGES[:0]})), "calibration split is empty"),
        (
            Data(Split({"image": np.zeros((4, 3, 8, 8), np.float32)})),
            r"does not take the calibration data .*\[4, 3, 8, 8\]",
        ),
        (Data(Split({"image": IMAGES.astype(np.float64)})), "does not take the calibration data"),
        (Data(Split({"image": IMAGES, "mask": IMAGES})), "does not take the calibration data"),
        (plain_data(test=Split({"picture": IMAGES})), r"the test split has \['picture'\], the network takes image"),
        (plain_data(train=Split({"image": IMAGES[:, :, :7]})), r"the train split has image: float32\[4, 1, 7, 8\]"),
        (plain_data(test=Split({"image": IMAGES.astype(np.int64)})), "the test split has image: int64"),
        (plain_data(test=Split({"image": IMAGES}, LABELS + 1)), "labels of the test split go from 1 to 10"),
        (plain_data(test=Split({"image": IMAGES}, LABELS - 1)), "labels of the test split go from -1 to 8"),
        (plain_data(test=Split({"image": IMAGES}, LABELS * 0.5)), "not one integer each"),
        (plain_data(test=Split({"image": IMAGES}, np.eye(4, 10, dtype=int))), "not one integer each"),
        (plain_data(test=Split({"image": IMAGES}, np.ones((4, 10), bool))), "not one integer each"),
        (plain_data(test=Split({"image": IMAGES}, np.full((4, 10), np.nan))), "test split's labels holds NaN"),
        (
            plain_data(train=Split({"image": np.where(np.arange(4) == 2, np.inf, IMAGES.T).T.astype(np.float32)})),
            r"the train split's image holds NaN or infinity in 1 sample\(s\), the first is 2",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused_by_split_and_shape(data, message):
    with pytest.raises(UsageError, match=message):
        workload.load(digits.BUILD, digits.checkpoint(), data)


def test_float_labels_in_the_shape_of_the_output_are_targets():
    targets = np.zeros((4, 10), np.float32)
    data = plain_data(test=Split({"image": IMAGES}, targets))
    assert workload.load(digits.BUILD, digits.checkpoint(), data).task == "tensor"


def places(labels, channels=3, classes="torch.nn.Conv2d(1, {}, 1)"):
    def build(tmp_path):
        source = code(tmp_path, f"import torch\ndef build():\n    return {classes.format(channels)}")
        return workload.load(source, None, plain_data(test=Split({"image": IMAGES}, labels)))

    return build


@pytest.mark.parametrize(
    "build",
    [
        places(np.full((4, 8, 8), 2, np.uint8)),
        places(np.where(np.eye(8, dtype=int), -100, 2)[None].repeat(4, 0)),
        places(np.ones((4, 1, 8, 8), int), 1),
        places(np.ones((4, 8, 8), int), 1),
        places(np.full((4, 1, 8), 7), classes="torch.nn.Linear(8, 8)"),
        places(np.full((4, 5), 300)),
    ],
    ids=["masks", "with holes", "of one score", "without its axis", "tags", "boxes"],
)
def test_integer_labels_of_any_rank_are_taken_and_are_no_class_of_the_sample(tmp_path, build):
    assert build(tmp_path).task == "tensor"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (places(np.full((4, 8, 8), 3)), "go from 3 to 3"),
        (places(np.full((4, 8, 8), -1)), "go from -1 to -1"),
        (places(np.full((4, 1, 8), 9), classes="torch.nn.Linear(8, 9)"), "go from 9 to 9"),
    ],
)
def test_a_class_of_a_position_that_has_no_score_is_refused(tmp_path, build, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(tmp_path)
    assert "-100 marks a position that does not count" in caught.value.hint


# --- ONNX files


def test_an_onnx_file_says_its_own_names_and_shapes():
    model = workload.load(str(digits.onnx_file()))
    assert isinstance(model.network, OnnxNetwork)
    assert model.inputs == (TensorSpec("image", "float32", (-1, 1, 8, 8)),)
    assert model.outputs == (TensorSpec("scores", "float32", (-1, 10)),)
    images = digits.model().data.test.inputs
    np.testing.assert_allclose(
        model.network.run(images)["scores"], digits.model().network.run(images)["scores"], atol=1e-4
    )


@pytest.mark.parametrize("content", [b"", b"garbage", "half"])
def test_a_corrupt_onnx_file_is_refused(tmp_path, content):
    whole = digits.onnx_file().read_bytes()
    (tmp_path / "m.onnx").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(UsageError, match="no valid ONNX model"):
        workload.load(str(tmp_path / "m.onnx"))


def test_data_for_another_input_of_an_onnx_file_is_refused():
    with pytest.raises(UsageError, match="calibration split has"):
        workload.load(str(digits.onnx_file()), None, Data(Split({"picture": IMAGES})))


# --- saved folders


def test_a_saved_model_loads_back_whole(tmp_path):
    model = digits.quantized()
    workload.save(model, tmp_path / "m", {"recipe.toml": b"version = 1\n"})
    again = workload.load(str(tmp_path / "m"))
    assert (again.name, again.task, again.inputs, again.outputs) == (
        model.name,
        model.task,
        model.inputs,
        model.outputs,
    )
    assert (again.plan, again.lineage) == (model.plan, model.lineage)
    assert (again.data.preprocess, again.data.labels) == (model.data.preprocess, model.data.labels)
    np.testing.assert_array_equal(again.data.calibration.inputs["image"], model.data.calibration.inputs["image"][:128])
    images = model.data.test.inputs
    np.testing.assert_allclose(again.network.run(images)["scores"], model.network.run(images)["scores"], atol=1e-5)
    assert (tmp_path / "m" / "recipe.toml").read_bytes() == b"version = 1\n"


def test_the_plan_still_names_the_graph_after_saving_and_loading(tmp_path):
    workload.save(digits.quantized(), tmp_path / "m")
    again = workload.load(str(tmp_path / "m"))
    graph = workload.trace(again).module().graph
    assert again.plan.activations.keys() - {"scores"} <= {node.name for node in graph.nodes}
    assert again.plan.weights.keys() <= {str(node.target) for node in graph.nodes}


def test_a_saved_onnx_model_is_the_same_file(tmp_path):
    workload.save(workload.load(str(digits.onnx_file())), tmp_path / "m")
    assert (tmp_path / "m" / "model.onnx").read_bytes() == digits.onnx_file().read_bytes()
    assert isinstance(workload.load(str(tmp_path / "m")).network, OnnxNetwork)


def test_an_onnx_file_with_weights_beside_it_is_saved_in_one_piece(tmp_path):
    import onnx

    (tmp_path / "big").mkdir()
    onnx.save(onnx.load(digits.onnx_file()), tmp_path / "big/m.onnx", save_as_external_data=True, size_threshold=256)
    assert len(list((tmp_path / "big").iterdir())) == 2
    model = workload.load(str(tmp_path / "big/m.onnx"))
    workload.save(model, tmp_path / "m")
    for path in (tmp_path / "big").iterdir():
        path.unlink()
    images = digits.model().data.test.inputs
    np.testing.assert_allclose(
        workload.load(str(tmp_path / "m")).network.run(images)["scores"],
        digits.model().network.run(images)["scores"],
        atol=1e-4,
    )


@pytest.mark.parametrize("name", ["model.json", "plan.json", "samples.npz", "network.pt2", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage", "half"])
def test_a_damaged_saved_model_is_refused(tmp_path, name, content):
    folder = tmp_path / "m"
    workload.save(digits.quantized(), folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(UsageError, match="is damaged"):
        workload.load(str(folder))


def test_a_saved_model_of_a_later_version_is_refused(tmp_path):
    workload.save(digits.quantized(), tmp_path / "m")
    description = json.loads((tmp_path / "m" / "model.json").read_text())
    (tmp_path / "m" / "model.json").write_bytes(msgspec.json.encode(description | {"version": 2}))
    with pytest.raises(UsageError, match=r"`\$\.version`"):
        workload.load(str(tmp_path / "m"))


def test_a_folder_of_something_else_is_no_model_and_is_never_replaced(tmp_path):
    (tmp_path / "precious.txt").write_text("thesis")
    with pytest.raises(UsageError, match="holds no model"):
        workload.load(str(tmp_path))
    for place in (tmp_path, tmp_path / "precious.txt"):
        with pytest.raises(UsageError, match="not replaced"):
            workload.save(digits.model(), place)
    assert (tmp_path / "precious.txt").read_text() == "thesis"


def test_a_hugging_face_folder_is_a_language_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    model = workload.load(str(tmp_path))
    assert isinstance(model.network, LlamaFolder)
    assert model.task == "text-generation"


def test_control_flow_on_values_cannot_be_saved(tmp_path):
    source = code(
        tmp_path,
        "import torch\nclass build(torch.nn.Module):\n    def forward(self, x):\n"
        "        return x * 2 if x.sum() > 0 else x\n",
    )
    model = workload.load(source, None, plain_data())
    with pytest.raises(CompressionError, match="cannot be traced to a graph"):
        workload.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with pytest.raises(CompressionError, match="no PyTorch network"):
        workload.trace(workload.load(str(digits.onnx_file())))


def test_a_kill_at_any_step_of_saving_leaves_the_old_model_or_the_new(tmp_path):
    """The network is an ONNX file here: torch's threads do not survive the fork that the kill needs."""
    old = workload.load(str(digits.onnx_file()))
    new = replace(old, name="new")
    place = tmp_path / "m"
    seen = []
    for step in range(1, 100):
        workload.save(old, place)
        if not kills.run_and_kill(lambda: workload.save(new, place), step):
            break
        seen.append(workload.load(str(place)).name)
    assert set(seen) == {"digits", "new"}
    assert len(seen) > 8
    workload.save(new, place)
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "what was killed is swept by the next run"
