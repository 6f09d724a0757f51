"""Writes, opens and names ONNX graphs of any size: protobuf ends at 2 GiB, so large weights lie in a file of their own.

Knows no model and no engine's options.
"""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import UsageError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx
    import onnxruntime

LARGE = 1 << 30
"""Bytes of weights from which on they lie in a file of their own."""
PAGE = 4096
"""Smaller weights stay in the graph."""


def size(proto: onnx.ModelProto) -> int:
    """Return how many bytes the weights have that lie in the graph."""
    return sum(len(one.raw_data) for one in tensors(proto.graph))


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Give all constants of a graph: weights, those of nodes, and those of graphs inside nodes."""
    yield from graph.initializer
    for attribute in (one for node in graph.node for one in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
            yield from tensors(inner)


def one_piece(proto: onnx.ModelProto) -> bytes:
    """Return a graph with its weights as one file, the same bytes for the same graph.

    Raises:
        UsageError: it has more than protobuf holds.
    """
    held = size(proto)
    if held >= 2 * LARGE:
        raise UsageError(
            f"the ONNX network has {held / LARGE:.1f} GiB of weights, and passes change at most 2 GiB of them",
            "give the PyTorch network or the Hugging Face folder that it came from, or export it as it is",
        )
    return bytes(proto.SerializeToString(deterministic=True))


def whole(path: Path) -> bytes:
    """Return an ONNX file as one piece, with the weights that lie in files beside it.

    Raises:
        UsageError: it has more than protobuf holds.
    """
    with extra("onnx"):
        import onnx
    return one_piece(onnx.load(path)) if _beside(path) else path.read_bytes()


def digest(path: Path) -> str:
    """Return the SHA-256 of an ONNX file, and of the files of weights beside it where there are any."""
    total = hashlib.sha256(path.read_bytes())
    for name in _beside(path):
        with (path.parent / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _beside(path: Path) -> list[str]:
    with extra("onnx"):
        import onnx
    graph = onnx.load(path, load_external_data=False).graph
    external = [one for one in tensors(graph) if onnx.external_data_helper.uses_external_data(one)]
    return sorted({entry.value for one in external for entry in one.external_data if entry.key == "location"})


def save(proto: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Write a file and return the names of the files, the same bytes for the same graph; see `move_apart`."""
    apart = move_apart(proto, path)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return (path.name, *apart)


def move_apart(proto: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Write the weights of a large model into one file beside ``path`` and return its name; nothing for a small one.

    They are taken out of ``proto``. Each begins where a page does, so that an engine can map them.
    """
    from onnx.external_data_helper import set_external_data, write_external_data_tensors

    if size(proto) <= LARGE:
        return ()
    apart, end = f"{path.name}.data", 0
    for weight in tensors(proto.graph):
        length = len(weight.raw_data)
        if length >= PAGE:
            set_external_data(weight, apart, offset=end)
            end = -(-(end + length) // PAGE) * PAGE
    write_external_data_tensors(proto, str(path.parent))
    (path.parent / apart).chmod(0o644)  # onnx lets its owner alone read it
    return (apart,)


@contextmanager
def light(proto: onnx.ModelProto) -> Iterator[dict[str, bytes]]:
    """Take the bytes of large weights out of a graph while something reads it that needs but their shapes.

    They are given by name, so that a copy which was made of the graph can have them too (`give_back`).
    """
    from onnx import TensorProto

    taken = [one for one in proto.graph.initializer if len(one.raw_data) >= PAGE]
    content = {one.name: one.raw_data for one in taken}
    for one in taken:
        one.ClearField("raw_data")
        one.data_location = TensorProto.EXTERNAL
        one.external_data.add(key="location", value="elsewhere")
    try:
        yield content
    finally:
        give_back(proto, content)


def give_back(proto: onnx.ModelProto, content: Mapping[str, bytes]) -> None:
    """Put bytes into the weights of a graph that `light` made empty, or of a copy of it."""
    for one in proto.graph.initializer:
        if one.name in content:
            one.raw_data = content[one.name]
            one.ClearField("data_location")
            del one.external_data[:]


def infer_shapes(proto: onnx.ModelProto, *, data_prop: bool = False) -> None:
    """Note the shape and type of every value in the graph that onnx can tell."""
    from onnx import shape_inference

    with light(proto):
        told = shape_inference.infer_shapes(proto, data_prop=data_prop).graph
    for own, found in ((proto.graph.value_info, told.value_info), (proto.graph.output, told.output)):
        del own[:]
        own.extend(found)


def session(proto: onnx.ModelProto, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
    """Open a graph in ONNX Runtime on the CPU; large weights are taken out of ``proto``."""
    with extra("onnx"):
        import onnxruntime
    how = {"sess_options": options, "providers": ["CPUExecutionProvider"]}
    if size(proto) <= LARGE:
        return onnxruntime.InferenceSession(proto.SerializeToString(), **how)
    with tempfile.TemporaryDirectory() as folder:  # which may go once the session is there: it has read the weights
        path = Path(folder) / "model.onnx"
        save(proto, path)
        return onnxruntime.InferenceSession(str(path), **how)
