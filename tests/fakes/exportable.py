"""Small models for the exporters: a CNN with every seam of the real ones, its plan, and a Llama of 30,000 weights."""

import dataclasses
import json
import warnings

import numpy as np
import pytest

from edgekit import workload
from edgekit.manifest import ImagePreprocess
from edgekit.model import Data, Split
from edgekit.plan import QuantizationPlan, Range, WeightRule

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def tiny_model(network=None, count=24):
    """Return a classification model whose weights and pictures are always the same."""
    torch = pytest.importorskip("torch", reason="exporters need torch")
    images = np.random.default_rng(0).random((count, 3, 8, 8), np.float32)
    preprocess = ImagePreprocess(input="image", resize=8, crop=8, std=(255.0,))
    data = Data(Split({"image": images}, np.arange(count) % 10), preprocess=preprocess, labels=LABELS)
    torch.manual_seed(0)
    return workload.from_module("tiny", (network or _cnn()).eval(), data)


def _cnn():
    """Depthwise, strided, residual, ReLU and ReLU6, pooling, Linear: pads and layouts that go wrong elsewhere."""
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
            self.head = nn.Linear(16, 10)

        def forward(self, image):
            x = torch.relu(self.stem(image))
            x = x + nn.functional.relu6(self.depthwise(x))
            x = torch.relu(self.down(x))
            # Spread the scores, so that the best class is clear and top-1 agreement means something.
            return 20 * self.head(x.mean((2, 3)))

    return Tiny()


def tied_model(rows=12, width=8):
    """Return a network that looks rows of a table up and multiplies by the same table."""
    import torch
    from torch import nn

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(rows, width)
            self.head = nn.Linear(width, rows, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(torch.relu(self.table(tokens)))

    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(0, rows, (32, 5), np.int64)
    return workload.from_module("tied", Tied().eval(), Data(Split({"tokens": tokens})))


def with_plan(model, *, bits=8, granularity="channel", weights=None):
    """Return the model with a min-max plan made by running its traced graph."""
    import torch

    traced = workload.trace(model)
    found = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if (
                isinstance(result, torch.Tensor)
                and result.is_floating_point()
                and n.op in ("placeholder", "call_function")
            ):
                found[n.name] = Range(float(result.min()), float(result.max()))
            return result

    with torch.no_grad():
        Watch(traced.module()).run(*[torch.as_tensor(a) for a in model.data.calibration.inputs.values()])
    rule = WeightRule(bits=bits, granularity=granularity)
    names = weights or [n for n, p in model.network.module.named_parameters() if p.dim() > 1]
    return dataclasses.replace(model, plan=QuantizationPlan(bits, "minmax", dict.fromkeys(names, rule), found))


def llama_folder(folder, **changes):
    """Write a Hugging Face Llama with seeded weights and a llama2.c tokenizer; return its path."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="the GGUF exporter reads Hugging Face folders")
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128,
                "bos_token_id": 1, "eos_token_id": 2, **changes}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
        # Large weights: logits far apart, so that agreement of the best token means something.
        for name, parameter in network.named_parameters():
            if "norm" not in name:
                parameter.data.mul_(8)
        network.save_pretrained(folder)
    (folder / "tokenizer.bin").write_bytes(llama2c_tokenizer(settings["vocab_size"]))
    return folder


def llama2c_tokenizer(size):
    import struct

    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *[b"<0x%02X>" % n for n in range(256)]]
    pieces += [b" " if n == 0 else bytes([96 + n]) for n in range(27)]
    pieces += [b"%c%c" % (97 + n % 26, 97 + n // 26) for n in range(size)]
    records = [struct.pack("<fi", -float(n), len(p)) + p for n, p in enumerate(pieces[:size])]
    return struct.pack("<i", 7) + b"".join(records)


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
