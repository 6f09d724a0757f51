"""A recipe: which passes, in which order, with which options, as TOML. Knows no pass by name but the default's."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import msgspec
from msgspec import inspect

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
    if path == Path():  # so comes an empty name, too
        raise UsageError("the recipe has no name: it is empty, or '.'", "give a file, or a name: --recipe int8")
    if path.suffix != ".toml" and path.parent == Path() and not path.exists():
        if path.name not in shipped():
            raise UnknownName("recipe", path.name, shipped())
        path = shipped()[path.name]
    try:
        return decode(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.stem.lower(), shipped(), n=1)
        hint = f"check the path, or did you mean --recipe {near[0]}?" if near else "check --recipe"
        raise UsageError(f"there is no recipe at {path}", hint) from error
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
        raise UsageError(f"the recipe is no TOML: {error}", "or give one by name: --recipe int8") from error
    for key in document:
        if key not in ("version", "pass"):
            raise UnknownName("key of a recipe", key, ["version", "pass"])
    version = document.get("version")
    if version is None:
        raise UsageError("the recipe has no version line", f"begin it with: version = {VERSION}")
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
        hint = _good_values(kind, options, str(error)) or f"its options: {', '.join(kind.__struct_fields__)}"
        raise UsageError(f"pass {number} of the recipe, {name!r}: {error}", hint) from error


def _good_values(kind: type[CompressionPass], options: dict[str, object], said: str) -> str:
    """Return what the option takes that msgspec's message names, or nothing where it names none."""
    found = re.search(r"at `\$\.(\w+)(?:\[(\d+)\])?", said)
    if found is None:
        return ""
    name, place = found.groups()
    given = options[name]
    if place is not None and isinstance(given, list):
        given = given[int(place)]
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    return f"{name} takes {_in_words(inspect.type_info(types[name]), given)}"


def _in_words(kind: inspect.Type, given: object) -> str:
    """Describe values: choices with those nearest to what was given first, numbers with their bounds."""
    match kind:
        case inspect.LiteralType(values=values):
            return ", ".join(json.dumps(value) for value in sorted(values, key=lambda value: _distance(given, value)))
        case inspect.IntType() | inspect.FloatType():
            limits = {"above": kind.gt, "from": kind.ge, "below": kind.lt, "up to": kind.le}
            bounds = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
            return f"{'whole numbers' if isinstance(kind, inspect.IntType) else 'numbers'} {bounds}".rstrip()
        case inspect.VarTupleType(item_type=item):
            return f"a list{' of one or more' if kind.min_length else ''}, each: {_in_words(item, given)}"
        case inspect.BoolType():
            return "true or false"
        case _:
            return 'text in quotes, as "text"'


def _distance(given: object, value: object) -> float:
    if isinstance(given, int | float) and isinstance(value, int):
        return abs(given - value)
    return 1 - difflib.SequenceMatcher(None, str(given), str(value)).ratio()
