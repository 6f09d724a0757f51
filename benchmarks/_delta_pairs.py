"""The pairs of files that deltas are measured on: the same model before and after somebody trained it further.

What changed was fixed before any delta was measured:

* **all weights nudged**: EfficientNet-Lite0 trained further on 872 labelled photographs, one pass, SGD with momentum
  0.9 and learning rate 0.001, batches of 16, batch norm's statistics kept. Quantized to int8 with calibration of its
  own, or written in fp16, before and after.
* **head only**: the same network with a classifier of ten groups of classes in place of its own, a logistic regression
  on its features: trained on half of the photographs, then on all.
* **LoRA-like**: SmolLM2-135M with an adapter of rank 8, alpha 16, on q_proj and v_proj of every block, merged. A is
  uniform within 1 / sqrt(width) as peft begins it, B normal with a deviation of 0.01, which is what AdamW makes of
  zeros in a few hundred steps at a learning rate of 2e-4: the matrices move by 0.7 % of their norm. Beside it, without
  a goal, an adapter four times as strong, and one on all seven matrices of every block.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from _report import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent / "export"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import efficientnet
from _smollm import source, write_folder

from edgekit import device_profiles, plugins, workload
from edgekit.compress import compress, recipe
from edgekit.export import PACKAGE
from edgekit.model import Data, LlamaFolder, Model
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SAMPLE = Path(os.environ.get("EDGEKIT_DATA") or ROOT.parent / "shared/data/imagenet_sample256_jpg.zip")
EFFICIENTNET = ROOT / "examples/efficientnet.py"
GROUPS = 10
RANK, ALPHA, SPREAD = 8, 16, 0.01
TWO = ("q_proj", "v_proj")
SEVEN = (*TWO, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Pair:
    """A file and what replaces it."""

    name: str
    old: Path
    new: Path


def build_groups() -> nn.Module:
    """Make EfficientNet-Lite0 with a head of ten scores; its weights come from a checkpoint."""
    network = efficientnet.build()
    network._fc = nn.Linear(network._fc.in_features, GROUPS)  # noqa: SLF001  # the package gives no other way
    return network


def convolutional(scratch: Path, *, quick: bool) -> Iterator[Pair]:
    """Yield the three pairs of EfficientNet-Lite0, or none where the photographs are missing."""
    if not SAMPLE.is_file():
        return
    os.environ["EDGEKIT_IMAGENET_SAMPLE"] = str(SAMPLE)
    data = workload.load_data(f"{EFFICIENTNET}:sample_data")
    judged = data.validation
    assert judged is not None
    assert judged.labels is not None
    images, labels = judged.inputs["image"], judged.labels
    order = np.random.default_rng(0).permutation(len(labels))[: 64 if quick else None]
    steering = Data(data.calibration.head(16 if quick else 128), preprocess=data.preprocess)
    network = efficientnet.build()
    before = _saved(network, scratch / "before.pt")
    features = _features(network, images[order])
    _train_further(network, images[order], labels[order])
    after = _saved(network, scratch / "after.pt")
    for name, plan in (("int8", "int8"), ("fp16", "fp16")):
        files = [_onnx(f"{EFFICIENTNET}:build", point, steering, plan) for point in (before, after)]
        yield Pair(f"EfficientNet-Lite0 {name}, all weights nudged", *files)
    groups = labels[order] * GROUPS // 1000
    heads = [
        _saved(_with_head(before, features[:count], groups[:count]), scratch / f"head{count}.pt")
        for count in (len(order) // 2, len(order))
    ]
    files = [_onnx(f"{Path(__file__)}:build_groups", point, steering, "int8") for point in heads]
    yield Pair("EfficientNet-Lite0 int8, head only", *files)


def _saved(network: nn.Module, path: Path) -> Path:
    torch.save(network.state_dict(), path)
    return path


def _train_further(network: nn.Module, images: np.ndarray, labels: np.ndarray) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    for start in range(0, len(labels), 16):
        part = slice(start, start + 16)
        optimizer.zero_grad()
        scores = network(torch.from_numpy(images[part]))
        nn.functional.cross_entropy(scores, torch.from_numpy(labels[part])).backward()
        optimizer.step()


def _features(network: nn.Module, images: np.ndarray) -> torch.Tensor:
    """Return what the classifier is given."""
    found: list[torch.Tensor] = []
    hook = network._fc.register_forward_pre_hook(lambda _, given: found.append(given[0]))  # noqa: SLF001  # as above
    with torch.no_grad():
        for start in range(0, len(images), 16):
            network(torch.from_numpy(images[start : start + 16]))
    hook.remove()
    return torch.cat(found)


def _with_head(before: Path, features: torch.Tensor, groups: np.ndarray) -> nn.Module:
    torch.manual_seed(0)
    network = build_groups()
    state = torch.load(before, weights_only=True)
    network.load_state_dict({name: one for name, one in state.items() if "_fc." not in name}, strict=False)
    head, truth = network._fc, torch.from_numpy(groups)  # noqa: SLF001  # as above
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.003)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), truth).backward()
        optimizer.step()
    return network


def _onnx(build: str, checkpoint: Path, data: Data, plan: str) -> Path:
    model = compress(workload.load(build, checkpoint, data), recipe.read(Path(plan)))
    return _exported(model, checkpoint.with_suffix(f".{plan}"), "x86-64", {})


def _exported(model: Model, folder: Path, profile: str, options: dict[str, str]) -> Path:
    folder.mkdir()
    chosen = device_profiles.load(profile)
    chosen = msgspec.structs.replace(chosen, options={**chosen.options, **options})
    exporter = plugins.load(PACKAGE, chosen.format, "format")
    return folder / exporter.export(model, chosen, folder, silent).main  # type: ignore[attr-defined]  # an Exporter


def language(scratch: Path, precisions: Sequence[str], matrices: Sequence[str], spread: float) -> Iterator[Pair]:
    """Yield SmolLM2-135M before and after an adapter on ``matrices`` was merged; none without the model."""
    found = source()
    if found is None:
        return
    old, new = scratch / "smollm2", scratch / f"smollm2-{len(matrices)}-{spread}"
    if not old.is_dir():
        write_folder(found, old, is_shuffled=True)
    shutil.copytree(old, new)
    save_file(_merged(load_file(old / "model.safetensors"), matrices, spread), new / "model.safetensors")
    strength = "" if spread == SPREAD else f", {spread / SPREAD:g} times as strong"
    for precision in precisions:
        if precision.endswith("_k_m") and importlib.util.find_spec("llama_cpp") is None:
            continue
        files = [_gguf(folder, precision) for folder in (old, new)]
        yield Pair(f"SmolLM2-135M {precision.upper()}, LoRA on {len(matrices)} matrices a block{strength}", *files)


def _merged(state: dict[str, torch.Tensor], matrices: Sequence[str], spread: float) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    for name in sorted(state):
        if name.split(".")[-2] not in matrices:
            continue
        rows, columns = state[name].shape
        a = (2 * torch.rand(RANK, columns, generator=chance) - 1) / columns**0.5
        b = spread * torch.randn(rows, RANK, generator=chance)
        state[name] += ALPHA / RANK * b @ a
    return state


def _gguf(folder: Path, precision: str) -> Path:
    made = folder.parent / f"{folder.name}.{precision}"
    if not made.is_dir():
        _exported(
            Model(name="smollm2", task="text-generation", network=LlamaFolder(folder)),
            made,
            "llama-cpp",
            {"precision": precision},
        )
    return made / "model.gguf"
