"""The cache and what people wrote themselves: a metric or a teacher that was edited is never answered from before."""

import pytest
from fakes import digits

pytest.importorskip("torch")

from edgekit.compress import cache as caches  # torch may be missing
from edgekit.compress import compress, fingerprint  # the same
from edgekit.compress.passes.distill import Distill  # the same
from edgekit.compress.recipe import decode  # the same

FOLD = 'version = 1\n[[pass]]\nname = "fold"\n'
METRIC = "def metric(outputs, labels):\n    return {}\n"


def scored(cache, metric):
    return compress(digits.model(), decode(FOLD), metric=metric, cache=cache).lineage[-1].measured


def figure(measured):
    return next(value for name, value in measured.items() if name.startswith("validation"))


@pytest.mark.parametrize("kind", ["file", "module"])
def test_scores_by_a_metric_that_was_edited_are_computed_again(tmp_path, monkeypatch, kind):
    import sys

    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "own_metric.py"
    named = f"{file}:metric" if kind == "file" else "own_metric:metric"
    for value in (0.25, 0.75):
        file.write_text(METRIC.format(value))
        sys.modules.pop("own_metric", None)
        cache = caches.Cache(tmp_path / "cache")
        assert figure(scored(cache, named)) == value
        assert cache.found == []
    cache = caches.Cache(tmp_path / "cache")
    assert figure(scored(cache, named)) == 0.75
    assert len(cache.found) == 1


def test_a_teacher_in_a_module_that_was_edited_makes_another_key(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "own_networks"
    package.mkdir()
    (package / "__init__.py").write_text("from .large import build\n")
    for named, file in (("own_networks.large:build", "large.py"), ("own_networks:build", "large.py")):
        keys = set()
        for text in ("one = 1\n", "two = 2\n"):
            (package / file).write_text("build = None\n" + text)
            keys.add(fingerprint.of_pass("x", "distill", Distill(teacher=named)))
            assert fingerprint.of_pass("x", "distill", Distill(teacher=named)) in keys
        assert len(keys) == 2


def test_a_name_that_is_no_code_has_no_content():
    assert [fingerprint.of_named(text) for text in ("", "top1", "no.such.module:build", "no_such_file.py:f")] == [
        ""
    ] * 4
