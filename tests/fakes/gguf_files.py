"""GGUF files for tests: headers alone, and real models whose header says something else."""

from __future__ import annotations

import struct


def header(*, version=3, **pairs) -> bytes:
    """Return a file without tensors; names with ``__`` for dots, values as integers, strings or lists of either."""
    body = b"".join(_string(key.replace("__", ".")) + _typed(value) for key, value in pairs.items())
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(pairs)) + body


def model(tensors, *, pairs=(), data=b"", counts=(None, None)) -> bytes:
    """Return a file as it is told, sound or not: ``tensors`` are (name, axes, type, offset), ``pairs`` raw bytes.

    ``counts`` are the numbers of tensors and of pairs that the header tells, where they are not the true ones.
    """
    told = [len(what) if count is None else count for what, count in zip((tensors, pairs), counts, strict=True)]
    body = b"".join(pairs)
    for name, axes, kind, offset in tensors:
        body += _string(name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes) + struct.pack("<IQ", kind, offset)
    head = b"GGUF" + struct.pack("<IQQ", 3, *told) + body
    return head + bytes(-len(head) % 32) + data


def pair(key: str, kind: int, content: bytes) -> bytes:
    """Return a key and its value as raw bytes."""
    return _string(key) + struct.pack("<I", kind) + content


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _typed(value) -> bytes:
    if isinstance(value, list):
        kind = 8 if isinstance(value[0], str) else 4
        items = b"".join(_string(one) if kind == 8 else struct.pack("<I", one) for one in value)
        return struct.pack("<IIQ", 9, kind, len(value)) + items
    return struct.pack("<I", 8) + _string(value) if isinstance(value, str) else struct.pack("<II", 4, value)


def rewritten(source, target, new, remove=()) -> None:
    """Copy a model by the `gguf` package, with other words in its header: ``new`` maps keys to integers or texts."""
    import gguf
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader = gguf.GGUFReader(source)
    kinds = {int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
    said = {key: MetadataDetails(kinds[type(value)], value) for key, value in new.items()}
    architecture = reader.fields["general.architecture"].contents()
    copy_with_new_metadata(reader, gguf.GGUFWriter(target, architecture), said, list(remove))


_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def in_transformers(file):
    """Return a Llama file as transformers' network, in float32, and the tokenizer of `tokenizers`."""
    import gguf
    import torch
    import transformers

    reader = gguf.GGUFReader(file)
    said = {key.removeprefix("llama."): field.contents() for key, field in reader.fields.items() if "llama." in key}
    heads = {"attn_q": said["attention.head_count"], "attn_k": said["attention.head_count_kv"]}
    network = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=said["vocab_size"],
            hidden_size=said["embedding_length"],
            intermediate_size=said["feed_forward_length"],
            num_hidden_layers=said["block_count"],
            num_attention_heads=heads["attn_q"],
            num_key_value_heads=heads["attn_k"],
            rope_theta=said["rope.freq_base"],
            rms_norm_eps=said["attention.layer_norm_rms_epsilon"],
        )
    )
    weights = {}
    for tensor in reader.tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        block, _, rest = tensor.name.removesuffix(".weight").partition(".")
        number, _, name = rest.partition(".")
        if name in heads:  # llama.cpp rotates neighbours, transformers the two halves
            array = array.reshape(heads[name], -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        ours = {"token_embd": "embed_tokens", "output_norm": "norm"}.get(block) or f"layers.{number}.{_NAMES[name]}"
        weights[f"{ours}.weight"] = torch.tensor(array)
    network.load_state_dict(weights)
    return network.eval(), _words(reader)


def _words(reader):
    """Return the tokenizer of a file whose ``tokenizer.ggml.pre`` is ``smollm``: GPT-2's, and every digit alone."""
    import tokenizers

    said = {key: reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges")}
    vocabulary = {token: number for number, token in enumerate(said["tokens"])}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [tuple(one.split(" ")) for one in said["merges"]]))
    split = (
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(list(split))
    return words
