"""Reads a model as people have it, and a compressed one as edgekit saved it.

Takes ``file.py:build`` or ``package.module:build`` with a checkpoint, an exported program (.pt2), an ONNX or GGUF
file, a Hugging Face folder, or a folder that `edgekit compress` wrote. Knows neither passes nor formats to export.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit import checkpoints, hugging_face, onnx_io
from edgekit.datasets import load_data, refuse_unfit
from edgekit.errors import BundleError, UsageError
from edgekit.guards import ModelFile, check_file
from edgekit.hugging_face import write as huggingface_folder
from edgekit.manifest import Step, Task
from edgekit.model import Data, GgufFile, LlamaFolder, Model, OnnxNetwork, Split, TorchNetwork, scores_first
from edgekit.plugins import extra
from edgekit.saving import load_saved, refuse_foreign, save
from edgekit.sources import call, first_line, named_object
from edgekit.tensors import DYNAMIC, TensorSpec
from edgekit.tracing import trace

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from edgekit.tensors import Array

__all__ = ["huggingface_folder", "load", "load_data", "named_object", "refuse_foreign", "save", "trace"]


def load(
    source: str,
    checkpoint: Path | None = None,
    data: Data | None = None,
    *,
    invent: Callable[[Path], Data] | None = None,
    as_text: bool = False,
) -> Model:
    """Read a model from ``file.py:build``, ``package.module:build``, ``.pt2``, ``.onnx``, ``.gguf``, or a folder.

    A Hugging Face folder becomes a PyTorch network where there is data that says its inputs; that of a language model
    stays a folder without, and with ``as_text``: what only writes its weights again need not open it. ``invent`` makes
    inputs for any other such folder that comes without data, from which no range may be learned.

    Raises:
        UsageError: nothing there, not readable, or the checkpoint does not fit the network.
    """
    if data is not None and not len(data.calibration):
        raise UsageError("the calibration split is empty", "give 32 or more samples that look like the device's")
    path = Path(source)
    if data is None and invent is not None and hugging_face.is_folder(path) and not hugging_face.speaks(path):
        data = invent(path)
    model = _load(source, checkpoint, data, as_text=as_text)
    refuse_unfit(model)
    return model


def _load(source: str, checkpoint: Path | None, data: Data | None, *, as_text: bool) -> Model:
    path = Path(source)
    if ":" in source and not path.exists():
        return _load_torch(source, checkpoint, data)
    if checkpoint is not None:
        raise UsageError(f"{source} brings its own weights", "drop --checkpoint")
    if path.is_dir():
        return _load_folder(path, data, as_text=as_text)
    if path.suffix == ".pt2":
        return _load_program(path, data)
    if path.suffix == ".onnx":
        return _load_onnx(path, data)
    if path.suffix == ".gguf":
        return _load_gguf(path)
    raise UsageError(
        f"{source!r} is no model",
        "give file.py:build, package.module:build, a .pt2, .onnx or .gguf file, or a model folder",
    )


def _load_torch(source: str, checkpoint: Path | None, data: Data | None) -> Model:
    with extra("compress"):
        import torch
    module = call(source)
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"{source} returned {type(module).__name__}, not torch.nn.Module", "return the network")
    steps = [Step(name="load", options={"source": Path(source).name})]
    if checkpoint is not None:
        module.load_state_dict(checkpoints.read(checkpoint, module))
        steps = [Step(name="load", options={"source": Path(source).name, "checkpoint": _sha256(checkpoint)})]
    if data is None:
        raise UsageError(f"{source} needs data to learn its input shapes", "give --data file.py:function or data.npz")
    name = source.rpartition(":")[0].removesuffix(".py").replace(".", "/").rpartition("/")[2]
    return from_module(name, module.eval(), data, tuple(steps))


def _load_program(path: Path, data: Data | None) -> Model:
    program = checkpoints.read_program(path)
    if data is None:
        raise UsageError(
            f"{path} needs data to learn the names of its inputs", "give --data file.py:function or data.npz"
        )
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in program.graph_signature.user_inputs and isinstance(node.meta["val"].shape[0], int):
            raise UsageError(
                f"{path} was exported for exactly {node.meta['val'].shape[0]} samples at once",
                "export it with dynamic_shapes: {0: torch.export.Dim('batch')} for each input",
            )
    step = Step(name="load", options={"source": path.name, "checkpoint": _sha256(path)})
    return from_module(path.stem, program.module(), data, (step,))


def from_module(name: str, module: torch.nn.Module, data: Data, lineage: tuple[Step, ...] = ()) -> Model:
    """Wrap a PyTorch module; input names come from the data, shapes from its calibration split.

    Inputs go by name where the data has the names of ``forward``, else in the data's order. Outputs are named by
    ``data.outputs``; an only one is ``scores`` else, and several are ``output_0``, ``output_1`` …

    Raises:
        UsageError: the network does not take the calibration data, or returns other than tensors.
    """
    return _described(name, TorchNetwork(module, _in_order(module, data), ()), data, lineage)


def _in_order(module: torch.nn.Module, data: Data) -> tuple[str, ...]:
    given = tuple(data.calibration.inputs)
    taken = tuple(inspect.signature(module.forward).parameters)
    return taken if set(taken) == set(given) else given


def _described(name: str, network: TorchNetwork, data: Data, lineage: tuple[Step, ...]) -> Model:
    """Learn the outputs of a network, whose names it may know, from two samples."""
    samples = data.calibration.inputs
    try:
        if not network.output_names:
            count = _count_outputs(network, data.calibration.head(1))
            network = replace(network, output_names=_output_names(data, count))
        results = network.run(data.calibration.head(2).inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        given = ", ".join(f"{n}: {a.dtype}{list(a.shape)}" for n, a in samples.items())
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
        inputs=tuple(_spec(n, samples[n]) for n in network.input_names),
        outputs=tuple(_spec(n, a) for n, a in results.items()),
    )


def _output_names(data: Data, count: int) -> tuple[str, ...]:
    if data.outputs and len(data.outputs) != count:
        raise UsageError(
            f"the data names {len(data.outputs)} outputs ({', '.join(data.outputs)}), the network gives {count}",
            "name each one, or none",
        )
    return data.outputs or (("scores",) if count == 1 else tuple(f"output_{i}" for i in range(count)))


def _task(data: Data) -> Task:
    """Tell by the labels; a class for each position is none for the sample, which a device could name."""
    if data.detection:
        return "detection"
    labels = [split.labels for split in data.splits().values() if split.labels is not None]
    ranks = {array.ndim for array in labels if array.dtype.kind in "iu"}
    return "classification" if ranks == {1} or (data.labels and not ranks) else "tensor"


def _count_outputs(network: TorchNetwork, sample: Split) -> int:
    import torch

    with torch.no_grad():
        result = network.module(*[torch.as_tensor(sample.inputs[name]) for name in network.input_names])
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


def _load_onnx(path: Path, data: Data | None) -> Model:
    with extra("onnx"):
        import onnxruntime
    if not path.is_file():
        raise UsageError(f"there is no ONNX file at {path}", "check the path")
    _refuse_harmful(path, "onnx", f"{path} is no valid ONNX model")
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
        outputs=tuple(_onnx_spec(o) for o in scores_first(session.get_outputs())),
        lineage=(Step(name="load", options={"source": path.name, "checkpoint": onnx_io.digest(path)}),),
    )


def _refuse_harmful(path: Path, file_format: str, told: str) -> None:
    """Look at a foreign file before native code reads it: it may name any plain file below its folder, and no other."""
    try:
        check_file(ModelFile(path.parent, path.name), file_format)
    except BundleError as error:
        raise UsageError(f"{told}: {error.message}", error.hint) from error


_ONNX_DTYPES = {"float": "float32", "double": "float64", "float16": "float16"}


def _onnx_spec(value: object) -> TensorSpec:
    kind = str(value.type).removeprefix("tensor(").removesuffix(")")  # type: ignore[attr-defined]  # NodeArg is untyped
    shape = tuple(n if isinstance(n, int) else DYNAMIC for n in value.shape)  # type: ignore[attr-defined]  # the same
    return TensorSpec(str(value.name), _ONNX_DTYPES.get(kind, kind), shape)  # type: ignore[attr-defined]  # the same


def _load_gguf(path: Path) -> Model:
    if not path.is_file():
        raise UsageError(f"there is no GGUF file at {path}", "check the path")
    _refuse_harmful(path, "gguf", f"{path} is no GGUF file")
    step = Step(name="load", options={"source": path.name, "checkpoint": _sha256(path)})
    return Model(name=path.stem, task="text-generation", network=GgufFile(path), lineage=(step,))


def _load_folder(folder: Path, data: Data | None, *, as_text: bool) -> Model:
    if (folder / "model.json").is_file():
        return load_saved(folder, data)
    if hugging_face.is_folder(folder):
        return _load_hugging_face(folder, data, as_text=as_text)
    raise UsageError(f"{folder} holds no model", "give a folder that edgekit compress wrote, or a Hugging Face folder")


def _load_hugging_face(folder: Path, data: Data | None, *, as_text: bool) -> Model:
    name = folder.resolve().name
    steps = (Step(name="load", options={"source": name}),)
    if data is not None:
        digest = hashlib.sha256(b"".join(_sha256(path).encode() for path in sorted(folder.glob("*.safetensors"))))
        steps = (Step(name="load", options={"source": name, "checkpoint": digest.hexdigest()}),)
        if not (as_text and hugging_face.speaks(folder)):
            text = data.text or hugging_face.reading(folder, data.calibration)
            vector = data.embedding or hugging_face.embedding(folder)
            data = replace(_numbered(data, hugging_face.labels(folder)), text=text, embedding=vector)
            return _described(name, hugging_face.network(folder, data.calibration), data, steps)
        hugging_face.refuse_windows(folder, data.calibration)
    if hugging_face.speaks(folder):
        return Model(name=name, task="text-generation", network=LlamaFolder(folder), data=data, lineage=steps)
    raise UsageError(f"{name} needs data that looks like the device's", "give --data data.toml with its tokenizer")


def _numbered(data: Data, names: tuple[str, ...]) -> Data:
    """Count the classes as the network does: ``names`` are its own, in its order, and the data has its words sorted.

    Raises:
        UsageError: some of the data's classes are the network's, others are not.
    """
    if not names or not data.labels:
        return replace(data, labels=data.labels or names)
    strangers = [word for word in data.labels if word not in names]
    if len(strangers) == len(data.labels):  # as folders named by numbers: their order is the network's, or nobody's
        return data
    if strangers:
        raise UsageError(
            f"the data has the class {strangers[0]!r}, the network knows {', '.join(names)}",
            "name the classes as id2label in config.json does",
        )
    import numpy as np

    numbers = np.array([names.index(word) for word in data.labels])
    found = {
        name: split if split.labels is None else replace(split, labels=numbers[split.labels])
        for name, split in data.splits().items()
    }
    return replace(data.with_splits(found), labels=names)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
