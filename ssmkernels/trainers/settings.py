# SPDX-License-Identifier: BSD-3-Clause
"""What a setting may be, said by its type: ``batch_size: Count = 64``. :class:`Settings` checks it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints


class Allowed(NamedTuple):
    """A condition on a value, and the words for it after "it should be"."""

    words: str
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:
        """The words, which the reference of the configurations shows."""
        return repr(self.words)


# A NaN fulfils none of them.
Count = Annotated[int, Allowed("at least 1", lambda value: value >= 1)]
CountOrZero = Annotated[int, Allowed("at least 0", lambda value: value >= 0)]
AtLeastTwo = Annotated[int, Allowed("at least 2", lambda value: value >= 2)]
NonNegative = Annotated[float, Allowed("at least 0", lambda value: value >= 0)]
Positive = Annotated[float, Allowed("positive", lambda value: value > 0)]
Share = Annotated[float, Allowed("in [0, 1]", lambda value: 0 <= value <= 1)]
ShareBelowOne = Annotated[float, Allowed("in [0, 1)", lambda value: 0 <= value < 1)]
PartialShare = Annotated[float, Allowed("between 0 and 1", lambda value: 0 < value < 1)]


@dataclass
class Settings:
    """The base of configurations. Every field whose type is one of those above, or a ``Literal``, is checked.

    Raises:
        ValueError: a field is not as its type says; the message names it as the command line does.
    """

    section: ClassVar[str] = ""
    """What stands before the name of a field on the command line: "data." or "run."."""

    def __post_init__(self) -> None:
        # mypy takes a class for as unhashable as its instances.
        for name, optional, conditions in _conditions_of_fields(type(self)):  # type: ignore[arg-type]
            value = getattr(self, name)
            for condition in conditions:
                if not (optional and value is None) and not condition.holds(value):
                    words = condition.words + (", or null" if optional else "")
                    raise ValueError(f"{self.section}{name} is {value!r}; it should be {words}")

    def check_multiple(self, name: str, of: int, words: str) -> None:
        """Raises a ``ValueError`` unless the field ``name`` is a multiple of a number that only the run knows."""
        if getattr(self, name) % of:
            raise ValueError(f"{name} is {getattr(self, name)}; it should be a multiple of {words}")


@functools.cache
def _conditions_of_fields(settings: type) -> list[tuple[str, bool, list[Allowed]]]:
    """Of each field its name, whether it may be None, and its conditions."""
    hints = get_type_hints(settings, include_extras=True)
    return [(name, type(None) in get_args(hint), list(_conditions(hint))) for name, hint in hints.items()]


def _conditions(hint: Any) -> Iterator[Allowed]:
    """Those in a type, or in the members of a union."""
    if get_origin(hint) is Annotated:
        yield from (mark for mark in hint.__metadata__ if isinstance(mark, Allowed))
    elif get_origin(hint) is Literal:
        choices = get_args(hint)
        yield Allowed(f"one of {', '.join(map(str, choices))}", choices.__contains__)
    elif type(None) in get_args(hint):
        for member in get_args(hint):
            yield from _conditions(member)
