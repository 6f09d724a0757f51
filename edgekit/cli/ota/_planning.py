"""The flags of a rollout's plan, and the plan that they make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgekit.ota.server.fleet import DeviceState
    from edgekit.ota.server.judging import Judging
    from edgekit.ota.server.pacing import Window
    from edgekit.ota.server.plan import Plan

    Command = TypeVar("Command", bound=Callable[..., Any])

_FLAGS = (
    click.option(
        "--waves", default="20%,100%", show_default=True, help="Cumulative shares of each stratum, or counts."
    ),
    click.option(
        "--where", default="", help="Only devices of which this holds: class = pi and tag.region in (eu, us)."
    ),
    click.option(
        "--stratify",
        default="tag.region,fact.runtime",
        show_default=True,
        help="Beside the hardware class: what each wave has its share of.",
    ),
    click.option("--max-failures", help="Halt above this count, or share as 10%. [default: 0; with --alpha: 100%]"),
    click.option("--alpha", help="Judge by statistics, wrong with this probability at most: 5%."),
    click.option(
        "--detect",
        multiple=True,
        metavar="WHAT=RISE",
        help="Least regression to find: failures=5%, errors=1%, latency=15%; repeatable.",
    ),
    click.option("--dwell", default=0.0, show_default=True, help="Watch each wave so many seconds before the next."),
    click.option("--rate", default=0.0, help="Ask at most so many devices a minute. [default: no limit]"),
    click.option("--growth", default=1.0, help="Multiply the rate by this …"),
    click.option("--growth-after", default=100, show_default=True, help="… after each so many devices that installed."),
    click.option("--in-flight", default=0, help="Let at most so many be at it at once. [default: no limit]"),
    click.option("--patience", default=0.0, help="Who is at it for more seconds holds up no one. [default: for ever]"),
    click.option("--window", help="Ask devices at this time of their day only: 22:00-05:00."),
    click.option("--zone", default="UTC", show_default=True, help="Time zone of devices that say none."),
    click.option("--penalty", default=0, help="Skip devices that failed in so many of their last 5. [default: none]"),
    click.option("--roll-back", type=click.IntRange(1), metavar="VERSION", help="After a halt: the old bundle, anew."),
    click.option(
        "--spread", type=float, help="Let downloads begin over so many seconds. [default: 10 devices a second]"
    ),
)


def options(command: Command) -> Command:
    """Add the flags that `plan` reads."""
    for add in reversed(_FLAGS):
        command = add(command)
    return command


def plan(flags: Mapping[str, Any], release: tuple[str, int, tuple[str, ...]], fleet: Mapping[str, DeviceState]) -> Plan:
    """Return the plan that flags make for a release (model, version, classes).

    Raises:
        UsageError: a flag makes no sense.
    """
    from edgekit.ota.server import rollout
    from edgekit.ota.server.plan import Plan, amount, amounts
    from edgekit.ota.server.turns import targets

    model, version, profiles = release
    judging = _judging(flags["alpha"], flags["detect"])
    most = flags["max_failures"] or ("100%" if judging else "0")
    made = Plan(
        model=model,
        version=version,
        profiles=profiles,
        waves=amounts(flags["waves"].split(",")),
        where=flags["where"],
        strata=tuple(filter(None, flags["stratify"].split(","))),
        max_failures=amount(most),
        judging=judging,
        window=_window(flags["window"], flags["zone"]),
        spread=flags["spread"] or 0.0,
        back=flags["roll_back"] or 0,
        **{
            name: flags[name]
            for name in ("dwell", "rate", "growth", "growth_after", "in_flight", "patience", "penalty")
        },
    )
    if flags["spread"] is not None:
        return made
    from msgspec.structs import replace

    return replace(made, spread=rollout.spread(len(targets(made, fleet))))


def _judging(alpha: str | None, detect: tuple[str, ...]) -> Judging | None:
    from edgekit.ota.server.judging import Judging
    from edgekit.ota.server.plan import amount

    if alpha is None:
        if detect:
            raise UsageError("--detect without --alpha", "say how surely: --alpha 5%")
        return None
    least: dict[str, Any] = {}
    for one in detect:
        what, _, rise = one.partition("=")
        if what not in ("failures", "errors", "latency"):
            raise UsageError(
                f"--detect {one!r} names nothing that is judged", "write failures=5%, errors=1%, latency=15%"
            )
        least[what] = float(amount(rise))
    return Judging(alpha=float(amount(alpha)), **least)


def _window(text: str | None, zone: str) -> Window | None:
    import msgspec

    from edgekit.ota.server.pacing import Window

    if text is None:
        return None
    begin, _, end = text.partition("-")
    try:
        return msgspec.convert({"begin": begin.strip(), "end": end.strip(), "zone": zone}, Window)
    except msgspec.ValidationError as error:
        raise UsageError(f"{text!r} is no window: {error}", "write it as 22:00-05:00") from error
