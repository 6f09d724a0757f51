"""Ranks recipes on the validation pictures of one network: what the recipes in `recipes/` were chosen by.

    python benchmarks/compress/_choose.py resnet20 CANDIDATES.toml [--seeds 3] [--check simulation]

The file of candidates holds one table a recipe, ``[[NAME.pass]]``. Reads no test picture. Files are judged in ONNX
Runtime; ``--check simulation`` judges the plan on the float network instead, for what has no ONNX form yet.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from _setting import scores, sqnr, top1
from _subjects import EFFICIENTNET, Subject, cifar, efficientnet, write_onnx

from edgekit.cli._terminal import markdown_table
from edgekit.compress import compress, recipe
from edgekit.compress.evaluate import stored_bytes
from edgekit.compress.simulation import planned_network
from edgekit.errors import EdgekitError
from edgekit.model import run_batched

if TYPE_CHECKING:
    from edgekit.model import Model
    from edgekit.tensors import Array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("subject")
    parser.add_argument("candidates", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="names to take, with commas")
    parser.add_argument("--calibration", type=int, default=32, help="photographs of EfficientNet-Lite0")
    parser.add_argument("--check", choices=("onnx", "simulation"), default="onnx")
    options = parser.parse_args()
    subject = efficientnet(options.calibration) if options.subject == EFFICIENTNET else cifar(options.subject)
    candidates = tomllib.loads(options.candidates.read_text(encoding="utf-8"))
    wanted = options.only.split(",") if options.only else list(candidates)
    with tempfile.TemporaryDirectory() as scratch:
        judge = Judge(subject, Path(scratch), options.check)
        rows = [judge.row(name, candidates[name], seed) for name in wanted for seed in range(options.seeds)]
    print(markdown_table(("recipe", "seed", "validation top-1", "drop", "SQNR dB", "bytes", "seconds"), rows))


class Judge:
    """Holds the float network's answers on the validation pictures."""

    def __init__(self, subject: Subject, folder: Path, check: str) -> None:
        self.subject, self.folder, self.check = subject, folder, check
        self.labels = subject.validation.labels
        self.reference = scores(subject.float_file(folder), subject.validation.inputs)

    def row(self, name: str, passes: dict[str, Any], seed: int) -> tuple[str, ...]:
        """Compress by one recipe and compare."""
        began = time.perf_counter()
        try:
            made = compress(self.subject.model(seed), recipe.decode(tomli_w.dumps({"version": 1, **passes})))
            took = time.perf_counter() - began
            found = self._scores(made)
        except EdgekitError as error:
            print(name, seed, error, flush=True)
            return (name, str(seed), "", "", "", "", str(error)[:60])
        drop = top1(self.reference, self.labels) - top1(found, self.labels)
        cells = (
            name,
            str(seed),
            f"{top1(found, self.labels):.2f}",
            f"{drop:.2f}",
            f"{sqnr(found, self.reference):.2f}",
            str(stored_bytes(made)),
            f"{took:.1f}",
        )
        print(*cells, flush=True)
        return cells

    def _scores(self, made: Model) -> Array:
        if self.check == "simulation":
            return next(iter(run_batched(planned_network(made), self.subject.validation, 100).values()))
        path = write_onnx(made, self.folder / "try", self.folder / f"try-{os.getpid()}.onnx")
        return scores(path, self.subject.validation.inputs)


if __name__ == "__main__":
    main()
