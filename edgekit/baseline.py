"""What a model's data looked like when it was exported: what a device holds its live requests against.

Types and checks only; reads no disk and computes nothing. `docs/bundle-format.md` is the specification.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from edgekit.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekit.tensors import TensorSpec

FILE = "baseline.json"
MAX_BASELINE_BYTES = 1 << 20
MAX_TENSORS, MAX_SERIES = 64, 256
Reading = Literal["columns", "picture", "tensor", "tokens", "labels", "objects"]


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class Series(_Part, frozen=True, kw_only=True):
    """One number a sample, as a histogram: ``counts[i]`` samples lie in (``edges[i - 1]``, ``edges[i]``].

    The outer bins are open. ``classes``: the number is that of a class, so that order means nothing.
    """

    name: str
    edges: Annotated[tuple[float, ...], msgspec.Meta(max_length=64)] = ()
    counts: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=1 << 31)], ...], msgspec.Meta(max_length=65)]
    classes: bool = False

    @property
    def samples(self) -> int:
        """How many samples were counted."""
        return sum(self.counts)


class Observed(_Part, frozen=True, kw_only=True):
    """What is drawn from one tensor, and the series that the data gave.

    ``least`` and ``most`` bound the values themselves: one number a column, or a channel, or one for all; empty for
    none. ``axis``: that of a picture's channels. ``unknown``: the token for what the tokenizer does not know, -1 for
    none. ``seen``: a bit for each token of the data, lowest bit first.
    """

    role: Literal["input", "output"]
    tensor: str
    reading: Reading
    series: Annotated[tuple[Series, ...], msgspec.Meta(min_length=1, max_length=64)]
    least: Annotated[tuple[float, ...], msgspec.Meta(max_length=64)] = ()
    most: Annotated[tuple[float, ...], msgspec.Meta(max_length=64)] = ()
    axis: Annotated[int, msgspec.Meta(ge=1, le=3)] = 1
    unknown: int = -1
    seen: Annotated[bytes, msgspec.Meta(max_length=1 << 16)] = b""


class Baseline(_Part, frozen=True, kw_only=True):
    """All that was drawn from ``samples`` samples of the split ``split``, answered by the float model.

    ``shifts`` says by variant and series (``scores: confidence``) how far the variant's own answers lie from the float
    model's on the same samples: that much is no drift. It is a KS distance, for classes a PSI.
    """

    format: Literal[1] = 1
    samples: Annotated[int, msgspec.Meta(ge=1)]
    split: str
    tensors: Annotated[tuple[Observed, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    shifts: dict[str, dict[str, Annotated[float, msgspec.Meta(ge=0, le=100)]]] = {}


def encode(baseline: Baseline) -> bytes:
    """Return the canonical bytes."""
    return msgspec.json.encode(baseline, order="sorted") + b"\n"


def decode(data: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Baseline:
    """Parse a baseline and check it against the tensors of its model.

    Raises:
        BundleError: too long, no baseline, of tensors that the model has not, or histograms that are none.
    """
    if len(data) > MAX_BASELINE_BYTES:
        raise BundleError(f"the baseline has {len(data)} bytes, more than {MAX_BASELINE_BYTES}")
    try:
        baseline = msgspec.json.decode(data, type=Baseline)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"this is no baseline of format 1: {error}", "export the bundle again") from error
    names = {"input": {spec.name for spec in inputs}, "output": {spec.name for spec in outputs}}
    if sum(len(observed.series) for observed in baseline.tensors) > MAX_SERIES:
        raise BundleError(f"the baseline tells of more than {MAX_SERIES} series")
    for observed in baseline.tensors:
        if observed.tensor not in names[observed.role]:
            raise BundleError(f"the baseline tells of the {observed.role} {observed.tensor!r}, which the model has not")
        for series in observed.series:
            _check(series, f"{observed.tensor}: {series.name}")
        if len(observed.least) != len(observed.most) or not all(map(math.isfinite, (*observed.least, *observed.most))):
            raise BundleError(f"the baseline of {observed.tensor!r} bounds values by what are no bounds")
    return baseline


def _check(series: Series, what: str) -> None:
    ascending = all(low < high for low, high in pairwise(series.edges)) and all(map(math.isfinite, series.edges))
    if not ascending or len(series.counts) != len(series.edges) + 1 or not series.samples:
        raise BundleError(f"the baseline of {what} is no histogram", "export the bundle again")
