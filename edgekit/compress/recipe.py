"""A recipe: which passes, in which order, with which options, as TOML. Knows no pass by name but the default's."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import msgspec

from edgekit import plugins
from edgekit.compress.passes import CompressionPass
from edgekit.errors import UnknownName, UsageError
from edgekit.plugins import extra

PASSES = "edgekit.compress.passes"
VERSION = 1
DEFAULT = 'version = 1\n\n[[pass]]\nname = "quantize"\n'
"""Int8 post-training quantization with min-max ranges: what is done when no recipe is given."""


@dataclass(frozen=True)
class Recipe:
    """The passes by name, in order."""

    passes: tuple[tuple[str, CompressionPass], ...]

    def with_seed(self, seed: int) -> Recipe:
        """Set the seed of every pass that has one."""
        return Recipe(
            tuple(
                (name, msgspec.structs.replace(step, seed=seed) if "seed" in step.__struct_fields__ else step)
                for name, step in self.passes
            )
        )


def shipped() -> dict[str, Path]:
    """Return the files of the recipes that come with edgekit, by name."""
    folder = Path(str(resources.files("edgekit"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read(path: Path) -> Recipe:
    """Read a recipe from a file, or one that comes with edgekit by its name, as ``int8``.

    Raises:
        UnknownName: no recipe has that name; the nearest are offered.
        UsageError: there is no such file, or it is no recipe.
    """
    if path.suffix != ".toml" and path.parent == Path() and not path.exists():
        if path.name not in shipped():
            raise UnknownName("recipe", path.name, shipped())
        path = shipped()[path.name]
    try:
        return decode(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UsageError(f"there is no recipe at {path}", "check --recipe") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is no recipe: it is a folder", f"give {path / 'recipe.toml'}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no recipe: it is not UTF-8 text", "give a TOML file") from error


def default() -> Recipe:
    """Return what is done when no recipe is given: int8 post-training quantization."""
    return decode(DEFAULT)


def decode(text: str) -> Recipe:
    """Parse a recipe strictly.

    Raises:
        UnknownName: a pass or an option that nobody knows; the nearest are offered.
        UsageError: not TOML, another version, no pass, or an option with a wrong value.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the recipe is no TOML: {error}", "see the recipes in examples/recipes") from error
    for key in document:
        if key not in ("version", "pass"):
            raise UnknownName("key of a recipe", key, ["version", "pass"])
    version = document.get("version")
    if version != VERSION or version is True:
        raise UsageError(f"the recipe has version {version!r}", f"begin it with: version = {VERSION}")
    entries = document.get("pass")
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise UsageError("the recipe has no pass", 'add one: [[pass]] and on the next line name = "quantize"')
    return Recipe(tuple(_decode_pass(number, entry) for number, entry in enumerate(entries, 1)))


def encode(recipe: Recipe) -> str:
    """Write a recipe as TOML with every option spelled out; `decode` gives it back."""
    with extra("compress"):
        import tomli_w
    entries = [{"name": name, **msgspec.to_builtins(step)} for name, step in recipe.passes]
    return tomli_w.dumps({"version": VERSION, "pass": entries})


def _decode_pass(number: int, entry: dict[str, object]) -> tuple[str, CompressionPass]:
    options = dict(entry)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f"pass {number} of the recipe has no name", f"known: {', '.join(plugins.names(PASSES))}")
    kind = plugins.load(PASSES, name, "pass")
    if not (isinstance(kind, type) and issubclass(kind, CompressionPass)):
        raise UsageError(f"the plugin {name!r} is no compression pass: {kind!r}")
    for key in options:
        if key not in kind.__struct_fields__:
            raise UnknownName(f"option of pass {name!r}", key, kind.__struct_fields__)
    try:
        return name, msgspec.convert(options, kind)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"pass {number} of the recipe, {name!r}: {error}", f"its options: {', '.join(kind.__struct_fields__)}"
        ) from error
