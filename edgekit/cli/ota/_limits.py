"""The flags of a release's acceptance contract: what a device has to measure to keep it, and what it may replace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.ota.release import Limits, Replaces

    Command = TypeVar("Command", bound=Callable[..., Any])

ABOVE_ZERO = click.FloatRange(0, min_open=True)


def options(command: Command) -> Command:
    """Add the flags that `limits` and `replaces` read."""
    for add in reversed(
        (
            click.option(
                "--replaces",
                type=click.IntRange(1),
                help="Least installed version that it may replace. [default: any]",
            ),
            click.option(
                "--replaces-model", "other_models", multiple=True, help="Another model that it may replace, repeatable."
            ),
            click.option("--max-p95-ms", type=ABOVE_ZERO, help="Roll back above this 95th percentile."),
            click.option("--max-rss", type=ABOVE_ZERO, help="Roll back if the try-out takes more MiB."),
            click.option("--max-load", type=ABOVE_ZERO, help="Roll back if loading takes more seconds."),
            click.option(
                "--max-error-rate",
                type=click.FloatRange(0, 1),
                default=0.02,
                show_default=True,
                help="Roll back above this share of failed requests.",
            ),
            click.option(
                "--min-agreement", type=click.FloatRange(0, 1), help="Roll back if old and new model agree less often."
            ),
            click.option(
                "--probation-requests",
                type=click.IntRange(0),
                default=20,
                show_default=True,
                help="Watch so many live requests …",
            ),
            click.option(
                "--probation-seconds",
                type=click.FloatRange(0),
                default=30.0,
                show_default=True,
                help="… but no longer than this.",
            ),
            click.option(
                "--shadow-requests",
                type=click.IntRange(0),
                default=0,
                help="Before that, let the new model compute so many live requests that the old one answers …",
            ),
            click.option(
                "--shadow-seconds",
                type=click.FloatRange(0),
                default=30.0,
                show_default=True,
                help="… but no longer than this.",
            ),
        )
    ):
        command = add(command)
    return command


def limits(flags: dict[str, Any]) -> Limits:
    """Take the limits out of all flags."""
    from edgekit.ota.release import Limits

    same = (
        *("max_p95_ms", "max_error_rate", "min_agreement"),
        *("probation_requests", "probation_seconds", "shadow_requests", "shadow_seconds"),
    )
    kept = {name: flags.pop(name) for name in same}
    return Limits(max_rss_mib=flags.pop("max_rss"), max_load_seconds=flags.pop("max_load"), **kept)


def replaces(flags: dict[str, Any]) -> Replaces:
    """Take what the release may replace out of all flags."""
    from edgekit.ota.release import ANYTHING, Replaces

    version, models = flags.pop("replaces"), flags.pop("other_models")
    return Replaces(version=version or 0, models=models) if version or models else ANYTHING
