"""A PyTorch network as two files: its weights by name (safetensors) and its graph without them (torch.export).

Knows nothing of the folder they lie in. The same network gives the same bytes in any process and any place.
"""

from __future__ import annotations

import io
import json
import zipfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgekit.errors import UsageError
from edgekit.plugins import extra
from edgekit.sources import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch

GRAPH = "network.pt2"
WEIGHTS = "weights.safetensors"
TRACES = ("stack_trace", "from_node", "nn_module_stack", "source_fn_stack")
"""What torch.export notes of each node's origin: paths of this machine, numbers of this process, and a stack of
modules that grows each time a graph is saved and traced again."""


def broken_file_errors() -> tuple[type[Exception], ...]:
    """Return what PyTorch and safetensors raise for a file that is damaged or something else."""
    import pickle

    with extra("compress"):
        from safetensors import SafetensorError

    return (
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        OSError,
        AttributeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        SafetensorError,
    )


def write(program: torch.export.ExportedProgram, folder: Path) -> None:
    """Write both files into ``folder``."""
    (folder / WEIGHTS).write_bytes(tensors_to_bytes(program.state_dict))
    (folder / GRAPH).write_bytes(graph_bytes(program))


def graph_bytes(program: torch.export.ExportedProgram) -> bytes:
    """Return the graph as an archive without weights."""
    import torch

    archive = io.BytesIO()  # torch ends the process at a full disk, and at a path that is no UTF-8
    with _hollow(program), _without_places(program.graph_module):
        torch.export.save(program, archive)
    return archive.getvalue()


@contextmanager
def _hollow(program: torch.export.ExportedProgram) -> Iterator[None]:
    """Take the weights out for a while: a program is shared by all who trace the same network."""
    import torch

    whole = dict(program.state_dict)
    try:
        for name, tensor in whole.items():
            hollow = torch.empty_like(tensor, device="meta")
            is_learned = isinstance(tensor, torch.nn.Parameter)
            program.state_dict[name] = torch.nn.Parameter(hollow, tensor.requires_grad) if is_learned else hollow
        yield
    finally:
        program.state_dict.update(whole)


@contextmanager
def _without_places(module: torch.fx.GraphModule) -> Iterator[None]:
    nodes = [node for part in module.modules() for node in getattr(getattr(part, "graph", None), "nodes", ())]
    kept = [{key: node.meta.pop(key) for key in TRACES if key in node.meta} for node in nodes]
    try:
        yield
    finally:
        for node, origin in zip(nodes, kept, strict=True):
            node.meta.update(origin)


def read(folder: Path) -> torch.nn.Module:
    """Return the network of a folder; older ones hold the weights inside the graph's file.

    Raises:
        UsageError: a file is missing or damaged, or the two do not belong together.
    """
    with extra("compress"):
        import torch

    path = folder / GRAPH
    if not zipfile.is_zipfile(path):  # PyTorch would print its trace before it refuses
        raise UsageError(f"{path} is damaged: it is no archive", "run edgekit compress again")
    try:
        with path.open("rb") as file:  # torch ends the process at a path that is no UTF-8
            program = torch.export.load(file)
        hollow = [name for name, tensor in program.state_dict.items() if tensor.is_meta]
        if hollow or (folder / WEIGHTS).exists():
            _fill(program, folder / WEIGHTS)
        module: torch.nn.Module = program.module(check_guards=False)
    except broken_file_errors() as error:
        raise UsageError(
            f"{path} cannot be read: {first_line(error)}", "if it is damaged, run edgekit compress again"
        ) from error
    return module


def _fill(program: torch.export.ExportedProgram, path: Path) -> None:
    import torch

    tensors = read_tensors(path)
    for name, hollow in program.state_dict.items():
        found = tensors.get(name)
        if found is None or (found.shape, found.dtype) != (hollow.shape, hollow.dtype):
            raise UsageError(f"{path} is damaged: it does not fit {name!r} of the graph", "run edgekit compress again")
        is_learned = isinstance(hollow, torch.nn.Parameter)
        program.state_dict[name] = torch.nn.Parameter(found, hollow.requires_grad) if is_learned else found


def tensors_to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return tensors as a safetensors file; what shares memory whole, as tied weights do, is stored once."""
    with extra("compress"):
        from safetensors.torch import save
    first: dict[object, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else name
        if first.setdefault(place, name) != name:
            aliases[name] = first[place]
    kept = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items() if n not in aliases}
    # One key only: safetensors writes several in any order.
    return bytes(save(kept, {"aliases": json.dumps(aliases, sort_keys=True)} if aliases else None))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of `tensors_to_bytes`.

    Raises:
        UsageError: it is missing or damaged.
    """
    with extra("compress"):
        from safetensors.torch import load
    try:
        content = path.read_bytes()
        tensors: dict[str, torch.Tensor] = load(content)
        aliases = json.loads(_header(content).get("aliases", "{}"))
        return tensors | {name: tensors[source] for name, source in aliases.items()}
    except broken_file_errors() as error:
        raise UsageError(f"{path} is damaged: {first_line(error)}", "run edgekit compress again") from error


def _header(content: bytes) -> dict[str, str]:
    """Return the metadata, which safetensors gives from a path only: one that is no UTF-8 it does not open."""
    size = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    return found
