"""The counts of the serving model as Prometheus reads them (text format 0.0.4). Knows no HTTP."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from edgekit.runtime.memory import rss_mib
from edgekit.runtime.telemetry import BUCKETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgekit.runtime.host import Host

KIND = b"text/plain; version=0.0.4; charset=utf-8"


def text(host: Host) -> bytes:
    """Return all metrics of the model that serves now."""
    return ("\n".join(_lines(host)) + "\n").encode()


def _lines(host: Host) -> Iterator[str]:
    session = host.session
    counted = host.statistics(session.digest)
    labels = f'digest="{session.digest}"'
    contract = session.contract
    info = (
        f'model="{_escaped(contract.name)}",version="{_escaped(contract.version)}",{labels},'
        f'variant="{session.variant.name}",engine="{_escaped(session.engine)}"'
    )
    yield from _metric("edgekit_model_info", "gauge", "The model that serves", [(info, 1)])
    yield from _metric("edgekit_requests_total", "counter", "Requests to the model", [(labels, counted.requests)])
    kinds = [(f'{labels},kind="{_escaped(kind)}"', count) for kind, count in sorted(counted.by_kind.items())]
    yield from _metric("edgekit_errors_total", "counter", "Requests that ended in an error", kinds)
    yield from _metric(
        "edgekit_non_finite_outputs_total", "counter", "Answers with NaN or infinity", [(labels, counted.non_finite)]
    )
    yield from _histogram(labels, counted.buckets, counted.seconds)
    agreement = host.agreement()
    yield from _metric("edgekit_shadow_samples", "gauge", "Samples compared with the old model",
                       [("", agreement.samples)])  # fmt: skip
    yield from _metric("edgekit_shadow_agreement", "gauge", "Share of them with the same choice",
                       [("", agreement.share)])  # fmt: skip
    yield from _metric("process_resident_memory_bytes", "gauge", "Resident memory", [("", int(rss_mib() * (1 << 20)))])


def _histogram(labels: str, buckets: tuple[int, ...], seconds: float) -> Iterator[str]:
    name = "edgekit_request_seconds"
    counts = list(itertools.accumulate(buckets)) or [0] * (len(BUCKETS) + 1)
    yield f"# HELP {name} Time to an answer"
    yield f"# TYPE {name} histogram"
    for bound, count in zip([*map(str, BUCKETS), "+Inf"], counts, strict=True):
        yield f'{name}_bucket{{{labels},le="{bound}"}} {count}'
    yield f"{name}_sum{{{labels}}} {seconds:.9g}"
    yield f"{name}_count{{{labels}}} {counts[-1]}"


def _metric(name: str, kind: str, meaning: str, values: Sequence[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values:
        yield f"{name}{{{labels}}} {value:.15g}" if labels else f"{name} {value:.15g}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
