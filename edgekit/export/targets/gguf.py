"""GGUF for llama.cpp, from a Hugging Face folder: floats and plain blocks in Python, K and IQ types by llama.cpp.

Calibration text, where the model comes with some, gives the importance matrix. Knows no families and no tokens.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgekit import blockwise
from edgekit.errors import ExportError, UsageError
from edgekit.export import blocks, budget, families, gguf_file, llama, llama_quantize, vocabulary
from edgekit.export import importance as importances
from edgekit.export.targets import Artifact
from edgekit.model import GgufFile, LlamaFolder, Model, TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.families import Shape
    from edgekit.export.importance import Importance
    from edgekit.export.targets import Exporter
    from edgekit.export.vocabulary import Vocabulary
    from edgekit.progress import Progress
    from edgekit.tensors import Array

PRECISIONS = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q5_1": 9, "q5_0": 8, "q4_1": 3, "q4_0": 2}
"""What edgekit itself writes, with llama.cpp's number for it (``llama_ftype``)."""
FLOATS = ("F32", "F16", "BF16")
BLOCK, SUPER_BLOCK = 32, 256
"""How many numbers of a row share a scale: in plain types, and in K and most IQ types."""


@dataclass(frozen=True)
class _Plan:
    """All that a file is written from beside its weights."""

    name: str
    shape: Shape
    words: Vocabulary
    precision: str
    importance: Importance
    types: Mapping[str, str] = field(default_factory=dict)
    """What was chosen for single tensors."""
    told: tuple[str, ...] = ()

    def kind(self, tensor: str, array: Array) -> str:
        """Return the type of a tensor."""
        return self.types.get(tensor) or tensor_type(tensor, array.shape, self.precision)


class GgufExporter:
    """Writes one ``model.gguf``. Reads ``options.precision``."""

    extra = "export"

    def export(self, model: Model, profile: DeviceProfile, folder: Path, progress: Progress) -> Artifact:
        """Write the file.

        Raises:
            ExportError: no such folder, a tensor or tokenizer that llama.cpp has no place for.
            UsageError: an unknown precision, or a damaged folder.
            MissingExtra: gguf, torch or safetensors is not installed.
        """
        if isinstance(model.network, GgufFile):
            return _taken(model.network.path, folder)
        if isinstance(model.network, TorchNetwork) and model.network.folder is not None:  # else it came as a folder
            raise ExportError(
                f"{model.name} cannot answer in words and in tensors from one bundle", "export llama-cpp by itself"
            )
        if not isinstance(model.network, LlamaFolder):
            raise ExportError(
                f"{model.name} is no language model; GGUF holds those",
                "give a Hugging Face folder, a .gguf file, or another target",
            )
        precision = str(profile.options.get("precision", "q8_0")).lower()
        _refuse_unknown(precision, model)
        source = model.network.path
        shape = families.read_shape(source)
        words = vocabulary.read(source, shape.vocabulary)
        path = folder / "model.gguf"
        bits = budget.bits_asked(precision)
        if bits is None:
            importance = _importance(model, source, shape, precision, progress=progress)
            plan = _Plan(model.name, shape, words, precision, importance)
        else:
            plan = _within(bits, model, _Plan(model.name, shape, words, precision, importances.Importance()), progress)
        if bits is not None or precision in PRECISIONS:
            _write(path, source, plan, progress=progress)
        else:
            _by_llama_cpp(path, source, plan, progress=progress)
        return _artifact(path, precision, *_told(path, plan))

    def evaluate(self, main: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute ``logits`` for ``input_ids`` from the file's bytes, in PyTorch."""
        return {"logits": llama.logits(main, inputs["input_ids"])}


def _taken(source: Path, folder: Path) -> Artifact:
    """Take a finished file as it stands; its precision is the type that most of its bytes have."""
    try:
        tensors = gguf_file.opened(source).tensors
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ExportError(f"{source.name} is damaged: {error}", "fetch the file again") from error
    used: Counter[str] = Counter()
    for tensor in tensors:
        used[tensor.tensor_type.name] += int(tensor.n_bytes)
    if not used:
        raise ExportError(f"{source.name} holds no tensor", "give a whole model, not its vocabulary")
    path = folder / "model.gguf"
    shutil.copyfile(source, path)
    told = ", ".join(f"{size / 2**20:.1f} MiB {kind}" for kind, size in used.most_common())
    return _artifact(path, used.most_common(1)[0][0].lower(), f"tensor types: {told}")


def _refuse_unknown(precision: str, model: Model) -> None:
    if precision in PRECISIONS:
        return
    if budget.bits_asked(precision) is not None:
        if model.data is None:
            raise UsageError(
                f"{precision} chooses types by what they cost on text, and {model.name} has no calibration text",
                "give --data data.toml, or take one type for all: q4_0, q5_0, q8_0",
            )
        return
    if precision not in llama_quantize.PRECISIONS:
        known = ", ".join((*PRECISIONS, "bits a weight as 4.8bpw", *llama_quantize.PRECISIONS))
        raise UsageError(f"GGUF is not written as {precision!r}", f"choose {known}")
    if precision in llama_quantize.BLIND and model.data is None:
        raise UsageError(
            f"{precision} needs to know which columns count, and {model.name} has no calibration text",
            "give --data data.toml, or take q3_k_s, iq4_xs or wider",
        )
    llama_quantize.need_llama_cpp()


def _importance(model: Model, source: Path, shape: Shape, precision: str, *, progress: Progress) -> Importance:
    """Gather it where there is text and a type that can use it."""
    if model.data is None or tensor_type("", (BLOCK, BLOCK), precision) not in {*blocks.BITS, "K"}:
        return importances.Importance()
    return importances.gather(source, shape, model.data.calibration, progress)


def _within(bits: float, model: Model, plan: _Plan, progress: Progress) -> _Plan:
    """Choose the types of tensors so that the file's weights take so many bits on average.

    Raises:
        UsageError: too little text, or too few bits; names the least.
    """
    source, data = model.network.path, model.data  # type: ignore[union-attr]  # a folder, refused elsewhere if not
    first, last = budget.apart(data.calibration)  # type: ignore[union-attr]  # without text it was refused
    importance = importances.gather(source, plan.shape, first, progress)
    groups, rest, weights = budget.measure(source, plan.shape, last, importance.columns, progress=progress)
    chosen = budget.spend(groups, rest, weights, bits)
    types = {tensor: chosen[group.name] for group in groups for tensor in group.tensors}
    return replace(plan, importance=importance, types=types, told=tuple(budget.told(groups, chosen)))


def _artifact(path: Path, precision: str, *notes: str) -> Artifact:
    return Artifact(
        main=path.name,
        files=(path.name,),
        precision=precision,
        requires={"gguf": "3", "memory_mib": str(path.stat().st_size * 5 // 4 // 2**20 + 64)},
        weights={one.name: one.tensor_type.name for one in gguf_file.opened(path).tensors},
        notes=notes,
    )


def _write(path: Path, source: Path, plan: _Plan, *, progress: Progress) -> None:
    with extra("export"):
        import gguf
    # Tensors wait in a file: all of them in memory would be the size of the model once more.
    writer = gguf.GGUFWriter(path, plan.shape.family.arch, use_temp_file=True)
    writer.add_name(plan.name)
    families.add_shape(writer, plan.shape)
    _add_vocabulary(writer, plan.words)
    writer.add_file_type(_file_type(plan))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_importance(writer, plan.importance)
    for done, (tensor, array) in enumerate(llama.tensors(source, plan.shape), 1):
        progress("quantize tensors", done, 0)
        kind = plan.kind(tensor, array)
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(tensor, blocks.quantize(array, kind, plan.importance.columns.get(tensor)), raw_dtype=number)
    blockwise.trim()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _file_type(plan: _Plan) -> int:
    """Return llama.cpp's number for the file: where types are mixed that of the most frequent one."""
    if not plan.types:
        return PRECISIONS[plan.precision]
    return PRECISIONS[Counter(plan.types.values()).most_common(1)[0][0].lower()]


def _add_importance(writer: Any, importance: Importance) -> None:  # noqa: ANN401  # gguf's writer is untyped here
    """Say under llama.cpp's keys that there was an importance matrix, and of how much text."""
    if importance.columns:
        writer.add_string("quantize.imatrix.file", "calibration")
        writer.add_string("quantize.imatrix.dataset", "calibration")
        writer.add_uint32("quantize.imatrix.entries_count", len(importance.columns))
        writer.add_uint32("quantize.imatrix.chunks_count", importance.windows)


def _by_llama_cpp(path: Path, source: Path, plan: _Plan, *, progress: Progress) -> None:
    """Write floats first: llama.cpp quantizes files, not tensors."""
    plain = path.with_name("float.gguf")
    _write(plain, source, replace(plan, precision="f32"), progress=progress)
    try:
        llama_quantize.quantize(plain, path, plan.precision, plan.importance.columns, progress=progress)
    finally:
        plain.unlink()


def _told(path: Path, plan: _Plan) -> tuple[str, ...]:
    """Tell what the file holds, read from it: tensors by type, bits a weight, and what did not get what was asked."""
    tensors = gguf_file.opened(path).tensors
    used = Counter(tensor.tensor_type.name for tensor in tensors)
    bits = 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)
    reason = ""
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2]
    block = BLOCK if plan.types or plan.precision in PRECISIONS or plan.precision == "iq4_nl" else SUPER_BLOCK
    odd = (
        [t for t in matrices if t.shape[0] % block]
        if tensor_type("", (BLOCK, BLOCK), plan.precision) not in FLOATS
        else []
    )
    if odd:
        widths = ", ".join(map(str, sorted({int(t.shape[0]) for t in odd})))
        reason = f" (rows of {widths} are no multiple of {block})"
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(used.items()))
    notes = [f"tensor types: {counted}{reason}", f"{bits:.2f} bits a weight"]
    if odd and block == SUPER_BLOCK:
        instead = ", ".join(sorted({t.tensor_type.name for t in odd}))
        notes.append(
            f"{len(odd)} of {len(matrices)} matrices fell back to {instead}: {plan.precision} takes rows of {block}"
        )
    if plan.importance.columns:
        matrix = plan.importance
        notes.append(f"importance matrix: {len(matrix.columns)} tensors, {matrix.windows} windows of calibration text")
    return (*notes, *plan.told)


def tensor_type(name: str, shape: tuple[int, ...], precision: str) -> str:
    """Choose how a tensor is stored: vectors F32, rows that blocks do not divide F16, the vocabulary at least Q8_0.

    ``K`` leaves the choice to llama.cpp.

    llama.cpp itself keeps embedding and output above four and five bits: they decide which token wins.
    """
    if len(shape) < 2 or precision == "f32":
        return "F32"
    if precision == "bf16":
        return "BF16"
    if precision in llama_quantize.PRECISIONS:
        return "K"
    if precision == "f16" or shape[-1] % BLOCK:
        return "F16"
    if precision != "q8_0" and name in ("token_embd.weight", "output.weight"):
        return "Q8_0"
    return precision.upper()


def _add_vocabulary(writer: Any, words: Vocabulary) -> None:  # noqa: ANN401  # gguf's writer is untyped here
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores:
        writer.add_token_scores(words.scores)
    if words.merges:
        writer.add_token_merges(words.merges)
    writer.add_add_space_prefix(words.add_space_prefix)
    if words.bos is not None:
        writer.add_bos_token_id(words.bos)
    if words.eos is not None:
        writer.add_eos_token_id(words.eos)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


PLUGIN: Exporter = GgufExporter()
