"""The wire format against Google's own package: what either writes, the other reads, and nothing else gets through."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import InputError
from edgekit.runtime.server import oip_contents, oip_messages, protobuf
from edgekit.runtime.server.protobuf import Message, decode, encode

pytest.importorskip("grpc", reason="grpcio is not installed")
theirs = pytest.importorskip("tritonclient.grpc.service_pb2", reason="tritonclient is not installed")

PAIRS = {
    "Live": "ServerLiveResponse",
    "ModelName": "ModelReadyRequest",
    "ServerMetadata": "ServerMetadataResponse",
    "ModelMetadata": "ModelMetadataResponse",
    "Parameter": "InferParameter",
    "Contents": "InferTensorContents",
    "InferRequest": "ModelInferRequest",
    "InferResponse": "ModelInferResponse",
    "StreamResponse": "ModelStreamInferResponse",
    "RepositoryIndex": "RepositoryIndexResponse",
}
TEXT = st.text(max_size=8)
INT64 = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize(("ours", "name"), PAIRS.items())
def test_every_field_has_the_number_and_the_name_of_the_published_one(ours, name):
    published = {f.number: f.name for f in getattr(theirs, name).DESCRIPTOR.fields}
    found = dict(enumerate(getattr(oip_messages, ours).__struct_fields__, 1))
    if ours == "ModelMetadata":
        assert found.pop(6) == "properties"  # KServe's; Triton has none
    assert found == published


@st.composite
def requests(draw):
    """A request as Google's package builds it."""
    made = theirs.ModelInferRequest(model_name=draw(TEXT), model_version=draw(TEXT), id=draw(TEXT))
    for key, value in draw(
        st.dictionaries(TEXT, st.one_of(st.booleans(), INT64, TEXT, st.floats())),
    ).items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
        setattr(made.parameters[key], kind, value)
    for _ in range(draw(st.integers(0, 3))):
        tensor = made.inputs.add(name=draw(TEXT), datatype=draw(TEXT), shape=draw(st.lists(INT64, max_size=4)))
        if draw(st.booleans()):
            tensor.contents.fp32_contents.extend(draw(st.lists(st.floats(width=32), max_size=3)))
            tensor.contents.int_contents.extend(draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3)))
            tensor.contents.bytes_contents.extend(draw(st.lists(st.binary(max_size=200), max_size=3)))
    for _ in range(draw(st.integers(0, 2))):
        made.outputs.add(name=draw(TEXT)).parameters["p"].bool_param = draw(st.booleans())
    made.raw_input_contents.extend(draw(st.lists(st.binary(max_size=200), max_size=3)))
    return made


@settings(max_examples=200, deadline=None)
@given(requests())
def test_a_request_means_the_same_to_both_and_comes_back_as_it_was(made):
    read = decode(made.SerializeToString(), oip_messages.InferRequest)
    assert (read.model_name, read.model_version, read.id) == (made.model_name, made.model_version, made.id)
    assert [tuple(t.shape) for t in made.inputs] == [t.shape for t in read.inputs]
    assert list(map(bytes, read.raw_input_contents)) == list(made.raw_input_contents)
    for key, value in made.parameters.items():
        kind = value.WhichOneof("parameter_choice")
        want, got = getattr(value, kind), getattr(read.parameters[key], kind)
        assert got == want or (math.isnan(got) and math.isnan(want))
    back = theirs.ModelInferRequest.FromString(encode(read))
    assert back.SerializeToString(deterministic=True) == made.SerializeToString(deterministic=True)


INTEGERS = [name for name, field in oip_contents.FIELDS.items() if "int" in field or "bool" in field]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(INTEGERS), st.data())
def test_typed_integers_are_read_and_written_as_the_package_does(datatype, data):
    dtype = np.dtype(oip_contents.DATATYPES[datatype])
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    values = np.array(data.draw(st.lists(st.integers(int(low), int(high)), max_size=30)), dtype)
    field = oip_contents.FIELDS[datatype]
    made = theirs.InferTensorContents(**{field: values.tolist()})
    contents = decode(made.SerializeToString(), oip_messages.Contents)
    tensor = oip_messages.Tensor(name="x", datatype=datatype, contents=contents)
    assert bytes(oip_contents.raw_bytes(tensor)) == values.tobytes()
    assert encode(oip_contents.typed(datatype, values)) == made.SerializeToString()


def test_more_integers_than_are_read_at_once_are_all_read():
    values = np.random.default_rng(3).integers(-(2**40), 2**40, 2 * oip_contents.BLOCK + 7)
    made = theirs.InferTensorContents(int64_contents=values.tolist()).SerializeToString()
    tensor = oip_messages.Tensor(name="x", datatype="INT64", contents=decode(made, oip_messages.Contents))
    assert bytes(oip_contents.raw_bytes(tensor)) == values.tobytes()


def test_numbers_that_travel_one_by_one_are_read_as_those_that_are_packed():
    single = b"".join(protobuf.varint(3 << 3) + protobuf.varint(n) for n in (1, 300, -1))
    single += protobuf.varint(3 << 3 | 2) + b"\x02\x05\x06"
    tensor = oip_messages.Tensor(name="x", datatype="INT64", contents=decode(single, oip_messages.Contents))
    assert np.frombuffer(oip_contents.raw_bytes(tensor), np.int64).tolist() == [1, 300, -1, 5, 6]
    assert theirs.InferTensorContents.FromString(single).int64_contents == [1, 300, -1, 5, 6]


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60))
def test_noise_is_refused_or_read_but_never_breaks(noise):
    from google.protobuf.message import DecodeError

    try:
        read = decode(noise, oip_messages.InferRequest)
        theirs.ModelInferRequest.FromString(noise)
    except (InputError, DecodeError):
        return
    assert theirs.ModelInferRequest.FromString(noise).model_name == read.model_name


@settings(max_examples=300, deadline=None)
@given(requests(), st.data())
def test_a_changed_or_cut_request_is_refused_or_read_but_never_breaks(made, data):
    whole = bytearray(made.SerializeToString() or b"\x0a\x00")
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    for damaged in (bytes(whole), bytes(whole[: data.draw(st.integers(0, len(whole)))])):
        try:
            decode(damaged, oip_messages.InferRequest)
        except InputError:
            continue


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\x0a\x05abc", "ends too early"),
        (b"\x0a", "ends inside a number"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "ends too early"),
        (b"\x80" * 11, "more than ten bytes"),
        (b"\x0a\x02\xff\xfe", "no UTF-8"),
        (b"\x08\x05", "'model_name' travelled as type 0, not 2"),
        (b"\x0b", "no wire type 3"),
        (b"\x02\x00", "number 0"),
    ],
)
def test_a_damaged_message_is_refused_with_its_reason(data, told):
    with pytest.raises(InputError, match=told):
        decode(data, oip_messages.InferRequest)


@pytest.mark.parametrize("field", [b"\x2a\x00", b"\x3a\x00"], ids=["inputs", "raw contents"])
def test_a_message_of_a_million_empty_fields_is_refused(field):
    with pytest.raises(InputError, match="more than 262144 fields"):
        decode(field * 1_000_000, oip_messages.InferRequest)


def test_a_shape_of_a_million_axes_is_refused():
    inner = b"\x1a" + protobuf.varint(1_000_000) + b"\x01" * 1_000_000
    with pytest.raises(InputError, match="fields"):
        decode(b"\x2a" + protobuf.varint(len(inner)) + inner, oip_messages.InferRequest)


def test_unknown_fields_are_passed_over():
    class Newer(Message, frozen=True):
        name: str = ""
        version: str = ""
        weight: float = 0.0
        count: int = 0
        note: str = ""

    data = encode(Newer(name="m", weight=1.5, count=-1, note="n", version="2"))
    assert decode(data, oip_messages.ModelName) == oip_messages.ModelName(name="m", version="2")
    assert decode(data, Newer) == Newer(name="m", weight=1.5, count=-1, note="n", version="2")


def test_bytes_are_slices_of_what_came_and_no_copies():
    made = theirs.ModelInferRequest(raw_input_contents=[b"x" * 1000]).SerializeToString()
    assert decode(made, oip_messages.InferRequest).raw_input_contents[0].obj is made
