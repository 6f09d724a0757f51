"""Plugins: found by file name, else by entry point; missing packages name their extra."""

import importlib
import sys

import pytest

from edgekit import plugins
from edgekit.errors import MissingExtra, UnknownName


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A package of plugins: one good file, one that needs a missing package, one private."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "cat.py").write_text("PLUGIN = 'meow'")
    (folder / "dodo.py").write_text(
        "from edgekit.plugins import extra\nwith extra('extinct'):\n    import dodo_package.wings\nPLUGIN = None"
    )
    (folder / "_hidden.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    yield "zoo"
    for name in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
        del sys.modules[name]


def install_entry_point(folder, group, line):
    info = folder / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{line}\n")
    (folder / "stranger.py").write_text("dog = 'woof'")
    importlib.invalidate_caches()


def test_a_file_is_a_plugin_and_listing_imports_none(zoo):
    assert plugins.names(zoo) == ["cat", "dodo"]
    assert "zoo.dodo" not in sys.modules
    assert plugins.load(zoo, "cat", "animal") == "meow"


def test_a_third_party_brings_one_by_entry_point(zoo, tmp_path):
    install_entry_point(tmp_path, zoo, "dog = stranger:dog")
    assert plugins.names(zoo) == ["cat", "dodo", "dog"]
    assert plugins.load(zoo, "dog", "animal") == "woof"


def test_an_unknown_name_offers_the_nearest(zoo):
    with pytest.raises(UnknownName, match="unknown animal 'cta'") as caught:
        plugins.load(zoo, "cta", "animal")
    assert "cat" in caught.value.hint


def test_private_files_are_no_plugins(zoo):
    with pytest.raises(UnknownName):
        plugins.load(zoo, "_hidden", "animal")


def test_a_missing_package_becomes_the_pip_command(zoo):
    with pytest.raises(MissingExtra) as caught:
        plugins.load(zoo, "dodo", "animal")
    assert caught.value.hint == "pip install 'edgekit[extinct]'"
    assert caught.value.module == "dodo_package"


def test_our_own_missing_module_is_a_bug_and_no_missing_extra():
    with pytest.raises(ModuleNotFoundError), plugins.extra("onnx"):
        importlib.import_module("edgekit.nowhere")


def test_other_errors_pass_through_untouched():
    with pytest.raises(ValueError, match="odd"), plugins.extra("onnx"):
        raise ValueError("odd")


def test_a_stranger_does_not_replace_a_plugin_of_our_own(zoo, tmp_path):
    install_entry_point(tmp_path, zoo, "cat = stranger:dog")
    assert plugins.names(zoo) == ["cat", "dodo"]
    assert plugins.load(zoo, "cat", "animal") == "meow"
