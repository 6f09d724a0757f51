"""The device's TUF client as a command, for the public conformance suite of TUF clients.

``python -m edgekit.ota.device.tuf_cli --metadata-dir D init ROOT``, then ``--metadata-url U refresh``, or
``--target-name P --target-base-url T --target-dir X download``. Exit code 0 or 1. It goes the way that the agent
goes: the same rules, the same fetcher over HTTP, the root of trust always from where `init` put it.

Protocol: https://github.com/theupdateframework/tuf-conformance/blob/main/CLIENT-CLI.md
"""

from __future__ import annotations

import argparse
import sys
import urllib.parse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.durable import write_file
from edgekit.errors import EdgekitError, TrustError, UsageError
from edgekit.ota.device import trust
from edgekit.ota.device.https import HttpFetcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuf.ngclient.updater import Updater

BOOTSTRAP = "trusted-root"
"""Beside the metadata, and called like none of it: what was provisioned, as the device keeps it apart."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what fails is told on standard error."""
    from tuf.api.exceptions import DownloadError, RepositoryError

    asked = _parser().parse_args(arguments)
    commands = {"init": _init, "refresh": lambda a: _updater(a).refresh(), "download": _download}
    try:
        commands[asked.command](asked)
    except (EdgekitError, RepositoryError, DownloadError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m edgekit.ota.device.tuf_cli")
    parser.add_argument("--metadata-dir", required=True, type=Path)
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url", default="")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    return parser


def _init(asked: argparse.Namespace) -> None:
    root = asked.root.read_bytes()
    asked.metadata_dir.mkdir(parents=True, exist_ok=True)
    write_file(asked.metadata_dir / BOOTSTRAP, root)
    write_file(asked.metadata_dir / "root.json", root)


def _updater(asked: argparse.Namespace) -> Updater:
    if not asked.metadata_url:
        raise UsageError("no repository is named", "give --metadata-url")
    root = (asked.metadata_dir / BOOTSTRAP).read_bytes()
    places = (asked.metadata_url.rstrip("/") + "/", asked.target_base_url.rstrip("/") + "/")
    return trust.open_updater(root, asked.metadata_dir, HttpFetcher(""), _now(), places=places)


def _now() -> datetime:
    return datetime.now(UTC)


def _download(asked: argparse.Namespace) -> None:
    if not (asked.target_name and asked.target_base_url and asked.target_dir):
        raise UsageError(
            "what is to be downloaded is not said", "give --target-name, --target-base-url and --target-dir"
        )
    updater = _updater(asked)
    for name in asked.target_name:
        target = updater.get_targetinfo(name)
        if target is None:
            raise TrustError(f"nobody signed a target {name}")
        file = str(asked.target_dir / urllib.parse.quote(name, safe=""))
        if updater.find_cached_target(target, file) is None:
            updater.download_target(target, file)


if __name__ == "__main__":
    sys.exit(main())
