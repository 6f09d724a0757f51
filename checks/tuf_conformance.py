"""Runs the public conformance suite of TUF clients against the device's client: all cases, none expected to fail.

    git clone https://github.com/theupdateframework/tuf-conformance
    .venv/bin/python checks/tuf_conformance.py tuf-conformance

The suite wants pytest, tuf and securesystemslib, all of them there after `make test`, and the program faketime
(`apt-get install faketime`). Where suite or faketime is missing it says so and ends with 0; else with pytest's code.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path


def main(folder: str = "tuf-conformance") -> int:
    suite = Path(folder, "tuf_conformance").resolve()
    if not suite.is_dir() or shutil.which("faketime") is None:
        what = "faketime is not installed" if suite.is_dir() else f"{suite} is not there: clone the suite"
        print(f"skipped: {what}")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        client = Path(scratch, "client")
        client.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgekit.ota.device.tuf_cli "$@"\n')
        client.chmod(client.stat().st_mode | stat.S_IXUSR)
        paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), str(suite.parent)])
        command = [sys.executable, "-m", "pytest", "-q", str(suite), "--entrypoint", str(client)]
        return subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            check=False,
            cwd=suite.parent,
            env={**os.environ, "PYTHONPATH": paths},
        ).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
