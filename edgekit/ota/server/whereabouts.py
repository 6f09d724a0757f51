"""Where the memory of a fleet folder lies: a file inside it, or a PostgreSQL that it remembers. Opens no database."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edgekit.durable import write_file
from edgekit.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

FILE = "database.json"
SQLITE = "fleet.sqlite"


class Whereabouts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The database's address without its password, and the fleet's name in it."""

    url: str
    fleet: str


def find(folder: Path, told: str = "") -> tuple[Path | str, str]:
    """Return the place and the fleet's name that `Store` takes; ``told`` is another address of the same database.

    Raises:
        UsageError: an address was told, and the fleet's memory is a file.
        ResourceError: the folder's note is damaged.
    """
    path = folder / FILE
    if not path.exists():
        if told:
            raise UsageError(
                f"the memory of {folder} is its own file {SQLITE}, not another database",
                "leave --database and EDGEKIT_DATABASE out, or begin a new fleet: edgekit ota init --database URL",
            )
        return folder / SQLITE, "fleet"
    try:
        noted = msgspec.json.decode(path.read_bytes(), type=Whereabouts)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResourceError(f"{path} is damaged: {error}", "restore a backup") from error
    return told or noted.url, noted.fleet


def note(folder: Path, url: str, fleet: str) -> None:
    """Remember a database in the fleet's folder: never its password, which is told by EDGEKIT_DATABASE or PGPASSWORD.

    Raises:
        UsageError: it is no address of PostgreSQL, or the folder has a memory already.
    """
    from edgekit.ota.server.database import without_password

    if (folder / SQLITE).exists():
        raise UsageError(f"{folder / SQLITE} is there: this fleet has a memory", "begin another folder")
    noted = Whereabouts(url=without_password(url), fleet=fleet)
    write_file(folder / FILE, msgspec.json.format(msgspec.json.encode(noted)))
