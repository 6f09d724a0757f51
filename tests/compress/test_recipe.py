"""Recipes: read strictly, written completely, and every mistake answered with the nearest right thing."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import plugins
from edgekit.compress import recipe as recipes
from edgekit.compress.passes import CompressionPass
from edgekit.compress.passes.distill import Distill
from edgekit.compress.passes.fold import Fold
from edgekit.compress.passes.prune import Prune
from edgekit.compress.passes.quantize import Quantize
from edgekit.compress.recipe import Recipe
from edgekit.errors import UnknownName, UsageError

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.toml"))


def with_pass(lines):
    return f"version = 1\n[[pass]]\n{lines}\n"


def test_the_default_is_int8_quantization_over_channels_with_min_max_ranges():
    assert recipes.default().passes == (("quantize", Quantize(bits=8, observer="minmax", granularity="channel")),)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_example_recipe_decodes(path):
    assert recipes.read(path).passes


def test_there_are_example_recipes():
    assert {"int8.toml", "prune-digits.toml", "distill-digits.toml"} <= {path.name for path in RECIPES}


PASSES = st.one_of(
    st.builds(Fold),
    st.builds(Quantize, observer=st.sampled_from(["minmax", "percentile", "mse"]), samples=st.integers(2, 9999)),
    st.builds(Prune, ratio=st.floats(0.01, 0.99), epochs=st.integers(0, 99), seed=st.integers(0, 2**31 - 1)),
    st.builds(Distill, teacher=st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=30)),
)


@given(st.lists(PASSES, min_size=1, max_size=4))
def test_decode_gives_back_what_encode_wrote(steps):
    recipe = Recipe(tuple((type(step).__name__.lower(), step) for step in steps))
    assert recipes.decode(recipes.encode(recipe)) == recipe


def test_every_pass_in_the_folder_is_a_compression_pass_with_options():
    for name in plugins.names(recipes.PASSES):
        kind = plugins.load(recipes.PASSES, name, "pass")
        assert issubclass(kind, CompressionPass)
        assert kind.__doc__


def test_a_misspelled_pass_is_answered_with_the_nearest():
    with pytest.raises(UnknownName, match="unknown pass 'quantise'") as caught:
        recipes.decode(with_pass('name = "quantise"'))
    assert "quantize" in caught.value.hint


def test_a_misspelled_option_is_answered_with_the_nearest():
    with pytest.raises(UnknownName, match="option of pass 'prune' 'ration'") as caught:
        recipes.decode(with_pass('name = "prune"\nration = 0.5'))
    assert "ratio" in caught.value.hint


def test_a_misspelled_key_of_the_recipe_is_refused():
    with pytest.raises(UnknownName, match="versoin"):
        recipes.decode('versoin = 1\n[[pass]]\nname = "fold"\n')


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('name = "prune"\nratio = "half"', r"prune.*Expected `float`, got `str` - at `\$\.ratio`"),
        ('name = "prune"\nratio = 1.0', "ratio"),
        ('name = "prune"\nratio = nan', "ratio"),
        ('name = "quantize"\nbits = 9', "bits"),
        ('name = "quantize"\nobserver = "best"', "observer"),
        ('name = "quantize"\nsamples = 1', "samples"),
        ('name = "quantize"\nsamples = true', "samples"),
        ('name = "distill"', "teacher"),
        ("ratio = 0.5", "pass 1 of the recipe has no name"),
        ("name = 3", "pass 1 of the recipe has no name"),
    ],
)
def test_a_wrong_value_is_refused_by_name(lines, message):
    with pytest.raises(UsageError, match=message):
        recipes.decode(with_pass(lines))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no version line"),
        ("version = 2", "version 2"),
        ("version = true", "version True"),
        ("version = 1", "has no pass"),
        ("version = 1\npass = []", "has no pass"),
        ("version = 1\npass = [1]", "has no pass"),
        ('version = 1\npass = "quantize"', "has no pass"),
        ("version = = 1", "no TOML"),
    ],
)
def test_what_is_no_recipe_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        recipes.decode(text)


def test_a_missing_or_binary_file_is_refused_by_path(tmp_path):
    with pytest.raises(UsageError, match="no recipe at"):
        recipes.read(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        recipes.read(tmp_path / "r.toml")


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        ('name = "quantize"\nobserver = "minmaxx"', 'observer takes "minmax", '),
        ('name = "quantize"\nbits = 9', "bits takes 8, 7, 6, 5, 4, 3, 2"),
        ('name = "quantize"\nsamples = 1', "samples takes whole numbers from 2"),
        ('name = "prune"\nratio = 1.5', "ratio takes numbers above 0 and below 1"),
        ('name = "prune"\nflip = "yes"', "flip takes true or false"),
        ('name = "prune"\nkeep_modules = [3]', 'keep_modules takes a list, each: text in quotes, as "text"'),
        ('name = "mixed_precision"\nwidths = [8, 33]', "widths takes a list of one or more, each: 32, 8, "),
        ('name = "mixed_precision"\nwidths = []', "widths takes a list of one or more, each: "),
        ('name = "distill"', "its options: epochs, "),
    ],
)
def test_a_wrong_value_is_answered_with_the_good_ones(lines, hint):
    with pytest.raises(UsageError) as caught:
        recipes.decode(with_pass(lines))
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("INT8", "unknown recipe 'INT8'", "did you mean int8"),
        ("int8.toml", r"no recipe at int8\.toml", "did you mean --recipe int8?"),
        ("", "the recipe has no name", "--recipe int8"),
    ],
)
def test_a_recipe_of_nearly_a_shipped_name_is_answered_with_it(name, message, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        recipes.read(Path(name))
    assert hint in caught.value.hint


def test_a_seed_reaches_the_passes_that_have_one_and_only_them():
    recipe = Recipe((("prune", Prune()), ("quantize", Quantize()))).with_seed(7)
    assert recipe.passes == (("prune", Prune(seed=7)), ("quantize", Quantize()))


def test_a_plugin_that_is_no_pass_is_refused(monkeypatch):
    monkeypatch.setattr(plugins, "load", lambda *_: print)
    with pytest.raises(UsageError, match="no compression pass"):
        recipes.decode(with_pass('name = "fold"'))
