"""How commands come by what opens keys: a passphrase from the environment, a file or a prompt, folders of key files."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.cli._terminal import Terminal
    from edgekit.ota.server.keys import Unlock
    from edgekit.ota.server.roots import Change

    Command = TypeVar("Command", bound=Callable[..., Any])

VARIABLE = "EDGEKIT_PASSPHRASE"


def options(command: Command) -> Command:
    """Add the flags that `unlock` reads."""
    folder = click.Path(path_type=Path, file_okay=False, exists=True)
    file = click.Path(path_type=Path, dir_okay=False, exists=True)
    command = click.option(
        "--passphrase-file", type=file, help=f"Its first line opens keys. [default: ${VARIABLE}, else asked for]"
    )(command)
    return click.option("--keys", "folders", multiple=True, type=folder, help="Look for key files here, too.")(command)


def unlock(flags: dict[str, Any], *, may_ask: bool = True) -> Unlock:
    """Take the flags of `options` out of others, and return what they say."""
    from edgekit.ota.server.keys import Unlock

    file, folders = flags.pop("passphrase_file"), flags.pop("folders")
    text = file.read_text(encoding="utf-8").partition("\n")[0] if file else None
    asked: dict[str, str] = {}

    def ask(what: str) -> str | None:
        name = _name(what)
        told = os.environ.get(f"{VARIABLE}_{name}") or os.environ.get(VARIABLE) or text
        if told or not may_ask or not sys.stdin.isatty():
            return told
        if name not in asked:  # one that was just made is not asked for again
            asked[name] = _prompted(what, next(reversed(asked.values()), ""))
        return asked[name]

    return Unlock(ask, tuple(folders))


def _prompted(what: str, last: str) -> str:
    """Ask on the terminal; nothing typed means the same as last time."""
    text = f"{what} (Enter: as before)" if last else what
    typed: str = click.prompt(text, hide_input=True, err=True, default="" if last else None, show_default=False)
    if typed and what.startswith("new "):
        while click.prompt("once more", hide_input=True, err=True) != typed:
            typed = click.prompt(f"they differ; {what}", hide_input=True, err=True)
    return typed or last


def _name(what: str) -> str:
    """Return a key's name in an environment variable: of ``passphrase of file:keys/root-1.pem?encrypted`` ROOT_1."""
    address = what.removesuffix("?encrypted").split()[-1]
    is_file = address.startswith("file:") or ":" not in address
    return re.sub(r"\W", "_", Path(address.removeprefix("file:")).stem if is_file else address).upper()


def tell(terminal: Terminal, fleet: Path, change: Change) -> None:
    """Say what became of a change of keys."""
    if change.missing:
        terminal.say(f"root {change.version} waits for {change.missing} more signature(s): {change.pending}")
        terminal.say(f"sign it where a root key is: edgekit ota sign {fleet} --keys FOLDER")
    else:
        terminal.say(f"root {change.version} is in force; devices follow when they ask next")
    for uri in change.made:
        terminal.say(f"new key: {uri}")
    for uri in change.dropped:
        terminal.say(f"no longer trusted, delete it: {uri}")
    terminal.result(
        {
            "root": change.version,
            "missing": change.missing,
            "pending": change.pending,
            "made": change.made,
            "dropped": change.dropped,
        }
    )


def require(value: object, message: str, hint: str) -> None:
    """Refuse a call that lacks something.

    Raises:
        UsageError: ``value`` is nothing.
    """
    if not value:
        raise UsageError(message, hint)
