"""Reads trained weights by name: safetensors, PyTorch's files without code in them, torch.export's archive."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

from edgekit.errors import UsageError
from edgekit.network_files import broken_file_errors
from edgekit.plugins import extra
from edgekit.sources import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

WRAPPINGS = ("state_dict", "model_state_dict", "model")
"""Under which key training scripts put the weights beside what else they keep."""


def read(path: Path, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint that fits the network, tensor by tensor.

    Raises:
        UsageError: not there, damaged, more than tensors, weights of a kind that the network does not take, or the
            checkpoint of another network; names the tensor.
    """
    import torch

    if not path.is_file():
        raise UsageError(f"there is no checkpoint at {path}", "check --checkpoint")
    state = _content(path)
    if isinstance(state, dict):
        inner = [state[key] for key in WRAPPINGS if isinstance(state.get(key), dict)]
        state = inner[0] if inner else state
    if not isinstance(state, dict):
        raise UsageError(
            f"{path} is no checkpoint: it holds a {type(state).__name__}, not tensors by name",
            "write it with torch.save(network.state_dict(), path)",
        )
    state = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    _refuse_misfit(path, state, module.state_dict())
    return state


def read_program(path: Path) -> torch.export.ExportedProgram:
    """Read an archive that ``torch.export.save`` wrote.

    Raises:
        UsageError: not there, or damaged.
    """
    with extra("compress"):
        import torch
    if not path.is_file():
        raise UsageError(f"there is no exported program at {path}", "check the path")
    if not zipfile.is_zipfile(path):  # PyTorch would print its trace before it refuses
        raise UsageError(
            f"{path} is no exported program, or only the beginning of one", "write it with torch.export.save"
        )
    try:
        with path.open("rb") as file:  # torch ends the process at a path that is no UTF-8
            return torch.export.load(file)
    except broken_file_errors() as error:
        raise UsageError(
            f"{path} is no exported program: {first_line(error)}", "write it again with torch.export.save"
        ) from error


def _content(path: Path) -> object:
    import torch

    if path.suffix == ".pt2":
        return dict(read_program(path).state_dict)
    try:
        if path.suffix == ".safetensors":
            with extra("compress"):
                from safetensors.torch import load_file
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except broken_file_errors() as error:
        raise UsageError(
            f"{path} is no checkpoint: {_unpickled(error)}", "give .safetensors, .pt with weights only, or .pt2"
        ) from error


def _unpickled(error: Exception) -> str:
    """Leave out PyTorch's advice to load what is no plain tensors by running its code."""
    import pickle

    if isinstance(error, pickle.UnpicklingError):
        return "it holds something else than tensors, or is damaged"
    return first_line(error)


def _refuse_misfit(path: Path, state: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    import torch

    hint = "is it the checkpoint of another model?"
    for name in sorted(want.keys() - state.keys()):
        if not name.endswith("num_batches_tracked"):
            raise UsageError(f"{path} lacks {name!r}, which the network has", hint)
    for name, tensor in state.items():
        if name not in want:
            raise UsageError(f"{path} holds {name!r}, which the network lacks", hint)
        _refuse_kind(f"{path}: {name!r}", tensor, want[name])
        if tensor.shape != want[name].shape:
            raise UsageError(
                f"{path}: {name!r} is {list(tensor.shape)}, the network wants {list(want[name].shape)}", hint
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UsageError(f"{path}: {name!r} holds NaN or infinity", "training diverged: take an earlier checkpoint")


def _refuse_kind(what: str, tensor: torch.Tensor, want: torch.Tensor) -> None:
    import torch

    if tensor.is_quantized:
        raise UsageError(f"{what} is quantized", "give the float checkpoint it was made from: edgekit quantizes it")
    if tensor.is_meta:
        raise UsageError(f"{what} has a shape, but no numbers: it is a meta tensor", "save it with its weights loaded")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise UsageError(f"{what} is {layout}, not dense", "save tensor.to_dense() in its place")
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if want.dtype in floats and tensor.dtype not in floats:
        given, wanted = (str(one.dtype).removeprefix("torch.") for one in (tensor, want))
        raise UsageError(f"{what} is {given}, the network wants {wanted}", "give the checkpoint with float weights")
