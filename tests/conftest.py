"""Puts tests/ on the import path, so that every test may use what lies in tests/fakes, and keeps emulators out."""

import logging
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fakes import unobserved
from fakes.databases import place, postgresql  # noqa: F401  # fixtures for every test

os.environ["EDGEKIT_ALLOW_VOLATILE"] = "1"
"""Agents keep their state in the folders of tests, which lie in memory on some machines."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Keep what watches lines out of converters, as far as they are imported."""
    unobserved.suspend()


@pytest.fixture(autouse=True)
def no_arm64_system(request, monkeypatch, tmp_path):
    """Whatever was built on this machine: a test boots an ARM system only where it asks for one."""
    if "arm64_system" not in request.fixturenames:
        from edgekit.runtime import arm64

        monkeypatch.setattr(arm64, "place", lambda: tmp_path / "no-arm64-system")


@pytest.fixture(autouse=True)
def warnings_are_logged():
    """Whatever a library that another test called has left: what is logged here can be read here."""
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
