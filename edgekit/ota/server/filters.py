"""Which devices a rollout is for: a small language over what is known of a device. Does no I/O.

``class = raspberry-pi-5 and tag.region in (eu, us) and not group = lab and fact.runtime ~ 0.1.*``. Fields are
``class``, ``id``, ``group``, ``model``, ``version``, ``tag.KEY`` and ``fact.KEY``; what a device lacks is empty.
Facts are what the device says of itself: a filter that must hold against a device that lies asks for tags and groups.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import msgspec

from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.ota.server.fleet import DeviceState

Operator = Literal["=", "!=", "~", "!~", "<", "<=", ">", ">=", "in"]
MAX_LENGTH = 4000
MAX_DEPTH = 32
WORDS = ("and", "or", "not", "in")
FIELDS = ("class", "id", "group", "model", "version")
HINT = 'write it as: class = pi and tag.region in (eu, us) and not group = lab and fact.runtime ~ "0.1.*"'
_FIELD = re.compile(r"(class|id|group|model|version|(tag|fact)\.[A-Za-z0-9][A-Za-z0-9._-]{0,63})\Z")
_BARE = re.compile(r"[A-Za-z0-9._+:/*?@-]+\Z")
_TOKEN = re.compile(
    r"\s*(?:(?P<word>[A-Za-z0-9._+:/*?@-]+)|(?P<quoted>\"(?:[^\"\\]|\\[\"\\])*\")|(?P<sign>!=|!~|<=|>=|[=~<>(),]))"
)


class Compare(msgspec.Struct, frozen=True):
    """One field beside one value, or several where the operator is ``in``."""

    field: str
    operator: Operator
    values: tuple[str, ...]


class Not(msgspec.Struct, frozen=True):
    """What its inside is not."""

    inside: Filter


class And(msgspec.Struct, frozen=True):
    """All of two or more."""

    parts: tuple[Filter, ...]


class Or(msgspec.Struct, frozen=True):
    """Any of two or more."""

    parts: tuple[Filter, ...]


Filter = Compare | Not | And | Or


class _Token(msgspec.Struct, frozen=True):
    text: str
    at: int
    kind: Literal["word", "quoted", "sign", "end"]


@lru_cache(maxsize=256)
def parse(text: str) -> Filter:
    """Read a filter.

    Raises:
        UsageError: it is none; the message points at the place.
    """
    if len(text) > MAX_LENGTH:
        raise UsageError(f"a filter of {len(text)} characters is too long", f"use at most {MAX_LENGTH}")
    return _Reader(text).whole()


def render(one: Filter) -> str:
    """Write a filter so that `parse` gives the same back."""
    if isinstance(one, Compare):
        if one.operator == "in":
            return f"{one.field} in ({', '.join(map(_value, one.values))})"
        return f"{one.field} {one.operator} {_value(one.values[0])}"
    if isinstance(one, Not):
        return f"not {_inner(one.inside)}"
    word = " and " if isinstance(one, And) else " or "
    return word.join(map(_inner, one.parts))


def matches(one: Filter, device: DeviceState) -> bool:
    """Say whether a filter holds for a device."""
    if isinstance(one, And):
        return all(matches(part, device) for part in one.parts)
    if isinstance(one, Or):
        return any(matches(part, device) for part in one.parts)
    if isinstance(one, Not):
        return not matches(one.inside, device)
    if one.operator in ("!=", "!~"):
        return not any(_holds(found, one.operator[1:], one.values) for found in values_of(device, one.field))
    return any(_holds(found, one.operator, one.values) for found in values_of(device, one.field))


def values_of(device: DeviceState, field: str) -> tuple[str, ...]:
    """Return what a device has under a field: several groups, else one text, empty where it lacks that."""
    simple = {"class": device.profile, "id": device.id, "model": device.model, "version": str(device.version)}
    if field in simple:
        return (simple[field],)
    if field == "group":
        return device.members or ("",)
    kind, _, key = field.partition(".")
    return ((device.tags if kind == "tag" else device.facts).get(key, ""),)


def require_field(field: str) -> None:
    """Raise UsageError unless a field may be asked for."""
    if not _FIELD.match(field):
        raise UsageError(f"there is no field {field!r}", f"use {', '.join(FIELDS)}, tag.KEY or fact.KEY")


_ORDERS: dict[str, Callable[[int, int], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def _holds(found: str, operator: str, values: tuple[str, ...]) -> bool:
    if operator in ("=", "in"):
        return found in values
    if operator == "~":
        return fnmatchcase(found, values[0])
    return _ORDERS[operator](int(found), int(values[0]))


def _inner(one: Filter) -> str:
    return render(one) if isinstance(one, Compare | Not) else f"({render(one)})"


def _value(text: str) -> str:
    if _BARE.match(text) and text not in WORDS:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _tokens(text: str) -> list[_Token]:
    found, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            raise _misread(text, at, "a quote that does not end" if text[at] == '"' else "no such sign")
        kind = match.lastgroup or ""
        found.append(msgspec.convert({"text": match[kind], "at": match.start(kind), "kind": kind}, _Token))
        at = match.end()
    return [*found, _Token("", len(text), "end")]


def _misread(text: str, at: int, why: str) -> UsageError:
    return UsageError(f"the filter is misread at character {at + 1}, {why}:\n  {text}\n  {' ' * at}^", HINT)


class _Reader:
    """Reads one filter from left to right; `or` binds least, `not` most."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _tokens(text)
        self._next = 0
        self._depth = 0

    def whole(self) -> Filter:
        found = self._either()
        if self._token.kind != "end":
            raise self._wrong("'and', 'or' or the end is expected")
        return found

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _wrong(self, why: str) -> UsageError:
        return _misread(self._text, self._token.at, why)

    def _take(self, text: str) -> bool:
        token = self._token
        if token.kind == "quoted" or token.text != text:
            return False
        self._next += 1
        return True

    def _either(self) -> Filter:
        parts = [self._all()]
        while self._take("or"):
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def _all(self) -> Filter:
        parts = [self._one()]
        while self._take("and"):
            parts.append(self._one())
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def _one(self) -> Filter:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._wrong(f"more than {MAX_DEPTH} levels deep")
        found = self._nested()
        self._depth -= 1
        return found

    def _nested(self) -> Filter:
        if self._take("not"):
            return Not(self._one())
        if self._take("("):
            found = self._either()
            if not self._take(")"):
                raise self._wrong("')' is expected")
            return found
        return self._compare()

    def _compare(self) -> Filter:
        first = self._token
        field = first.text
        if first.kind != "word" or not _FIELD.match(field):
            raise self._wrong(f"a field is expected: {', '.join(FIELDS)}, tag.KEY or fact.KEY")
        self._next += 1
        second = self._token
        operator = second.text
        if operator not in ("=", "!=", "~", "!~", *_ORDERS, "in") or second.kind == "quoted":
            raise self._wrong("an operator is expected: = != ~ !~ < <= > >= in")
        if operator in _ORDERS and field != "version":
            raise self._wrong(f"{operator} compares versions only")
        self._next += 1
        values = self._list() if operator == "in" else (self._one_value(operator),)
        return msgspec.convert({"field": field, "operator": operator, "values": values}, Compare)

    def _list(self) -> tuple[str, ...]:
        if not self._take("("):
            raise self._wrong("'(' is expected")
        values = [self._one_value("in")]
        while self._take(","):
            values.append(self._one_value("in"))
        if not self._take(")"):
            raise self._wrong("',' or ')' is expected")
        return tuple(values)

    def _one_value(self, operator: str) -> str:
        token = self._token
        is_bare = token.kind == "word"
        if (is_bare and token.text in WORDS) or token.kind in ("sign", "end"):
            raise self._wrong('a value is expected; write words of the language and signs in "quotes"')
        value = token.text if is_bare else re.sub(r"\\(.)", r"\1", token.text[1:-1])
        if operator in _ORDERS and not re.fullmatch(r"[0-9]{1,9}", value):
            raise self._wrong("a version is expected: a whole number")
        self._next += 1
        return value
