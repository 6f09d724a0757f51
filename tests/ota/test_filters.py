"""The language of targets: what it means, that it survives being written, and where it points when it is misread."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.ota.server.filters import MAX_DEPTH, And, Compare, Not, Or, matches, parse, render, values_of
from edgekit.ota.server.fleet import DeviceState

PI = DeviceState(
    id="pi-1",
    profile="raspberry-pi-5",
    model="cat",
    version=7,
    tags={"region": "eu", "shop": "12 \"north\" \\ 'x'"},
    facts={"runtime": "0.1.3"},
    members=("beta", "stores"),
)


@pytest.mark.parametrize(
    "text",
    [
        "class = raspberry-pi-5",
        "class = raspberry-pi-5 and tag.region in (eu, us) and not group = lab and fact.runtime ~ 0.1.*",
        "group = beta and group = stores",
        "group != lab",
        "id ~ pi-*",
        "version >= 7 and version < 8 and version = 7",
        'tag.missing = ""',
        "tag.missing != eu",
        "tag.region = us or tag.region = eu and class = raspberry-pi-5",
        "not (tag.region = us or class = jetson)",
        "not not class = raspberry-pi-5",
        r"""tag.shop = "12 \"north\" \\ 'x'" """,
        'model = "cat"',
        "fact.runtime !~ 0.2.*",
        "tag.region in(eu,us)",
    ],
)
def test_it_holds(text):
    assert matches(parse(text), PI)
    assert not matches(parse(f"not ({text})"), PI)


@pytest.mark.parametrize(
    "text",
    ["class = jetson", "group = lab", "group != beta", "version > 7", "tag.region in (us, ap)", "tag.region = EU",
     "fact.runtime ~ 0.1", "tag.region = us or tag.region = eu and class = jetson"],
)  # fmt: skip
def test_it_does_not_hold(text):
    assert not matches(parse(text), PI)


def test_a_group_is_what_the_operator_says_and_not_what_the_device_says():
    liar = DeviceState(id="x", groups={"trusted": 1})
    assert not matches(parse("group = trusted"), liar)
    assert values_of(liar, "group") == ("",)


@pytest.mark.parametrize(
    ("text", "at", "says"),
    [
        ("", 1, "a field is expected"),
        ("clas = pi", 1, "a field is expected"),
        ("class pi", 7, "an operator is expected"),
        ("class = ", 9, "a value is expected"),
        ("class = and", 9, "a value is expected"),
        ("class = pi or", 14, "a field is expected"),
        ("class = pi tag.region = eu", 12, "'and', 'or' or the end"),
        ("(class = pi", 12, "')' is expected"),
        ("tag.region in eu", 15, "'(' is expected"),
        ("tag.region in (eu us)", 19, "',' or ')'"),
        ("version > new", 11, "a whole number"),
        ("class > pi", 7, "versions only"),
        ('class = "pi', 9, "a quote that does not end"),
        ("class = pi & id = x", 12, "no such sign"),
        ('"class" = pi', 1, "a field is expected"),
        ("tag. = x", 1, "a field is expected"),
        ("(" * (MAX_DEPTH + 1) + "class = pi" + ")" * (MAX_DEPTH + 1), MAX_DEPTH + 1, "levels deep"),
        ("not " * 5000 + "class = pi", None, "too long"),
    ],
)
def test_what_is_misread_is_pointed_at(text, at, says):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert says in caught.value.message
    if at is not None:
        assert f"character {at}," in caught.value.message
        assert caught.value.message.splitlines()[-1] == f"  {' ' * (at - 1)}^"


FIELDS = st.sampled_from(["class", "id", "group", "model", "version", "tag.region", "fact.os-release"])
VALUES = st.text(max_size=12)
COMPARES = st.one_of(
    st.builds(Compare, FIELDS, st.sampled_from(["=", "!=", "~", "!~"]), st.tuples(VALUES)),
    st.builds(Compare, FIELDS, st.just("in"), st.lists(VALUES, min_size=1, max_size=3).map(tuple)),
    st.builds(
        Compare, st.just("version"), st.sampled_from(["<", "<=", ">", ">="]), st.tuples(st.integers(0, 999).map(str))
    ),
)


def _nested(inside):
    parts = st.lists(inside, min_size=2, max_size=3).map(tuple)
    return st.one_of(st.builds(Not, inside), st.builds(And, parts), st.builds(Or, parts))


FILTERS = st.recursive(COMPARES, _nested, max_leaves=8)


@given(FILTERS)
def test_what_is_written_reads_as_the_same(one):
    assert parse(render(one)) == one


@given(FILTERS, FILTERS)
def test_and_or_not_mean_what_they_say(one, other):
    a, b = matches(one, PI), matches(other, PI)
    assert matches(And((one, other)), PI) == (a and b)
    assert matches(Or((one, other)), PI) == (a or b)
    assert matches(Not(one), PI) == (not a)


@given(st.text(alphabet="class=()<>!~ andortgin.\"\\,'0", max_size=40))
def test_any_text_is_a_filter_or_a_usage_error(text):
    with contextlib.suppress(UsageError):
        assert parse(render(parse(text))) == parse(text)
