"""How an engine is kept apart, from the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.runtime.isolation import Isolation

    Command = TypeVar("Command", bound=Callable[..., Any])


def options(*, default: bool) -> Callable[[Command], Command]:
    """Add the flags that `told` reads; ``default`` says whether an engine is isolated where nobody says so."""

    def add(command: Command) -> Command:
        isolate = click.option(
            "--isolate/--no-isolate",
            default=default,
            show_default=True,
            help="Run the engine in a process of its own, which is started again when it crashes.",
        )
        seconds = click.option(
            "--engine-timeout",
            type=click.FloatRange(0, min_open=True),
            help="With --isolate: kill an engine that is silent for so many seconds. [default: --request-timeout]",
        )
        return isolate(seconds(command))

    return add


def told(*, isolate: bool, engine_timeout: float | None, request_timeout: float) -> Isolation | None:
    """Return what the flags say; None where the engine runs in this process."""
    from edgekit.runtime.isolation import Isolation

    return Isolation(seconds=engine_timeout or request_timeout) if isolate else None
