"""What is kept of requests, from the command line: nothing, unless a flag says so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.runtime.watch import Watch

    Command = TypeVar("Command", bound=Callable[..., Any])


RATE = 0.001


def options(command: Command) -> Command:
    """Add the flags that `told` reads."""
    for add in reversed(
        (
            click.option(
                "--decision-log",
                type=click.Path(path_type=Path, dir_okay=False),
                help="Write a line of JSON a decision to this file: time, model, hash of the input, answer.",
            ),
            click.option(
                "--decision-log-size",
                default=128,
                show_default=True,
                type=click.IntRange(1, 1 << 20),
                help="MiB that it may take, in eight files; the oldest goes.",
            ),
            click.option(
                "--sample-inputs",
                type=click.Path(path_type=Path, file_okay=False),
                help="Keep raw inputs of some requests in this folder, at random and after alerts. [default: none]",
            ),
            click.option(
                "--sample-rate",
                type=click.FloatRange(0, 1),
                help="With --sample-inputs: which share of requests is kept at random. [default: 0.001]",
            ),
        )
    ):
        command = add(command)
    return command


def told(flags: dict[str, Any]) -> Watch:
    """Take the flags out of all flags, and return what they say; it has to be closed.

    Raises:
        UsageError, ResourceError: the log or the folder cannot be written, another process writes the log, or a rate is
            given without a folder.
    """
    from edgekit.errors import UsageError
    from edgekit.runtime.decisions import DecisionLog
    from edgekit.runtime.sampling import Samples
    from edgekit.runtime.watch import Watch

    path, size = flags.pop("decision_log"), flags.pop("decision_log_size")
    folder, rate = flags.pop("sample_inputs"), flags.pop("sample_rate")
    if folder is None and rate is not None:
        raise UsageError(f"a rate of {rate:g} says not where inputs are kept", "give --sample-inputs FOLDER")
    decisions = DecisionLog(path, size << 20) if path else None
    return Watch(decisions, Samples(folder, RATE if rate is None else rate) if folder else None)
