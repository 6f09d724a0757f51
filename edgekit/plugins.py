"""Finds a plugin by its file name, else by an entry point. Knows nothing of what a plugin does."""

from __future__ import annotations

import importlib
import pkgutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgekit.errors import MissingExtra, UnknownName

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn an import that fails inside the block into an error that names the pip command.

    Raises:
        MissingExtra: a module that the extra ``name`` would install is not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or str(error)).partition(".")[0]
        if module == "edgekit":
            raise
        raise MissingExtra(name, module, install_command(name)) from error


def install_command(extra: str) -> str:
    """Return the command that installs an extra of edgekit, with the settings that its packages are built with.

    llama-cpp-python comes as source. Built for the machine's own processor it stops at the first matrix product where
    the compiler is older than the processor (gcc 12, AMX), and its libraries run nowhere else.
    """
    settings = 'CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" ' if extra == "llama-cpp" else ""
    return f"{settings}pip install 'edgekit[{extra}]'"


def names(package: str) -> list[str]:
    """List the plugins of ``package`` (its files and its entry points) without importing any."""
    from importlib.metadata import entry_points  # slow to import: a tenth of what `edgekit --help` takes

    return sorted({*_files(package), *(point.name for point in entry_points(group=package))})


def _files(package: str) -> list[str]:
    folder = importlib.import_module(package).__path__
    return [m.name for m in pkgutil.iter_modules(folder) if not m.name.startswith("_")]


def load(package: str, name: str, kind: str) -> object:
    """Return the ``PLUGIN`` of the file ``name`` in ``package``, else what the entry point names.

    Raises:
        UnknownName: neither a file nor an entry point has that name.
        MissingExtra: the plugin's own file needs a package that is not installed.
    """
    from importlib.metadata import entry_points

    if name in _files(package):
        plugin: object = importlib.import_module(f"{package}.{name}").PLUGIN
        return plugin
    for point in entry_points(group=package, name=name):
        return point.load()
    raise UnknownName(kind, name, names(package))
