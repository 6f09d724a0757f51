"""Reads a model as people have it, and a compressed one as edgekit saved it.

Takes ``file.py:build`` or ``package.module:build`` with a checkpoint, an ONNX or GGUF file, a Hugging Face folder, or
a folder that `edgekit compress` wrote. Knows neither passes nor formats to export.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.datasets import load_data, refuse_unfit
from edgekit.errors import UsageError
from edgekit.manifest import Step
from edgekit.model import Data, GgufFile, LlamaFolder, Model, OnnxNetwork, Split, Task, TorchNetwork
from edgekit.network_files import broken_file_errors
from edgekit.plugins import extra
from edgekit.saving import load_saved, refuse_foreign, save, whole_onnx
from edgekit.sources import call, first_line, named_object
from edgekit.tensors import DYNAMIC, TensorSpec
from edgekit.tracing import trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from edgekit.tensors import Array

__all__ = ["load", "load_data", "named_object", "refuse_foreign", "save", "trace"]


def load(source: str, checkpoint: Path | None = None, data: Data | None = None) -> Model:
    """Read a model from ``file.py:build``, ``package.module:build``, ``.onnx``, ``.gguf``, or a folder.

    Raises:
        UsageError: nothing there, not readable, or the checkpoint does not fit the network.
    """
    if data is not None and not len(data.calibration):
        raise UsageError("the calibration split is empty", "give 32 or more samples that look like the device's")
    model = _load(source, checkpoint, data)
    refuse_unfit(model)
    return model


def _load(source: str, checkpoint: Path | None, data: Data | None) -> Model:
    path = Path(source)
    if ":" in source and not path.exists():
        return _load_torch(source, checkpoint, data)
    if checkpoint is not None:
        raise UsageError(f"{source} brings its own weights", "drop --checkpoint")
    if path.is_dir():
        return _load_folder(path, data)
    if path.suffix == ".onnx":
        return _load_onnx(path, data)
    if path.suffix == ".gguf":
        return _load_gguf(path)
    raise UsageError(
        f"{source!r} is no model", "give file.py:build, package.module:build, a .onnx or .gguf file, or a model folder"
    )


def _load_torch(source: str, checkpoint: Path | None, data: Data | None) -> Model:
    with extra("compress"):
        import torch
    module = call(source)
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"{source} returned {type(module).__name__}, not torch.nn.Module", "return the network")
    steps = [Step(name="load", options={"source": Path(source).name})]
    if checkpoint is not None:
        module.load_state_dict(_read_checkpoint(checkpoint, module))
        steps = [Step(name="load", options={"source": Path(source).name, "checkpoint": _sha256(checkpoint)})]
    if data is None:
        raise UsageError(f"{source} needs data to learn its input shapes", "give --data file.py:function or data.npz")
    name = source.rpartition(":")[0].removesuffix(".py").replace(".", "/").rpartition("/")[2]
    return from_module(name, module.eval(), data, tuple(steps))


def from_module(name: str, module: torch.nn.Module, data: Data, lineage: tuple[Step, ...] = ()) -> Model:
    """Wrap a PyTorch module; input names come from the data, shapes from its calibration split.

    Raises:
        UsageError: the network does not take the calibration data, or returns other than tensors.
    """
    names = tuple(data.calibration.inputs)
    network = TorchNetwork(module, names, ())
    try:
        count = _count_outputs(module, data.calibration.head(1))
        network = TorchNetwork(module, names, ("scores",) if count == 1 else tuple(f"output_{i}" for i in range(count)))
        results = network.run(data.calibration.head(2).inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        given = ", ".join(f"{n}: {a.dtype}{list(a.shape)}" for n, a in data.calibration.inputs.items())
        raise UsageError(
            f"{name} does not take the calibration data {given}: {first_line(error)}",
            "samples lie on the first axis, in the type of the network's inputs (mostly float32)",
        ) from error
    return Model(
        name=name,
        task=_task(data),
        network=network,
        data=data,
        lineage=lineage,
        inputs=tuple(_spec(n, a) for n, a in data.calibration.inputs.items()),
        outputs=tuple(_spec(n, a) for n, a in results.items()),
    )


def _task(data: Data) -> Task:
    splits = (data.calibration, data.train, data.validation, data.test)
    return "classification" if data.labels or any(s is not None and s.labels is not None for s in splits) else "tensor"


def _count_outputs(module: torch.nn.Module, sample: Split) -> int:
    import torch

    with torch.no_grad():
        result = module(*[torch.as_tensor(a) for a in sample.inputs.values()])
    results = result if isinstance(result, tuple | list) else (result,)
    for one in results:
        if not isinstance(one, torch.Tensor):
            raise UsageError(
                f"the network returns a {type(one).__name__}, not a tensor or a tuple of tensors",
                "wrap it in a module whose forward picks the tensors out",
            )
    return len(results)


def _spec(name: str, array: Array) -> TensorSpec:
    return TensorSpec(name, str(array.dtype), (DYNAMIC, *array.shape[1:]))


def _read_checkpoint(path: Path, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    import torch

    if not path.is_file():
        raise UsageError(f"there is no checkpoint at {path}", "check --checkpoint")
    try:
        if path.suffix == ".safetensors":
            with extra("compress"):
                from safetensors.torch import load_file
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except broken_file_errors() as error:
        raise UsageError(
            f"{path} is no checkpoint: {_unpickled(error)}", "give .safetensors, or .pt with weights only"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise UsageError(f"{path} is no checkpoint: it holds a {type(state).__name__}, not tensors by name")
    state = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    _refuse_misfit(path, state, module.state_dict())
    return state


def _unpickled(error: Exception) -> str:
    """Leave out PyTorch's advice to load what is no plain tensors by running its code."""
    import pickle

    if isinstance(error, pickle.UnpicklingError):
        return "it holds something else than tensors, or is damaged"
    return first_line(error)


def _onnx_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.InvalidArgument,
        state.NoSuchFile,
        RuntimeError,
    )


def _refuse_misfit(path: Path, state: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    for name in sorted(want.keys() - state.keys()):
        if not name.endswith("num_batches_tracked"):
            raise UsageError(f"{path} lacks {name!r}, which the network has", "is it the checkpoint of another model?")
    for name, tensor in state.items():
        if name not in want:
            raise UsageError(
                f"{path} holds {name!r}, which the network lacks", "is it the checkpoint of another model?"
            )
        if tensor.shape != want[name].shape:
            raise UsageError(
                f"{path}: {name!r} is {list(tensor.shape)}, the network wants {list(want[name].shape)}",
                "is it the checkpoint of another model?",
            )


def _load_onnx(path: Path, data: Data | None) -> Model:
    with extra("onnx"):
        import onnxruntime
    if not path.is_file():
        raise UsageError(f"there is no ONNX file at {path}")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except _onnx_errors() as error:
        raise UsageError(
            f"{path} is no valid ONNX model: {first_line(error)}", "fetch or export it again; onnx.checker tells more"
        ) from error
    return Model(
        name=path.stem,
        task=_task(data) if data else "tensor",
        network=OnnxNetwork(path),
        data=data,
        inputs=tuple(_onnx_spec(i) for i in session.get_inputs()),
        outputs=tuple(_onnx_spec(o) for o in session.get_outputs()),
        lineage=(
            Step(
                name="load", options={"source": path.name, "checkpoint": hashlib.sha256(whole_onnx(path)).hexdigest()}
            ),
        ),
    )


_ONNX_DTYPES = {"float": "float32", "double": "float64", "float16": "float16"}


def _onnx_spec(value: object) -> TensorSpec:
    kind = str(value.type).removeprefix("tensor(").removesuffix(")")  # type: ignore[attr-defined]  # NodeArg is untyped
    shape = tuple(n if isinstance(n, int) else DYNAMIC for n in value.shape)  # type: ignore[attr-defined]  # the same
    return TensorSpec(str(value.name), _ONNX_DTYPES.get(kind, kind), shape)  # type: ignore[attr-defined]  # the same


def _load_gguf(path: Path) -> Model:
    if not path.is_file():
        raise UsageError(f"there is no GGUF file at {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"{path} is no GGUF file", "it begins with other bytes; fetch it again")
    step = Step(name="load", options={"source": path.name, "checkpoint": _sha256(path)})
    return Model(name=path.stem, task="text-generation", network=GgufFile(path), lineage=(step,))


def _load_folder(folder: Path, data: Data | None) -> Model:
    if (folder / "model.json").is_file():
        return load_saved(folder, data)
    if (folder / "config.json").is_file():
        return Model(
            name=folder.resolve().name,
            task="text-generation",
            network=LlamaFolder(folder),
            lineage=(Step(name="load", options={"source": folder.resolve().name}),),
        )
    raise UsageError(f"{folder} holds no model", "give a folder that edgekit compress wrote, or a Hugging Face folder")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
