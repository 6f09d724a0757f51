"""Reads a model as people have it, and a compressed one as edgekit saved it.

Takes ``file.py:build`` or ``package.module:build`` with a checkpoint, an ONNX or GGUF file, a Hugging Face folder, or
a folder that `edgekit compress` wrote. Knows neither passes nor formats to export.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from edgekit.datasets import load_data, refuse_unfit
from edgekit.durable import new_folder
from edgekit.errors import CompressionError, UsageError
from edgekit.manifest import ImagePreprocess, Step
from edgekit.model import Data, GgufFile, LlamaFolder, Model, OnnxNetwork, Split, Task, TorchNetwork
from edgekit.plan import QuantizationPlan
from edgekit.plugins import extra
from edgekit.sources import call, first_line, named_object
from edgekit.tensors import DYNAMIC, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from edgekit.tensors import Array

__all__ = ["load", "load_data", "named_object", "refuse_foreign", "save", "trace"]

MAX_SAMPLES = 128
"""Calibration samples that travel with a saved model, for the formats that calibrate by themselves."""


class Saved(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file ``model.json`` of a saved model."""

    version: Literal[1] = 1
    name: str
    task: Task
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocess: ImagePreprocess | None
    labels: tuple[str, ...]
    lineage: tuple[Step, ...]


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


def save(model: Model, folder: Path, extra_files: Mapping[str, bytes] | None = None) -> None:
    """Write a compressed model so that `load` gives it back, in one step; replaces what was there.

    Raises:
        CompressionError: the network cannot be traced to a graph; says where.
        UsageError: ``folder`` holds something else than a saved model.
    """
    with extra("compress"):
        import numpy as np
    refuse_foreign(folder)
    with new_folder(folder) as scratch:
        data = model.data
        description = Saved(
            name=model.name,
            task=model.task,
            inputs=model.inputs,
            outputs=model.outputs,
            lineage=model.lineage,
            preprocess=data.preprocess if data else None,
            labels=data.labels if data else (),
        )
        (scratch / "model.json").write_bytes(msgspec.json.format(msgspec.json.encode(description)))
        if model.plan:
            (scratch / "plan.json").write_bytes(msgspec.json.format(msgspec.json.encode(model.plan)))
        if data:
            np.savez(scratch / "samples.npz", **data.calibration.head(MAX_SAMPLES).inputs)  # type: ignore[arg-type]  # NumPy types allow_pickle into **kwds
        _save_network(model, scratch)
        for name, content in (extra_files or {}).items():
            (scratch / name).write_bytes(content)


def refuse_foreign(folder: Path) -> None:
    """Raise UsageError where saving would replace something that is no saved model."""
    if folder.exists() and not _is_saved(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is there and holds no saved model, so it is not replaced", "choose another folder for the output"
        )


def _is_saved(folder: Path) -> bool:
    """Look into model.json: other programs, as TensorFlow.js, write files of that name too."""
    try:
        msgspec.json.decode((folder / "model.json").read_bytes(), type=Saved)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError):
        return False
    return True


def trace(model: Model) -> torch.export.ExportedProgram:
    """Return the torch.export graph of the model's network, its batch dynamic.

    Raises:
        CompressionError: not a PyTorch network, or control flow that cannot be traced.
    """
    with extra("compress"):
        import torch
    if not isinstance(model.network, TorchNetwork):
        raise CompressionError(f"{model.name} is no PyTorch network", "give its Python workload instead")
    example = tuple(torch.as_tensor(a) for a in _example(model, 2).values())
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    shapes = tuple({0: batch} for _ in example)
    parameters = list(inspect.signature(model.network.module.forward).parameters.values())
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        shapes = (shapes,)  # type: ignore[assignment]  # *args are one entry, a tuple of its own
    try:
        return torch.export.export(model.network.module, example, dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise CompressionError(
            f"{model.name} cannot be traced to a graph: {first_line(error)}",
            "remove control flow that depends on values, or export it to ONNX yourself and give the .onnx file",
        ) from error


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


def _example(model: Model, batch: int) -> dict[str, Array]:
    import numpy as np

    sizes = {s.name: tuple(1 if n == DYNAMIC else n for n in s.shape[1:]) for s in model.inputs}
    return {s.name: np.zeros((batch, *sizes[s.name]), s.dtype) for s in model.inputs}


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
    except _broken_file_errors() as error:
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


def _broken_file_errors() -> tuple[type[Exception], ...]:
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
                name="load", options={"source": path.name, "checkpoint": hashlib.sha256(_whole_onnx(path)).hexdigest()}
            ),
        ),
    )


_ONNX_DTYPES = {"float": "float32", "double": "float64", "float16": "float16"}


def _onnx_spec(value: object) -> TensorSpec:
    kind = str(value.type).removeprefix("tensor(").removesuffix(")")  # type: ignore[attr-defined]  # NodeArg is untyped
    shape = tuple(n if isinstance(n, int) else DYNAMIC for n in value.shape)  # type: ignore[attr-defined]  # the same
    return TensorSpec(str(value.name), _ONNX_DTYPES.get(kind, kind), shape)  # type: ignore[attr-defined]  # the same


def _whole_onnx(path: Path) -> bytes:
    """Return an ONNX file as one piece, with the weights that lie in files beside it."""
    with extra("onnx"):
        import onnx
    proto = onnx.load(path, load_external_data=False)
    if not any(onnx.external_data_helper.uses_external_data(tensor) for tensor in proto.graph.initializer):
        return path.read_bytes()
    return bytes(onnx.load(path).SerializeToString(deterministic=True))


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
        return _load_saved(folder, data)
    if (folder / "config.json").is_file():
        return Model(
            name=folder.resolve().name,
            task="text-generation",
            network=LlamaFolder(folder),
            lineage=(Step(name="load", options={"source": folder.resolve().name}),),
        )
    raise UsageError(f"{folder} holds no model", "give a folder that edgekit compress wrote, or a Hugging Face folder")


def _load_saved(folder: Path, data: Data | None) -> Model:
    with extra("compress"):
        import numpy as np
    try:
        saved = msgspec.json.decode((folder / "model.json").read_bytes(), type=Saved)
        plan_file = folder / "plan.json"
        plan = msgspec.json.decode(plan_file.read_bytes(), type=QuantizationPlan) if plan_file.exists() else None
        if data is None and (folder / "samples.npz").exists():
            with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
                data = Data(Split(dict(arrays)), preprocess=saved.preprocess, labels=saved.labels)
    except (msgspec.DecodeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{folder} is damaged: {first_line(error)}", "run edgekit compress again") from error
    return Model(
        name=saved.name,
        task=saved.task,
        network=_load_network(folder, saved),
        inputs=saved.inputs,
        outputs=saved.outputs,
        data=data,
        plan=plan,
        lineage=saved.lineage,
    )


def _load_network(folder: Path, saved: Saved) -> TorchNetwork | OnnxNetwork:
    if (folder / "model.onnx").is_file():
        return OnnxNetwork(folder / "model.onnx")
    with extra("compress"):
        import torch

    if not zipfile.is_zipfile(folder / "network.pt2"):  # PyTorch would print its trace before it refuses
        raise UsageError(f"{folder / 'network.pt2'} is damaged: it is no archive", "run edgekit compress again")
    try:
        with (folder / "network.pt2").open("rb") as file:  # torch ends the process at a path that is no UTF-8
            module = torch.export.load(file).module()
    except _broken_file_errors() as error:
        raise UsageError(
            f"{folder / 'network.pt2'} cannot be read: {first_line(error)}",
            "if it is damaged, run edgekit compress again",
        ) from error
    return TorchNetwork(module, tuple(s.name for s in saved.inputs), tuple(s.name for s in saved.outputs))


def _save_network(model: Model, folder: Path) -> None:
    if isinstance(model.network, OnnxNetwork):
        (folder / "model.onnx").write_bytes(_whole_onnx(model.network.path))
        return
    import torch

    archive = io.BytesIO()  # torch ends the process at a full disk, and at a path that is no UTF-8
    torch.export.save(trace(model), archive)
    (folder / "network.pt2").write_bytes(archive.getbuffer())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
