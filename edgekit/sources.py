"""Imports what a person names as ``file.py:function`` or ``package.module:function``. Knows nothing of what it is."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


def named_object(source: str) -> Callable[[], object]:
    """Import ``file.py:name`` or ``package.module:name``.

    Raises:
        UsageError: the file, the module or the name does not exist.
    """
    place, _, name = source.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise UsageError(f"{place} has no function {name!r}", f"it has: {', '.join(known) or 'none'}")
    return cast("Callable[[], object]", found)


def call(source: str) -> object:
    """Import a function and call it without arguments.

    Raises:
        UsageError: it is not there, or it failed.
    """
    function = named_object(source)
    try:
        return function()
    except _broken_code_errors() as error:
        raise UsageError(
            f"{source} failed with {type(error).__name__}: {first_line(error)}", "call it in Python to see where"
        ) from error


def _import_file(path: Path) -> object:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    name = f"edgekit_workload_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except _broken_code_errors() as error:
        raise UsageError(f"{path} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    return module


def _import_module(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"there is no module {name!r}: {error}", "check the spelling, or give file.py:build"
        ) from error


def _broken_code_errors() -> tuple[type[Exception], ...]:
    """What somebody else's Python file may raise; errors of edgekit and of the disk speak for themselves."""
    return (ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError, RuntimeError)


def first_line(error: BaseException) -> str:
    """Shorten another library's message to what fits into ours."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
