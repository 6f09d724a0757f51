"""Chatter is swallowed, and nothing that was made meanwhile is broken afterwards."""

import logging
import sys

from edgekit.export.quiet import silence


def test_a_logger_made_in_silence_speaks_afterwards(capsys):
    with silence():
        handler = logging.StreamHandler(sys.stderr)  # as libraries do when they are imported
        logger = logging.getLogger("library that speaks")
        logger.addHandler(handler)
        logger.propagate = False
        logger.error("swallowed")
        print("swallowed")
    logger.error("heard")
    assert capsys.readouterr() == ("", "heard\n")


def test_silence_within_silence_stays_silent(capsys):
    with silence():
        with silence():
            inner = logging.StreamHandler(sys.stderr)
        inner.emit(logging.makeLogRecord({"msg": "swallowed"}))
    inner.emit(logging.makeLogRecord({"msg": "heard"}))
    assert capsys.readouterr().err == "heard\n"
