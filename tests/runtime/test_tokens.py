"""From a text to tokens on the device: the same numbers as on the workstation, and labels over the wire."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import bundles
from fakes.requests_to import ask, post_json
from fakes.words import word_piece
from hypothesis import given, settings
from hypothesis import strategies as st

import edgekit
from edgekit import bundle, token_numbers
from edgekit.cli.inspect import COMMAND as INSPECT
from edgekit.cli.run import COMMAND as RUN
from edgekit.errors import HealthError, InputError
from edgekit.manifest import Classification, TextPreprocess
from edgekit.runtime.host import Host
from edgekit.runtime.server import serve_in_thread
from edgekit.runtime.tokens import MAX_CHARACTERS, TextReader
from edgekit.tensors import TensorSpec

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return the workstation's tokenizer and the device's, made of what the first wrote."""
    pytest.importorskip("transformers")
    folder = word_piece(tmp_path_factory.mktemp("words"))
    workstation = token_numbers.read(folder)
    (folder / "device.json").write_bytes(workstation.written(12))
    how = TextPreprocess(tokenizer="device.json", tokens=12)
    return workstation, TextReader(folder / "device.json", how)


@pytest.mark.parametrize("texts", [["a b c d e f g h"], ["a b c d e", "f g h"], ["a"]])
def test_what_is_cut_at_its_beginning_is_cut_there_on_the_device(tmp_path, texts):
    word_piece(tmp_path)
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "truncation_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(more))
    workstation = token_numbers.read(tmp_path)
    (tmp_path / "device.json").write_bytes(workstation.written(6))
    found = TextReader(tmp_path / "device.json", TextPreprocess(tokenizer="device.json", tokens=6)).read(texts)
    wanted = token_numbers.padded([workstation.framed(texts, 6)], 6)
    np.testing.assert_array_equal(found["input_ids"], wanted["input_ids"])


def test_a_pair_in_fewer_tokens_than_its_ends_is_cut_alike(pair, tmp_path):
    (tmp_path / "t.json").write_bytes(pair[0].written(2))
    found = TextReader(tmp_path / "t.json", TextPreprocess(tokenizer="t.json", tokens=2)).read(["good", "film"])
    assert found["input_ids"].tolist() == [pair[0].framed(["good", "film"], 2)]


@given(st.lists(st.text(max_size=40), min_size=1, max_size=2))
@settings(max_examples=150, deadline=None)
def test_a_device_reads_any_text_or_pair_as_the_workstation_did(pair, texts):
    workstation, device = pair
    wanted = token_numbers.padded([workstation.framed(texts, 12)], 12)
    found = device.read(texts)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_written_tokenizer_is_the_same_whatever_was_read_with_it(pair):
    workstation, _ = pair
    before = workstation.written(12)
    workstation.framed(["good film"] * 2, 4)
    assert workstation.written(12) == before


def test_a_model_without_mask_gets_none(tmp_path):
    how = TextPreprocess(tokenizer="tokenizer.json", tokens=4, mask="")
    found = TextReader(word_piece(tmp_path) / "tokenizer.json", how).read(["goodly film bad film"])
    assert {name: array.tolist() for name, array in found.items()} == {"input_ids": [[2, 4, 7, 3]]}


@pytest.mark.parametrize("texts", [(), ("a", "b", "c"), ("x" * (MAX_CHARACTERS + 1),), ("a\ud800",), ("a", "\udfff")])
def test_what_is_no_text_or_pair_is_refused(pair, texts):
    with pytest.raises(InputError, match=r"texts are no sample|characters, more than|is no Unicode"):
        pair[1].read(texts)


def test_a_damaged_tokenizer_is_told(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(HealthError, match=r"tokenizer\.json is no tokenizer"):
        TextReader(tmp_path / "tokenizer.json", TextPreprocess(tokenizer="tokenizer.json", tokens=4))


def sealed(folder):
    """Seal a model of five token numbers and two moods: what counts is the second number, the first word's."""
    from edgekit.manifest import Manifest, Port

    one = bundles.variant(
        inputs=(Port(name="input_ids", key="x", dtype="float32"),),
        outputs=(Port(name="scores", key="y", dtype="float32"),),
    )
    weights = np.zeros((5, 2), np.float32)
    weights[1] = [-4.0, 4.0]  # "good" is 4 and "bad" 5, so 4.5 lies between
    draft = Manifest(
        name="moods",
        version="1",
        task="classification",
        inputs=(TensorSpec("input_ids", "int64", (-1, 5)),),
        outputs=(TensorSpec("scores", "float32", (-1, 2)),),
        text=TextPreprocess(tokenizer="preprocess/tokenizer.json", tokens=5, mask=""),
        postprocess=Classification(output="scores", labels=("good", "bad")),
        variants=(one,),
        files=(),
    )
    tokenizer = (word_piece(folder.parent / "words") / "tokenizer.json").read_bytes()
    network = bundles.gemm_onnx(weights, [18.0, -18.0])
    return bundle.seal(folder, draft, {one.main: network, "preprocess/tokenizer.json": tokenizer})


def test_program_server_and_command_line_tell_the_same_mood(tmp_path):
    opened = sealed(tmp_path / "b")
    assert "preprocess/tokenizer.json" in {entry.path for entry in opened.manifest.files_of("x86-64")}
    with edgekit.load(tmp_path / "b") as session:
        assert session.run_text("Good!")[0][0] == "good"
        assert session.run_text("bad", "film")[0][0] == "bad"
        with pytest.raises(InputError, match="how to read a picture"):
            session.run_raw(b"")
    host = Host(edgekit.load(tmp_path / "b"))
    with serve_in_thread(host) as running:
        for text, mood in (("good film", "good"), (["bad", "film"], "bad")):
            status, answer = post_json(running.url, "/v1/classify", {"text": text})[:2]
            assert (status, answer["labels"][0]["label"], answer["digest"]) == (200, mood, opened.digest)
        for body in (
            b"{",
            b"{}",
            b'{"text": 1}',
            b'{"text": ["a", "b", "c"]}',
            b'{"text": "\\ud800"}',
            b'{"text": "\xff"}',
        ):
            status, _, answer = ask(
                running.url, "POST", "/v1/classify", body, {"Content-Type": "application/json; x=y"}
            )
            assert status == 400, (body, answer)
        assert ask(running.url, "POST", "/v1/classify", b"no picture")[0] == 400
    host.close()
    shown = CliRunner().invoke(RUN, [str(tmp_path / "b"), "a bad film", "--top", "1"])
    assert shown.exit_code == 0, shown.output
    np.save(tmp_path / "x.npy", np.array([[2, 5, 3, 0, 0]]))
    told = json.loads(CliRunner().invoke(RUN, [str(tmp_path / "b"), str(tmp_path / "x.npy"), "--json"]).output)
    np.testing.assert_allclose(told["outputs"]["scores"], [[-2.0, 2.0]], atol=1e-5)
    assert (
        "by preprocess/tokenizer.json, 5 tokens, into input_ids"
        in CliRunner().invoke(INSPECT, [str(tmp_path / "b")]).output
    )


def test_a_model_that_reads_no_text_says_so(tmp_path):
    bundles.brightness_bundle(tmp_path / "b")
    with edgekit.load(tmp_path / "b") as session, pytest.raises(InputError, match="how to read a text"):
        session.run_text("good")


def test_a_device_that_cannot_read_texts_says_so_when_it_loads(tmp_path, monkeypatch):
    import sys

    from edgekit.errors import MissingExtra

    sealed(tmp_path / "b")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match="tokenizers") as caught:
        edgekit.load(tmp_path / "b")
    assert "edgekit[text]" in caught.value.hint


def test_texts_are_read_by_the_bytes_that_were_checked(tmp_path):
    sealed(tmp_path / "b")
    with edgekit.load(tmp_path / "b") as session:
        (tmp_path / "b/preprocess/tokenizer.json").write_text("{}")
        assert session.run_text("good")[0][0] == "good"
