"""A manifest from anywhere: what decodes is safe and complete, and encodes to the same bytes again."""

import contextlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import manifest as manifests
from edgekit.errors import BundleError, UnknownName
from edgekit.manifest import (
    Classification,
    Detection,
    FileEntry,
    Golden,
    ImagePreprocess,
    Manifest,
    Parity,
    Port,
    Step,
    TextPreprocess,
    Variant,
)
from edgekit.tensors import TensorSpec

ZERO = "0" * 64


def entry(path="m/model.onnx", **changes):
    return FileEntry(**{"path": path, "size": 3, "sha256": ZERO, **changes})


def variant(name="x86-64", path="m/model.onnx", **changes):
    parity = Parity(status="checked", samples=8, sqnr_db=40.0, min_sqnr_db=10.0)
    return Variant(
        **{
            "name": name,
            "format": "onnx",
            "precision": "int8",
            "main": path,
            "files": (path,),
            "parity": parity,
            **changes,
        }
    )


def manifest(**changes):
    return Manifest(
        **{"name": "tiny", "version": "1", "task": "tensor", "variants": (variant(),), "files": (entry(),), **changes}
    )


def document(**changes):
    return {**json.loads(manifests.encode(manifest())), **changes}


def decode(value):
    return manifests.decode(json.dumps(value).encode())


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


SHORT = st.text(max_size=9)
PICTURES = st.builds(ImagePreprocess, input=st.just("p"), resize=st.integers(1, 8192), crop=st.just(8))
WHOLE_PICTURES = st.builds(
    ImagePreprocess, input=st.just("p"), resize=st.just(8), crop=st.just(8), fit=st.sampled_from(["pad", "stretch"])
)
TEXTS = st.builds(
    TextPreprocess,
    tokenizer=st.just("m/model.onnx"),
    tokens=st.integers(2, 99),
    ids=st.just("t"),
    mask=st.sampled_from(["", "m"]),
)
LABELS = st.builds(Classification, output=st.just("q"), labels=st.tuples(SHORT))
DETECTIONS = st.builds(
    Detection,
    boxes=st.just("q"),
    scores=st.just("q"),
    labels=st.tuples(SHORT),
    box_format=st.sampled_from(["xyxy", "yxyx", "xywh", "cxcywh"]),
    iou_threshold=st.floats(0, 1),
)
PARITIES = st.builds(Parity, status=st.just("unverified"), reason=SHORT, sqnr_db=st.none() | FINITE)
SHAPES = st.tuples(st.integers(-1, 9), st.integers(-1, 9))


@st.composite
def whole(draw):
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    port = Port(name="x", key="args_0", dtype="float32", axes=(0, 2, 3, 1))
    options = {"ratio": draw(FINITE), "on": True, "n": 3, "source": draw(SHORT)}
    return manifest(
        name=draw(NAMES),
        version=draw(SHORT),
        task=draw(st.sampled_from(["tensor", "classification", "detection", "text-generation"])),
        inputs=(
            *(TensorSpec(n, "float32", draw(SHAPES)) for n in [*names, "p"]),
            *(TensorSpec(n, "int64", (-1, -1)) for n in "tm"),
        ),
        outputs=(TensorSpec("q", "float32", draw(SHAPES)),),
        preprocess=draw(st.none() | PICTURES | WHOLE_PICTURES),
        text=draw(st.none() | TEXTS),
        postprocess=draw(st.none() | LABELS),
        detection=draw(st.none() | DETECTIONS),
        variants=tuple(variant(n, inputs=(port,), parity=draw(PARITIES)) for n in names),
        golden=Golden(prompts=tuple(draw(st.lists(st.tuples(SHORT, SHORT), max_size=2)))),
        lineage=(Step(name="prune", options=options, measured={"top1": draw(FINITE)}),),
    )


@given(whole())
def test_decode_undoes_encode_and_encoding_is_canonical(value):
    data = manifests.encode(value)
    assert manifests.decode(data) == value
    assert manifests.encode(manifests.decode(data)) == data
    assert manifests.digest(manifests.decode(data)) == manifests.digest(value)


@given(st.binary(max_size=200))
def test_noise_is_refused_with_one_kind_of_error(data):
    with pytest.raises(BundleError):
        manifests.decode(data)


@given(st.binary(min_size=1, max_size=4), st.integers(0))
def test_a_manifest_with_noise_inside_decodes_or_is_refused(noise, at):
    data = bytearray(manifests.encode(manifest()))
    at %= len(data)
    data[at : at + len(noise)] = noise
    with contextlib.suppress(BundleError):  # any other error fails the test
        manifests.decode(bytes(data))


PATHS = ["/absolute", "../up", "a/../b", "a/..", "..", ".", "a//b", "a/", "./a", ".hidden", "", "a\\b", "a\n", "a\0b"]
PATHS += ["x" * 301, "manifest.json", "a/./b"]


@pytest.mark.attack("zip-slip")
@pytest.mark.attack("absolute path")
@pytest.mark.parametrize("path", PATHS)
def test_an_unsafe_path_is_refused(path):
    files = [msgspec.to_builtins(entry()), {"path": path, "size": 1, "sha256": ZERO}]
    with pytest.raises(BundleError):
        decode(document(files=files))


@given(st.text(max_size=12))
def test_a_path_that_is_accepted_stays_inside_the_folder(path):
    from pathlib import PurePosixPath

    try:
        decode(document(files=[msgspec.to_builtins(entry()), {"path": path, "size": 1, "sha256": ZERO}]))
    except BundleError:
        return
    pure = PurePosixPath("/bundle") / path
    assert pure.is_relative_to("/bundle")
    assert ".." not in pure.parts
    assert str(pure) == f"/bundle/{path}"


def test_a_file_listed_twice_is_refused():
    with pytest.raises(BundleError, match="lists a file twice"):
        decode(document(files=[msgspec.to_builtins(entry())] * 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocess": {"input": "gone", "resize": 8, "crop": 8}}, "input 'gone', which the model has not"),
        ({"postprocess": {"output": "gone"}}, "output 'gone', which the model has not"),
        ({"detection": {"boxes": "q", "scores": "gone"}}, "output 'gone', which the model has not"),
        ({"text": {"tokenizer": "m/model.onnx", "tokens": 4, "ids": "p", "mask": "gone"}}, "input 'gone'"),
        ({"text": {"tokenizer": "m/gone.json", "tokens": 4, "ids": "p", "mask": ""}}, "uses 'm/gone.json'"),
        ({"text": {"tokenizer": "../up.json", "tokens": 4, "ids": "p", "mask": ""}}, "no manifest of format"),
        ({"text": {"tokenizer": "m/model.onnx", "tokens": 4, "ids": "t", "mask": "t"}}, "one input of several: t, t"),
        ({"text": {"tokenizer": "m/model.onnx", "tokens": 4, "ids": "p", "mask": ""}}, "makes 4 tokens of a text"),
        ({"text": {"tokenizer": "m/model.onnx", "tokens": 5, "ids": "t", "mask": ""}}, "makes 5 tokens of a text"),
        ({"preprocess": {"input": "p", "resize": 9, "crop": 8, "fit": "pad"}}, "'pad' to 9 and to 8 pixels"),
        ({"preprocess": {"input": "p", "resize": 8, "crop": 8, "fit": "pad", "fill": 256}}, "no manifest of format"),
        ({"detection": {"boxes": "q", "scores": "q", "iou_threshold": 1.5}}, "no manifest of format"),
    ],
)
def test_what_a_device_could_not_prepare_or_read_is_refused(changes, message):
    given, told = ([{"name": name, "dtype": "float32", "shape": [-1, 4]}] for name in "pq")
    tensors = {"inputs": [*given, {"name": "t", "dtype": "int64", "shape": [-1, 4]}], "outputs": told}
    with pytest.raises(BundleError, match=message):
        decode(document(**tensors, **changes))


def test_a_variant_named_twice_is_refused():
    with pytest.raises(BundleError, match="names a variant twice"):
        decode(document(variants=[msgspec.to_builtins(variant())] * 2))


@pytest.mark.parametrize(
    "changes",
    [
        {"variants": [msgspec.to_builtins(variant(path="other"))]},
        {"golden": {"inputs": {"x": "other"}}},
        {"golden": {"outputs": {"x": "other"}}},
        {"variants": [{**msgspec.to_builtins(variant()), "files": ["m/model.onnx", "other"]}]},
    ],
)
def test_a_file_that_is_used_but_not_listed_is_named(changes):
    with pytest.raises(BundleError, match="uses 'other' but does not list it"):
        decode(document(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"surprise": 1},
        {"variants": []},
        {"name": "../x"},
        {"name": "x" * 101},
        {"task": "magic"},
        {"files": [{"path": "m/model.onnx", "size": -1, "sha256": ZERO}]},
        {"files": [{"path": "m/model.onnx", "size": 1, "sha256": "abc"}]},
        {"files": [{"path": "m/model.onnx", "size": 1, "sha256": "A" * 64}]},
        {"preprocess": {"input": "x", "resize": 0, "crop": 8}},
        {"preprocess": {"input": "x", "resize": 8, "crop": 1 << 40}},
    ],
)
def test_what_the_format_does_not_know_is_refused(changes):
    with pytest.raises(BundleError, match="no manifest of format 1"):
        decode(document(**changes))


def test_a_manifest_beyond_the_bound_is_refused_before_it_is_parsed():
    with pytest.raises(BundleError, match="more than"):
        manifests.decode(b" " * (manifests.MAX_MANIFEST_BYTES + 1))


@pytest.mark.attack("bomb")
def test_more_files_than_the_bound_are_refused():
    files = [msgspec.to_builtins(entry(f"f{n}")) for n in range(10_001)]
    with pytest.raises(BundleError):
        decode(document(files=files))


def test_an_unknown_variant_offers_the_nearest():
    with pytest.raises(UnknownName) as caught:
        manifest().variant("x86_64")
    assert "x86-64" in caught.value.hint


def test_shared_and_unclaimed_files_belong_to_every_variant():
    paths = ("one", "two", "shared", "golden.npy", "card.md")
    value = manifest(
        documents={"card": "card.md"},
        files=tuple(entry(p) for p in paths),
        variants=(
            variant("a", "one", files=("one", "shared")),
            variant("b", "two", files=("two", "shared")),
        ),
    )
    assert {e.path for e in value.files_of("a")} == {"one", "shared", "golden.npy"}
    assert {e.path for e in value.files_of("b")} == {"two", "shared", "golden.npy"}
    assert {e.path for e in value.files_of(None)} == set(paths)


def test_a_variant_whose_main_file_is_not_among_its_files_is_refused():
    lost = {**msgspec.to_builtins(variant()), "files": []}
    with pytest.raises(BundleError, match="which is not among its files"):
        decode(document(variants=[lost]))


def test_a_port_with_a_scale_holds_integers_of_eight_bits_within_bounds():
    end = {"name": "x", "key": "x", "dtype": "int8", "scale": 0.5, "zero": -3}
    lone = document()["variants"][0]
    (port,) = decode(document(variants=[{**lone, "inputs": [end]}])).variants[0].inputs
    assert (port.scale, port.zero) == (0.5, -3)
    for wrong in ({"dtype": "float32"}, {"scale": -1.0}, {"scale": 1e31}, {"zero": 256}):
        with pytest.raises(BundleError):
            decode(document(variants=[{**lone, "inputs": [{**end, **wrong}]}]))
