"""``edgekit bench``: latency, load time, memory and throughput of bundles, side by side in one run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from edgekit.cli._terminal import Terminal, command, finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekit.runtime.measure import Measurement


@command(name="bench")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path())
@click.option("--variant", "variants", multiple=True, help="Which variant; give it again for several. [default: best]")
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(0), help="Threads a bundle; 0: as edgekit serve."
)
@click.option(
    "--seconds",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0.01),
    callback=finite,
    help="Measure each so long.",
)
@click.option("--requests", default=0, type=click.IntRange(0), help="Measure so many requests instead of seconds.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Samples a request.")
@click.option("--cpu", type=click.IntRange(0), help="Pin every bundle to this core.")
def COMMAND(  # noqa: N802, PLR0913  # the name by which the frame finds a command; one parameter an option
    terminal: Terminal,
    *,
    bundles: tuple[str, ...],
    variants: tuple[str, ...],
    threads: int,
    seconds: float,
    requests: int,
    batch: int,
    cpu: int | None,
) -> None:
    """Measure bundles side by side, each in a process of its own.

    They take turns, so that a noisy machine is noisy for all; the ratio is of medians, to the first one.
    """
    from edgekit.device_profiles import machine
    from edgekit.runtime.measure import Contender, Settings, measure

    settings = Settings(threads=threads, seconds=seconds, requests=requests, batch=batch, cpu=cpu)
    contenders = [Contender(bundle, variant) for bundle in bundles for variant in variants or (None,)]
    found = measure(contenders, settings, terminal.progress)
    _tell(terminal, found)
    terminal.result(
        {
            "machine": msgspec.to_builtins(machine.describe()),
            "settings": msgspec.to_builtins(settings),
            "measurements": msgspec.to_builtins(found),
        }
    )


def _tell(terminal: Terminal, found: Sequence[Measurement]) -> None:
    is_text = any(m.first_token_ms is not None for m in found)
    unit = "ms/token" if is_text else "ms"
    columns = ["bundle", "precision", "MB", f"p50 {unit}", "p90", "p99", "ratio", "per s", "load ms", "RSS MiB"]
    rows = [_row(m) for m in found]
    if is_text:
        columns.append("first token ms")
        rows = [[*row, _number(m.first_token_ms)] for row, m in zip(rows, found, strict=True)]
    terminal.table(columns, rows)
    terminal.say("\nengines: " + "; ".join(dict.fromkeys(m.engine for m in found)))
    least = min(m.requests for m in found)
    if not all(m.has_reliable_p99 for m in found):
        terminal.say(f"p99 stands on {least} requests only; measure longer for a firm one")


def _row(m: Measurement) -> list[str]:
    latencies = [_number(value) for value in (m.p50_ms, m.p90_ms, m.p99_ms)]
    size = f"{m.bytes / 1e6:.2f}"
    return [
        m.name, m.precision, size, *latencies, f"{m.ratio:.2f}", f"{m.per_second:.0f}", f"{m.load_ms:.0f}",
        f"{m.rss_mib:.0f}",
    ]  # fmt: skip


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"
