"""ONNX files that would have ONNX Runtime read what is not theirs, and sound ones that must pass."""

import numpy as np
import pytest
from fakes import bundles
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import BundleError
from edgekit.guards import ModelFile, check_file

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402  # behind the skip

SOUND = bundles.mlp_onnx(sizes=(4, 3, 2))
LISTED = frozenset(["x86/m.onnx", "x86/m.onnx.data", "golden/image.npy"])


def look(folder, content, listed=LISTED, file_format="onnx"):
    (folder / "x86").mkdir(exist_ok=True)
    (folder / "x86/m.onnx").write_bytes(content)
    check_file(ModelFile(folder, "x86/m.onnx", listed), file_format)


def is_refused(folder, content, because, **options):
    with pytest.raises(BundleError, match=because) as caught:
        look(folder, content, **options)
    assert caught.value.message.startswith("m.onnx, byte ")


def external(location="m.onnx.data", name="w", **entries):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def graph(nodes=(), weights=()):
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [4])] for name in "xy"]
    return helper.make_graph(list(nodes), "g", *ends, list(weights))


def saved(inner, functions=()):
    return helper.make_model(inner, functions=list(functions)).SerializeToString()


def in_initializer(tensor):
    return saved(graph(weights=[tensor]))


def in_constant(tensor):
    return saved(graph([helper.make_node("Constant", [], ["w"], value=tensor)]))


def in_branch(tensor):
    deep = graph([helper.make_node("If", ["c"], ["y"], then_branch=graph(weights=[tensor]), else_branch=graph())])
    return saved(graph([helper.make_node("If", ["c"], ["y"], then_branch=deep, else_branch=graph())]))


def in_function(tensor):
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    return saved(graph(), [helper.make_function("d", "f", [], ["y"], [node], [helper.make_opsetid("", 17)])])


def in_sparse(tensor):
    inner = graph()
    inner.sparse_initializer.add().values.CopyFrom(tensor)
    return saved(inner)


def in_list(tensor):
    node = helper.make_node("Odd", [], ["y"])
    node.attribute.add(name="many", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)
    return saved(graph([node]))


def in_training(tensor):
    proto = helper.make_model(graph())
    proto.training_info.add().algorithm.CopyFrom(graph(weights=[tensor]))
    return proto.SerializeToString()


PLACES = [in_initializer, in_constant, in_branch, in_function, in_sparse, in_list, in_training]


@pytest.fixture
def beside(tmp_path):
    (tmp_path / "x86").mkdir()
    (tmp_path / "golden").mkdir()
    (tmp_path / "x86/m.onnx.data").write_bytes(bytes(100))
    (tmp_path / "golden/image.npy").write_bytes(bytes(100))
    (tmp_path / "x86/unlisted.data").write_bytes(bytes(100))
    return tmp_path


@pytest.mark.parametrize("place", PLACES)
def test_weights_in_a_listed_file_beside_the_graph_are_taken(beside, place):
    look(beside, place(external(offset=84, length=16)))


@pytest.mark.attack("external-data escape")
@pytest.mark.parametrize("place", PLACES)
def test_weights_out_of_the_folder_are_found_wherever_they_stand(beside, place):
    is_refused(beside, place(external("../../etc/shadow")), r"reads '\.\./\.\./etc/shadow', which is not a file of")


OUTSIDE = ["../golden/image.npy", "..", ".", "", "unlisted.data", "a/../../x", "..\\..\\x", "m.onnx.data\0",
           "*/_ORT_MEM_ADDR_/*", "M.ONNX.DATA", "~/x", "file:///etc/passwd"]  # fmt: skip


@pytest.mark.attack("external-data escape")
@pytest.mark.parametrize("location", OUTSIDE)
@pytest.mark.parametrize("listed", [True, False], ids=["in a bundle", "foreign"])
def test_a_name_that_is_not_a_file_of_the_model_is_refused(beside, location, listed):
    if not listed and location == "unlisted.data":
        pytest.skip("a foreign file may read any plain file beside it")
    options = {} if listed else {"listed": None}
    is_refused(beside, in_initializer(external(location)), "not a file of this model|no plain file", **options)


@pytest.mark.attack("absolute path")
@pytest.mark.parametrize("location", ["/etc/passwd", "//etc/passwd", "/"])
def test_an_absolute_path_is_refused(beside, location):
    is_refused(beside, in_initializer(external(location)), "not a file of this model")


@pytest.mark.attack("symlink")
def test_a_link_in_the_listed_files_place_is_refused(beside, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(100))
    (beside / "x86/m.onnx.data").unlink()
    (beside / "x86/m.onnx.data").symlink_to(secret)
    is_refused(beside, in_initializer(external()), "no plain file")
    is_refused(beside, in_initializer(external()), "no plain file", listed=None)


@pytest.mark.attack("symlink")
def test_a_folder_that_is_a_link_is_refused_for_a_foreign_file(beside, tmp_path):
    (tmp_path / "away").mkdir()
    (tmp_path / "away/w").write_bytes(bytes(100))
    (beside / "x86/sub").symlink_to(tmp_path / "away")
    is_refused(beside, in_initializer(external("sub/w")), "no plain file", listed=None)


@pytest.mark.attack("external-data escape")
@pytest.mark.parametrize(
    ("entries", "because"),
    [
        ({"offset": 84, "length": 17}, "17 bytes at 84"),
        ({"offset": 101}, "0 bytes at 101"),
        ({"offset": 2**63, "length": 2**63}, "which has 100"),
        ({"offset": -1}, "no number"),
        ({"length": "1e3"}, "no number"),
        ({"offset": "0x10"}, "no number"),
        ({"offset": " 1"}, "no number"),
        ({"offset": "1" * 20}, "no number"),
        ({"basepath": "/"}, "external data tell b'basepath'"),
    ],
)
def test_bytes_beyond_the_file_are_refused(beside, entries, because):
    is_refused(beside, in_initializer(external(**entries)), because)


@pytest.mark.attack("external-data escape")
def test_a_tensor_that_tells_its_place_twice_or_not_at_all_is_refused(beside):
    twice = external()
    twice.external_data.add(key="location", value="../x")
    is_refused(beside, in_initializer(twice), "twice")
    nowhere = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    is_refused(beside, in_initializer(nowhere), "reads ''")
    silent = external("../x")
    silent.ClearField("data_location")  # protobuf would merge it in from elsewhere
    is_refused(beside, in_initializer(silent), "not a file of this model")


@pytest.mark.attack("external-data escape")
def test_what_protobuf_would_merge_of_two_halves_is_refused(beside):
    one, other = (saved(graph(weights=[numpy_helper.from_array(np.ones(4, np.float32), "w")])) for _ in range(2))
    assert len(onnx.load_from_string(one + other).graph.initializer) == 2  # it is merged
    is_refused(beside, one + other, "tells its field 7 twice")


@pytest.mark.attack("external-data escape")
def test_an_operator_that_reads_a_compiled_file_by_its_path_is_refused(beside):
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="../../x", embed_mode=0)
    is_refused(beside, saved(graph([node])), "EPContext would read a file")
    is_refused(beside, saved(graph([node])), "EPContext would read a file", file_format="tensorrt")


@pytest.mark.attack("bomb")
def test_graphs_in_graphs_without_end_are_refused(beside):
    def nested(levels):
        inner = b""
        for _ in range(levels):
            for tag in (b"\x32", b"\x2a", b"\x0a"):  # a node's attribute's graph
                inner = tag + varint(len(inner)) + inner
        return b"\x3a" + varint(len(inner)) + inner

    look(beside, nested(10))
    is_refused(beside, nested(5000), "messages in each other")


@pytest.mark.attack("bomb")
def test_fields_without_end_are_refused(beside, monkeypatch):
    from edgekit.guards import _protobuf

    monkeypatch.setattr(_protobuf, "MOST_FIELDS", 1000)
    is_refused(beside, b"\x08\x01" * 1001, "more than 1000 fields")


def varint(value):
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def test_a_file_of_onnx_runtimes_own_format_is_refused(tmp_path):
    (tmp_path / "m.ort").write_bytes(SOUND)
    with pytest.raises(BundleError, match="another format"):
        check_file(ModelFile(tmp_path, "m.ort"), "onnx")


@pytest.mark.parametrize("end", range(0, len(SOUND), 7))
def test_a_cut_file_is_refused(tmp_path, end):
    """Protobuf has no end of its own: cut between two fields of the model it is a shorter model, without its opset."""
    try:
        look(tmp_path, SOUND[:end])
    except BundleError:
        return
    assert onnx.load_from_string(SOUND[:end]).graph.node


def test_what_protobuf_takes_is_taken_and_what_it_does_not_is_not(tmp_path):
    look(tmp_path, SOUND)
    look(tmp_path, SOUND, file_format="tensorrt")
    for content in (b"", b"\x0b", b"\xff" * 30, b"this is no model", b"\x3a\xff\xff\xff\xff\x7f"):
        is_refused(tmp_path, content, "byte")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.data())
def test_any_changed_byte_is_taken_or_refused_with_one_kind_of_error(tmp_path, changes, data):
    content = bytearray(data.draw(st.sampled_from([SOUND, in_branch(external()), in_function(external())])))
    for at, byte in changes:
        content[at % len(content)] = byte
    try:
        look(tmp_path, content)
    except BundleError:
        return
    try:
        proto = onnx.load_from_string(bytes(content))
    except Exception:  # noqa: BLE001  # protobuf has errors of several packages, and may be stricter: texts are no UTF-8
        return
    named = {entry.value for w in proto.graph.initializer for entry in w.external_data if entry.key == "location"}
    assert named <= {"m.onnx.data"}
