"""The counts of the models that serve as Prometheus reads them (text format 0.0.4). Knows no HTTP."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import TYPE_CHECKING

from edgekit.runtime import sensors
from edgekit.runtime.memory import rss_mib
from edgekit.runtime.telemetry import BUCKETS
from edgekit.runtime.watch import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from edgekit.runtime.decisions import DecisionLog
    from edgekit.runtime.isolation import Condition
    from edgekit.runtime.repository import Repository
    from edgekit.runtime.server.gate import Gate
    from edgekit.runtime.session import Session, TextSession

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Upper bounds of the histogram of batches."""
KIND = b"text/plain; version=0.0.4; charset=utf-8"


def text(models: Repository, gates: Sequence[Gate]) -> bytes:
    """Return all metrics of the models that serve now, of those who wait for them, and of the device."""
    return ("\n".join([*_served(models), *_watched(models), *_queue(gates), *_device(sensors.read())]) + "\n").encode()


def _queue(gates: Sequence[Gate]) -> Iterator[str]:
    waits = [gate.waits() for gate in gates]
    together = [sum(counts) for counts in zip(*(buckets for buckets, _ in waits), strict=True)]
    seconds = sum(seconds for _, seconds in waits)
    yield from _histogram("edgekit_queue_seconds", "Time until a thread was free", [("", together, seconds)])
    for name, kind, meaning, value in (
        ("edgekit_requests_in_flight", "gauge", "Requests that compute or wait", sum(one.inside for one in gates)),
        ("edgekit_requests_waiting", "gauge", "Requests that wait", sum(one.waiting for one in gates)),
        ("edgekit_turned_away_total", "counter", "Requests answered 429", sum(one.turned_away for one in gates)),
        ("edgekit_given_up_total", "counter", "Requests answered 504", sum(one.given_up for one in gates)),
    ):
        yield from _metric(name, kind, meaning, [("", value)])


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


def _watched(models: Repository) -> Iterator[str]:
    """Tell of the last window of each model's requests, and of every kind of alert that there is, raised or not."""
    found = [
        (f'digest="{session.digest}"', host.watch.findings(session.digest), host.alerts_of(session.digest))
        for host in models
        for session in host.sessions
    ]
    samples = [(labels, one.samples) for labels, one, _ in found]
    yield from _metric("edgekit_drift_samples_total", "counter", "Samples looked at", samples)
    for name, meaning, number in (
        ("edgekit_drift_ks", "Distance of the farthest series from the data (Kolmogorov-Smirnov)", "distance"),
        ("edgekit_drift_psi", "Stability index of the farthest series, less what chance adds", "stability"),
        ("edgekit_out_of_range_share", "Samples beyond the extremes of the data", "outside"),
        ("edgekit_non_finite_share", "Samples with NaN or infinity", "non_finite"),
        ("edgekit_confidence_mean", "Mean probability or score of the best class", "confidence"),
    ):
        values = [
            (f'{labels},{tensor.role}="{_escaped(tensor.tensor)}"', value)
            for labels, one, _ in found
            for tensor in one.tensors
            if (value := getattr(tensor, number)) is not None
        ]
        if values:
            yield from _metric(name, "gauge", meaning, values)
    yield from _decisions({id(log): log for host in models if (log := host.watch.decisions)}.values())
    alerts = [
        (f'{labels},kind="{kind}"', float(any(kind == alert.kind for alert in raised)))
        for labels, _, raised in found
        for kind in KINDS
    ]
    yield from _metric("edgekit_alert", "gauge", "Whether something of that kind is not as it was", alerts)


def _decisions(logs: Iterable[DecisionLog]) -> Iterator[str]:
    for log in logs:  # several models share one
        yield from _metric("edgekit_decisions_total", "counter", "Decisions that were logged", [("", log.written)])
        yield from _metric(
            "edgekit_decisions_dropped_total", "counter", "Decisions that the log lacks", [("", log.dropped)]
        )


def _served(models: Repository) -> Iterator[str]:
    sessions = [(host, session) for host in models for session in host.sessions]
    counted = [(f'digest="{session.digest}"', host.statistics(session.digest)) for host, session in sessions]
    infos = [(_info(session), host.is_loaded) for host, session in sessions]
    yield from _metric("edgekit_model_info", "gauge", "The models that serve; 0 while one is not loaded", infos)
    requests = [(labels, one.requests) for labels, one in counted]
    yield from _metric("edgekit_requests_total", "counter", "Requests to the model", requests)
    kinds = [
        (f'{labels},kind="{_escaped(kind)}"', count)
        for labels, one in counted
        for kind, count in sorted(one.by_kind.items())
    ]
    yield from _metric("edgekit_errors_total", "counter", "Requests that ended in an error", kinds)
    non_finite = [(labels, one.non_finite) for labels, one in counted]
    yield from _metric("edgekit_non_finite_outputs_total", "counter", "Answers with NaN or infinity", non_finite)
    times = [(labels, one.buckets, one.seconds) for labels, one in counted]
    yield from _histogram("edgekit_request_seconds", "Time to an answer", times)
    conditions = [(f'digest="{session.digest}"', session.condition()) for _, session in sessions]
    yield from _engines([(labels, found) for labels, found in conditions if found])
    batches = [(f'digest="{host.digest}"', *_by_bound(host.batch_sizes())) for host in models if host.batch_sizes()]
    yield from _histogram("edgekit_batch_size", "Samples that were computed together", batches, SIZES)
    compared = [(f'digest="{host.digest}"', host.agreement()) for host in models]
    samples = [(labels, one.samples) for labels, one in compared]
    yield from _metric("edgekit_shadow_samples", "gauge", "Samples compared with the other model", samples)
    shares = [(labels, one.share) for labels, one in compared]
    yield from _metric("edgekit_shadow_agreement", "gauge", "Share of them with the same choice", shares)
    yield from _metric("process_resident_memory_bytes", "gauge", "Resident memory", [("", int(rss_mib() * (1 << 20)))])


def _by_bound(sizes: Mapping[int, int]) -> tuple[list[int], float]:
    counts = [0] * (len(SIZES) + 1)
    for size, count in sizes.items():
        counts[bisect_left(SIZES, size)] += count
    return counts, float(sum(size * count for size, count in sizes.items()))


def _engines(all_found: Sequence[tuple[str, Condition]]) -> Iterator[str]:
    """Tell how the engines' own processes do, where they have some."""
    if not all_found:
        return
    crashes = [
        (f'{labels},signal="{_escaped(how)}"', count)
        for labels, found in all_found
        for how, count in sorted(found.crashes.items())
    ]
    sizes = [(labels, int(rss_mib(one.pid) * (1 << 20))) for labels, one in all_found if one.pid is not None]
    for name, kind, meaning, values in (
        ("up", "gauge", "The engine's process answers", [(labels, one.pid is not None) for labels, one in all_found]),
        ("broken", "gauge", "It crashed too often", [(labels, one.is_broken) for labels, one in all_found]),
        ("restarts_total", "counter", "Starts after a crash", [(labels, one.restarts) for labels, one in all_found]),
        ("crashes_total", "counter", "Ends of the engine's process by what ended it", crashes),
        ("resident_memory_bytes", "gauge", "Its resident memory", sizes),
    ):
        yield from _metric(f"edgekit_engine_{name}", kind, meaning, values)


def _info(session: Session | TextSession) -> str:
    contract = session.contract
    return (
        f'model="{_escaped(contract.name)}",version="{_escaped(contract.version)}",digest="{session.digest}",'
        f'variant="{session.variant.name}",engine="{_escaped(session.engine)}"'
    )


def _histogram(
    name: str, meaning: str, all_counted: Sequence[tuple[str, Sequence[int], float]], bounds: Sequence[float] = BUCKETS
) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} histogram"
    for labels, buckets, seconds in all_counted:
        counts = list(itertools.accumulate(buckets)) or [0] * (len(bounds) + 1)
        for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
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
