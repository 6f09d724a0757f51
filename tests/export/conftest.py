"""The small models that most tests of the exporters share."""

import pytest
from fakes.exportable import tiny_model, with_plan


@pytest.fixture(scope="session")
def tiny():
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_int8(tiny):
    return with_plan(tiny)
