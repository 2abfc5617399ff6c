"""Laws of profiles: the file, its checks, the interpolation and the counts.

The references here are written apart from the library: numpy and plain arithmetic on the published JSON, and
safetensors' own reader and writer.
"""

import copy
import importlib.util
import io
import json
import math
import os
import pickle
import random
import runpy
import shutil
import stat
import struct
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from prefixkv_cache import profile as profile_module
from prefixkv_cache.bundled import bundled_dir
from prefixkv_cache.profile import MAX_FILE_BYTES, PrefixProfile, ProfileError, check_budget, prompt_counts

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = json.loads((ROOT / "examples/data/prefixkv-published.json").read_text(encoding="utf-8"))
NAMES = {"llava-1.5-7b": "llava-v1.5-7b", "llava-1.5-13b": "llava-v1.5-13b"}
METADATA = {
    "format": "prefixkv-profile",
    "format_version": "1",
    "model": "tiny",
    "n_layers": "3",
    "method": "prefixkv",
    "queries": "32",
    "source": "a test",
    "samples": "10",
    "library_version": "0.1.0",
    "created": "2026-11-21",
}
BUDGETS = [0.2, 0.5, 1.0]
KEEP = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [1.0, 1.0, 1.0]]

few = settings(max_examples=50, deadline=None)
budgets = st.floats(min_value=1e-6, max_value=1.0)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@st.composite
def profiles(draw):
    """Profiles whose rows rise and whose row means are the budgets, but for rounding."""
    grid = sorted(draw(st.sets(st.integers(1, 1000), min_size=1, max_size=12)))
    spread = draw(st.lists(st.floats(-1, 1), min_size=1, max_size=9))
    centre = sum(spread) / len(spread)
    slope = [(s - centre) / 2 for s in spread]  # mean 0, each in [-1, 1]: then b + s*b*(1-b) rises within [0, 1]
    rows = [[min(1.0, max(0.0, b + s * b * (1 - b))) for s in slope] for b in (g / 1000 for g in grid)]
    return PrefixProfile([g / 1000 for g in grid], rows, draw(st.dictionaries(text.map("x-".__add__), text)))


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    PrefixProfile(BUDGETS, KEEP, METADATA).save(path)
    return path


def write(path, budgets=BUDGETS, keep=KEEP, metadata=METADATA, dtype=torch.float64, **extra):
    """Write a file with safetensors' own writer, unchecked."""
    tensors = {"budgets": budgets, "keep": keep, **extra}
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in tensors.items() if value is not None}
    save_file(tensors, path, metadata=metadata)


def raw(header, data=b""):
    """Return a file with any header at all."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


# Save and load.


@few
@given(profile=profiles())
def test_save_then_load_is_the_identity_byte_for_byte(profile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity")
    profile.save(folder / "a.safetensors")
    loaded = PrefixProfile.load(folder / "a.safetensors")
    loaded.save(folder / "b.safetensors")
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()
    assert loaded == profile and hash(loaded) == hash(profile)
    assert torch.equal(loaded.budgets, profile.budgets) and torch.equal(loaded.keep, profile.keep)
    assert loaded.metadata == profile.metadata
    assert sorted(os.listdir(folder)) == ["a.safetensors", "b.safetensors"]


@few
@given(profile=profiles())
def test_safetensors_reads_the_same(profile, tmp_path_factory):
    path = tmp_path_factory.mktemp("reader") / "a.safetensors"
    profile.save(path)
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["budgets", "keep"]
        assert file.metadata() == profile.metadata
        assert torch.equal(file.get_tensor("budgets"), profile.budgets)
        assert torch.equal(file.get_tensor("keep"), profile.keep)


def test_a_file_of_another_writer_is_read_and_order_of_metadata_does_not_matter(good, tmp_path):
    other = tmp_path / "other.safetensors"
    write(other, metadata=dict(reversed(METADATA.items())))
    assert PrefixProfile.load(other) == PrefixProfile.load(good)
    PrefixProfile(BUDGETS, KEEP, dict(reversed(METADATA.items()))).save(other)
    assert other.read_bytes() == good.read_bytes()


def test_any_content_that_differs_is_another_profile():
    profile = PrefixProfile(BUDGETS, KEEP, METADATA)
    moved = [KEEP[0], [0.4, 0.5, math.nextafter(0.6, 1)], KEEP[2]]
    assert profile == PrefixProfile(BUDGETS, KEEP, METADATA)
    assert profile != PrefixProfile(BUDGETS, moved, METADATA)
    assert profile != PrefixProfile([math.nextafter(0.2, 1), *BUDGETS[1:]], KEEP, METADATA)
    assert profile != PrefixProfile(BUDGETS, KEEP, {**METADATA, "model": "other"})
    assert profile != "profile"


def test_minus_zero_is_zero():
    plus, minus = (PrefixProfile([0.5], [[zero, 1.0]], METADATA | {"n_layers": "2"}) for zero in (0.0, -0.0))
    assert plus == minus and hash(plus) == hash(minus)


def test_a_profile_cannot_be_changed():
    budgets, keep = torch.tensor(BUDGETS, dtype=torch.float64), torch.tensor(KEEP, dtype=torch.float64)
    metadata = dict(METADATA)
    profile = PrefixProfile(budgets, keep, metadata)
    before = copy.deepcopy(profile)
    for handed_out in (
        budgets,
        keep,
        profile.budgets,
        profile.keep,
        *(profile.keep_ratios(b) for b in (0.1, 0.2, 1.0)),
    ):
        handed_out.fill_(0.125)
    metadata["model"] = profile.metadata["model"] = "changed"
    assert profile == before == pickle.loads(pickle.dumps(profile))
    for name in ("keep", "budgets", "metadata", "n_layers", "something"):
        with pytest.raises(AttributeError):
            setattr(profile, name, None)


def test_what_is_absent_from_the_metadata_is_filled_in():
    metadata = PrefixProfile(BUDGETS, KEEP, {"model": "tiny", "spread": "[]"}).metadata
    assert set(metadata) == {*METADATA, "spread"}
    assert (
        metadata["format"] == "prefixkv-profile" and metadata["format_version"] == "1" and metadata["n_layers"] == "3"
    )
    assert metadata["model"] == "tiny" and metadata["queries"] == "unknown"


def test_save_replaces_and_is_as_readable_as_any_file(good):
    umask = os.umask(0o022)
    try:
        PrefixProfile([1.0], [[1.0]], {}).save(str(good))
    finally:
        os.umask(umask)
    assert PrefixProfile.load(good).n_layers == 1
    assert stat.S_IMODE(good.stat().st_mode) == 0o644


class _DiskFull(io.FileIO):
    """A file that takes half of what is written, and then no more."""

    def write(self, data):
        super().write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")


def _interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "name", "stand_in", "error"),
    [
        (profile_module, "open", _DiskFull, OSError),
        (profile_module.os, "replace", _interrupted, KeyboardInterrupt),
        (profile_module.PrefixProfile, "_to_bytes", _interrupted, KeyboardInterrupt),
    ],
)
def test_an_interrupted_save_leaves_the_old_file_whole_and_nothing_else(
    good, monkeypatch, where, name, stand_in, error
):
    before = good.read_bytes()
    profile = PrefixProfile([1.0], [[1.0]], {})
    monkeypatch.setattr(where, name, stand_in, raising=False)
    with pytest.raises(error):
        profile.save(good)
    monkeypatch.undo()
    assert good.read_bytes() == before
    assert os.listdir(good.parent) == [good.name]


def test_save_into_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        PrefixProfile(BUDGETS, KEEP).save(tmp_path / "nowhere" / "a.safetensors")


# Interpolation.


@few
@given(profile=profiles(), budget=budgets)
def test_the_mean_of_the_keep_ratios_is_the_budget(profile, budget):
    ratios = profile.keep_ratios(budget)
    assert ratios.dtype == torch.float64 and ratios.shape == (profile.n_layers,)
    assert ((ratios >= 0) & (ratios <= 1)).all()
    assert abs(ratios.mean().item() - budget) < 1e-12


@few
@given(profile=profiles(), pair=st.tuples(budgets, budgets).map(sorted))
def test_more_budget_never_keeps_less(profile, pair):
    less, more = (profile.keep_ratios(b) for b in pair)
    assert (less <= more).all()
    assert (prompt_counts(less, 777) <= prompt_counts(more, 777)).all()


def _by_hand(profile, budget):
    """The contract's rule, with numpy and one case after the other."""
    grid, keep = profile.budgets.numpy(), profile.keep.numpy()
    if budget == 1:
        return np.ones(keep.shape[1])
    if budget < grid[0]:
        return keep[0] * (budget / grid[0])
    if budget > grid[-1]:
        return 1 - (1 - keep[-1]) * (1 - budget) / (1 - grid[-1])
    return np.array([np.interp(budget, grid, column) for column in keep.T])


@few
@given(profile=profiles(), budget=budgets)
def test_interpolation_is_linear_and_scaled_outside_the_grid(profile, budget):
    np.testing.assert_allclose(profile.keep_ratios(budget).numpy(), _by_hand(profile, budget), rtol=0, atol=1e-12)


@few
@given(profile=profiles())
def test_a_budget_of_the_grid_gives_its_row_bit_for_bit(profile):
    for budget, row in zip(profile.budgets.tolist(), profile.keep, strict=True):
        if budget < 1:
            assert torch.equal(profile.keep_ratios(budget), row)
    assert torch.equal(profile.keep_ratios(1.0), torch.ones(profile.n_layers, dtype=torch.float64))


def test_budget_one_keeps_everything_whatever_the_last_row_says():
    profile = PrefixProfile([0.5, 1.0], [[0.5, 0.5], [0.999, 0.995]], {})
    assert profile.keep_ratios(1.0).tolist() == [1.0, 1.0]


def test_published_means_stay_near_the_budget_between_and_outside_the_grid():
    for name in NAMES:
        profile = PrefixProfile.load(name)
        error = (profile.keep.mean(dim=1) - profile.budgets).abs().max().item()
        for step in range(1, 201):
            assert abs(profile.keep_ratios(step / 200).mean().item() - step / 200) <= error + 1e-12 < 0.002


@pytest.mark.parametrize("budget", [1, 1.0, 0.5, 1e-300, Fraction(1, 3), np.float32(0.5), np.float64(0.1)])
def test_good_budgets(budget):
    assert check_budget(budget) == float(budget) and type(check_budget(budget)) is float


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        (b, ValueError)
        for b in (0, 0.0, -0.5, 1.5, 2, 10**400, -(10**400), math.nan, math.inf, -math.inf, Fraction(1, 10**400))
    ]
    + [(b, TypeError) for b in ("half", "0.5", True, False, None, [0.5], 1j, torch.tensor(0.5))],
)
def test_bad_budgets_are_refused_with_the_value_and_the_cure(budget, error):
    for check in (check_budget, PrefixProfile(BUDGETS, KEEP).keep_ratios):
        with pytest.raises(error) as caught:
            check(budget)
        assert repr(budget) in str(caught.value)
        assert "a fraction of the prompt's KV pairs to keep, in (0, 1]" in str(caught.value)


# Counts.


@pytest.mark.parametrize("name", NAMES)
def test_published_counts_entry_for_entry(name):
    profile = PrefixProfile.load(name)
    n = np.arange(1, 4097)
    for overall, forget in PUBLISHED[NAMES[name]].items():
        dropped = np.round(np.array(forget)[:, None] * n).astype(np.int64)  # as the reference has it
        expected = np.minimum(np.maximum(n - dropped, 2), n)
        counts = prompt_counts(profile.keep_ratios(round(1 - float(overall), 1)), torch.from_numpy(n))
        assert np.array_equal(counts.numpy(), expected), overall


def test_published_budgets_are_clean_decimals_and_all_are_there():
    for name, key in NAMES.items():
        profile = PrefixProfile.load(name)
        assert profile.budgets.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
        assert profile.keep.tolist() == [[1 - f for f in PUBLISHED[key][f"0.{9 - i}"]] for i in range(10)]
        assert profile.metadata["queries"] == "all" and PUBLISHED["source"] in profile.metadata["source"]
        assert profile.n_layers == (32 if "7b" in name else 40)


def test_the_script_makes_the_bundled_files_byte_for_byte(tmp_path, monkeypatch):
    script = ROOT / "examples/make_published_profiles.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    assert sorted(os.listdir(tmp_path)) == sorted(f"{name}.safetensors" for name in NAMES)
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (ROOT / "profiles" / made.name).read_bytes()


@few
@given(
    keep=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    n_tokens=st.lists(st.integers(0, 100_000), min_size=1, max_size=4),
    sink=st.integers(0, 5),
)
def test_counts_follow_the_formula_for_each_row_by_its_own_length(keep, n_tokens, sink):
    counts = prompt_counts(torch.tensor(keep, dtype=torch.float64), torch.tensor(n_tokens), sink)
    expected = [[min(n, max(sink + 1, n - round(n * (1 - k)))) for n in n_tokens] for k in keep]
    assert counts.dtype == torch.int64 and counts.tolist() == expected
    alone = prompt_counts(torch.tensor(keep, dtype=torch.float64), n_tokens[0], sink)
    assert alone.dtype == torch.int64 and torch.equal(alone, counts[:, 0])


def test_halves_round_to_even():
    half = torch.tensor([0.5], dtype=torch.float64)
    assert prompt_counts(half, torch.tensor([5, 7, 9, 11])).tolist() == [[3, 3, 5, 5]]


@pytest.mark.parametrize(
    ("keep", "n_tokens", "sink", "error"),
    [
        (torch.tensor([0.5]), 10, 1, TypeError),
        (torch.tensor([0.5]).double(), 10.0, 1, TypeError),
        (torch.tensor([0.5]).double(), True, 1, TypeError),
        (torch.tensor([0.5]).double(), torch.tensor([10.0]), 1, TypeError),
        (torch.tensor([0.5]).double(), -1, 1, ValueError),
        (torch.tensor([0.5]).double(), torch.tensor([5, -1]), 1, ValueError),
        (torch.tensor([0.5]).double(), 10, -1, ValueError),
        (torch.tensor([1.5]).double(), 10, 1, ValueError),
        (torch.tensor([math.nan]).double(), 10, 1, ValueError),
    ],
)
def test_counts_of_bad_input(keep, n_tokens, sink, error):
    with pytest.raises(error):
        prompt_counts(keep, n_tokens, sink)


# Names and bundled data.


def test_a_name_gives_the_bundled_file():
    assert PrefixProfile.available() == sorted(PrefixProfile.available())
    assert set(NAMES) <= set(PrefixProfile.available())
    for name in NAMES:
        path = ROOT / "profiles" / f"{name}.safetensors"
        assert PrefixProfile.load(name) == PrefixProfile.load(path) == PrefixProfile.load(str(path))


def test_a_bundled_name_wins_and_any_other_may_be_a_file_here(good, monkeypatch):
    monkeypatch.chdir(good.parent)
    shutil.copy(good, "mine")
    shutil.copy(good, "llava-1.5-7b")
    assert PrefixProfile.load("mine") == PrefixProfile.load("good.safetensors") == PrefixProfile.load(Path("mine"))
    assert PrefixProfile.load("llava-1.5-7b").n_layers == 32
    assert PrefixProfile.load(Path("llava-1.5-7b")).n_layers == 3
    assert PrefixProfile.load("./llava-1.5-7b").n_layers == 3


@pytest.mark.parametrize("name", ["llava-1.5-8b", "", "..", ".", "LLAVA*", "a\0b", "x" * 5000])
def test_an_unknown_name_is_refused_with_the_names_there_are(name):
    with pytest.raises(ProfileError) as caught:
        PrefixProfile.load(name)
    assert repr(name) in str(caught.value)
    assert "llava-1.5-13b, llava-1.5-7b" in str(caught.value)


@pytest.mark.parametrize(
    "path", ["../profiles/llava-1.5-7b", "profiles/../../x.safetensors", "llava-1.5-7b.safetensors"]
)
def test_what_looks_like_a_path_is_never_a_bundled_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProfileError, match="no such file"):
        PrefixProfile.load(path)


@pytest.mark.parametrize("source", [None, 7, b"llava-1.5-7b", True, PrefixProfile(BUDGETS, KEEP)])
def test_what_is_neither_name_nor_path(source):
    with pytest.raises(TypeError, match="expected a path or the name"):
        PrefixProfile.load(source)


def _bundled_dir_of(package):
    """Return `bundled_dir` as a copy of the package at another place has it."""
    package.mkdir(parents=True)
    copied = shutil.copy(Path(profile_module.__file__).parent / "bundled.py", package)
    spec = importlib.util.spec_from_file_location("bundled_copy", copied)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.bundled_dir


@pytest.mark.parametrize("kind", ["profiles", "models"])
def test_bundled_data_is_found_in_a_wheel_and_in_a_checkout_and_nowhere_else(kind, tmp_path):
    find = _bundled_dir_of(tmp_path / "site-packages" / "prefixkv_cache")
    (tmp_path / kind).mkdir()  # of somebody else
    assert not find(kind).exists()
    inside = tmp_path / "site-packages" / "prefixkv_cache" / kind
    inside.mkdir()
    assert find(kind) == inside

    find = _bundled_dir_of(tmp_path / "clone" / "src" / "prefixkv_cache")
    (tmp_path / "clone" / kind).mkdir()
    assert not find(kind).exists()
    (tmp_path / "clone" / "pyproject.toml").touch()
    assert find(kind) == tmp_path / "clone" / kind


@pytest.mark.parametrize("kind", ["", "..", "/etc", "profiles/..", "src"])
def test_bundled_kinds_are_no_paths(kind):
    with pytest.raises(ValueError, match="expected one of profiles, models"):
        bundled_dir(kind)


# What is wrong is refused, naming file, field and rule.


def _without(key):
    return {k: v for k, v in METADATA.items() if k != key}


WRONG = {
    "nan": (dict(keep=[KEEP[0], [0.4, math.nan, 0.6], KEEP[2]]), ["keep", "layer 1 at budget 0.5 is nan", "[0, 1]"]),
    "inf": (dict(keep=[KEEP[0], [0.4, math.inf, 0.6], KEEP[2]]), ["keep", "inf", "[0, 1]"]),
    "negative": (dict(keep=[[-0.1, 0.3, 0.4], *KEEP[1:]]), ["keep", "layer 0 at budget 0.2 is -0.1", "[0, 1]"]),
    "above one": (dict(keep=[*KEEP[:2], [1.0, 1.0, 1.0000001]]), ["keep", "layer 2 at budget 1.0", "[0, 1]"]),
    "falling": (dict(keep=[[0.1, 0.2, 0.3], [0.6, 0.6011, 0.2989], KEEP[2]]), ["keep", "layer 2", "falls", "0.001"]),
    "mean": (dict(keep=[[0.1, 0.2, 0.316], *KEEP[1:]]), ["keep", "mean", "0.2", "0.005"]),
    "budgets fall": (dict(budgets=[0.5, 0.2, 1.0]), ["budgets", "0.2 follows 0.5", "rising"]),
    "budgets stand": (dict(budgets=[0.2, 0.2, 1.0]), ["budgets", "0.2 follows 0.2", "rising"]),
    "budget zero": (dict(budgets=[0.0, 0.5, 1.0]), ["budgets", "entry 0 is 0.0", "(0, 1]"]),
    "budget above": (dict(budgets=[0.2, 0.5, 1.5]), ["budgets", "entry 2 is 1.5", "(0, 1]"]),
    "budget nan": (dict(budgets=[0.2, math.nan, 1.0]), ["budgets", "entry 1 is nan", "(0, 1]"]),
    "float32": (dict(dtype=torch.float32), ["budgets", "F32", "F64"]),
    "int64": (dict(dtype=torch.int64), ["budgets", "I64", "F64"]),
    "flat keep": (dict(keep=KEEP[0]), ["keep", "shape [3]", "[n_budgets, n_layers]"]),
    "deep keep": (dict(keep=[KEEP]), ["keep", "shape [1, 3, 3]", "[n_budgets, n_layers]"]),
    "row missing": (dict(keep=KEEP[:2]), ["keep", "shape [2, 3]", "n_budgets = 3"]),
    "scalar budget": (dict(budgets=0.5), ["budgets", "shape []", "[n_budgets]"]),
    "no budgets": (dict(budgets=[], keep=[]), ["budgets", "shape [0]", "[n_budgets]"]),
    "no layers": (dict(keep=[[], [], []]), ["keep", "shape [3, 0]", "1 to 1024 layers"]),
    "too many layers": (dict(keep=[[b] * 1025 for b in BUDGETS]), ["keep", "shape [3, 1025]", "1 to 1024 layers"]),
    "keep missing": (dict(keep=None), ["tensors", "['budgets']", "'budgets' and 'keep'"]),
    "budgets missing": (dict(budgets=None), ["tensors", "['keep']", "'budgets' and 'keep'"]),
    "one more": (dict(spread=KEEP), ["tensors", "spread", "exactly"]),
    "no metadata": (dict(metadata=None), ["format", "None", "prefixkv-profile"]),
    "other format": (dict(metadata={**METADATA, "format": "pt"}), ["format", "'pt'", "prefixkv-profile"]),
    "newer": (dict(metadata={**METADATA, "format_version": "2"}), ["format_version", "newer version; upgrade"]),
    "version zero": (dict(metadata={**METADATA, "format_version": "0"}), ["format_version", "'0'", "'1'"]),
    "version text": (dict(metadata={**METADATA, "format_version": "1.0"}), ["format_version", "'1.0'", "'1'"]),
    "other depth": (dict(metadata={**METADATA, "n_layers": "32"}), ["n_layers", "'32'", "'3'"]),
    "queries": (dict(metadata={**METADATA, "queries": "-8"}), ["queries", "'-8'", "'all'"]),
    **{f"no {key}": (dict(metadata=_without(key)), [f"{key}: ", "expected"]) for key in METADATA},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_breaks_a_rule_is_refused(case, tmp_path):
    change, words = WRONG[case]
    path = tmp_path / "wrong.safetensors"
    write(path, **change)
    with pytest.raises(ProfileError) as caught:
        PrefixProfile.load(path)
    for word in [str(path), "expected", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", [c for c in WRONG if set(WRONG[c][0]) <= {"budgets", "keep"} and "missing" not in c])
def test_the_constructor_refuses_the_same(case):
    change, words = WRONG[case]
    with pytest.raises(ProfileError) as caught:
        PrefixProfile(change.get("budgets", BUDGETS), change.get("keep", KEEP), METADATA)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((torch.tensor(BUDGETS), KEEP), ["budgets", "torch.float32", "double"]),
        ((BUDGETS, [[0.1], [0.4, 0.5], [1.0]]), ["keep", "float64"]),
        ((BUDGETS, "keep"), ["keep", "float64"]),
        ((None, KEEP), ["budgets", "float64"]),
        ((BUDGETS, KEEP, {"model": 7}), ["metadata", "'model' is 7", "strings"]),
        ((BUDGETS, KEEP, {7: "model"}), ["metadata", "7", "strings"]),
        ((BUDGETS, KEEP, {"model": "\ud800"}), ["metadata", "strings"]),
        ((BUDGETS, KEEP, [("model", "tiny")]), ["metadata", "list", "strings"]),
        ((BUDGETS, KEEP, {"notes": "x" * 2**20}), ["metadata", "bytes", "at most"]),
    ],
)
def test_the_constructor_refuses_wrong_types(args, words):
    with pytest.raises(ProfileError) as caught:
        PrefixProfile(*args)
    for word in words:
        assert word in str(caught.value)


def test_a_fall_and_a_mean_at_the_limit_are_allowed(tmp_path):
    write(tmp_path / "a.safetensors", budgets=[0.4, 0.401], keep=[[0.401, 0.409], [0.4, 0.412]], metadata=_two_layers())
    assert PrefixProfile.load(tmp_path / "a.safetensors").n_layers == 2


def _two_layers():
    return {**METADATA, "n_layers": "2"}


HOSTILE = {
    "empty": b"",
    "short": b"\x07",
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "text": b'{"keep": 1}' * 50,
    "pickle": pickle.dumps({"keep": KEEP}),
    "huge header": struct.pack("<Q", 2**62) + b"{}",
    "header over the limit": raw(
        json.dumps(
            {
                "__metadata__": METADATA,
                "budgets": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]},
                "keep": {"dtype": "F64", "shape": [3, 3], "data_offsets": [24, 96]},
            }
        ).encode()
        + b" " * 2**20,
        struct.pack("<12d", *BUDGETS, *(k for row in KEEP for k in row)),
    ),
    "header longer than the file": struct.pack("<Q", 2000) + b"{}" * 100,
    "deep header": raw(b'{"__metadata__":' + b"[" * 500_000),
    "deep tensor": raw(b'{"keep":' + b'{"a":' * 100_000),
    "list for a header": raw([1, 2, 3]),
    "number for a header": raw(b"7"),
    "metadata of null": raw({"__metadata__": None}),
    "metadata of numbers": raw({"__metadata__": {**METADATA, "n_layers": 3}}),
    "metadata of half a pair": raw(b'{"__metadata__":{"format":"\\ud800"}}'),
    "not utf-8": raw(b'{"__metadata__":{"format":"\xff\xfe"}}'),
    "utf-16": raw('{"__metadata__":{}}'.encode("utf-16")),
    "huge shape": raw(
        {
            "__metadata__": METADATA,
            "budgets": {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 8]},
            "keep": {"dtype": "F64", "shape": [2**40, 3], "data_offsets": [8, 32]},
        },
        bytes(32),
    ),
    "shape over all integers": raw({"keep": {"dtype": "F64", "shape": [2**63, 2], "data_offsets": [0, 8]}}, bytes(8)),
    "much of nothing": raw(
        {
            "__metadata__": METADATA,
            "budgets": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]},
            "keep": {"dtype": "F64", "shape": [0, 2**64 - 1], "data_offsets": [24, 24]},
        },
        struct.pack("<3d", *BUDGETS),
    ),
    "offsets outside": raw({"keep": {"dtype": "F64", "shape": [1], "data_offsets": [2**40, 2**40 + 8]}}, bytes(8)),
    "offsets backward": raw({"keep": {"dtype": "F64", "shape": [1], "data_offsets": [8, 0]}}, bytes(8)),
    "many tensors": raw({f"t{i}": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]} for i in range(15_000)}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_at_once(case, tmp_path):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[case])
    start = time.perf_counter()
    with pytest.raises(ProfileError) as caught:
        PrefixProfile.load(path)
    assert time.perf_counter() - start < 10
    assert str(path) in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="pipes and devices are files only on POSIX")
def test_what_is_no_regular_file_is_refused_without_reading(tmp_path):
    folder, pipe, huge = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    folder.mkdir()
    os.mkfifo(pipe)
    with open(huge, "wb") as file:
        file.truncate(2**36)  # sparse: takes no room
    link = tmp_path / "d.safetensors"
    link.symlink_to(tmp_path / "gone.safetensors")
    paths = [(folder, "a folder"), (pipe, "no regular file"), (Path("/dev/zero"), "no regular file")]
    for path, word in [*paths, (huge, str(MAX_FILE_BYTES)), (link, "no such file"), (tmp_path / "a\0b", "null")]:
        with pytest.raises(ProfileError) as caught:
            PrefixProfile.load(path)
        assert str(path) in str(caught.value) and word in str(caught.value)


def test_the_largest_profile_is_loaded_quickly(tmp_path):
    grid = [b / 1024 for b in range(1, 1025)]
    PrefixProfile(grid, [[b] * 1024 for b in grid], {"notes": "x" * 1_000_000}).save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size <= MAX_FILE_BYTES
    start = time.perf_counter()
    assert PrefixProfile.load(tmp_path / "a.safetensors").n_layers == 1024
    assert time.perf_counter() - start < 10


def _mutated(data, rng):
    """Return the bytes with one kind of damage; half of the hits are aimed at the header, where the rules are."""
    data = bytearray(data)
    kind = rng.choice(["flip", "flip", "flip", "cut", "grow", "swap", "fill"])
    at = rng.randrange(rng.choice([len(data), min(len(data), 500)]))
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 1, 4, 30])):
            data[at] ^= 1 << rng.randrange(8)
            at = rng.randrange(len(data))
    elif kind == "cut":
        del data[at : at + rng.choice([1, 8, len(data)])]
    elif kind == "grow":
        data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
    elif kind == "swap":
        other = rng.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    else:
        data[at : at + 8] = rng.choice([b"\xff", b"\0", b"9", b'"', b"["]) * 8
    return bytes(data)


def test_random_damage_gives_a_profile_error_or_a_valid_profile(good, tmp_path):
    rng = random.Random(20261121)
    whole, path, again = good.read_bytes(), tmp_path / "damaged.safetensors", tmp_path / "again.safetensors"
    refused = 0
    for _ in range(400):
        path.write_bytes(_mutated(whole, rng))
        try:
            profile = PrefixProfile.load(path)
        except ProfileError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            profile.save(again)
            assert PrefixProfile.load(again) == profile
            assert (profile.keep.mean(dim=1) - profile.budgets).abs().max() <= 0.005 + 1e-9
    assert 200 < refused < 400  # the damage is real, and not only at one place


def test_every_truncation_is_refused(good):
    whole = good.read_bytes()
    for length in range(0, len(whole), 7):
        good.write_bytes(whole[:length])
        with pytest.raises(ProfileError):
            PrefixProfile.load(good)
