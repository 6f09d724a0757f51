"""Writes a compressed model as a folder, and reads it back. Knows neither passes nor where a model came from."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Literal

import msgspec

from edgekit.durable import new_folder
from edgekit.errors import UsageError
from edgekit.manifest import ImagePreprocess, Step
from edgekit.model import Data, Model, OnnxNetwork, Split, Task, TorchNetwork
from edgekit.plan import QuantizationPlan
from edgekit.plugins import extra
from edgekit.sources import first_line
from edgekit.tensors import TensorSpec
from edgekit.tracing import trace

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

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


def whole_onnx(path: Path) -> bytes:
    """Return an ONNX file as one piece, with the weights that lie in files beside it."""
    with extra("onnx"):
        import onnx
    proto = onnx.load(path, load_external_data=False)
    if not any(onnx.external_data_helper.uses_external_data(tensor) for tensor in proto.graph.initializer):
        return path.read_bytes()
    return bytes(onnx.load(path).SerializeToString(deterministic=True))


def load_saved(folder: Path, data: Data | None) -> Model:
    """Read a folder that `save` wrote; without ``data`` its few samples calibrate.

    Raises:
        UsageError: a file is missing or damaged.
    """
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
    except broken_file_errors() as error:
        raise UsageError(
            f"{folder / 'network.pt2'} cannot be read: {first_line(error)}",
            "if it is damaged, run edgekit compress again",
        ) from error
    return TorchNetwork(module, tuple(s.name for s in saved.inputs), tuple(s.name for s in saved.outputs))


def _save_network(model: Model, folder: Path) -> None:
    if isinstance(model.network, OnnxNetwork):
        (folder / "model.onnx").write_bytes(whole_onnx(model.network.path))
        return
    import torch

    archive = io.BytesIO()  # torch ends the process at a full disk, and at a path that is no UTF-8
    torch.export.save(trace(model), archive)
    (folder / "network.pt2").write_bytes(archive.getbuffer())
