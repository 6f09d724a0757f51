"""Real databases for the fleet's memory: a file of SQLite, and a PostgreSQL of our own where it is installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from fakes.brokers import free_port

KINDS = ["sqlite", "postgresql"]


class Cluster:
    """A PostgreSQL of this test run, on a free port of the loopback; nothing it writes outlives the run."""

    def __init__(self, programs, folder):
        self.folder, self.port, self._programs = folder, free_port(), programs
        self._run("initdb", "-D", folder / "data", "-U", "edgekit", "--auth=trust", "--no-sync", "-E", "UTF8")
        self.start()

    def start(self):
        settings = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off "
            "-c max_connections=60 -c shared_buffers=32MB"
        )
        self._run("pg_ctl", "-D", self.folder / "data", "-w", "-l", self.folder / "log", "-o", settings, "start")

    def stop(self, mode="immediate"):
        self._run("pg_ctl", "-D", self.folder / "data", "-m", mode, "-w", "stop")

    def create(self):
        """Make the one database there is empty again, and return its URL; to make one anew takes ten times as long."""
        self.ask("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname='edgekit'")
        if not self.ask("postgres", "SELECT 1 FROM pg_database WHERE datname='edgekit'"):
            self.ask("postgres", "CREATE DATABASE edgekit")
        self.ask("edgekit", "DROP SCHEMA public CASCADE")
        self.ask("edgekit", "CREATE SCHEMA public")
        return f"postgresql+psycopg://edgekit@127.0.0.1:{self.port}/edgekit"

    def ask(self, database, statement):
        """Run one statement as the owner of everything, past edgekit."""
        import psycopg

        address = f"host=127.0.0.1 port={self.port} user=edgekit dbname={database}"
        with psycopg.connect(address, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _run(self, program, *arguments):
        command = [str(self._programs / program), *map(str, arguments)]
        if os.getuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        with (self.folder / "out").open("a") as out:
            done = subprocess.run(command, check=False, stdout=out, stderr=out, cwd=self.folder)
        assert done.returncode == 0, (self.folder / "out").read_text()[-2000:]


def _programs():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parents[1].name))
    if found:
        return found[-1].parent
    return Path(path).parent if (path := shutil.which("initdb")) else None


@pytest.fixture(scope="session")
def postgresql():
    """A PostgreSQL that runs for the whole session."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    with tempfile.TemporaryDirectory(prefix="edgekit-postgresql-") as folder:
        if os.getuid() == 0:
            try:
                owner = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("there is no user postgres, and PostgreSQL does not run as root")
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        cluster = Cluster(programs, Path(folder))
        yield cluster
        with contextlib.suppress(AssertionError):
            cluster.stop()


@pytest.fixture(params=KINDS)
def place(request, tmp_path):
    """Where a store lies: a file that is not there yet, or an empty database."""
    if request.param == "sqlite":
        return tmp_path / "fleet.sqlite"
    return request.getfixturevalue("postgresql").create()
