"""Checks of what a caller gives: plain types come out, and errors name the argument and the value."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from prefixkv_cache.rules.checks import check_budget, check_choice, check_fraction, check_integer, to_float

HUGE = 10**400


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (0.5, 0.5), (1.0, 1.0), (5e-324, 5e-324), (np.float32(0.5), 0.5), (Fraction(1, 4), 0.25), (Fraction(1), 1.0),
        (1, 1), (64, 64), (np.int64(64), 64), (HUGE, HUGE),
    ],
)  # fmt: skip
def test_a_budget_is_a_fraction_or_so_many_pairs(given, wanted):
    found = check_budget(given)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    "given",
    [0.0, -0.1, 1.01, 64.0, math.nan, math.inf, -math.inf, 0, -3, -HUGE, 1 + Fraction(1, HUGE), Fraction(1, HUGE)],
)
def test_a_budget_out_of_range(given):
    with pytest.raises(ValueError, match=r"budget is .*fraction of the KV pairs to keep"):
        check_budget(given)


@pytest.mark.parametrize("given", ["half", None, True, False, [0.5], 0.5j, Decimal("0.5")])
def test_a_budget_of_another_kind(given):
    with pytest.raises(TypeError, match=r"budget is .*of type"):
        check_budget(given)


def test_integers():
    assert check_integer("sink", 0, 0) == 0
    assert type(check_integer("sink", np.int32(3), 1)) is int
    for value in (-1, -HUGE):
        with pytest.raises(ValueError, match=r"^sink must be at least 0; got -1"):
            check_integer("sink", value, 0)
    for value in (1.0, True, "one", None):
        with pytest.raises(TypeError, match=rf"^sink must be an integer of at least 0; got {value!r}"):
            check_integer("sink", value, 0)


def test_fractions():
    assert [check_fraction("share", value) for value in (0, 1, 0.5, Fraction(1, 2))] == [0.0, 1.0, 0.5, 0.5]
    assert type(check_fraction("share", 1)) is float
    for value in (-0.1, 1.1, math.nan, math.inf, HUGE):
        with pytest.raises(ValueError, match=r"^share must be a number from 0 to 1; got "):
            check_fraction("share", value)
    for value in ("half", None, True):
        with pytest.raises(TypeError, match=f"^share must be a number from 0 to 1; got {value!r}"):
            check_fraction("share", value)


def test_choices():
    assert check_choice("heads", "max", ("mean", "max")) == "max"
    assert check_choice("merge", None, (None, "all")) is None
    for value in ("other", None, 1, ["mean"], np.array(["mean", "max"])):
        with pytest.raises(ValueError, match=r"^heads must be one of 'mean', 'max'; got "):
            check_choice("heads", value, ("mean", "max"))


def test_numbers_no_float_can_hold():
    assert [to_float(each) for each in (HUGE, -HUGE, Fraction(-HUGE, 3), 2)] == [math.inf, -math.inf, -math.inf, 2.0]
