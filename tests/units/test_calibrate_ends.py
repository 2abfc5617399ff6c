"""What a calibration does with failures and bad arguments, and how it goes on after an interruption."""

import functools
import importlib
import json
import math
import warnings

import pytest
import torch

import models
from prefixkv_cache import PrefixProfile, calibrate, methods
from prefixkv_cache.calibration.observe import UnobservedAttentionError, observe

find_module, run_module = (importlib.import_module(f"prefixkv_cache.calibration.{name}") for name in ("find", "run"))
state_module = importlib.import_module("prefixkv_cache.calibration.state")
GRID = (0.1, 0.2, 0.5, 1.0)
LENGTHS = (61, 44, 40)
PAPER = methods.PREFIXKV
mass = functools.partial(calibrate, by="mass", budgets=GRID)


pytestmark = pytest.mark.usefixtures("short_descent")


def samples():
    return [models.batch("llava_gqa", (length,), seed=index) for index, length in enumerate(LENGTHS)]


def same_but_for_the_date(one, other):
    fixed = [PrefixProfile(each.budgets, each.keep, {**each.metadata, "created": "then"}) for each in (one, other)]
    return fixed[0] == fixed[1]


# Failures.


def bad_sample():
    return {**samples()[0], "pixel_values": torch.zeros(1, 3, 8, 8)}


def test_a_bad_sample_is_reported_and_skipped():
    model = models.shared("llava_gqa", "sdpa")
    reported = []
    mixed = [samples()[0], bad_sample(), "no sample", *samples()[1:]]
    profile = mass(model, mixed, on_error=lambda *seen: reported.append(seen))
    assert [index for index, _ in reported] == [1, 2]
    assert "got str" in str(reported[1][1])
    assert torch.equal(profile.keep, mass(model, samples()).keep)
    with pytest.warns(UserWarning, match="sample 0 was skipped"):
        mass(model, [bad_sample(), samples()[0]])


def test_a_sample_that_makes_no_numbers_is_skipped():
    nan = {**samples()[0], "pixel_values": torch.full((1, 3, 16, 16), math.nan, dtype=torch.float64)}
    with pytest.warns(UserWarning, match="sample 0 was skipped: importance must be finite"):
        profile = mass(models.shared("llava_gqa", "sdpa"), [nan, samples()[1]], method=PAPER)
    assert profile.metadata["samples"] == "1"


@pytest.mark.parametrize("by", ["mass", "measured"])
def test_all_failed_is_an_error(by):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"all samples failed \(\d\); the last one"):
            calibrate(models.shared("llava_gqa"), [bad_sample(), bad_sample()], by=by)
    with pytest.raises(ValueError, match="there are no samples"):
        calibrate(models.shared("llava_gqa"), [], by=by)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_what_ends_the_calibration(error, monkeypatch, tmp_path):
    state_file = tmp_path / "state.json"
    observed = []

    def observe_two(*args, **kwargs):
        if len(observed) == 2:
            raise error
        observed.append(1)
        return observe(*args, **kwargs)

    monkeypatch.setattr(find_module, "observe", observe_two)
    with pytest.raises(type(error)):
        mass(models.shared("llava_gqa"), samples(), state_file=state_file)
    assert len(json.loads(state_file.read_text())["samples"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_attention_that_never_comes_to_the_hook(monkeypatch):
    model = models.build("llava_gqa")

    def own_attention(self, hidden_states, past_key_values=None, **_):
        if past_key_values is not None:
            shape = (*hidden_states.shape[:2], 2, -1)
            key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
            past_key_values.update(key, key, self.layer_idx)
        return hidden_states, None

    monkeypatch.setattr(type(models.attention_modules(model)[0]), "forward", own_attention)
    for by in ("mass", "reconstruction"):
        with pytest.raises(UnobservedAttentionError, match=r"layer 0 .*self_attn.*LlamaAttention.* never came through"):
            calibrate(model, samples(), by=by)


def test_models_that_cannot_be_pruned_are_refused_before_any_sample():
    model = models.build("llava_gqa")
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="encoder-decoder"):
        calibrate(model, _explode())


def _explode():
    raise AssertionError("asked for a sample")
    yield


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": []}, "budgets is empty"),
        ({"budgets": [0.5, 0.0]}, "budget is 0"),
        ({"budgets": [1.5]}, "budget is 1.5"),
        ({"budgets": ["half"]}, "budget is 'half'"),
        ({"budgets": [0.5, 64]}, "a profile's grid holds fractions"),
        ({"method": "best"}, "there is no method 'best'"),
        ({"method": 7}, "method must be"),
        ({"by": "luck"}, "by must be one of"),
        ({"unit": "token"}, "unit must be one of"),
        ({"method": "elastic", "by": "loss"}, "merge=True mixes"),
        ({"state_file": "no/such/folder/state.json"}, "does not exist"),
        ({"metadata": {"samples": 3}}, "metadata: 'samples' is 3"),
        ({"metadata": "mine"}, "metadata: is of type str"),
        *(
            ({"metadata": {name: "mine"}}, f"metadata: '{name}' is written")
            for name in ("method", "measured", "n_heads")
        ),
    ],
)
def test_bad_arguments_are_refused_before_any_sample(options, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        calibrate(models.shared("llava_gqa"), _explode(), **options)


def test_budgets_too_small_for_the_prompts_are_refused():
    model = models.shared("llava_gqa")
    with pytest.raises(ValueError, match=r"budget 0.01 cannot be calibrated on prompts of 40 to 61 tokens"):
        calibrate(model, samples(), by="mass", budgets=[0.01, 0.5])
    with pytest.raises(ValueError, match="at least 21 tokens"):
        calibrate(model, samples(), by="mass", budgets=[0.2, 0.5], method=PAPER.replace(sink=20))


# Going on.


def interrupted(path, after=2, **options):
    """Calibrate, press Ctrl-C after some samples; the state file is what remains."""
    done = []

    def progress(count):
        done.append(count)
        if count == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mass(models.shared("llava_gqa"), samples(), state_file=path, progress=progress, **options)
    return done


def test_it_goes_on_where_it_stopped(monkeypatch, tmp_path):
    path = tmp_path / "state.json"
    interrupted(path)
    seen, done = [], []
    monkeypatch.setattr(find_module, "observe", lambda *args, **kw: seen.append(1) or observe(*args, **kw))
    profile = mass(models.shared("llava_gqa"), samples(), state_file=path, progress=done.append)
    assert len(seen) == 1 and done == [1, 2, 3]
    assert not path.exists()
    assert same_but_for_the_date(profile, mass(models.shared("llava_gqa"), samples()))


def test_measuring_goes_on_where_it_stopped(monkeypatch, tmp_path):
    model, path = models.shared("llava_gqa", "sdpa"), tmp_path / "state.json"
    options = {"by": "measured", "budgets": [0.3], "method": "snapkv:queries=8"}
    weigh = run_module.weigh

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "weigh", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, samples(), state_file=path, **options)
    monkeypatch.setattr(run_module, "weigh", weigh)
    monkeypatch.setattr(run_module, "find", stop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        profile = calibrate(model, samples(), state_file=path, **options)
        monkeypatch.undo()
        assert same_but_for_the_date(profile, calibrate(model, samples(), **options))


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"budgets": [0.5]}, "budgets"),
        ({"method": "h2o"}, "method"),
        ({"by": "loss"}, "by"),
        ({"unit": "head"}, "unit"),
        ("weights", "weights"),
        ("family", "config"),
    ],
    ids=str,
)
def test_the_state_of_another_calibration_is_refused(tmp_path, changed, field):
    path = tmp_path / "state.json"
    interrupted(path, method="snapkv")
    kept = path.read_bytes()
    options = {"by": "mass", "budgets": GRID, "method": "snapkv", **(changed if isinstance(changed, dict) else {})}
    model = models.build("llava_mha" if changed == "family" else "llava_gqa")
    if changed == "weights":
        model.get_input_embeddings().weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=rf"state of another run, whose {field} was"):
        calibrate(model, _explode(), state_file=path, **options)
    assert path.read_bytes() == kept


EMPTY_STATE = {"format": "prefixkv-calibration-state", "format_version": 2, "fingerprint": {}, "samples": {}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": "prefixkv-calibration-state"}',
        json.dumps({**EMPTY_STATE, "format": "other"}),
        json.dumps({**EMPTY_STATE, "format_version": 1}),
        json.dumps({**EMPTY_STATE, "samples": {"found/a": []}}),
        json.dumps({**EMPTY_STATE, "samples": {"found/0": [5]}}),
        json.dumps({**EMPTY_STATE, "samples": {"found/0": [{"n_tokens": 4, "tables": {"mass/layer": [[-1]]}}]}}),
        json.dumps({**EMPTY_STATE, "samples": {"found/0": [{"n_tokens": "4", "tables": {"mass/layer": [[4]]}}]}}),
    ],
)
def test_damaged_states_are_refused(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="no state of a calibration"):
        calibrate(models.shared("llava_gqa"), _explode(), state_file=path)


def test_the_state_is_written_every_few_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(state_module, "_SECONDS_BETWEEN_SAVES", 0.0)
    path, lengths = tmp_path / "state.json", []

    def progress(_):
        lengths.append(len(json.loads(path.read_text())["samples"]))

    mass(models.shared("llava_gqa"), samples(), state_file=path, progress=progress)
    assert lengths == [1, 2, 3]
