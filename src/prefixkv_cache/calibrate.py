"""From a model and some samples to a profile: the calibrator of PrefixKV (arXiv 2412.03409, section 3.3).

One sample after the other is observed (observe.py), the scores by which the cache will rank its keys are searched for
the lengths at every budget (threshold.py), and only the lengths are kept: whole numbers, in whose mean neither order
nor grouping of the samples can be told. The mean is the profile (profile.py), which says what ranking it is for
(calibrated_for.py). Reads no data files and prints nothing: that is the command's part (calibrate_command.py).
Calibrations that were interrupted go on from a file (calibration_state.py).
"""

from __future__ import annotations

import json
import math
import numbers
import os
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from typing import Any

import torch
import transformers

from .architecture import cache_layers
from .cache import image_mask_of
from .calibrated_for import DEFAULT, write_ranking
from .calibration_state import CalibrationState, Measurement, fingerprint_model
from .importance import DEFAULT_MAX_BYTES
from .observe import UnobservedAttentionError, observe
from .profile import MAX_MEAN_ERROR, PrefixProfile, check_budget
from .scoring import Ranking
from .threshold import search_lengths

DEFAULT_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Closer together where lengths change most; between two of them a profile interpolates."""

# The spread takes about six bytes a value; larger tables would not fit beside the rest in a profile's header.
_MAX_SPREAD_VALUES = 2**16

OnError = Callable[[int, Exception], None]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """What, beside model and samples, decides the lengths. Checked when it is made.

    Attributes:
        budgets: fractions kept, rising, each in (0, 1].
        ranking: how the cache will rank its keys.
        sink: first tokens that are never pruned; each layer keeps at least `sink + 1`.
        max_bytes: ceiling for the temporaries of the importance computation, per layer.
    """

    budgets: tuple[float, ...] = DEFAULT_BUDGETS
    ranking: Ranking = DEFAULT
    sink: int = 1
    max_bytes: int = DEFAULT_MAX_BYTES

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(sorted({check_budget(budget) for budget in self.budgets})))
        if not self.budgets:
            raise ValueError("budgets is empty; give fractions of the KV pairs to keep, such as [0.1, 0.2, 0.5, 1.0]")
        for name, least in (("sink", 0), ("max_bytes", 1)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
            object.__setattr__(self, name, int(value))


def calibrate(
    model: Any,
    samples: Iterable[Mapping[str, Any]],
    *,
    budgets: Sequence[float] = DEFAULT_BUDGETS,
    queries: int | str = 32,
    sink: int = 1,
    average: str = "sum",
    heads: str = "mean",
    pooling: int = 1,
    value_norm: bool = False,
    diversity: float = 0.5,
    novelty: float = 8.0,
    max_bytes: int = DEFAULT_MAX_BYTES,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    on_error: OnError | None = None,
    state_file: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> PrefixProfile:
    """Make the profile of a model from its attention on some prompts. A keep ratio is the mean of count / n_tokens.

    The lengths are searched on the scores that a cache of the same arguments ranks its keys by, so that of one sample
    the profile holds what `PrefixKVCache(budget=...)` finds on that prompt by itself; the cache warns of a profile made
    for another ranking. The paper's calibration is `queries="all", diversity=0, novelty=0`.

    Streams: one sample is in memory at a time and no cache is built, so the peak is that of a plain forward. Each row
    of a padded batch is a sample of its own. The order of the samples cannot change the profile. Nor can their batching
    as such, but a padded forward may differ from an unpadded one in the last bit of a float32, which now and then moves
    the last of a layer's pairs to another layer.

    A sample that fails is reported and skipped; it is in nobody's interest, though, to skip what ran out of memory, as
    those are the longest prompts, and the profile of the others would be another one: that ends the calibration, and so
    does a model whose attention cannot be observed, and Ctrl-C. What was measured until then is in `state_file`.

    Args:
        model: a transformers model of a kind that `PrefixKVCache` can prune, in any dtype, on one device or several.
        samples: dicts that `model(**sample)` takes, such as what a processor returns; any iterable.
        budgets: the grid of the profile, fractions kept, in (0, 1].
        queries: whose attention counts: `"all"` prompt tokens (the paper), `"text"`: the text behind the first image,
            which is told by the image tokens in `input_ids`, or an integer W: the last W real tokens.
        sink: each layer keeps at least `sink + 1` pairs.
        average: `"sum"` over these queries, or `"visible"`, as in `PrefixKVCache`; and so the five that follow.
        heads: `"mean"`, `"max"` or `"each"`; where each head ranks keys for itself, lengths are searched on the mean of
            all heads.
        pooling: window of neighbours, in keys, an odd number; 1: none.
        value_norm: whether importance is multiplied by the norm of the value.
        diversity: share of a key's score that is its difference from the others, in [0, 1].
        novelty: exponent of the price of repeating better-ranked keys, 0 or more.
        max_bytes: ceiling for the temporaries of the importance computation, per layer.
        metadata: more to write into the profile, string to string, such as `{"source": "MM-Vet, 10 samples"}`; not
            `queries`, `ranking` and `n_layers`, which say what was measured.
        progress: called with the number of samples done after each one.
        on_error: called with the index of a failed sample and the exception; by default a warning is given.
        state_file: where to keep what was measured, every few seconds and whenever the calibration ends early; deleted
            at the end.
        resume: go on from `state_file`, if there is one. The samples must come in the same order as before.

    Returns:
        The profile. Its metadata says what ranking it is for (`queries`, `ranking`), how many samples there were, their
        lengths in tokens (`tokens_min`, `tokens_mean`, `tokens_max`), and the standard deviation over the samples of
        each keep ratio (`spread`).

    Raises:
        TypeError, ValueError: an argument is not what is described above, the model cannot be pruned, or with
            `queries="text"` names no image token, there are no samples or all of them failed, a budget is too small for
            prompts this short, or `state_file` is that of another calibration.
        UnobservedAttentionError: the model computes attention by code of its own.
    """
    ranking = Ranking(queries, average, heads, pooling, value_norm, diversity, novelty)
    settings = Settings(tuple(budgets), ranking, sink, max_bytes)
    check_model(model, settings)  # what cannot be calibrated is refused before the first sample is looked at
    described = {**describe_model(model), **_check_metadata(metadata)}
    state = CalibrationState(state_file, fingerprint_calibration(model, settings) if state_file else {})
    if resume:
        state.read()
    failures = measure(model, _one_by_one(samples), settings, state, progress=progress, on_error=on_error or _warn)
    refuse_if_nothing_left(state.measurements(), failures)
    profile = make_profile(state.measurements(), settings, described)
    state.delete()
    return profile


def check_model(model: Any, settings: Settings) -> None:
    """Refuse a model that no sample could be measured on.

    Raises:
        TypeError, ValueError: it cannot be pruned, or nobody knows where in its prompts the images are.
    """
    cache_layers(model.config)
    if settings.ranking.queries == "text" and image_mask_of({"input_ids": torch.zeros(1, 1)}, model.config) is None:
        raise ValueError(
            "queries='text' ranks keys by the text behind the first image, but the config of this model names no image "
            "token; take a number of last tokens, or 'all'"
        )


def _check_metadata(metadata: Mapping[str, str] | None) -> Mapping[str, str]:
    """The metadata, if a profile can hold it: found out at the end, it would cost the whole calibration."""
    metadata = {} if metadata is None else metadata
    for field in ("queries", "ranking", "n_layers"):
        if isinstance(metadata, Mapping) and field in metadata:
            raise ValueError(f"metadata: {field!r} is written by the calibration, by what it measures; leave it out")
    PrefixProfile([1.0], [[1.0]], metadata)
    return metadata


def _warn(index: int, error: Exception) -> None:
    warnings.warn(f"sample {index} was skipped: {describe_error(error)}", stacklevel=2)


# Measuring.


@dataclass(frozen=True)
class Job:
    """Samples that go through the model together.

    Attributes:
        indices: of the samples; where there are several, each is one row.
        load: makes what `model(**sample)` takes, of the indices that it is given: all of them, or one at a time where
            together they failed.
    """

    indices: tuple[int, ...]
    load: Callable[[tuple[int, ...]], Mapping[str, Any]]


def _one_by_one(samples: Iterable[Mapping[str, Any]]) -> Iterator[Job]:
    indices = count()  # enumerate would hold on to a sample until the next one is made, which is once too often
    for sample in samples:
        yield Job((next(indices),), lambda _, sample=sample: sample)
        del sample


def measure(
    model: Any,
    jobs: Iterable[Job],
    settings: Settings,
    state: CalibrationState,
    *,
    progress: Progress | None,
    on_error: OnError,
) -> dict[int, Exception]:
    """Measure all samples that `state` does not hold yet, and put them there.

    Returns:
        The failed samples, by index.
    """
    failures: dict[int, Exception] = {}
    done = 0
    try:
        for job in jobs:
            left = tuple(index for index in job.indices if index not in state)
            if left:
                _measure_job(model, Job(left, job.load), settings, state, on_error, failures)
            done += len(job.indices)
            if progress is not None:
                progress(done)
            del job
    finally:
        state.save()
    return failures


def _measure_job(
    model: Any, job: Job, settings: Settings, state: CalibrationState, on_error: OnError, failures: dict[int, Exception]
) -> None:
    try:
        rows = _measure_sample(model, job.load(job.indices), settings)
        of_index = [rows] if len(job.indices) == 1 else [[row] for row in rows]
        measured = dict(zip(job.indices, of_index, strict=True))
    except UnobservedAttentionError:
        raise
    except Exception as error:
        # The frames hold the activations of the forward that failed.
        traceback.clear_frames(error.__traceback__)
        failed = error
    else:
        for index, measurements in measured.items():
            state.add(index, measurements)
        return
    if len(job.indices) > 1:  # one bad image must not take its batch with it
        for index in job.indices:
            _measure_job(model, Job((index,), job.load), settings, state, on_error, failures)
        return
    if _is_out_of_memory(failed):
        raise failed
    for index in job.indices:
        failures[index] = failed
        on_error(index, failed)


def _measure_sample(model: Any, sample: Mapping[str, Any], settings: Settings) -> list[Measurement]:
    """The lengths of each row of a sample at every budget."""
    mask = _image_mask(model, sample) if settings.ranking.queries == "text" else None
    rows = observe(model, sample, ranking=settings.ranking, image_mask=mask, max_bytes=settings.max_bytes)
    for row, scores in enumerate(rows):
        if scores.shape[1] == 0:
            raise ValueError(f"row {row} of the sample is padding only")
    return [
        Measurement(scores.shape[1], search_lengths(scores, settings.budgets, sink=settings.sink).tolist())
        for scores in rows
    ]


def _image_mask(model: Any, sample: Any) -> torch.Tensor | None:
    if isinstance(sample, Mapping) and not isinstance(sample.get("input_ids"), torch.Tensor):
        raise ValueError("queries='text' needs input_ids in a sample, to see which tokens are images; there are none")
    return image_mask_of(sample, model.config) if isinstance(sample, Mapping) else None  # observe() refuses the rest


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU, torch has no class of its own for it.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def describe_error(error: BaseException) -> str:
    """One line: the message, with the kind of the error where the message alone would say little."""
    message = " ".join(str(error).split())
    known = isinstance(error, (ValueError, RuntimeError, OSError)) and message
    return message if known else f"{type(error).__name__}: {message}".rstrip(": ")


# From lengths to a profile.


def refuse_if_nothing_left(measurements: Sequence[Measurement], failures: Mapping[int, Exception]) -> None:
    """Raise a ValueError where no sample was measured."""
    if measurements:
        return
    if not failures:
        raise ValueError("there are no samples; one is the least that a profile can be made of, and ten do well")
    last = list(failures.values())[-1]
    reason = describe_error(last)
    raise ValueError(f"all samples failed ({len(failures)}); the last one: {reason}") from last


def make_profile(measurements: Sequence[Measurement], settings: Settings, metadata: Mapping[str, str]) -> PrefixProfile:
    """The mean of the keep ratios over the samples, whatever the order of these.

    Sums are exact (`math.fsum`). Lengths of one sample are nested over the budgets, so their mean rises, too.

    Raises:
        ValueError: a budget is too small for prompts this short.
    """
    n_layers = len(measurements[0].counts[0])
    keep, spread = [], []
    for row in range(len(settings.budgets)):
        of_layers = [[each.counts[row][layer] / each.n_tokens for each in measurements] for layer in range(n_layers)]
        keep.append([math.fsum(ratios) / len(ratios) for ratios in of_layers])
        spread.append([_deviation(ratios) for ratios in of_layers])
    _check_means(keep, measurements, settings)
    lengths = [each.n_tokens for each in measurements]
    described = {
        "method": "prefixkv",
        "queries": str(settings.ranking.queries),
        "ranking": write_ranking(settings.ranking),
        "sink": str(settings.sink),
        "samples": str(len(measurements)),
        "tokens_min": str(min(lengths)),
        "tokens_mean": f"{math.fsum(lengths) / len(lengths):.1f}",
        "tokens_max": str(max(lengths)),
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    if len(measurements) > 1 and len(keep) * n_layers <= _MAX_SPREAD_VALUES:
        described["spread"] = json.dumps([[round(value, 4) for value in row] for row in spread], separators=(",", ":"))
    return PrefixProfile(list(settings.budgets), keep, {**described, **metadata})


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample (divided by n - 1); 0.0 for a single value."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))


def _check_means(keep: list[list[float]], measurements: Sequence[Measurement], settings: Settings) -> None:
    for budget, row in zip(settings.budgets, keep, strict=True):
        mean = math.fsum(row) / len(row)
        if abs(mean - budget) > MAX_MEAN_ERROR:
            lengths = [each.n_tokens for each in measurements]
            least = math.fsum(min(settings.sink + 1, n) / n for n in lengths) / len(lengths)
            raise ValueError(
                f"budget {budget:g} cannot be calibrated on prompts of {min(lengths)} to {max(lengths)} tokens in "
                f"{len(row)} layers: it comes out as {mean:.4g}, since lengths are whole numbers and each layer keeps "
                f"at least {settings.sink + 1} tokens, here {least:.4g} of them. Leave this budget out, or take longer "
                "prompts"
            )


def describe_model(model: Any) -> dict[str, str]:
    """The fields of a profile that tell the model: its hub id, or the last part of its path, and how it was run."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if os.path.isabs(name) or os.path.isdir(name):  # what else a path says is nobody's business but this machine's
        name = os.path.basename(os.path.normpath(name))
    return {
        "model": name or model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
    }


def fingerprint_calibration(model: Any, settings: Settings, **more: Any) -> dict[str, Any]:
    """What has to be the same for one calibration to go on where another one stopped."""
    return {
        **fingerprint_model(model),
        "budgets": list(settings.budgets),
        "queries": settings.ranking.queries,
        "ranking": write_ranking(settings.ranking),
        "sink": settings.sink,
        **more,
    }
