"""The error tree: every kind has its code, a hint reaches the person, the system's refusals are sorted."""

import errno
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import errors
from edgekit.errors import ContextError, EdgekitError, MissingExtra, ResourceError, UnknownName, UsageError, from_os


def kinds(kind=EdgekitError):
    below = [deeper for child in kind.__subclasses__() for deeper in kinds(child)]
    return [
        kind,
        *(found for found in below if found.__module__ == errors.__name__),
    ]  # a room may refine one for itself


def test_the_drawing_in_the_docstring_is_the_tree():
    drawn = dict(re.findall(r"(\w+) +(\d+)  ", errors.__doc__))
    assert drawn == {kind.__name__: str(kind.exit_code) for kind in kinds()}


def test_kinds_that_want_another_reaction_have_another_code():
    for kind in kinds():
        parent = kind.__mro__[1]
        same_reaction = issubclass(parent, UsageError)
        assert (kind.exit_code == getattr(parent, "exit_code", None)) == same_reaction, kind


@pytest.mark.parametrize("kind", [k for k in kinds() if k not in (UnknownName, MissingExtra, ContextError)])
def test_every_kind_carries_message_and_hint(kind):
    error = kind("it broke", "mend it")
    assert (str(error), error.message, error.hint) == ("it broke", "it broke", "mend it")


def test_an_unknown_name_offers_the_nearest_ones():
    assert UnknownName("target", "raspbery", ["raspberry-pi-5", "x86-64"]).hint == "did you mean raspberry-pi-5?"
    assert UnknownName("target", "vax", ["x86-64", "pixel-8"]).hint == "known: pixel-8, x86-64"
    assert UnknownName("target", "vax", []).hint == "known: none"


@given(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=6))
def test_any_name_can_be_unknown(name, known):
    assert repr(name) in UnknownName("thing", name, known).message


def test_a_missing_extra_names_the_pip_command():
    error = MissingExtra("onnx", "onnxruntime")
    assert error.hint == "pip install 'edgekit[onnx]'"
    assert "onnxruntime" in error.message


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTDIR, errno.EISDIR])
def test_a_wrong_path_is_a_wrong_call(code):
    error = from_os(OSError(code, "is wrong", "/some/path"), "export")
    assert type(error) is UsageError
    assert "/some/path" in error.message


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free disk space"), (errno.EADDRINUSE, "--port"), (errno.EACCES, "owner"),
        (errno.EROFS, "can be written"), (errno.EMFILE, "ulimit"), (errno.EIO, "operating system"),
    ],
)  # fmt: skip
def test_what_the_machine_lacks_is_a_resource(code, hint):
    error = from_os(OSError(code, "refused"), "serve")
    assert type(error) is ResourceError
    assert hint in error.hint


def test_an_error_of_the_system_without_a_number_is_told():
    assert from_os(OSError("odd"), "serve").message == "serve: odd"
