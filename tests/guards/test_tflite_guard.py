"""LiteRT files whose offsets, indices or buffers lead out of them, and sound ones that must pass."""

import numpy as np
import pytest
from fakes.litert_files import dense, packed, schema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import BundleError
from edgekit.guards import ModelFile, check_file

SOUND = packed(dense())


def look(folder, content, *listed):
    (folder / "m.tflite").write_bytes(content)
    check_file(ModelFile(folder, "m.tflite", frozenset(["m.tflite", *listed])), "tflite")


def is_refused(folder, content, because, *listed):
    with pytest.raises(BundleError, match=because) as caught:
        look(folder, content, *listed)
    assert caught.value.message.startswith("m.tflite, byte ")


def test_a_file_that_litert_runs_passes(tmp_path):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(model_content=SOUND)
    interpreter.allocate_tensors()
    interpreter.set_tensor(0, np.ones((1, 4), np.float32))
    interpreter.invoke()
    assert interpreter.get_tensor(2).tolist() == [[6.0, 22.0, 38.0]]
    look(tmp_path, SOUND)


def bent(change):
    model = dense()
    change(model)
    return packed(model)


def with_buffer(**fields):
    def change(model):
        for name, value in fields.items():
            setattr(model.buffers[1], name, value)

    return bent(change)


def of_graph(name, value):
    return bent(lambda model: setattr(model.subgraphs[0], name, value))


def of_operator(name, value):
    return bent(lambda model: setattr(model.subgraphs[0].operators[0], name, value))


BENT = {
    "a buffer that is not there": (
        bent(lambda model: setattr(model.subgraphs[0].tensors[1], "buffer", 2)), "buffer 2 is named, the file has 2",
    ),
    "an input that is not there": (of_graph("inputs", [3]), "tensor 3 is named, the graph has 3"),
    "an output below zero": (of_graph("outputs", [-2]), "tensor -2 is named"),
    "an operator's input that is not there": (of_operator("inputs", [0, 99, -1]), "tensor 99"),
    "an operator's output that is not there": (of_operator("outputs", [2**31 - 1]), "tensor 2147483647"),
    "a scratch tensor that is not there": (of_operator("intermediates", [7]), "tensor 7"),
    "an operator of no code": (of_operator("opcodeIndex", 1), "code 1 is named, the file has 1"),
    "a signature of no graph": (
        bent(lambda model: setattr(model.signatureDefs[0], "subgraphIndex", 5)), "subgraph 5 is named",
    ),
    "weights behind the end": (with_buffer(data=None, offset=1 << 40, size=48), "48 bytes are told at 1099511627776"),
    "weights longer than the file": (with_buffer(data=None, offset=2, size=1 << 62), "bytes are told at 2"),
    "weights that wrap around": (with_buffer(data=None, offset=2**64 - 8, size=16), "16 bytes are told at"),
    "options behind the end": (
        bent(lambda model: (setattr(model.subgraphs[0].operators[0], "largeCustomOptionsOffset", 1 << 33),
                            setattr(model.subgraphs[0].operators[0], "largeCustomOptionsSize", 9))),
        "9 bytes are told at",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BENT)
def test_what_points_out_of_the_file_is_refused(tmp_path, name):
    is_refused(tmp_path, *BENT[name])


def with_external(name, offset=0, length=16, group=0):
    def change(model):
        model.externalBufferGroups, model.externalBuffers = [schema.ExternalBufferGroupT()], [schema.ExternalBufferT()]
        model.externalBufferGroups[0].name = name
        buffer = model.externalBuffers[0]
        buffer.id, buffer.group, buffer.offset, buffer.length = 1, group, offset, length

    return bent(change)


@pytest.mark.attack("external-data escape")
@pytest.mark.parametrize("name", ["../../etc/shadow", "/etc/shadow", "unlisted", "", None])
def test_weights_in_a_file_that_is_not_the_models_are_refused(tmp_path, name):
    (tmp_path / "unlisted").write_bytes(bytes(16))
    is_refused(tmp_path, with_external(name), "not a file of this model")


@pytest.mark.attack("external-data escape")
def test_weights_beside_the_file_stay_within_their_own(tmp_path):
    (tmp_path / "w").write_bytes(bytes(16))
    look(tmp_path, with_external("w"), "w")
    is_refused(tmp_path, with_external("w", length=17), "17 bytes at 0 of 'w'", "w")
    is_refused(tmp_path, with_external("w", offset=2**63, length=2**63), "which has 16", "w")
    is_refused(tmp_path, with_external("w", group=1), "group 1", "w")


@pytest.mark.parametrize("end", range(0, len(SOUND), 3))
def test_a_cut_file_is_refused(tmp_path, end):
    is_refused(tmp_path, SOUND[:end], "byte")


def test_tables_that_are_shared_a_million_times_are_refused(tmp_path, monkeypatch):
    from edgekit.guards import _flatbuffer

    monkeypatch.setattr(_flatbuffer, "MOST_TABLES", 20)
    is_refused(tmp_path, bent(lambda model: model.subgraphs[0].operators.extend(model.subgraphs[0].operators * 20)),
               "more than 20 tables")  # fmt: skip


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_changed_byte_is_taken_or_refused_with_one_kind_of_error(tmp_path, changes):
    content = bytearray(SOUND)
    for at, byte in changes:
        content[at] = byte
    try:
        look(tmp_path, content)
    except BundleError:
        return
    model = schema.Model.GetRootAs(bytes(content))  # what was taken can be walked to its end by LiteRT's own reader
    for place in range(model.SubgraphsLength()):
        graph = model.Subgraphs(place)
        for number in range(graph.TensorsLength()):
            tensor = graph.Tensors(number)
            assert tensor.Buffer() < model.BuffersLength()
            tensor.ShapeAsNumpy()
            tensor.Name()
