"""What a profile was calibrated for: the line of metadata, what is read from it, and how a mismatch is told."""

import gc
import shlex
import sys
import threading
import time
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig

import models
from prefixkv_cache import PrefixKVCache, PrefixProfile, ProfileError, calibrate
from prefixkv_cache import calibrated_for as module
from prefixkv_cache.baselines import SnapKVCache
from prefixkv_cache.bundled import bundled_dir
from prefixkv_cache.calibrate_command import _ranking
from prefixkv_cache.calibrated_for import (
    DEFAULT,
    ProfileMismatchWarning,
    calibrated_ranking,
    explain_mismatch,
    plain_ranking,
    read_ranking,
    spell_cache,
    spell_options,
    spell_ranking,
    tell_mismatch,
    write_ranking,
)
from prefixkv_cache.cli import _parser
from prefixkv_cache.generate import cache_options
from prefixkv_cache.scoring import Ranking

TEXT = "average=sum heads=mean pooling=1 value_norm=false diversity=0.5 novelty=8.0"
PLAIN_TEXT = TEXT.replace("0.5", "0.0").replace("8.0", "0.0")
rankings = st.builds(
    Ranking,
    queries=st.sampled_from(["all", "text"]) | st.integers(1, 10**6),
    average=st.sampled_from(["sum", "visible"]),
    heads=st.sampled_from(["mean", "max", "each"]),
    pooling=st.integers(0, 50).map(lambda half: 2 * half + 1),
    value_norm=st.booleans(),
    diversity=st.sampled_from([0, 1, 0.5, -0.0]) | st.floats(0, 1),
    novelty=st.sampled_from([0, 8, 0.0]) | st.floats(0, 1e300),
)
few = settings(max_examples=200, deadline=None)


def a_profile(metadata=None, n_layers=4):
    return PrefixProfile([0.5, 1.0], [[0.5] * n_layers, [1.0] * n_layers], metadata)


def metadata_of(ranking):
    return {"model": "tiny", "queries": str(ranking.queries), "ranking": write_ranking(ranking)}


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(module, "_told", {})


def told(act):
    """The warnings of a mismatch that a function gives, under a filter that hides none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [each for each in caught if issubclass(each.category, ProfileMismatchWarning)]


# The line.


def test_the_line_by_hand():
    assert write_ranking(DEFAULT) == TEXT and read_ranking(TEXT, 32) == DEFAULT
    assert write_ranking(plain_ranking("all")) == PLAIN_TEXT
    other = Ranking(8, "visible", "each", 7, True, 1, 1e22)
    text = "average=visible heads=each pooling=7 value_norm=true diversity=1.0 novelty=1e+22"
    assert write_ranking(other) == text and read_ranking(text, 8) == other


@few
@given(rankings)
def test_what_is_written_is_read_back(ranking):
    text = write_ranking(ranking)
    read = read_ranking(text, ranking.queries)
    assert read == ranking and write_ranking(read) == text
    profile = a_profile(metadata_of(ranking))
    assert calibrated_ranking(profile.metadata) == ranking


def test_equal_rankings_are_one_text():
    assert write_ranking(Ranking(diversity=0, novelty=8)) == write_ranking(Ranking(diversity=-0.0, novelty=8.0))
    assert explain_mismatch(metadata_of(Ranking(diversity=0, novelty=8)), Ranking(diversity=-0.0, novelty=8.0)) is None


DAMAGED = {
    "empty": ("", "average, heads, pooling"),
    "a word": ("plain", "average, heads, pooling"),
    "a field is missing": (TEXT.replace("pooling=1 ", ""), "average, heads, pooling"),
    "a field too many": (TEXT + " colour=red", "average, heads, pooling"),
    "a field twice": (TEXT.replace("heads=mean", "heads=mean heads=mean"), "average, heads, pooling"),
    "another order": (" ".join(reversed(TEXT.split(" "))), "in this order"),
    "a space in front": (" " + TEXT, "average, heads, pooling"),
    "a space behind": (TEXT + " ", "average, heads, pooling"),
    "two spaces": (TEXT.replace(" pooling", "  pooling"), "average, heads, pooling"),
    "a tab": (TEXT.replace(" ", "\t"), "expected such as 'average=sum"),
    "a line": (TEXT + "\n", "expected such as 'average=sum"),
    "no ascii": (TEXT.replace("1", "\u0661"), "expected such as 'average=sum"),
    "too long": (TEXT + "0" * 100, "(175 characters); expected such as"),
    "no average": (TEXT.replace("sum", "mean"), "average must be one of"),
    "no heads": (TEXT.replace("heads=mean", "heads=some"), "heads must be one of"),
    "even": (TEXT.replace("pooling=1", "pooling=2"), "pooling must be an odd number"),
    "a fraction of keys": (TEXT.replace("pooling=1", "pooling=1.5"), "pooling='1.5'; expected an odd number"),
    "a zero in front": (TEXT.replace("pooling=1", "pooling=01"), "expected it as"),
    "underscores": (TEXT.replace("pooling=1", "pooling=1_1"), "expected it as"),
    "a large true": (TEXT.replace("false", "True"), "value_norm='True'; expected true or false"),
    "a number for true": (TEXT.replace("false", "0"), "value_norm='0'; expected true or false"),
    "more than all": (TEXT.replace("0.5", "1.5"), "diversity must be"),
    "less than nothing": (TEXT.replace("8.0", "-8.0"), "novelty must be"),
    "nan": (TEXT.replace("8.0", "nan"), "novelty must be"),
    "inf": (TEXT.replace("8.0", "1e999"), "novelty must be"),
    "a word for a number": (TEXT.replace("8.0", "eight"), "novelty='eight'; expected a number"),
    "an integer": (TEXT.replace("8.0", "8"), "expected it as"),
    "minus zero": (TEXT.replace("8.0", "-0.0"), "expected it as"),
    "too many digits": (TEXT.replace("0.5", "0.50"), "expected it as"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_line_is_refused_by_file_and_field(case, tmp_path):
    text, words = DAMAGED[case]
    with pytest.raises(ProfileError) as caught:
        a_profile({"queries": "32", "ranking": text})
    assert str(caught.value).startswith("ranking: ") and words in str(caught.value)
    good, path = a_profile({"queries": "32", "ranking": TEXT}), tmp_path / "damaged.safetensors"
    tensors = {"budgets": good.budgets, "keep": good.keep}
    save_file(tensors, path, metadata={**good.metadata, "ranking": text})
    with pytest.raises(ProfileError) as caught:
        PrefixProfile.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ranking: ") and "expected" in message and words in message
    assert "\n" not in message and len(message) < 1000
    save_file(tensors, path, metadata=good.metadata)
    assert PrefixProfile.load(path) == good


@few
@given(st.text(max_size=300) | st.text(TEXT, min_size=60, max_size=90))
def test_any_text_is_read_back_or_refused(text):
    try:
        ranking = read_ranking(text, 32)
    except ValueError as error:
        assert "expected" in str(error) and len(str(error)) < 800 and str(error).isprintable()
    else:
        assert write_ranking(ranking) == text


def test_a_ranking_without_queries_is_half_of_one():
    with pytest.raises(ProfileError, match="queries: is 'unknown'; expected whose attention counts"):
        a_profile({"ranking": TEXT})


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b"])
def test_profiles_that_do_not_say_are_plain(name):
    metadata = PrefixProfile.load(name).metadata
    assert "ranking" not in metadata and calibrated_ranking(metadata) == plain_ranking("all")
    assert calibrated_ranking({"queries": "8"}) == plain_ranking(8)
    assert calibrated_ranking({"queries": "text"}) == plain_ranking("text")


def test_where_the_queries_are_unknown_nothing_is_told():
    assert calibrated_ranking(a_profile().metadata) is None
    assert told(lambda: PrefixKVCache(a_profile())) == []


# A mismatch.


@few
@given(rankings, rankings)
def test_a_mismatch_names_what_differs_and_its_cures_work(profiles, caches):
    message = explain_mismatch({**metadata_of(profiles), "created": "then"}, caches)
    assert (message is None) == (profiles == caches)
    if message is None:
        return
    assert "'tiny'" in message and "'then'" in message and "used all the same" in message and message.isprintable()
    for name in ("queries", "average", "heads", "pooling", "value_norm", "diversity", "novelty"):
        differs = getattr(profiles, name) != getattr(caches, name)
        assert (f"{name}=" in message.partition(". Its")[0]) == differs
    # The one cure: the command makes a profile for this cache.
    command = message.partition("`")[2].partition(" ...`")[0]
    arguments = _parser().parse_args([*shlex.split(command)[1:], "--model", "m", "--out", "p"])
    assert _ranking(arguments) == caches
    # The other: the cache that is named ranks as the profile was made.
    asked = message.partition("as the profile was made: ")[2]
    assert asked == spell_cache(profiles)
    profile = a_profile(metadata_of(profiles))
    for spelled in asked.split(", or "):
        cache = eval(spelled, {"PrefixKVCache": PrefixKVCache, "profile": profile, "budget": 0.5})
        assert cache.ranking == profiles and explain_mismatch(profile.metadata, cache.ranking) is None


@few
@given(rankings | st.sampled_from([DEFAULT, plain_ranking("all")]), st.sampled_from(["all", 8, 32, "text"]))
def test_the_options_of_a_command_rank_as_the_profile_was_made(ranking, queries):
    for made_for in (
        ranking,
        replace(ranking, queries=queries),
        plain_ranking(queries),
        replace(DEFAULT, queries=queries),
    ):
        options = spell_options(made_for)
        within_reach = {**vars(made_for), "queries": 32} in (vars(DEFAULT), vars(plain_ranking(32)))
        assert (options is not None) == (within_reach and made_for.queries != "text")
        if options is not None:
            words = [] if options.startswith("neither") else options.split()
            arguments = _parser().parse_args(["generate", "--model", "m", "--prompt", "p", *words])
            assert PrefixKVCache(**cache_options(arguments)).ranking == made_for


@pytest.mark.parametrize(
    ("made_for", "options"),
    [
        (plain_ranking("all"), "--paper"),
        (plain_ranking(8), "--paper --queries 8"),
        (replace(DEFAULT, queries=8), "--queries 8"),
        (DEFAULT, "neither --queries nor --paper"),
        (Ranking("text", novelty=8.0, diversity=0.5), None),
        (Ranking(heads="each"), None),
    ],
)
def test_a_warning_knows_the_options_that_end_it(made_for, options):
    (warning,) = told(lambda: PrefixKVCache(a_profile(metadata_of(made_for)), queries=77))
    assert spell_options(made_for) == warning.message.options == options


def test_the_published_profiles_are_told_calmly_and_used():
    profile = PrefixProfile.load("llava-1.5-7b")
    caches = []
    (warning,) = told(lambda: caches.append(PrefixKVCache("llava-1.5-7b", budget=0.5)))
    assert isinstance(warning.message, UserWarning)
    assert str(warning.message) == (
        "the profile of 'llava-hf/llava-1.5-7b-hf' (created '2026-11-21') was calibrated for queries='all', "
        "diversity=0.0, novelty=0.0, and this cache ranks keys by queries=32, diversity=0.5, novelty=8.0. Its lengths "
        "are used all the same; they fit best with the ranking that they were measured by. Make a profile for this "
        "ranking, `prefixkv calibrate ...`, or rank as the profile was made: PrefixKVCache(profile, budget, "
        "queries='all', diversity=0.0, novelty=0.0), or PrefixKVCache.paper(profile, budget)"
    )
    assert caches[0]._keep == profile.keep_ratios(0.5).tolist()
    assert told(lambda: PrefixKVCache.paper("llava-1.5-7b")) == []


def test_what_somebody_else_wrote_is_told_without_harm():
    metadata = a_profile({"model": "a\x1b[31m\nb" * 100, "queries": "all", "created": "\x00"}).metadata
    message = explain_mismatch(metadata, DEFAULT)
    assert message.isprintable() and len(message) < 1500


@pytest.mark.parametrize("name", ["scene-llava", "board-qwen2-vl"])
def test_the_bundled_profiles_of_our_models_are_for_the_default(name):
    assert calibrated_ranking(PrefixProfile.load(name).metadata) == DEFAULT == PrefixKVCache().ranking
    assert told(lambda: PrefixKVCache(name)) == []
    model = torch.nn.Module()
    model.config = AutoConfig.from_pretrained(bundled_dir("models") / name)
    assert PrefixKVCache.for_model(model, 0.2).profile == PrefixProfile.load(name)


def test_what_calibrate_makes_is_for_its_own_arguments(tmp_path):
    model, path = models.build("llava_gqa", "sdpa"), tmp_path / "p.safetensors"
    options = {"queries": 8, "heads": "each", "novelty": 0}
    calibrate(model, [models.batch("llava_gqa", (61,))], budgets=[0.2, 1], **options).save(path)
    assert told(lambda: PrefixKVCache(path, **options)) == []
    (warning,) = told(lambda: PrefixKVCache(path))
    assert "for queries=8, heads='each', novelty=0.0, and" in str(warning.message)


def test_other_methods_have_no_profile_to_differ_from():
    assert told(lambda: SnapKVCache(0.5)) == []


# Once.

OTHER = {"model": "tiny", "queries": "all"}


def test_it_is_told_once_for_each_profile_and_ranking():
    def serve():
        for _ in range(3):
            PrefixKVCache(a_profile(OTHER))
        PrefixKVCache(a_profile(OTHER), 0.2)

    assert len(told(serve)) == 1
    assert told(serve) == []
    assert len(told(lambda: PrefixKVCache(a_profile(OTHER), novelty=2))) == 1
    assert len(told(lambda: PrefixKVCache(a_profile({**OTHER, "model": "another"})))) == 1
    assert len(told(lambda: PrefixKVCache(a_profile({**OTHER, "source": "other pictures"})))) == 1
    assert told(lambda: PrefixKVCache(a_profile(OTHER), novelty=2)) == []


def test_a_cache_that_could_not_be_made_tells_nothing():
    config = models.weights("llava_mha").config

    def fail():
        with pytest.raises(ProfileError):
            PrefixKVCache(a_profile(OTHER, 5), config=config)

    assert told(fail) == []
    assert len(told(lambda: PrefixKVCache(a_profile(OTHER, 4), config=config))) == 1


def test_where_nothing_is_pruned_nothing_is_told():
    """All pairs stay, whatever ranks them. It is told at the next budget below."""
    assert told(lambda: PrefixKVCache(a_profile(OTHER), 1.0)) == []
    assert len(told(lambda: PrefixKVCache(a_profile(OTHER), 0.99))) == 1


def test_it_points_to_the_line_that_asked():
    class Own(PrefixKVCache):
        def __init__(self, profile):
            super().__init__(profile)  # the line of a subclass

    config = models.weights("llava_mha").config
    model = torch.nn.Module()
    model.config = config
    ways = {
        "the class": lambda: PrefixKVCache(a_profile(OTHER)),
        "for_model": lambda: PrefixKVCache.for_model(model, profile=a_profile(OTHER)),
        "paper": lambda: PrefixKVCache.paper(a_profile({**OTHER, "queries": "8"})),
        "a subclass": lambda: Own(a_profile(OTHER)),
    }
    first = sys._getframe().f_lineno
    for name, way in ways.items():
        module._told.clear()
        (warning,) = told(way)
        assert warning.filename == __file__ and first - 14 <= warning.lineno < first, name


class Slow(dict):
    """Gives the other threads a chance between the question and what is made of the answer."""

    def __contains__(self, key):
        found = super().__contains__(key)
        time.sleep(0.01)
        return found


def test_threads_tell_it_once(monkeypatch):
    monkeypatch.setattr(module, "_told", Slow())
    profile, start, failed = a_profile(OTHER), threading.Barrier(8), []

    def work():
        start.wait()
        try:
            for _ in range(3):
                PrefixKVCache(profile)
        except BaseException as error:
            failed.append(error)

    def all_at_once():
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(told(all_at_once)) == 1 and not failed


def test_where_warnings_are_errors_it_is_raised_every_time():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(ProfileMismatchWarning, match="was calibrated for queries='all'"):
                PrefixKVCache(a_profile(OTHER))
    assert len(told(lambda: PrefixKVCache(a_profile(OTHER)))) == 1


def test_whoever_shows_warnings_may_make_caches(monkeypatch):
    shown = []

    def show(message, *_):
        shown.append(message)
        PrefixKVCache(a_profile(OTHER))
        PrefixKVCache(a_profile({**OTHER, "model": "another"}))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        PrefixKVCache(a_profile(OTHER))
    assert len(shown) == 2


def test_nothing_is_kept_for_it():
    caches = []
    told(lambda: caches.append(PrefixKVCache(a_profile(OTHER))))
    gone = weakref.ref(caches.pop())
    gc.collect()
    assert gone() is None
    for index in range(module._MOST_TOLD + 10):
        told(lambda index=index: tell_mismatch({**OTHER, "source": str(index)}, DEFAULT))
    assert len(module._told) == module._MOST_TOLD


def test_a_thousand_caches_work_it_out_once():
    profile = a_profile(OTHER)
    told(lambda: PrefixKVCache(profile))
    before = module._explain.cache_info().misses
    for _ in range(1000):
        PrefixKVCache(profile)
    assert module._explain.cache_info().misses == before


def test_titles():
    assert spell_ranking(plain_ranking("all")) == "queries: all"
    assert spell_ranking(DEFAULT) == "queries: 32, diversity: 0.5, novelty: 8.0"
    assert spell_ranking(Ranking(8, value_norm=True)) == "queries: 8, value_norm: true"
