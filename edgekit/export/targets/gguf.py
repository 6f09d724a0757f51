"""GGUF for llama.cpp, from a Hugging Face folder, in pure Python: floats and the plain types of blocks; no K-quants."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

from edgekit.errors import ExportError, UsageError
from edgekit.export import families, llama, vocabulary
from edgekit.export.targets import Artifact
from edgekit.model import GgufFile, LlamaFolder, Model, TorchNetwork
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.device_profiles import DeviceProfile
    from edgekit.export.families import Shape
    from edgekit.export.targets import Exporter
    from edgekit.export.vocabulary import Vocabulary
    from edgekit.progress import Progress
    from edgekit.tensors import Array

PRECISIONS = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q5_1": 9, "q5_0": 8, "q4_1": 3, "q4_0": 2}
"""What a file may mostly consist of, with llama.cpp's number for it (``llama_ftype``)."""
BLOCK = 32


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
        if precision not in PRECISIONS:
            raise UsageError(f"GGUF is not written as {precision!r}", f"choose {', '.join(PRECISIONS)}")
        source = model.network.path
        shape = families.read_shape(source)
        words = vocabulary.read(source, shape.vocabulary)
        path = folder / "model.gguf"
        types = _write(path, source, (model.name, precision), (shape, words), progress=progress)
        return _artifact(path, precision, types)

    def evaluate(self, main: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute ``logits`` for ``input_ids`` from the file's bytes, in PyTorch."""
        return {"logits": llama.logits(main, inputs["input_ids"])}


def _taken(source: Path, folder: Path) -> Artifact:
    """Take a finished file as it stands; its precision is the type that most of its bytes have."""
    with extra("export"):
        import gguf
    try:
        tensors = gguf.GGUFReader(source).tensors
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


def _artifact(path: Path, precision: str, note: str) -> Artifact:
    return Artifact(
        main=path.name,
        files=(path.name,),
        precision=precision,
        requires={"gguf": "3", "memory_mib": str(path.stat().st_size * 5 // 4 // 2**20 + 64)},
        notes=(note,),
    )


def _write(
    path: Path, source: Path, title: tuple[str, str], parts: tuple[Shape, Vocabulary], *, progress: Progress
) -> str:
    with extra("export"):
        import gguf
    name, precision = title
    shape, words = parts
    writer = gguf.GGUFWriter(path, shape.family.arch)
    writer.add_name(name)
    families.add_shape(writer, shape)
    _add_vocabulary(writer, words)
    writer.add_file_type(PRECISIONS[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    used: Counter[str] = Counter()
    odd: set[int] = set()
    for tensor, array in llama.tensors(source, shape):
        progress("quantize tensors", sum(used.values()) + 1, 0)
        kind = tensor_type(tensor, array.shape, precision)
        if precision.startswith("q") and array.ndim == 2 and kind == "F16":
            odd.add(array.shape[-1])
        used[kind] += 1
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(tensor, gguf.quants.quantize(array, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reason = f" (rows of {', '.join(map(str, sorted(odd)))} are no multiple of {BLOCK})" if odd else ""
    return "tensor types: " + ", ".join(f"{count} {kind}" for kind, count in sorted(used.items())) + reason


def tensor_type(name: str, shape: tuple[int, ...], precision: str) -> str:
    """Choose how a tensor is stored: vectors F32, rows that blocks do not divide F16, the vocabulary at least Q8_0.

    llama.cpp itself keeps embedding and output above four and five bits: they decide which token wins.
    """
    if len(shape) < 2 or precision == "f32":
        return "F32"
    if precision == "bf16":
        return "BF16"
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
