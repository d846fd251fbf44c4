"""JSON that nobody has checked: read strictly, and its fields taken one by one.

Refused are what JSON does not know or leaves open: NaN, numbers without bounds, a key twice, half
a character, nesting without end. What is refused is named, in a `Refused` with status 400.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from gato.rollouts.serve_limits import Refused

MAX_DEPTH = 64
MAX_VALUES = 1 << 20
"""Of a body: as objects they take some twenty times the bytes that they are written with."""
_MAX_DIGITS = 40
_UNREAD = 1000
"""Characters or items of a field that nobody looks at."""


def strict_json(raw: bytes) -> Any:
    """Return the value of a body.

    Raises:
        Refused: saying what is wrong with it.
    """
    if sum(map(raw.count, (b",", b"{", b"["))) > MAX_VALUES:  # those inside of strings too
        raise _broken(f"expected JSON of at most {MAX_VALUES} values")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_no_key_twice,
            parse_constant=_no_constant,
            parse_int=_bounded_int,
            parse_float=_finite,
        )
    except Refused:
        raise
    except UnicodeDecodeError as error:
        raise _broken(f"expected UTF-8; byte {error.start} is none") from error
    except RecursionError as error:
        raise _broken(f"expected JSON of at most {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise _broken(f"expected JSON; {error}") from error
    _check(value)
    return value


def _broken(message: str) -> Refused:
    return Refused(400, message[:300], code="invalid_json")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _broken(f"expected every key once; got {key[:50]!r} twice")
            seen.add(key)
    return found


def _no_constant(name: str) -> Any:
    raise _broken(f"expected numbers; JSON has no {name}")


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _broken(f"expected whole numbers of at most {_MAX_DIGITS} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _broken(f"expected numbers within the range of floats; got {digits[:50]}")
    return number


def _check(value: Any) -> None:
    """Raise `Refused` for nesting that is too deep and for halves of characters."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.keys()
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str) and not one.isascii():
                _check_text(one)
        if not below:
            return
        level = below
    raise _broken(f"expected JSON of at most {MAX_DEPTH} levels")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _broken("expected Unicode; got half a character (a lone surrogate)") from error


class Fields:
    """The fields of an object; null is as good as left out."""

    def __init__(self, value: Any, where: str = "") -> None:
        """Take an object.

        Args:
            value: what JSON held.
            where: the path to it, to name its fields in errors.
        """
        if not isinstance(value, dict):
            at = f" as {where}" if where else ""
            raise Refused(400, f"expected an object{at}; got {kind(value)}", param=where or None)
        self._values: Mapping[str, Any] = {k: v for k, v in value.items() if v is not None}
        self._where = where
        self._taken: set[str] = set()

    def path(self, name: str) -> str:
        """Return a field's name with the path to it."""
        return f"{self._where}.{name}" if self._where else name

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str) -> Any:
        """Return a field, whatever it is; None where it is left out."""
        self._taken.add(name)
        return self._values.get(name)

    def need(self, name: str) -> Any:
        """Return a field that must be there."""
        value = self.take(name)
        if value is None:
            path = self.path(name)
            raise Refused(400, f"expected {path!r}; it is missing", param=path, code="missing")
        return value

    def wrong(self, name: str, expected: str) -> Refused:
        """Return the refusal of a field."""
        path, value = self.path(name), self._values.get(name)
        got = f"{value!r:.60}" if isinstance(value, str | int | float) else kind(value)
        return Refused(400, f"expected {path!r} to be {expected}; got {got}", param=path)

    def text(self, name: str, default: str | None = None, longest: int = 200) -> str | None:
        """Return a string."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        if len(value) > longest:
            raise self.wrong(name, f"of at most {longest} characters")
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number in [low, high]."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a number in [low, high]."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        if not low <= value <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """Return true or false; false where it is left out."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def only(self, *names: str) -> None:
        """Take fields that make no difference, and hold nothing large either."""
        for name in names:
            value = self.take(name)
            if isinstance(value, str | list | dict) and len(value) > _UNREAD:
                raise self.wrong(name, f"of at most {_UNREAD} characters or items")

    def refuse(self, harmless: Mapping[str, Iterable[Any]]) -> None:
        """Refuse fields that would change the answer, unless they have a value that does not."""
        for name, values in harmless.items():
            value = self.take(name)
            if value is not None and not any(_same(value, v) for v in values):
                path = self.path(name)
                raise Refused(
                    400,
                    f"{path!r} is not supported by this server; leave it out",
                    param=path,
                    code="unsupported_parameter",
                )

    def done(self) -> None:
        """Raise `Refused` where there are fields that nobody took."""
        for name in self._values:
            if name not in self._taken:
                path = self.path(name[:100])
                message = f"unknown field {path!r}"
                raise Refused(400, message, param=path, code="unknown_parameter")


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def kind(value: Any) -> str:
    """Return what a JSON value is, in JSON's words.

    >>> [kind(value) for value in (None, 0, [1], [], "", {})]
    ['nothing', 'a number', 'a list', 'an empty list', 'an empty string', 'an empty object']
    """
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    name = "nothing" if value is None else names.get(type(value), "a number")
    return f"an empty {name.split()[-1]}" if value in ("", [], {}) else name
