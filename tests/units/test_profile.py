"""Laws of profiles: the file in both versions, interpolation, the published figures, bundled names.

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
import runpy
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from prefixkv_cache import methods
from prefixkv_cache.profiles import bundled, files
from prefixkv_cache.profiles.profile import PrefixProfile, ProfileError, find_bundled
from prefixkv_cache.rules.lengths import prompt_count

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = json.loads((ROOT / "examples/data/prefixkv-published.json").read_text(encoding="utf-8"))
NAMES = {"llava-1.5-7b": "llava-v1.5-7b", "llava-1.5-13b": "llava-v1.5-13b"}
COMMON = {
    "format": "prefixkv-profile",
    "model": "tiny",
    "n_layers": "3",
    "source": "a test",
    "samples": "10",
    "library_version": "0.1.0",
    "created": "2026-11-21",
}
METADATA = {**COMMON, "format_version": "2", "n_heads": "2", "method": methods.SNAPKV.spell(full=True)}
METADATA_1 = {**COMMON, "format_version": "1", "method": "prefixkv", "queries": "32"}
RANKING_1 = "average=sum heads=each pooling=7 value_norm=true diversity=0.0 novelty=0.0"
BUDGETS = [0.2, 0.5, 1.0]
KEEP_1 = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [1.0, 1.0, 1.0]]
KEEP = [[[k - 0.05, k + 0.05] if k < 1 else [1.0, 1.0] for k in row] for row in KEEP_1]
MEASURED = {"samples": 9, "budgets": {"0.5": {"kl": 0.1, "agreement": 0.9, "uniform_kl": 0.2}}}

few = settings(max_examples=50, deadline=None)
budgets = st.floats(min_value=1e-6, max_value=1.0)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@st.composite
def profiles(draw):
    """Profiles whose rows rise and whose row means are the budgets, but for rounding."""
    grid = sorted(draw(st.sets(st.integers(1, 1000), min_size=1, max_size=12)))
    n_layers, n_heads = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    spread = torch.tensor(draw(st.lists(st.floats(-1, 1), min_size=n_layers * n_heads, max_size=n_layers * n_heads)))
    slope = ((spread - spread.mean()) / 2).double().reshape(1, n_layers, n_heads)  # b + s*b*(1-b) rises within [0, 1]
    grid = torch.tensor(grid, dtype=torch.float64) / 1000
    rows = grid[:, None, None] + slope * (grid * (1 - grid))[:, None, None]
    method = draw(st.sampled_from(list(methods.NAMED.values())))
    metadata = {"method": method.spell(), **draw(st.dictionaries(text.map("x-".__add__), text))}
    return PrefixProfile(grid, rows.clamp(0, 1), metadata)


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
    return path


# Save and load.


@few
@given(profile=profiles())
def test_save_then_load_is_the_identity_byte_for_byte(profile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity")
    path, again = folder / "a.safetensors", folder / "b.safetensors"
    profile.save(path)
    loaded = PrefixProfile.load(path)
    loaded.save(again)
    assert path.read_bytes() == again.read_bytes()
    assert loaded == profile and hash(loaded) == hash(profile)
    assert loaded.metadata == profile.metadata and loaded.method == profile.method
    assert sorted(os.listdir(folder)) == ["a.safetensors", "b.safetensors"]
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["budgets", "keep"] and file.metadata() == profile.metadata
        assert torch.equal(file.get_tensor("budgets"), profile.budgets) and torch.equal(loaded.budgets, profile.budgets)
        assert torch.equal(file.get_tensor("keep"), profile.keep) and torch.equal(loaded.keep, profile.keep)


def test_neither_another_writer_nor_the_order_of_metadata_nor_a_short_spelling_makes_a_difference(good, tmp_path):
    other = write(tmp_path / "other.safetensors", metadata=dict(reversed(METADATA.items())) | {"method": "snapkv"})
    PrefixProfile.load(other).save(other)
    assert other.read_bytes() == good.read_bytes()


def test_any_content_that_differs_is_another_profile():
    profile = PrefixProfile(BUDGETS, KEEP, METADATA)
    moved = copy.deepcopy(KEEP)
    moved[1][2][0] = math.nextafter(moved[1][2][0], 1)
    assert profile == PrefixProfile(BUDGETS, KEEP, METADATA)
    assert profile != PrefixProfile(BUDGETS, moved, METADATA)
    assert profile != PrefixProfile([math.nextafter(0.2, 1), *BUDGETS[1:]], KEEP, METADATA)
    assert profile != PrefixProfile(BUDGETS, KEEP, {**METADATA, "model": "other"})
    assert profile != "profile"
    plus, minus = (PrefixProfile([0.5], [[zero, 1.0]]) for zero in (0.0, -0.0))
    assert plus == minus and hash(plus) == hash(minus)


def test_a_profile_cannot_be_changed():
    budgets, keep = torch.tensor(BUDGETS, dtype=torch.float64), torch.tensor(KEEP, dtype=torch.float64)
    metadata = METADATA | {"measured": json.dumps(MEASURED)}
    profile = PrefixProfile(budgets, keep, metadata)
    before = copy.deepcopy(profile)
    ratios = [profile.keep_ratios(b) for b in (0.1, 0.2, 1.0)]
    for handed_out in (budgets, keep, profile.budgets, profile.keep, *ratios):
        handed_out.fill_(0.125)
    metadata["model"] = profile.metadata["model"] = profile.measured["samples"] = "changed"
    assert profile == before == pickle.loads(pickle.dumps(profile))
    for name in ("keep", "budgets", "metadata", "n_layers", "something"):
        with pytest.raises(AttributeError):
            setattr(profile, name, None)


def test_what_is_absent_is_filled_in_and_a_flat_table_is_one_length_a_layer():
    profile = PrefixProfile(BUDGETS, KEEP_1, {"model": "tiny", "spread": "[]"})
    metadata = profile.metadata
    assert set(metadata) == {*METADATA, "spread"} and (profile.n_layers, profile.n_heads) == (3, 1)
    assert [metadata[name] for name in ("format_version", "n_layers", "n_heads")] == ["2", "3", "1"]
    assert (metadata["model"], metadata["samples"]) == ("tiny", "unknown")
    assert profile.method == methods.DEFAULT and metadata["method"] == methods.DEFAULT.spell(full=True)
    assert profile.measured is None
    assert PrefixProfile(BUDGETS, KEEP, {"measured": json.dumps(MEASURED)}).measured == MEASURED
    assert "n_layers=3, n_heads=1, budgets=0.2 to 1 in 3, method='default'" in repr(profile)


# Version 1.


@pytest.mark.parametrize(
    ("more", "method"),
    [
        ({}, methods.PREFIXKV.replace(queries=32)),
        ({"queries": "all"}, methods.PREFIXKV),
        ({"queries": "unknown"}, methods.PREFIXKV),
        ({"ranking": RANKING_1}, methods.PREFIXKV.replace(queries=32, heads="each", pooling=7, value_norm=True)),
        ({"ranking": RANKING_1.replace("each", "max"), "queries": "all"},
         methods.PREFIXKV.replace(heads="max", pooling=7, value_norm=True)),
    ],
)  # fmt: skip
def test_version_1_is_one_length_a_layer_with_its_ranking_as_method(more, method, tmp_path):
    metadata = {**METADATA_1, "notes": "kept", "measured": "of version 2", **more}
    profile = PrefixProfile.load(write(tmp_path / "a.safetensors", keep=KEEP_1, metadata=metadata))
    assert profile == PrefixProfile(BUDGETS, KEEP_1, {**COMMON, "notes": "kept", "method": method.spell()})
    assert profile.method == method and profile.measured is None and profile.metadata["format_version"] == "2"


# Writing.


class _DiskFull(io.FileIO):
    """A file that takes half of what is written, and then no more."""

    def write(self, data):
        super().write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")


def _interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "name", "stand_in", "error"),
    [(files, "open", _DiskFull, OSError), (files.os, "replace", _interrupted, KeyboardInterrupt)],
)
def test_an_interrupted_write_leaves_the_old_file_whole_and_nothing_else(
    good, monkeypatch, where, name, stand_in, error
):
    before = good.read_bytes()
    monkeypatch.setattr(where, name, stand_in, raising=False)
    with pytest.raises(error) as caught:
        PrefixProfile([1.0], [[1.0]]).save(good)
    monkeypatch.undo()
    assert good.read_bytes() == before and os.listdir(good.parent) == [good.name]
    assert error is KeyboardInterrupt or (caught.value.errno == 28 and str(good) in str(caught.value))


def test_write_replaces_is_as_readable_as_any_file_and_names_what_it_cannot_write(good):
    umask = os.umask(0o022)
    try:
        PrefixProfile([1.0], [[1.0]]).save(str(good))
    finally:
        os.umask(umask)
    assert PrefixProfile.load(good).n_layers == 1 and stat.S_IMODE(good.stat().st_mode) == 0o644
    files.write_atomically(good, "ä")
    assert good.read_bytes() == "ä".encode()
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*a\.txt"):
        files.write_atomically(good.parent / "nowhere" / "a.txt", "")
    (good.parent / "folder").mkdir()
    with pytest.raises(OSError, match=r"cannot write.*folder"):
        files.write_atomically(good.parent / "folder", b"")
    assert sorted(os.listdir(good.parent)) == ["folder", good.name]


# Interpolation.


def _by_hand(profile, budget):
    """The contract's rule, with numpy and one case after the other."""
    grid, keep = profile.budgets.numpy(), profile.keep.numpy()
    if budget == 1:
        return np.ones(keep.shape[1:])
    if budget < grid[0]:
        return keep[0] * (budget / grid[0])
    if budget > grid[-1]:
        return 1 - (1 - keep[-1]) * (1 - budget) / (1 - grid[-1])
    columns = keep.reshape(len(grid), -1).T
    return np.array([np.interp(budget, grid, column) for column in columns]).reshape(keep.shape[1:])


@few
@given(profile=profiles(), pair=st.tuples(budgets, budgets).map(sorted))
def test_ratios_are_linear_scaled_outside_the_grid_and_never_less_for_more(profile, pair):
    less, more = (profile.keep_ratios(b) for b in pair)
    for budget, ratios in zip(pair, (less, more), strict=True):
        assert ratios.dtype == torch.float64 and ratios.shape == (profile.n_layers, profile.n_heads)
        assert ((ratios >= 0) & (ratios <= 1)).all() and abs(ratios.mean().item() - budget) < 1e-6
        np.testing.assert_allclose(ratios.numpy(), _by_hand(profile, budget), rtol=0, atol=1e-12)
    assert (less <= more).all()
    for low, high in zip(less.flatten().tolist(), more.flatten().tolist(), strict=True):
        assert prompt_count(low, 777) <= prompt_count(high, 777)
    for budget, row in zip(profile.budgets.tolist(), profile.keep, strict=True):
        if budget < 1:
            assert torch.equal(profile.keep_ratios(budget), row)


def test_budget_one_keeps_everything_whatever_the_last_row_says():
    profile = PrefixProfile([0.5, 1.0], [[0.5, 0.5], [0.999, 0.995]])
    assert profile.keep_ratios(1.0).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("budget", "error"), [(0.0, ValueError), (1.5, ValueError), (math.nan, ValueError), (1, ValueError),
                          (64, ValueError), ("0.5", TypeError), (True, TypeError), (None, TypeError)],
)  # fmt: skip
def test_what_is_no_fraction_is_refused_with_the_value_and_the_cure(budget, error):
    with pytest.raises(error) as caught:
        PrefixProfile(BUDGETS, KEEP).keep_ratios(budget)
    assert f"budget is {budget!r}" in str(caught.value) and "in (0, 1], such as 0.5" in str(caught.value)


# The published figures.


@pytest.mark.parametrize("name", NAMES)
def test_published_counts_entry_for_entry(name):
    profile, n = PrefixProfile.load(name), np.arange(1, 4097)
    for overall, forget in PUBLISHED[NAMES[name]].items():
        dropped = np.round(np.array(forget)[:, None] * n).astype(np.int64)  # as the reference has it
        ratios = profile.keep_ratios(round(1 - float(overall), 1))
        counts = np.array([[prompt_count(ratio, each) for each in n.tolist()] for ratio in ratios[:, 0].tolist()])
        assert np.array_equal(counts, np.minimum(np.maximum(n - dropped, 2), n)), overall


@pytest.mark.parametrize("name", NAMES)
def test_published_budgets_are_clean_decimals_with_the_method_of_the_paper(name):
    profile, key = PrefixProfile.load(name), NAMES[name]
    assert profile.budgets.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert profile.keep[:, :, 0].tolist() == [[1 - f for f in PUBLISHED[key][f"0.{9 - i}"]] for i in range(10)]
    assert profile.method == methods.PREFIXKV and profile.metadata["method"] == methods.PREFIXKV.spell(full=True)
    assert profile.measured is None and PUBLISHED["source"] in profile.metadata["source"]
    assert (profile.n_layers, profile.n_heads) == (32 if "7b" in name else 40, 1)
    error = (profile.keep.mean((1, 2)) - profile.budgets).abs().max().item()
    for step in range(1, 201):
        assert abs(profile.keep_ratios(step / 200).mean().item() - step / 200) <= error + 1e-12 < 0.002


def test_the_script_makes_the_bundled_files_byte_for_byte(tmp_path, monkeypatch):
    script = ROOT / "examples/make_published_profiles.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    assert sorted(os.listdir(tmp_path)) == sorted(f"{name}.safetensors" for name in NAMES)
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (ROOT / "profiles" / made.name).read_bytes()


# Names and bundled data.


def test_a_bundled_name_wins_and_any_other_may_be_a_file_here(good, monkeypatch):
    monkeypatch.chdir(good.parent)
    shutil.copy(good, "mine")
    shutil.copy(good, "llava-1.5-7b")
    assert PrefixProfile.load("mine") == PrefixProfile.load("good.safetensors") == PrefixProfile.load(Path("mine"))
    assert PrefixProfile.load(Path("llava-1.5-7b")).n_layers == PrefixProfile.load("./llava-1.5-7b").n_layers == 3
    assert PrefixProfile.available() == sorted(PrefixProfile.available()) and set(NAMES) <= set(
        bundled.bundled_profiles()
    )
    for name in NAMES:
        assert PrefixProfile.load(name) == PrefixProfile.load(ROOT / "profiles" / f"{name}.safetensors")


@pytest.mark.parametrize("name", ["llava-1.5-8b", "", "..", ".", "LLAVA*", "a\0b", "x" * 5000])
def test_an_unknown_name_is_refused_with_the_names_there_are(name):
    with pytest.raises(ProfileError) as caught:
        PrefixProfile.load(name)
    assert repr(name) in str(caught.value) and "llava-1.5-13b, llava-1.5-7b" in str(caught.value)


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


def test_a_model_gets_the_bundled_profile_of_its_name_and_depth_if_that_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "bundled_dir", lambda kind: tmp_path)
    measured = PrefixProfile(BUDGETS, KEEP, {"measured": json.dumps(MEASURED)})
    measured.save(tmp_path / "llava-1.5-7b.safetensors")
    PrefixProfile(BUDGETS, KEEP).save(tmp_path / "never-measured.safetensors")

    def found(name, n_layers=3):
        return find_bundled(SimpleNamespace(name_or_path=name), n_layers)

    assert (
        found("llava-hf/llava-1.5-7b-hf") == found(r"C:\models\LLaVA-1.5-7B\\") == found("a/llava-1.5-7b/") == measured
    )
    assert find_bundled(SimpleNamespace(_name_or_path="llava-1.5-7b"), 3) == measured
    for name in ("me/llava-1.5-7bit", "llava-1.5-7b.1", "xllava-1.5-7b", "llava", "", "never-measured"):
        assert found(name) is None
    assert found("llava-1.5-7b", 4) is find_bundled(object(), 3) is None


@pytest.mark.parametrize("kind", ["profiles", "models"])
def test_bundled_data_is_found_in_a_wheel_and_in_a_checkout_and_nowhere_else(kind, tmp_path):
    def copy_of_package(folder):
        room = folder / "prefixkv_cache" / "profiles"
        room.mkdir(parents=True)
        spec = importlib.util.spec_from_file_location("bundled_copy", shutil.copy(bundled.__file__, room))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.bundled_dir

    def put_data(folder):
        (folder / kind).mkdir(exist_ok=True)
        (folder / kind / "a.safetensors").touch()
        return folder / kind

    find, package = copy_of_package(tmp_path / "site-packages"), tmp_path / "site-packages" / "prefixkv_cache"
    put_data(tmp_path)  # of somebody else
    assert find(kind) == package / kind == put_data(package) == find(kind)
    find, root = copy_of_package(tmp_path / "clone" / "src"), tmp_path / "clone"
    data = put_data(root)
    assert find(kind) == root / "src" / "prefixkv_cache" / kind
    (root / "pyproject.toml").touch()
    assert find(kind) == data
    for no_kind in ("", "..", "/etc", "profiles/..", "src"):
        with pytest.raises(ValueError, match="expected one of profiles, models"):
            find(no_kind)


def test_a_fall_and_a_mean_at_the_limit_are_allowed():
    assert PrefixProfile([0.4, 0.401], [[0.401, 0.409], [0.4, 0.412]]).n_layers == 2
