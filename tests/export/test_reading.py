"""What a device reads travels with the model: detectors find the same objects, encoders read the same words."""

import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from fakes import detector
from fakes.words import word_piece

import edgekit
from edgekit import datasets, device_profiles, workload
from edgekit.cli import cli
from edgekit.compress import compress
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.recipe import Recipe
from edgekit.errors import UsageError
from edgekit.export import export
from edgekit.manifest import Embedding
from edgekit.model import Data, Split, TextReading

pytest.importorskip("torch", reason="exporters need torch")


def replace_how(**changes):
    return msgspec.structs.replace(detector.HOW, **changes)


@pytest.fixture(scope="module")
def tiles():
    return workload.from_module("tiles", detector.network(), detector.data())


def bundle_of(model, folder, *formats):
    done = export(model, [device_profiles.of_format(name) for name in formats], folder)
    assert [row.error for row in done.rows] == [None] * len(formats)
    return done


def seen(folder, variant):
    with edgekit.load(folder, variant=variant) as session:
        return sorted((one.label, one.box) for one in session.detect(detector.scene()))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_shipped_files_find_the_objects_in_the_picture(tiles, tmp_path, precision):
    model = tiles if precision == "fp32" else compress(tiles, Recipe((("quantize", Quantize()),)))
    assert model.task == "detection"
    bundle_of(model, tmp_path / "b", "onnx", "tflite")
    names = [v.name for v in edgekit.runtime.opening.read_manifest(tmp_path / "b").variants]
    for name in names:
        found = seen(tmp_path / "b", name)
        assert [label for label, _ in found] == [label for label, _ in detector.SEEN]
        for (_, box), (_, wanted) in zip(found, detector.SEEN, strict=True):
            np.testing.assert_allclose(box, wanted, atol=0.01 if precision == "fp32" else 1.0)


def test_a_compressed_detector_is_saved_and_read_back_whole(tiles, tmp_path):
    workload.save(tiles, tmp_path / "m")
    again = workload.load(str(tmp_path / "m"))
    assert (again.task, again.data.detection, again.data.preprocess) == ("detection", detector.HOW, detector.PICTURE)
    np.savez(tmp_path / "d.npz", **{"calibration.image": detector.data().calibration.inputs["image"]})
    told = workload.load(str(tmp_path / "m"), data=datasets.load_data(str(tmp_path / "d.npz")))
    assert (told.data.detection, told.data.preprocess) == (detector.HOW, detector.PICTURE)
    assert tiles.data.digest() != replace(tiles.data, detection=None).digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detection": replace_how(scores="gone")}, "reads the output 'gone', the network gives boxes, scores"),
        ({"preprocess": None}, "detection needs the preprocessing"),
    ],
)
def test_a_detection_that_does_not_fit_is_refused_at_load(changes, message, tmp_path):
    model = workload.from_module("tiles", detector.network(), replace(detector.data(), **changes))
    with pytest.raises(UsageError, match=message):
        datasets.refuse_unfit(model)


def test_outputs_that_are_no_boxes_are_refused_before_anything_is_written(tmp_path):
    swapped = replace(detector.data(), detection=replace_how(boxes="scores", scores="boxes"))
    model = workload.from_module("tiles", detector.network(), swapped)
    with pytest.raises(UsageError, match=r"are no boxes and scores of candidates"):
        export(model, [device_profiles.of_format("onnx")], tmp_path / "b")
    assert not (tmp_path / "b").exists()
    logits = replace(detector.data(), detection=replace_how(activation="none"))
    with pytest.raises(UsageError, match=r"shares from 0 to 1") as caught:
        export(workload.from_module("tiles", detector.network(), logits), [device_profiles.of_format("onnx")], tmp_path)
    assert "sigmoid" in caught.value.hint


@pytest.mark.slow
def test_a_detector_goes_from_pictures_and_a_toml_to_objects_by_commands_alone(tmp_path):
    folder = tmp_path / "street"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.png").write_bytes(detector.scene(96 + 16 * number))
    (folder / "data.toml").write_text(TOML)
    (tmp_path / "net.py").write_text("from fakes.detector import network as build\n")
    for words in (
        ["compress", f"{tmp_path}/net.py:build", "--data", folder, "--recipe", "int8", "-o", tmp_path / "small"],
        ["export", tmp_path / "small", "--format", "onnx", "-o", tmp_path / "b"],
    ):
        done = CliRunner().invoke(cli, [str(word) for word in words])
        assert done.exit_code == 0, done.output
    (tmp_path / "p.png").write_bytes(detector.scene())
    told = json.loads(CliRunner().invoke(cli, ["run", str(tmp_path / "b"), str(tmp_path / "p.png"), "--json"]).output)
    assert sorted(one["label"] for one in told["objects"]) == ["bright", "dark"]


TOML = """
kind = "images"
resize = 32
crop = 32
fit = "pad"
fill = 128
mode = "L"
interpolation = "bicubic"
mean = [128.0]
std = [128.0]
outputs = ["boxes", "scores"]

[detection]
boxes = "boxes"
scores = "scores"
box_format = "cxcywh"
activation = "sigmoid"
labels = ["bright", "dark"]
score_threshold = 0.5

[counts]
calibration = 8
test = 4
"""


def encoder(folder):
    """Write a random BERT of two classes with its tokenizer, and a table of sentences; return data.toml's path."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=64, max_position_embeddings=32, id2label={0: "good", 1: "bad"})
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    word_piece(folder)
    lines = [f"{'good' if n % 2 else 'bad'} film {chr(97 + n)}\t{n % 2}" for n in range(16)]
    (folder.parent / "calibration.tsv").write_text("said\tmood\n" + "\n".join(lines))
    (folder.parent / "data.toml").write_text(
        f'kind = "tsv"\ntokenizer = "{folder.name}"\ntokens = 12\ntext = "said"\nlabel = "mood"\n'
        'files.calibration = "calibration.tsv"\n'
    )
    return folder.parent / "data.toml"


@pytest.mark.slow
def test_an_encoders_bundle_reads_texts_and_names_the_classes_of_its_configuration(tmp_path):
    data = datasets.load_data(str(encoder(tmp_path / "bert")))
    model = workload.load(str(tmp_path / "bert"), data=data)
    assert (model.task, model.data.labels) == ("classification", ("good", "bad"))
    workload.save(model, tmp_path / "saved")
    for source, folder in ((model, "a"), (workload.load(str(tmp_path / "saved")), "b")):
        bundle_of(source, tmp_path / folder, "onnx")
    with edgekit.load(tmp_path / "b") as session:
        wanted = data.calibration.inputs
        text = "bad film a"
        for name, array in session.text_inputs(text).items():
            np.testing.assert_array_equal(array[0], wanted[name][0])
        scores = model.network.run({name: array[:1] for name, array in wanted.items()})["logits"][0]
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        best, share = session.run_text(text)[0]
        assert best == ("good", "bad")[shares.argmax()]
        assert share == pytest.approx(shares.max(), abs=1e-4)
    np.savez(tmp_path / "d.npz", **{f"calibration.{name}": array for name, array in wanted.items()})
    bare = workload.load(str(tmp_path / "bert"), data=datasets.load_data(str(tmp_path / "d.npz")))
    assert (bare.data.text.tokens, bare.data.text.tokenizer) == (12, data.text.tokenizer)  # the folder's own
    first, second = ((tmp_path / folder / "preprocess/tokenizer.json").read_bytes() for folder in ("a", "b"))
    assert first == second


def test_a_bundle_without_data_reads_texts_by_the_folders_tokenizer(tmp_path):
    pytest.importorskip("optimum.exporters.onnx", reason="optimum tells the inputs where nobody gives data")
    transformers = pytest.importorskip("transformers")
    encoder(tmp_path / "bert")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=64, max_position_embeddings=32)).save_pretrained(
        tmp_path / "bert"
    )
    done = CliRunner().invoke(cli, ["export", str(tmp_path / "bert"), "--format", "onnx", "-o", str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    told = json.loads(CliRunner().invoke(cli, ["run", str(tmp_path / "b"), "good film", "--json"]).output)
    assert told["shapes"] == {"last_hidden_state": [1, 32, 32]}
    with edgekit.load(tmp_path / "b") as session:
        inputs = session.text_inputs("good", "bad film")
    assert {name: array[0, :7].tolist() for name, array in inputs.items()} == {
        "input_ids": [2, 4, 3, 5, 6, 3, 0],
        "attention_mask": [1, 1, 1, 1, 1, 1, 0],
        "token_type_ids": [0, 0, 0, 1, 1, 1, 0],
    }


def test_a_folder_whose_tokenizer_cannot_be_read_is_a_model_of_arrays(tmp_path):
    data = datasets.load_data(str(encoder(tmp_path / "bert")))
    (tmp_path / "bert/tokenizer.json").write_text("{")
    model = workload.load(str(tmp_path / "bert"), data=replace(data, text=None))
    assert model.data.text is None


@pytest.mark.parametrize("moods", [("good", "bad"), ("bad",)])
def test_classes_are_counted_as_the_network_counts_them_not_by_the_alphabet(tmp_path, moods):
    source = encoder(tmp_path / "bert")
    lines = [f"{moods[n % len(moods)]} film {chr(97 + n)}\t{moods[n % len(moods)]}" for n in range(16)]
    (tmp_path / "calibration.tsv").write_text("said\tmood\n" + "\n".join(lines))
    data = datasets.load_data(str(source))
    assert data.labels == tuple(sorted(moods))
    model = workload.load(str(tmp_path / "bert"), data=data)
    assert model.data.labels == ("good", "bad")
    assert model.data.calibration.labels.tolist() == [("good", "bad").index(moods[n % len(moods)]) for n in range(16)]
    (tmp_path / "calibration.tsv").write_text("said\tmood\n" + "\n".join([*lines, "a film\tdull"]))
    with pytest.raises(UsageError, match=r"has the class 'dull', the network knows good, bad"):
        workload.load(str(tmp_path / "bert"), data=datasets.load_data(str(source)))


def test_classes_of_other_names_than_the_networks_keep_them(tmp_path):
    data = datasets.load_data(str(encoder(tmp_path / "bert")))
    kept = workload.load(str(tmp_path / "bert"), data=replace(data, labels=("n01", "n02")))
    assert kept.data.labels == ("n01", "n02")
    assert kept.data.calibration.labels.tolist() == data.calibration.labels.tolist()


@pytest.mark.parametrize(("kind", "is_read"), [("int64", True), ("int32", True), ("float", False), ("longer", False)])
def test_texts_become_what_the_model_takes_or_are_not_promised(tmp_path, kind, is_read):
    """An ONNX file of one's own may take 32-bit tokens."""
    from fakes.bundles import gemm_onnx

    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    proto = onnx.load_from_string(gemm_onnx(np.ones((8, 2), np.float32), names=("cast", "y")))
    dtype = {"int32": TensorProto.INT32, "float": TensorProto.FLOAT}.get(kind, TensorProto.INT64)
    proto.graph.node.insert(0, helper.make_node("Cast", ["input_ids"], ["cast"], to=TensorProto.FLOAT))
    del proto.graph.input[:]
    proto.graph.input.append(helper.make_tensor_value_info("input_ids", dtype, ["n", 8]))
    onnx.save(proto, tmp_path / "net.onnx")
    tokens = np.arange(32).reshape(4, 8).astype({"int32": np.int32, "float": np.float32}.get(kind, np.int64))
    text = TextReading((word_piece(tmp_path / "words") / "tokenizer.json").read_bytes(), 9 if kind == "longer" else 8)
    model = workload.load(str(tmp_path / "net.onnx"), data=Data(Split({"input_ids": tokens}), text=text))
    bundle_of(model, tmp_path / "b", "onnx")
    with edgekit.load(tmp_path / "b") as session:
        assert (session.contract.text is not None) == is_read
        if is_read:
            assert session.run(session.text_inputs("good film"))["y"].tolist() == [[2 + 4 + 6 + 3] * 2]


def sentence_transformer(folder, modules=("Transformer", "Pooling", "Normalize"), **pooling):
    """Make an encoder's folder one of Sentence Transformers."""
    transformers = pytest.importorskip("transformers")
    encoder(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=64, max_position_embeddings=32)
    transformers.BertModel(config).save_pretrained(folder)
    listed = [
        {"idx": n, "path": f"{n}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    return datasets.load_data(str(folder.parent / "data.toml"))


@pytest.mark.slow
def test_a_sentence_transformer_gives_vectors_pooled_as_its_folder_says(tmp_path):
    data = sentence_transformer(tmp_path / "bert", pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
    data = replace(data, calibration=Split(data.calibration.inputs))
    model = workload.load(str(tmp_path / "bert"), data=data)
    assert model.data.embedding == Embedding(output="last_hidden_state", pooling="mean")
    workload.save(model, tmp_path / "saved")
    bundle_of(workload.load(str(tmp_path / "saved")), tmp_path / "b", "onnx")
    with edgekit.load(tmp_path / "b") as session:
        found = session.embed(["bad film a", "good film b"])
        inputs = session.texts_inputs(["bad film a", "good film b"])
    hidden, mask = model.network.run(inputs)["last_hidden_state"], inputs["attention_mask"][..., None]
    wanted = (hidden * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "b")]).output
    assert "vectors from last_hidden_state, pooling mean, of length 1" in shown


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (
            ("Transformer", "Pooling", "Dense"),
            {"pooling_mode_mean_tokens": True},
            "describes Transformer, Pooling, Dense",
        ),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            "by mean and max",
        ),
        (("Transformer", "Pooling"), {"pooling_mode_weightedmean_tokens": True}, "by something else"),
    ],
)
def test_a_sentence_transformer_that_does_more_is_refused_not_cut_short(tmp_path, modules, pooling, message):
    data = sentence_transformer(tmp_path / "bert", modules, **pooling)
    with pytest.raises(UsageError, match=message):
        workload.load(str(tmp_path / "bert"), data=replace(data, calibration=Split(data.calibration.inputs)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Embedding(output="gone"), "reads the output 'gone', the network gives last_hidden_state"),
        (Embedding(output="last_hidden_state", pooling="none"), "is not pooled by none"),
    ],
)
def test_an_embedding_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, how, message):
    data = sentence_transformer(tmp_path / "bert", pooling_mode_mean_tokens=True)
    data = replace(data, calibration=Split(data.calibration.inputs), embedding=how)

    def exported():
        model = workload.load(str(tmp_path / "bert"), data=data)
        export(model, [device_profiles.of_format("onnx")], tmp_path / "b")

    with pytest.raises(UsageError, match=message):
        exported()
    assert not (tmp_path / "b").exists()
