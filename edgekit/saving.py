"""Writes a compressed model as a folder, and reads it back. Knows neither passes nor where a model came from."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import msgspec

from edgekit import hugging_face, network_files, onnx_io
from edgekit.durable import new_folder
from edgekit.errors import UsageError
from edgekit.manifest import Detection, Embedding, ImagePreprocess, Step, Task
from edgekit.model import Data, Model, OnnxNetwork, Split, TextReading, TorchNetwork
from edgekit.plan import FILE as PLAN
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

ORIGIN = "huggingface"
"""Configuration and tokenizer of a network that came from a Hugging Face folder: with them it can be one again."""


TOKENIZER = "tokenizer.json"
"""What turns texts into a model's inputs, where its data told."""

BOM, CARD = "bom.cdx.json", "MODEL_CARD.md"
"""What `edgekit compress` writes beside the model: all files with their hashes, and what a person fills in."""


class _Hash(msgspec.Struct):
    content: str


class _Component(msgspec.Struct):
    type: str
    name: str
    hashes: tuple[_Hash, ...] = ()


class _Listed(msgspec.Struct):
    """As much of the bill of materials as tells which files are whose."""

    components: tuple[_Component, ...]


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
    detection: Detection | None = None
    embedding: Embedding | None = None
    tokens: int = 0


def save(model: Model, folder: Path, extra_files: Mapping[str, bytes] | None = None) -> None:
    """Write a compressed model so that `load_saved` gives it back, in one step; replaces what was there.

    Raises:
        CompressionError: the network cannot be traced to a graph; says where.
        UsageError: ``folder`` holds something else than a saved model.
    """
    refuse_foreign(folder)
    with new_folder(folder) as scratch:
        write(model, scratch)
        for name, content in (extra_files or {}).items():
            (scratch / name).write_bytes(content)


def write(model: Model, folder: Path) -> None:
    """Write the files of a saved model into an empty folder.

    ``model.json`` describes it; ``weights.safetensors`` and ``network.pt2`` (the graph) or ``model.onnx`` are the
    network, ``plan.json`` its plan, ``samples.npz`` a few calibration samples. Every file but the samples is the
    same for the same model.

    Raises:
        CompressionError: the network cannot be traced to a graph; says where.
    """
    with extra("compress"):
        import numpy as np
    data = model.data
    description = Saved(
        name=model.name,
        task=model.task,
        inputs=model.inputs,
        outputs=model.outputs,
        lineage=model.lineage,
        preprocess=data.preprocess if data else None,
        labels=data.labels if data else (),
        detection=data.detection if data else None,
        embedding=data.embedding if data else None,
        tokens=data.text.tokens if data and data.text else 0,
    )
    if data and data.text:
        (folder / TOKENIZER).write_bytes(data.text.tokenizer)
    (folder / "model.json").write_bytes(msgspec.json.format(msgspec.json.encode(description)))
    if model.plan:
        (folder / PLAN).write_bytes(msgspec.json.format(msgspec.json.encode(model.plan)))
    if data:
        np.savez(folder / "samples.npz", **data.calibration.head(MAX_SAMPLES).inputs)  # type: ignore[arg-type]  # NumPy types allow_pickle into **kwds
    _write_network(model, folder)


def refuse_foreign(folder: Path) -> None:
    """Raise UsageError where saving would replace what is no saved model, or lies where no folder can be.

    Files that a person put beside a saved model, and a model card that a person went on writing, are not replaced.
    """
    if folder.exists() and not _is_saved(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is there and holds no saved model, so it is not replaced", "choose another folder for the output"
        )
    own = _put_there(folder) if folder.exists() else []
    if own:
        raise UsageError(
            f"{folder} holds what would be lost when the model is replaced: {', '.join(own[:3])}",
            "move it away, or choose another folder for the output",
        )
    above = next(parent for parent in folder.resolve().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "may not be written" if above.is_dir() else "is no folder"
        raise UsageError(f"{folder} cannot be made: {above} {why}", "choose another folder for the output")


def _put_there(folder: Path) -> list[str]:
    """Name what a person put into a saved model, by the list of its files with their hashes, where there is one."""
    try:
        bom = msgspec.json.decode((folder / BOM).read_bytes(), type=_Listed)
    except (msgspec.DecodeError, OSError, UnicodeDecodeError):
        return []
    listed = {one.name: {it.content for it in one.hashes} for one in bom.components if one.type == "file"}
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != BOM)
    names = {path.relative_to(folder).as_posix(): path for path in found}
    strange = [name for name in names if name not in listed]
    card = names.get(CARD)
    is_edited = (
        card is not None and CARD in listed and hashlib.sha256(card.read_bytes()).hexdigest() not in listed[CARD]
    )
    return [*strange, f"changes of {CARD}"] if is_edited else strange


def _is_saved(folder: Path) -> bool:
    """Look into model.json: other programs, as TensorFlow.js, write files of that name too."""
    try:
        msgspec.json.decode((folder / "model.json").read_bytes(), type=Saved)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError):
        return False
    return True


def onnx_bytes(network: OnnxNetwork) -> bytes:
    """Return what a saved model holds of an ONNX network: one file with all weights."""
    return onnx_io.whole(network.path) if network.content is None else network.content


def load_saved(folder: Path, data: Data | None) -> Model:
    """Read a folder that `save` wrote; without ``data`` its few samples calibrate.

    How pictures, texts and labels read is what was saved, where ``data`` does not tell.

    Raises:
        UsageError: a file is missing or damaged.
    """
    with extra("compress"):
        import numpy as np
    try:
        saved = msgspec.json.decode((folder / "model.json").read_bytes(), type=Saved)
        plan_file = folder / PLAN
        plan = msgspec.json.decode(plan_file.read_bytes(), type=QuantizationPlan) if plan_file.exists() else None
        if data is None and (folder / "samples.npz").exists():
            with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
                data = Data(Split(dict(arrays)))
        data = data and _reading_of(folder, saved, data)
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
        documents={
            name: (folder / file).read_bytes()
            for name, file in ((CARD, CARD), (f"model.{BOM}", BOM))
            if (folder / file).is_file()
        },
    )


def _reading_of(folder: Path, saved: Saved, data: Data) -> Data:
    text = TextReading((folder / TOKENIZER).read_bytes(), saved.tokens) if saved.tokens else None
    return replace(
        data,
        preprocess=data.preprocess or saved.preprocess,
        labels=data.labels or saved.labels,
        text=data.text or text,
        detection=data.detection or saved.detection,
        embedding=data.embedding or saved.embedding,
    )


def _load_network(folder: Path, saved: Saved) -> TorchNetwork | OnnxNetwork:
    if (folder / "model.onnx").is_file():
        return OnnxNetwork(folder / "model.onnx")
    module = network_files.read(folder)
    inputs, outputs = (tuple(spec.name for spec in specs) for specs in (saved.inputs, saved.outputs))
    return TorchNetwork(module, inputs, outputs, folder / ORIGIN if (folder / ORIGIN).is_dir() else None)


def _write_network(model: Model, folder: Path) -> None:
    if isinstance(model.network, OnnxNetwork):
        if onnx_io.size(model.network.proto()) > onnx_io.LARGE:
            onnx_io.save(model.network.proto(), folder / "model.onnx")
        else:
            (folder / "model.onnx").write_bytes(onnx_bytes(model.network))
        return
    network_files.write(trace(model), folder)
    if isinstance(model.network, TorchNetwork) and model.network.folder:
        hugging_face.carry(model.network.folder, folder / ORIGIN)
