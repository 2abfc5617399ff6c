"""Checks of numbers and choices that a caller gives: the value in its plain type, or an error that names it."""

from __future__ import annotations

import math
import numbers
from typing import Any


def check_budget(value: Any) -> float | int:
    """A budget: a float in (0, 1], the fraction of the KV pairs to keep, or an int >= 1, so many pairs a head.

    The type decides: `1.0` keeps everything, `1` one pair a head.

    Raises:
        TypeError: not a real number (a bool is not one here).
        ValueError: nan, a fraction outside (0, 1], or an integer below 1.
    """
    cure = "give the fraction of the KV pairs to keep, in (0, 1], such as 0.5, or an integer: so many pairs a head"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"budget is {value!r}, of type {type(value).__name__}; {cure}")
    if isinstance(value, numbers.Integral):
        if int(value) >= 1:
            return int(value)
    # Compared before the conversion, which may round to 1; and after it, which may round to 0.
    elif value <= 1 and to_float(value) > 0:
        return to_float(value)
    raise ValueError(f"budget is {value!r}; {cure}")


def check_integer(name: str, value: Any, least: int) -> int:
    """The value as an int; a TypeError or ValueError that names it where it is no integer of at least `least`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer of at least {least}; got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}; got {value!r}")
    return int(value)


def check_fraction(name: str, value: Any) -> float:
    """The value as a float; a TypeError or ValueError that names it where it is no number in [0, 1]."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number from 0 to 1; got {value!r}")
    fraction = to_float(value)
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"{name} must be a number from 0 to 1; got {value!r}")
    return fraction


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """The value; a ValueError that names it where it is none of the choices."""
    # An array, of which each element would be compared, is no choice either.
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def to_float(value: Any) -> float:
    """A real number as a float: infinity where it is too large for one, as only integers and fractions can be."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
