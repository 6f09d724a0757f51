"""The flag ``--identity``: a folder that `edgekit ota provision` wrote, instead of a flag for each of its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = TypeVar("Command", bound=Callable[..., Any])


def option(*names: str) -> Callable[[Command], Command]:
    """Add the flag; what the folder holds becomes the default of these other flags."""

    def fill(context: click.Context, _option: click.Parameter, folder: Path | None) -> None:
        if folder is not None:
            try:
                told = _told(folder)
            except UsageError as error:  # click reads flags before the command runs, which would translate it
                raise click.BadParameter(f"{error.message}; {error.hint}") from error
            context.default_map = {name: told[name] for name in names if name in told}

    return click.option(
        "--identity",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        is_eager=True,
        expose_value=False,
        callback=fill,
        help="A folder of `edgekit ota provision`: says what the flags for names, root and certificates would.",
    )


def gave(name: str) -> bool:
    """Say whether a flag of the running command has its value from the folder."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.DEFAULT_MAP


def _told(folder: Path) -> dict[str, Any]:
    from edgekit.ota import identity

    files = {"ca": identity.AUTHORITY, "cert": identity.CERTIFICATE, "key": identity.KEY}
    told: dict[str, Any] = {
        prefix + name: str(folder / file) for name, file in files.items() for prefix in ("", "broker_")
    }
    if (folder / identity.FILE).exists():
        who = identity.read(folder)
        told |= {"device": who.device, "target": who.profile, "fleet": who.fleet, "root": str(folder / identity.ROOT)}
        told["groups"] = who.groups
        if who.broker:
            told["broker"] = who.broker
    return told
