"""The counts of the serving model as Prometheus reads them (text format 0.0.4). Knows no HTTP."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from edgekit.runtime import sensors
from edgekit.runtime.memory import rss_mib
from edgekit.runtime.telemetry import BUCKETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgekit.runtime.host import Host
    from edgekit.runtime.server.gate import Gate

KIND = b"text/plain; version=0.0.4; charset=utf-8"


def text(host: Host, gate: Gate) -> bytes:
    """Return all metrics of the model that serves now, of those who wait for it, and of the device."""
    return ("\n".join([*_lines(host), *_queue(gate), *_device(sensors.read())]) + "\n").encode()


def _queue(gate: Gate) -> Iterator[str]:
    yield from _histogram("edgekit_queue_seconds", "Time until a thread was free", "", *gate.waits())
    yield from _metric("edgekit_requests_in_flight", "gauge", "Requests that compute or wait", [("", gate.inside)])
    yield from _metric("edgekit_requests_waiting", "gauge", "Requests that wait", [("", gate.waiting)])
    yield from _metric("edgekit_turned_away_total", "counter", "Requests answered 429", [("", gate.turned_away)])
    yield from _metric("edgekit_given_up_total", "counter", "Requests answered 504", [("", gate.given_up)])


def _device(found: sensors.Readings) -> Iterator[str]:
    """Tell what the device's sensors say; nothing of those that it has not."""
    for name, meaning, values, label in (
        ("edgekit_temperature_celsius", "Temperature", found.celsius, "sensor"),
        ("edgekit_core_hertz", "Clock of a core", found.hertz, "core"),
        ("edgekit_core_max_hertz", "Highest clock of a core", found.most_hertz, "core"),
    ):
        if values:
            yield from _metric(name, "gauge", meaning, [(f'{label}="{_escaped(k)}"', v) for k, v in values.items()])
    if found.throttled is not None:
        yield from _metric("edgekit_throttled", "gauge", "The firmware slows the device", [("", found.throttled)])


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
    yield from _histogram("edgekit_request_seconds", "Time to an answer", labels, counted.buckets, counted.seconds)
    agreement = host.agreement()
    yield from _metric("edgekit_shadow_samples", "gauge", "Samples compared with the old model",
                       [("", agreement.samples)])  # fmt: skip
    yield from _metric("edgekit_shadow_agreement", "gauge", "Share of them with the same choice",
                       [("", agreement.share)])  # fmt: skip
    yield from _metric("process_resident_memory_bytes", "gauge", "Resident memory", [("", int(rss_mib() * (1 << 20)))])


def _histogram(name: str, meaning: str, labels: str, *counted: Any) -> Iterator[str]:  # noqa: ANN401  # buckets, sum
    buckets, seconds = counted
    counts = list(itertools.accumulate(buckets)) or [0] * (len(BUCKETS) + 1)
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} histogram"
    for bound, count in zip([*map(str, BUCKETS), "+Inf"], counts, strict=True):
        yield f'{name}_bucket{{{labels}{"," if labels else ""}le="{bound}"}} {count}'
    braced = f"{{{labels}}}" if labels else ""
    yield f"{name}_sum{braced} {seconds:.9g}"
    yield f"{name}_count{braced} {counts[-1]}"


def _metric(name: str, kind: str, meaning: str, values: Sequence[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values:
        yield f"{name}{{{labels}}} {value:.15g}" if labels else f"{name} {value:.15g}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
