"""Between a Hugging Face language model and GGUF: tensors by name, row order, both ways. Knows no tokens.

llama.cpp's Llama rotates pairs of neighbouring rows, Hugging Face rows half a head apart: rows of q and k are
reordered. Gemmas' norms multiply by one more than their weight: llama.cpp wants the sum.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from edgekit import blockwise
from edgekit.errors import ExportError, UsageError
from edgekit.export import families, gguf_file, rotation
from edgekit.export.quiet import silence
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgekit.export.families import Shape
    from edgekit.tensors import Array

AT_ONCE = 64 << 20
"""After so many bytes a file of weights is opened anew."""
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def tensors(folder: Path, shape: Shape) -> Iterator[tuple[str, Array]]:
    """Yield every tensor of the folder's safetensors files under its GGUF name, in float32, as llama.cpp wants it.

    Those of a scaled rotation, which config.json describes, come last.

    Raises:
        UsageError: there is no safetensors file, or it is damaged.
        ExportError: a tensor has no place in the family; names it.
    """
    with extra("export"):
        import torch
        from safetensors import SafetensorError
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder} has no .safetensors file", "pickled weights are not read: convert them first")
    for path in files:
        try:
            for name, tensor in _stored(path):
                if not _is_spare(name, shape):
                    yield to_gguf(name, tensor.to(torch.float32).numpy(), shape)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is damaged: {error}", "fetch the model again") from error
    yield from rotation.tensors(shape.scaling)


def _stored(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield a file's tensors by name. Opens it again and again: pages that were read stay while it is open."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = sorted(file.keys())
    read = AT_ONCE
    for name in names:
        if read >= AT_ONCE:
            file, read = safe_open(path, framework="pt"), 0
        tensor = file.get_tensor(name)
        read += tensor.nbytes
        yield name, tensor


def _is_spare(name: str, shape: Shape) -> bool:
    """Tell what is computed, or stored twice: the output matrix of a family that shares the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (shape.family.is_always_tied and name == "lm_head.weight")


def to_gguf(name: str, array: Array, shape: Shape) -> tuple[str, Array]:
    """Return the GGUF name and the numbers as llama.cpp wants them.

    Raises:
        ExportError: no tensor of the family has that name.
    """
    found = gguf_name(name, shape)
    heads = _rotated_heads(found, shape)
    if _is_norm(found):
        array = array + shape.family.norm_offset
    return found, _interleave(array, heads) if heads else array


def gguf_name(name: str, shape: Shape) -> str:
    """Return what GGUF calls a tensor of transformers.

    Raises:
        ExportError: no tensor of the family has that name.
    """
    family = shape.family
    found: str | None = _names(family.arch, shape.layers).get_name(name, try_suffixes=(".weight", ".bias"))
    is_known = found is not None and _part(found) in {*family.parts, *_WHOLE}
    if found is None or not is_known or (name.endswith(".bias") and _part(found) not in family.biased):
        raise ExportError(f"tensor {name!r} has no place in GGUF's {family.arch}", "use llama.cpp's own converter")
    return found


@cache
def _names(arch: str, layers: int) -> Any:  # noqa: ANN401  # gguf is untyped here
    """Return gguf's map of names, made once: it takes 20 ms for 30 blocks, and each of their tensors asks."""
    with extra("export"):
        import gguf
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)


def from_gguf(name: str, array: Array, shape: Shape) -> tuple[str, Array]:
    """Return a stored tensor's Hugging Face name and numbers: `to_gguf` undone."""
    heads = _rotated_heads(name, shape)
    if _is_norm(name):
        array = array - shape.family.norm_offset
    return _transformers_name(name, shape), _halve(array, heads) if heads else array


def _transformers_name(name: str, shape: Shape) -> str:
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{_WHOLE[stem]}.{suffix}"
    number = stem.split(".", 2)[1]
    return f"model.layers.{number}.{shape.family.parts[_part(name)]}.{suffix}"


def _is_norm(name: str) -> bool:
    return _part(name).endswith("_norm")


def _rotated_heads(name: str, shape: Shape) -> int:
    """Say in how many heads the rows are reordered, 0 for as they stand."""
    return {"attn_q": shape.heads, "attn_k": shape.kv_heads}.get(_part(name), 0) if shape.family.interleaved else 0


def _interleave(array: Array, heads: int) -> Array:
    half = array.shape[0] // heads // 2
    return array.reshape(heads, 2, half, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _halve(array: Array, heads: int) -> Array:
    half = array.shape[0] // heads // 2
    return array.reshape(heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _part(name: str) -> str:
    """Drop block number and suffix: ``blk.3.attn_q.weight`` is ``attn_q``."""
    stem = name.rpartition(".")[0]
    return stem.split(".", 2)[2] if stem.startswith("blk.") else stem


def logits(path: Path, tokens: Array) -> Array:
    """Compute logits [batch, tokens, vocabulary] from a GGUF file's bytes alone, in PyTorch, weights dequantized."""
    with extra("export"), silence():
        import torch
    network = network_of(path)
    with silence(), torch.no_grad():
        result: Array = network(torch.as_tensor(tokens)).logits.numpy()
    return result


def network_of(path: Path) -> Any:  # noqa: ANN401  # transformers is untyped here
    """Build transformers' network of a GGUF file that edgekit wrote, from its keys and dequantized tensors.

    A block has weights while it computes only: all blocks at once would be the size of the float model.

    Raises:
        ExportError: the file lacks tensors of the network; names them.
    """
    with extra("export"), silence():
        from transformers import AutoConfig
    reader = gguf_file.opened(path)
    shape = families.stored_shape(reader)
    names = {t.name for t in reader.tensors}
    settings = families.configuration(shape)
    for key, name in (("attention_bias", "attn_output"), ("mlp_bias", "ffn_up")):
        settings[key] = f"blk.0.{name}.bias" in names
    settings["tie_word_embeddings"] = "output.weight" not in names
    config = AutoConfig.for_model(shape.family.model_type, **settings)
    with silence():
        network = blockwise.empty(config)
    rotation.apply(network.model.rotary_emb, shape.scaling)
    stored = {_transformers_name(t.name, shape): t for t in reader.tensors if t.name not in rotation.TENSORS}
    if lacking := blockwise.names(network) - set(stored):
        raise ExportError(f"{path.name} lacks {', '.join(sorted(lacking))}", "export it again")
    return blockwise.fill(network, lambda wanted: _weights(path, {n: stored[n] for n in wanted}, shape))


def _weights(path: Path, stored: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Dequantize tensors by transformers' names; they are read, as pages of a mapped file stay in memory."""
    import gguf
    import numpy as np
    import torch

    found = {}
    for name, tensor in stored.items():
        kept = tensor.data
        data = np.fromfile(path, kept.dtype, kept.size, offset=tensor.data_offset).reshape(kept.shape)
        _, array = from_gguf(tensor.name, gguf.quants.dequantize(data, tensor.tensor_type), shape)
        found[name] = torch.from_numpy(np.ascontiguousarray(array))
    return found
