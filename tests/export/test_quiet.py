"""What converters say goes nowhere, and what the program says afterwards is heard."""

import logging

from edgekit.export.quiet import silence


def test_a_handler_that_a_converter_adds_for_all_logging_leaves_with_it():
    before = list(logging.root.handlers)
    with silence():
        logging.root.addHandler(logging.StreamHandler())
        logging.root.warning("said inside")
    assert logging.root.handlers == before
