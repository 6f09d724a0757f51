"""Which hardware classes and formats can be written and checked on this machine, and what is missing for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from edgekit import plugins
from edgekit.cli._extras import find_extras
from edgekit.errors import MissingExtra, UnknownName

if TYPE_CHECKING:
    from edgekit.device_profiles import DeviceProfile


def ability(profile: DeviceProfile) -> tuple[str, str]:
    """Say whether a class's file can be written here, else what is missing with the command, and what checks it."""
    from edgekit.export import PACKAGE
    from edgekit.export.targets import Evaluator, Exporter
    from edgekit.runtime import backends

    try:
        exporter = cast("Exporter", plugins.load(PACKAGE, profile.format, "format"))
    except MissingExtra as error:
        return f"no: {error.message}; {error.hint}", "-"
    missing = [lack for one in find_extras() if one.name == exporter.extra for lack in one.lacking]
    if missing:
        return f"no: {missing[0]}; pip install 'edgekit[{exporter.extra}]'", "-"
    if isinstance(exporter, Evaluator):
        return "yes", "evaluation"
    return "yes", "its engine" if profile.format in plugins.names(backends.__name__) else "nothing"


def runs_here(profile: DeviceProfile) -> str:
    """Say whether an engine of a class's format runs here, else why not, with the command if there is one."""
    from edgekit.runtime import backends

    why = backends.absence(profile.format)
    if why:
        return f"no: {why}"
    extra = cast("backends.Backend", plugins.load(backends.__name__, profile.format, "engine")).extra
    missing = [lack for one in find_extras() if one.name == extra for lack in one.lacking]
    return f"no: {missing[0]}; {plugins.install_command(extra)}" if missing else "yes"


def format_names() -> list[str]:
    """List the formats that have an exporter, strangers' among them."""
    from edgekit.export import PACKAGE

    return plugins.names(PACKAGE)


def known_format(name: str) -> str:
    """Return a format's name.

    Raises:
        UnknownName: there is no exporter of that name.
    """
    if name not in format_names():
        raise UnknownName("format", name, format_names())
    return name
