"""Methods as values: what is refused and how, and what single named methods do, by hand."""

from fractions import Fraction

import numpy as np
import pytest
import torch

import models
from models import PADDED
from oracle import feed
from prefixkv_cache import PrefixKVCache, methods
from prefixkv_cache.methods import DEFAULT, H2O, PREFIXKV, SNAPKV, STREAMING, Method
from watch import Case, prompt_kept, run

BAD = [
    ("score", "love", "attention"), ("heads", "some", "each"), ("heads", None, "each"), ("heads", ["mean"], "each"),
    ("heads", np.array(["mean"]), "each"),
    ("queries", 0, "at least 1"), ("queries", -1, "at least 1"), ("queries", "some", "all"),
    ("queries", 1.5, "at least 1"),
    ("queries", True, "at least 1"), ("context", -1, "at least 0"), ("context", "some", "all"),
    ("pooling", 0, "at least 1"), ("pooling", 4, "odd"), ("pooling", 2.5, "at least 1"),
    ("pooling", "wide", "at least 1"),
    ("pooling", True, "at least 1"), ("pooling_by", "sum", "mean"), ("value_norm", 1, "True or False"),
    ("lengths", "flat", "uniform"), ("lengths", None, "uniform"),
    ("floor", -1, "at least 0"), ("floor", 1.5, "share"), ("floor", -0.5, "share"), ("floor", "some", "integer"),
    ("sink", -1, "at least 0"), ("sink", "one", "integer"),
    ("recent", 0, "at least 1"), ("recent", -3, "at least 1"), ("recent", 1.5, "share"),
    ("recent", "half", "at least 1"),
    ("recent", True, "at least 1"), ("recent", float("nan"), "share"), ("recent", -(10**400), "at least 1"),
    ("text_floor", 1.01, "0 to 1"), ("text_floor", "all", "0 to 1"), ("text_floor", 10**400, "0 to 1"),
    ("merge", "kv", "True or False"), ("evict", "newest", "oldest"), ("evict", None, "oldest"),
    ("distance", 0, "at least 1"), ("distance", "far", "integer"), ("distance", -25, "at least 1"),
    ("headroom", -1, "at least 0"), ("headroom", 0.5, "integer"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "cure"), BAD, ids=lambda value: str(value)[:20])
def test_a_bad_value_is_refused_by_name(name, value, cure):
    with pytest.raises((ValueError, TypeError)) as error:
        PREFIXKV.replace(**{name: value})
    message = str(error.value)
    assert message.startswith(name) and cure in message and "got" in message and "\n" not in message


def test_an_unknown_field_or_method_lists_what_there_is():
    with pytest.raises((ValueError, TypeError), match=r"(?s)novelty.*queries.*headroom"):
        PREFIXKV.replace(novelty=8.0)
    for text in ("snapkv:window=3", "snapkv:queries", "snapkv:=3", "snapkv:queries=3;;", "snapkv:queries=many"):
        with pytest.raises(ValueError, match=r"snapkv") as error:
            Method.parse(text)
        assert "\n" not in str(error.value)
    for text in ("", "snap", "SNAPKV ", ":queries=3"):
        with pytest.raises(ValueError) as error:
            Method.parse(text)
        assert all(name in str(error.value) for name in methods.NAMED)
    for value in (3, b"snapkv", ["snapkv"]):
        with pytest.raises(TypeError, match="method"):
            PrefixKVCache(budget=0.5, method=value)


@pytest.mark.parametrize(
    ("method", "changes", "names"),
    [
        (PREFIXKV, {"evict": "oldest"}, ("distance", "evict")),
        (PREFIXKV, {"evict": "least-important"}, ("distance", "evict")),
    ],
    ids=str,
)
def test_a_combination_that_cannot_work_is_refused(method, changes, names):
    """What would be ignored in silence is an error that names both."""
    with pytest.raises(ValueError) as error:
        method.replace(**changes)
    assert all(name in str(error.value) for name in names)


def test_numbers_of_any_kind_are_taken():
    """And held as plain ones, so that equal methods are equal."""
    given = DEFAULT.replace(text_floor=Fraction(1, 2), pooling=np.int32(13), queries=np.int64(16))
    assert given == DEFAULT and hash(given) == hash(DEFAULT)
    assert [type(each) for each in (given.protect.text_floor, given.ranking.pooling)] == [float, int]


def test_methods_are_values():
    with pytest.raises(AttributeError):
        PREFIXKV.ranking = SNAPKV.ranking
    with pytest.raises(AttributeError):
        PREFIXKV.ranking.queries = 3
    assert PREFIXKV.replace() == PREFIXKV and PREFIXKV.replace(queries=8).replace(queries="all") == PREFIXKV
    assert PREFIXKV.replace(queries=8).spell() == "prefixkv:queries=8"
    assert PREFIXKV.replace(lengths="uniform").name == "uniform"
    assert len(set(methods.NAMED.values())) == len(methods.NAMED)


def test_resolution():
    """The method given, else the profile's, else the default."""
    case = Case("h2o", profile="layer")
    assert methods.resolve(None, None) == DEFAULT
    assert methods.resolve(None, case.read()) == H2O
    assert methods.resolve("h2o", case.read()) == methods.resolve(H2O, None) == methods.resolve("h2o", None) == H2O
    with pytest.warns(methods.MethodMismatchWarning):
        assert methods.resolve(STREAMING, case.read()) == STREAMING


# By hand.


def test_streaming_keeps_the_first_and_the_newest():
    """Of 44 tokens at a quarter, 4 and 7; of 54, 4 and the newest 10, since 15 would be one too many."""
    _, watch = run(Case("streaming", "llava_mha", lengths=(44,), budget=0.25, turns=(11,)))
    for first, last in zip(watch.kept[0].values(), watch.kept[10].values(), strict=True):
        assert all(head == [0, 1, 2, 3, *range(37, 44)] for head in first[0])
        assert all(head == [0, 1, 2, 3, *range(44, 54)] for head in last[0])


def test_uniform_lengths_are_within_one():
    _, watch = run(Case("uniform", turns=(1,)))
    for row, length in enumerate(PADDED):
        counts = [len(rows[row][0]) for rows in watch.kept[0].values()]
        assert max(counts) - min(counts) <= 1 and abs(sum(counts) - 0.4 * length * len(counts)) <= 0.5


def test_elastic_without_merging_is_uniform():
    changed = run(Case("elastic:merge=false", "qwen2_5_vl"))[1]
    assert changed.kept == run(Case("uniform", "qwen2_5_vl"))[1].kept
    assert run(Case("elastic", "qwen2_5_vl"))[1].kept[0] == changed.kept[0]


def test_random_keys():
    """Of the layer and the prompt's length alone; every key about as likely as any other."""
    case = Case("random", "llava_mha", turns=(1,))
    first = prompt_kept(case)
    for row in range(3):
        layers = [tuple(rows[row][0]) for rows in first.values()]
        assert len(set(layers)) == len(layers), "layers draw by themselves"
        assert all(head == rows[row][0] for rows in first.values() for head in rows[row])
    drawn, draws = [0] * 60, 0
    for length in range(60, 90):
        cache = PrefixKVCache(budget=0.5, method="random")
        feed(models.shared("llava_mha"), {"input_ids": models.words(1, length)}, models.words(1, 1), cache)
        for layer in range(4):
            for position in cache.kept_positions(layer)[0].tolist():
                if position < 60:
                    drawn[position] += 1
            draws += 1
    assert drawn[0] == draws == 120  # the sink
    chi_square = sum((each - 60) ** 2 / 30 for each in drawn[1:59])
    assert chi_square < 58 + 4 * (2 * 58) ** 0.5  # each key half of the time: 58 expected


def test_registering_a_score_is_all_that_a_new_method_takes():
    """A scoring rule under a name of its own can be asked for at once, and is told which there are otherwise."""
    with pytest.raises(ValueError, match="key-difference"):
        PREFIXKV.replace(score="unknown")
    case = Case("keydiff", turns=(1,))
    assert prompt_kept(case) != prompt_kept(Case("uniform:heads=each", turns=(1,)))
    assert torch.equal(run(case)[0], run(Case(methods.KEYDIFF.spell(full=True), turns=(1,)))[0])
