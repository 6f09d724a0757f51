"""The recipes that come with edgekit: each decodes, does what its name says, and is found by it."""

from pathlib import Path

import pytest
from fakes import planted

from edgekit.compress import compress, recipe
from edgekit.errors import UnknownName, UsageError

QUICK = ("int8", "int8-dynamic", "int8-equalize-bias_correction", "int8-smooth", "w8", "fp16", "w4-g64-hqq")


def meaning(name):
    """Return what the parts of a name promise: options of quantize, and passes beside it."""
    options, others = {}, []
    for part in name.split("-"):
        if part.startswith("g") and part[1:].isdigit():
            options |= {"granularity": "group", "group": int(part[1:])}
        elif part == "channel":
            options |= {"granularity": "channel"}
        elif part.startswith("w") and part[1:2].isdigit():
            width, _, activations = part[1:].partition("a")
            options |= {"bits": int(width), "activations": "static" if activations == "8" else "none"}
        elif part == "int8":
            options |= {"bits": 8, "activations": "static"}
        elif part == "dynamic":
            options |= {"activations": "dynamic"}
        else:
            others.append("float16" if part == "fp16" else part)
    return options, others


@pytest.mark.parametrize("name", recipe.shipped())
def test_a_recipe_does_what_its_name_says(name):
    passes = dict(recipe.read(Path(name)).passes)
    options, others = meaning(name)
    assert sorted(passes) == sorted([*others, *(["quantize"] if options else [])])
    for key, value in options.items():
        assert getattr(passes["quantize"], key) == value
    assert recipe.shipped()[name].read_text().startswith("# ")


@pytest.mark.parametrize("name", QUICK)
def test_a_recipe_runs(name):
    pytest.importorskip("torch")
    model = compress(planted.sound(), recipe.read(Path(name)))
    assert model.lineage[-1].measured["validation_top1"] > 0.9
    assert model.precision != "fp32"


def test_a_name_nearly_right_is_offered_the_right_one():
    with pytest.raises(UnknownName, match="unknown recipe 'int9'") as caught:
        recipe.read(Path("int9"))
    assert "int8" in caught.value.hint


def test_a_file_of_that_name_comes_before_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "int8").write_text('version = 1\n[[pass]]\nname = "fold"\n')
    assert [name for name, _ in recipe.read(Path("int8")).passes] == ["fold"]
    with pytest.raises(UsageError, match="no recipe at gone"):
        recipe.read(Path("gone.toml"))
