"""JSON as dataclasses: read strictly, refused with the place, the given value and what is allowed. No torch, no Triton.

A class says with its types what a file may hold: dataclasses (whose ``__post_init__`` may refuse more), lists, dicts,
``Literal`` for the values of a choice, ``Annotated`` with a ``Rule``, and str, bool, int and float. Integers are from 0
to 2**63 - 1, floats finite and from 0 on. A field with a default may be absent.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")


class Rule(NamedTuple):
    """What more must hold of a value, and that in words."""

    holds: Callable[[Any], bool]
    allowed: str


Count = Annotated[int, Rule(lambda value: value > 0, "an integer of at least 1")]
Positive = Annotated[float, Rule(lambda value: value > 0, "a number above 0")]
Words = Annotated[str, Rule(lambda value: bool(value.strip()), "a text that is not empty")]

_PLAIN: dict[Any, Rule] = {
    str: Rule(lambda value: isinstance(value, str), "a text"),
    bool: Rule(lambda value: isinstance(value, bool), "true or false"),
    int: Rule(lambda value: type(value) is int and 0 <= value < 1 << 63, "an integer from 0 to 2**63 - 1"),
    # NaN and Infinity are numbers in Python's JSON, and so are integers that no float can hold.
    float: Rule(
        lambda value: type(value) in (int, float) and 0 <= value <= sys.float_info.max, "a finite number from 0 on"
    ),
}


def refused(place: str, given: object, allowed: str) -> ValueError:
    return ValueError(f"{place} is {str(given)[:200]!r}, allowed: {allowed}")


def load(kind: type[T], path: Path) -> T:
    """What a file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or of another form.
    """
    content = path.read_bytes()
    try:
        given = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of the bytes, of the text, of a number's length, of the nesting
        raise ValueError(f"{path}: not JSON ({error}); allowed: JSON text") from error
    found: T = read(kind, given, str(path))
    return found


def read(kind: Any, given: Any, place: str) -> Any:
    """``given``, as JSON has it, as a ``kind``. place: what it is called where it is refused."""
    origin, parameters = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        base, rule = parameters
        found = read(base, given, place)
        if not rule.holds(found):
            raise refused(place, given, rule.allowed)
        return found
    if origin is Literal:
        if not any(type(given) is type(one) and given == one for one in parameters):
            raise refused(place, given, ", ".join(map(str, parameters)))
        return given
    if origin is list:
        if not isinstance(given, list):
            raise refused(place, given, "a list")
        return [read(parameters[0], value, f"{place}[{i}]") for i, value in enumerate(given)]
    if origin is dict:
        if not isinstance(given, dict):
            raise refused(place, given, f"an object with any of {', '.join(map(str, typing.get_args(parameters[0])))}")
        return {
            read(parameters[0], name, f"a key of {place}"): read(parameters[1], value, f"{place}.{name}")
            for name, value in given.items()
        }
    if is_dataclass(kind):
        return _dataclass(kind, given, place)
    if not _PLAIN[kind].holds(given):
        raise refused(place, given, _PLAIN[kind].allowed)
    return float(given) if kind is float else given


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _dataclass(kind: Any, given: Any, place: str) -> Any:
    names = [f.name for f in fields(kind)]
    if not isinstance(given, dict):
        raise refused(place, given, f"an object with {', '.join(names)}")
    needed = {f.name for f in fields(kind) if f.default is MISSING}
    if not needed <= set(given) <= set(names):
        raise refused(f"the list of keys of {place}", sorted(given), f"exactly {', '.join(names)}")
    values = {name: read(_hints(kind)[name], given[name], f"{place}.{name}") for name in names if name in given}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
