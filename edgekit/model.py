"""A model on the workstation: its network, what it takes and gives, its data, and the plan made for it.

Imports torch only inside the functions that compute with it. Knows neither passes nor formats.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from edgekit import blockwise
from edgekit.errors import CompressionError, InputError, UsageError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import onnx
    import onnxruntime
    import torch

    from edgekit.manifest import Detection, Embedding, ImagePreprocess, Step, Task
    from edgekit.plan import QuantizationPlan
    from edgekit.tensors import Array, TensorSpec

INITIALIZERS_ALONE = 4
"""The first version of ONNX's files in which weights need not be inputs."""
BATCH = 16
"""How many samples a network computes at once where it takes any number."""


@dataclass(frozen=True)
class Split:
    """Arrays by input name, samples on the first axis; where there are any, a label and a group's name a sample.

    Labels are classes counted from 0 as integers, or targets in the shape of the first output as floats.
    """

    inputs: Mapping[str, Array]
    labels: Array | None = None
    groups: Array | None = None

    def __post_init__(self) -> None:
        sizes = {name: len(array) for name, array in self.inputs.items()}
        sizes |= {
            name: len(array) for name, array in (("labels", self.labels), ("groups", self.groups)) if array is not None
        }
        if not self.inputs or len(set(sizes.values())) != 1:
            raise UsageError(
                f"a split needs arrays of one length, these have {sizes or 'none'}",
                "samples lie on the first axis, with one label each",
            )

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, chosen: slice | Array) -> Split:
        """Return the samples that a slice, numbers or truth values choose."""
        labels, groups = (None if array is None else array[chosen] for array in (self.labels, self.groups))
        return Split({name: array[chosen] for name, array in self.inputs.items()}, labels, groups)

    def head(self, count: int) -> Split:
        """Return the first ``count`` samples, their inputs copied: a network may write into what it takes."""
        return self._apart(slice(count))

    def batches(self, size: int) -> Iterator[Split]:
        """Cut into runs of at most ``size`` samples, in order, their inputs copied as those of `head`."""
        for start in range(0, len(self), size):
            yield self._apart(slice(start, start + size))

    def _apart(self, chosen: slice) -> Split:
        found = self.take(chosen)
        return replace(found, inputs={name: array.copy() for name, array in found.inputs.items()})


SPLITS = ("calibration", "train", "validation", "test")


@dataclass(frozen=True)
class TextReading:
    """How a text, or a pair, became ``input_ids``: by a ``tokenizer.json``, cut or filled up to that many tokens."""

    tokenizer: bytes = field(repr=False)
    tokens: int


@dataclass(frozen=True)
class Data:
    """The splits of a data set, how its pictures, texts and labels read, and the names of the outputs if they are told.

    ``detection`` says how objects are read from the outputs of a detector, ``embedding`` how a vector from an
    encoder's. ``calibration`` and ``validation`` steer, ``train`` trains, ``test`` is read once at the end.
    """

    calibration: Split
    train: Split | None = None
    validation: Split | None = None
    test: Split | None = None
    preprocess: ImagePreprocess | None = None
    labels: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    text: TextReading | None = None
    detection: Detection | None = None
    embedding: Embedding | None = None

    @classmethod
    def of(
        cls, splits: Mapping[str, Split], preprocess: ImagePreprocess | None = None, labels: tuple[str, ...] = ()
    ) -> Data:
        """Make it of splits by name, ``calibration`` among them."""
        return cls(splits["calibration"], preprocess=preprocess, labels=labels).with_splits(splits)

    def with_splits(self, splits: Mapping[str, Split]) -> Data:
        """Return the same data with other splits, by name."""
        train, validation, test = (splits.get(name) for name in SPLITS[1:])
        return replace(self, calibration=splits["calibration"], train=train, validation=validation, test=test)

    def splits(self) -> dict[str, Split]:
        """Return the splits that are there, by name."""
        found = {name: getattr(self, name) for name in SPLITS}
        return {name: split for name, split in found.items() if split is not None}

    def digest(self) -> str:
        """Return the SHA-256 over every array with its name, type and shape, and how pictures, texts, labels read."""
        told = (self.preprocess, self.labels, self.outputs, self.text, self.detection, self.embedding)
        total = hashlib.sha256(repr(told).encode())
        total.update(self.text.tokenizer if self.text else b"")
        for part, split in self.splits().items():
            for name, array in (*split.inputs.items(), ("labels", split.labels), ("groups", split.groups)):
                if array is not None:
                    total.update(f"{part}.{name}:{array.dtype.str}{array.shape}".encode())
                    total.update(array.tobytes())
        return total.hexdigest()


class Network(Protocol):
    """Something that computes the model on this machine, in float."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs for a batch."""
        ...


@dataclass(frozen=True)
class TorchNetwork:
    """A PyTorch module in eval mode; passes may change copies of it.

    ``folder`` is the Hugging Face folder it came from: what can be written back as one.
    """

    module: torch.nn.Module
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    folder: Path | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs for a batch, without gradients; the arrays stay as they are."""
        with extra("compress"):
            import torch
        # copies: as_tensor would share memory, and a network may write into what it takes
        tensors = [torch.tensor(inputs[name]) for name in self.input_names]
        with torch.no_grad():
            result = self.module(*tensors)
        outputs = result if isinstance(result, tuple | list) else (result,)
        return {name: o.detach().cpu().numpy() for name, o in zip(self.output_names, outputs, strict=True)}


@dataclass(frozen=True)
class OnnxNetwork:
    """An ONNX file, computed by ONNX Runtime: it can be quantized, not trained.

    ``content`` is what passes made of the file at ``path``, None while nothing has changed.
    """

    path: Path
    content: bytes | None = field(default=None, repr=False)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs for a batch."""
        session = _onnx_session(self.path, self.path.stat().st_mtime_ns if self.content is None else 0, self.content)
        names = [o.name for o in scores_first(session.get_outputs())]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    def proto(self) -> onnx.ModelProto:
        """Read the graph with its weights, also those that lie in files beside it."""
        with extra("onnx"):
            import onnx
        found = onnx.load(str(self.path)) if self.content is None else onnx.load_from_string(self.content)
        if found.ir_version < INITIALIZERS_ALONE:  # where every weight is an input as well
            weights = {tensor.name for tensor in found.graph.initializer}
            inputs = [value for value in found.graph.input if value.name not in weights]
            del found.graph.input[:]
            found.graph.input.extend(inputs)
            found.ir_version = INITIALIZERS_ALONE
        return found


def scores_first(values: Sequence[onnxruntime.NodeArg]) -> list[onnxruntime.NodeArg]:
    """Put floats before integers, else keep the file's order: classifiers of scikit-learn name the class first."""
    return sorted(values, key=lambda value: "float" not in str(value.type) and "double" not in str(value.type))


@functools.lru_cache(maxsize=2)
def _onnx_session(path: Path, changed_ns: int, content: bytes | None) -> onnxruntime.InferenceSession:
    """Open a file once for many batches, and again when it changed."""
    del changed_ns
    with extra("onnx"):
        import onnxruntime
    return onnxruntime.InferenceSession(content or str(path), providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class LlamaFolder:
    """A Hugging Face folder of a language model; exported to GGUF where `export.families` knows its architecture."""

    path: Path

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute ``logits`` [batch, tokens, vocabulary] for ``input_ids`` [batch, tokens]."""
        network = self.by_blocks()
        import torch

        with torch.no_grad():
            return {"logits": network(torch.as_tensor(inputs["input_ids"]), use_cache=False).logits.numpy()}

    def by_blocks(self) -> Any:  # noqa: ANN401  # transformers is untyped here
        """Open the network as `opened`; its blocks have weights while they compute only, where the folder allows it."""
        network = blockwise.of_folder(self.path)
        return self.opened() if network is None else network

    def opened(self) -> Any:  # noqa: ANN401  # transformers is untyped here
        """Open the network in float32, without a cache of keys and values."""
        with extra("export"):
            import torch
            from transformers import AutoModelForCausalLM
        how = {"local_files_only": True, "dtype": torch.float32, "attn_implementation": "eager"}  # others cap no scores
        network = AutoModelForCausalLM.from_pretrained(self.path, **how).eval()
        network.config.use_cache = False
        return network


@dataclass(frozen=True)
class GgufFile:
    """A language model that is a GGUF file already: sealed as it stands, run by llama.cpp only."""

    path: Path

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Refuse: only llama.cpp computes it.

        Raises:
            CompressionError: always; says what to give instead.
        """
        del inputs
        raise CompressionError(
            f"{self.path.name} is quantized already", "give the Hugging Face folder it was made from"
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """What flows from load through compress to export. ``network`` holds float weights; ``plan`` says their bits.

    ``documents``: what was written about this very model, by name, to travel with it. ``license``: an SPDX
    expression, empty where nobody said.
    """

    name: str
    task: Task
    network: TorchNetwork | OnnxNetwork | LlamaFolder | GgufFile
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    data: Data | None = None
    plan: QuantizationPlan | None = None
    lineage: tuple[Step, ...] = field(default=())
    documents: Mapping[str, bytes] = field(default_factory=dict)
    license: str = ""

    @property
    def precision(self) -> str:
        """``fp32`` until a quantize pass has made a plan."""
        return self.plan.precision if self.plan else "fp32"


def whole_batches(model: Model, split: Split) -> tuple[Split, int]:
    """Return the split without a remainder that the network would refuse, and how many samples it takes at once.

    Raises:
        UsageError: the network has a fixed batch, and the split is smaller.
    """
    fixed = [spec.shape[0] for spec in model.inputs if spec.shape and spec.shape[0] > 0]
    if not fixed:
        return split, BATCH
    if len(split) < fixed[0]:
        raise UsageError(
            f"{model.name} takes {fixed[0]} samples at once, a split has {len(split)}",
            "give more samples, or export the network with a dynamic batch",
        )
    return split.take(slice(len(split) - len(split) % fixed[0])), fixed[0]


def run_batched(network: Network, split: Split, size: int = BATCH) -> dict[str, Array]:
    """Compute all samples of a split in batches and join the outputs.

    Raises:
        InputError: the network gave NaN or infinity.
    """
    import numpy as np

    parts = [network.run(batch.inputs) for batch in split.batches(size)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name, array in joined.items():
        if not math.isfinite(float(np.sum(array, dtype=np.float64))):
            raise InputError(f"output {name!r} holds NaN or infinity", "check the checkpoint and the input's scaling")
    return joined
