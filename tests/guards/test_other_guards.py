"""OpenVINO, ExecuTorch and Core ML files that read what is not theirs, and what holds for every guard."""

import contextlib
import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit import guards, plugins
from edgekit.errors import BundleError
from edgekit.guards import ModelFile, check_file

GUARDS = plugins.names("edgekit.guards")


def look(folder, name, content, file_format, listed=()):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    check_file(ModelFile(folder, name, frozenset([name, *listed])), file_format)


def net(layers="", version="11", before=""):
    return f'<?xml version="1.0"?>{before}<net name="g" version="{version}"><layers>{layers}</layers></net>'.encode()


def constant(offset=0, size=4):
    return f'<layer id="0" type="Const"><data element_type="f32" shape="1" offset="{offset}" size="{size}"/></layer>'


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "m.bin").write_bytes(bytes(8))
    return tmp_path


def test_weights_in_the_bin_beside_the_graph_are_taken(weights):
    look(weights, "m.xml", net(constant(4, 4)), "openvino", ["m.bin"])
    look(weights, "m.xml", net('<layer type="Result"><data offset="x" size="y"/></layer>'), "openvino")


BOMB = '<!DOCTYPE net [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>'
XML = {
    "entities": (net("&b;", before=BOMB), "document type"),
    "an entity of a file": (net("&x;", before='<!DOCTYPE n [<!ENTITY x SYSTEM "file:///etc/passwd">]>'), "document"),
    "weights behind the end": (net(constant(8, 1)), "1 bytes at 8"),
    "weights that wrap around": (net(constant(2**63, 2**63)), "which have 8"),
    "weights before the start": (net(constant(-1)), "no number"),
    "elements without end": (net("<a>" * 5000), "in each other"),
    "another document": (b"<html/>", "no network"),
    "a version nobody reads": (net(version="7"), "no network"),
    "no document": (b"\0" * 40, "no XML"),
    "half a document": (net(constant())[:-9], "no XML"),
}


@pytest.mark.attack("bomb")
@pytest.mark.parametrize("name", XML)
def test_a_graph_of_openvino_that_does_harm_is_refused(weights, name):
    content, because = XML[name]
    with pytest.raises(BundleError, match=because):
        look(weights, "m.xml", content, "openvino", ["m.bin"])


@pytest.mark.attack("external-data escape")
def test_weights_of_openvino_that_are_not_listed_or_a_link_are_refused(weights):
    with pytest.raises(BundleError, match="not a file of this model"):
        look(weights, "m.xml", net(constant()), "openvino")
    (weights / "m.bin").rename(weights / "n.bin")
    (weights / "m.bin").symlink_to("n.bin")
    with pytest.raises(BundleError, match="no plain file"):
        look(weights, "m.xml", net(constant()), "openvino", ["m.bin"])


def program(segment=(0, 8), base=96, length=64, cut=None):
    """Return a program of ExecuTorch with one segment: a root table with its slot 4, and a table of two numbers."""
    head = struct.pack("<I4s4sIQQ", 48, b"ET12", b"eh00", 24, length, base).ljust(32, b"\0")
    vtable = struct.pack("<HH5H", 14, 8, 0, 0, 0, 0, 4).ljust(16, b"\0")  # at 32
    root = struct.pack("<iI", 16, 4)  # at 48; the vector lies at 56
    vector = struct.pack("<II", 1, 8)  # its only table lies at 68
    inner = struct.pack("<HHHH", 8, 20, 4, 12)
    table = struct.pack("<i", -20) + struct.pack("<QQ", *segment)  # its description lies behind it, at 88
    body = head + vtable + root + vector + bytes(4) + table + inner
    return (body.ljust(base, b"\0") + bytes(8))[:cut]


def test_a_program_whose_segment_lies_within_passes_and_another_does_not(tmp_path):
    look(tmp_path, "m.pte", program(), "executorch")
    for wrong, because in [
        (program(segment=(0, 9)), "a segment ends at 105"),
        (program(segment=(2**63, 2**63)), "a segment ends at"),
        (program(length=1 << 40), "a program of 1099511627776 bytes"),
        (program(base=96, cut=20), "byte"),
        (program().replace(b"ET12", b"XX12"), "no ExecuTorch program"),
    ]:
        with pytest.raises(BundleError, match=because):
            look(tmp_path, "m.pte", wrong, "executorch")


MODEL = "p/Data/com.apple.CoreML/model.mlmodel"
BLOB = "p/Data/com.apple.CoreML/weights/weight.bin"


def field(number, content):
    tag, size = number << 3 | 2, len(content)
    return b"".join(_varint(value) for value in (tag, size)) + content


def _varint(value):
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def spec(name):
    value = field(5, field(1, name.encode()))
    inside = value
    for number in (2, 5, 3, 2, 3, 2, 2):  # an operation's attribute, in a block, in a function, in a program
        inside = field(number, inside)
    return field(502, inside)


def package(folder, blob="@model_path/weights/weight.bin", root="com.apple.CoreML/model.mlmodel", model=None):
    for path, content in ((MODEL, spec(blob) if model is None else model), (BLOB, bytes(8))):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    listing = {"fileFormatVersion": "1.0.0", "itemInfoEntries": {"a": {"path": root}}, "rootModelIdentifier": "a"}
    look(folder, "p/Manifest.json", json.dumps(listing).encode(), "coreml", [MODEL, BLOB])


@pytest.mark.attack("external-data escape")
def test_a_package_of_core_ml_reads_its_own_files_alone(tmp_path):
    package(tmp_path)
    for wrong, because in [
        ({"blob": "@model_path/../../../../secret"}, "not a file of this model"),
        ({"blob": "/etc/passwd"}, "not in the package"),
        ({"root": "../../../secret"}, "not in it"),
        ({"root": "/etc/passwd"}, "not in it"),
        ({"root": "com.apple.CoreML/gone.mlmodel"}, "no model"),
        ({"model": field(556, b"")}, "lies in the app"),
        ({"model": b"\xff" * 9}, "byte"),
    ]:
        with pytest.raises(BundleError, match=because):
            package(tmp_path, **wrong)


@pytest.mark.parametrize("name", GUARDS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(noise=st.binary(max_size=200))
def test_noise_is_refused_by_every_guard_with_one_kind_of_error(name, tmp_path, noise):
    starts = {"gguf": b"GGUF", "tflite": b"\x10\0\0\0TFL3", "executorch": b"\x10\0\0\0ET12", "openvino": b"<net "}
    for content in (noise, starts.get(name, b"") + noise):
        with contextlib.suppress(BundleError):
            look(tmp_path, "file", content, name)


def test_a_missing_file_and_a_format_without_a_guard_are_told_apart(tmp_path):
    with pytest.raises(BundleError, match="missing from the bundle"):
        check_file(ModelFile(tmp_path, "gone"), "onnx")
    check_file(ModelFile(tmp_path, "gone"), "a-strangers-format")
    assert set(GUARDS) == {"coreml", "executorch", "gguf", "onnx", "openvino", "tensorrt", "tflite"}
    assert guards.number(b"12", 0) == 12
