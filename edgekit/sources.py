"""Imports what a person names as ``file.py:function`` or ``package.module:function``. Knows nothing of what it is."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgekit.errors import EdgekitError, MissingExtra, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

BROUGHT = ("numpy", "torch", "safetensors")
"""What the extra ``compress`` installs and a workload file imports at its top."""

SHOWN = 12
"""How many functions of a module are offered, those of similar names first."""


def named_object(source: str) -> Callable[..., object]:
    """Import ``file.py:name`` or ``package.module:name``.

    Raises:
        UsageError: the file, the module or the name does not exist.
    """
    place, _, name = source.rpartition(":")
    if not place or not name or place.startswith("."):
        raise UsageError(f"{source!r} names no function", "give file.py:function or package.module:function")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found = getattr(module, name, None)
    if not callable(found):
        functions = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        known = list(dict.fromkeys([*difflib.get_close_matches(name, functions), *functions]))[:SHOWN]
        raise UsageError(f"{place} has no function {name!r}", f"it has: {', '.join(known) or 'none'}")
    return cast("Callable[..., object]", found)


def call(source: str) -> object:
    """Import a function and call it without arguments.

    Raises:
        UsageError: it is not there, or it failed.
    """
    return invoke(source, named_object(source))


def invoke(source: str, function: Callable[..., object], *arguments: object) -> object:
    """Call somebody else's function, which ``source`` names in messages.

    Raises:
        UsageError: it failed.
    """
    try:
        return function(*arguments)
    except ModuleNotFoundError as error:
        raise _lacking(source, error) from error
    except _broken_code_errors() as error:
        raise UsageError(
            f"{source} failed with {type(error).__name__}: {first_line(error)}", "call it in Python to see where"
        ) from error


def _import_file(path: Path) -> object:
    if not path.is_file():
        raise UsageError(f"there is no file {path}", "check the path before the colon")
    name = f"edgekit_workload_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python", "give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise _lacking(str(path), error) from error
    except _broken_code_errors() as error:
        raise UsageError(
            f"{path} cannot be imported: {type(error).__name__}: {first_line(error)}", "call it in Python to see where"
        ) from error
    return module


def _import_module(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not f"{name}.".startswith(f"{error.name}."):
            raise _lacking(name, error) from error
        raise UsageError(
            f"there is no module {name!r}: {error}", "check the spelling, or give file.py:build"
        ) from error
    except _broken_code_errors() as error:
        raise UsageError(
            f"{name} cannot be imported: {type(error).__name__}: {first_line(error)}", "call it in Python to see where"
        ) from error


def _lacking(source: str, error: ModuleNotFoundError) -> EdgekitError:
    """Name the package that somebody's file imports: one that an extra brings, or one of their own."""
    module = (error.name or str(error)).partition(".")[0]
    if module in BROUGHT:
        return MissingExtra("compress", module)
    return UsageError(
        f"{source} cannot be imported: ModuleNotFoundError: {error}", f"install the package that brings {module}"
    )


def _broken_code_errors() -> tuple[type[BaseException], ...]:
    """What somebody else's Python file may raise; errors of edgekit speak for themselves."""
    return (
        ImportError,
        SyntaxError,
        NameError,
        AttributeError,
        TypeError,
        ValueError,
        LookupError,
        RuntimeError,
        ArithmeticError,
        AssertionError,
        EOFError,
        OSError,
        SystemExit,
    )


def first_line(error: BaseException) -> str:
    """Shorten another library's message to what fits into ours."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def own_line(error: BaseException) -> str:
    """Say at which line of somebody's own code an error came up, as ``net.py:29, if x.sum() > 0:``.

    Empty where no line of it is theirs.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_own(frame.filename)]
    return _place(own[-1].filename, own[-1].lineno or 0, own[-1].line or "") if own else ""


def is_own(path: str) -> bool:
    """Say whether a source file is somebody's own: neither Python's, nor an installed package's, nor edgekit's."""
    paths = sysconfig.get_paths()
    foreign = (paths["stdlib"], paths["purelib"], paths["platlib"], str(Path(__file__).parent))
    return not path.startswith(("<", *foreign)) and "site-packages" not in path and Path(path).is_file()


def _place(path: str, line: int, text: str) -> str:
    return f"{Path(path).name}:{line}" + (f", {text.strip()[:100]}" if text.strip() else "")
