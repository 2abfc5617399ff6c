"""From a model and some samples to a profile: propose lengths, measure what they cost, keep what wins.

One sample after the other goes through the model (observe.py, measure.py); of each only small tables of numbers are
kept, from which proposals are made (propose.py, plan.py). With `by="measured"` the proposals are compared on a third of
the samples, which was set aside. Reads no data files and prints nothing: that is the command's part
(tools/calibrate.py). Interrupted calibrations go on from a file (state.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import transformers

from ..cache.architecture import cache_layers
from ..methods import Method
from ..profiles.profile import PrefixProfile
from .find import describe_error
from .plan import DEFAULT_BUDGETS, MEASURED, WRITTEN, Plan
from .run import Job, OnError, Progress, Run
from .state import CalibrationState, fingerprint_model

IMPROVED_ON = 16
"""Samples that lengths are improved on by gradient, at most."""


def calibrate(
    model: Any,
    samples: Iterable[Mapping[str, Any]],
    *,
    method: Method | str | None = None,
    by: str = MEASURED,
    unit: str = "layer",
    budgets: Sequence[float] = DEFAULT_BUDGETS,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    on_error: OnError | None = None,
    state_file: str | os.PathLike[str] | None = None,
) -> PrefixProfile:
    """Make the profile of a model from some prompts. A keep ratio is the mean over the samples of count / n_tokens.

    Streams: one sample is in memory at a time (of those set aside, and of the first 16 others, the inputs). Each row of
    a padded batch is a sample. A sample that fails is reported and skipped. Out of memory ends the calibration:
    skipping long prompts would bias the profile. What was found by then, or by Ctrl-C, is in `state_file`.

    Args:
        model: a transformers model of a kind that `PrefixKVCache` can prune, in any dtype, on one device or several.
        samples: dicts that `model(**sample)` takes, such as what a processor returns; any iterable.
        method: how the cache will rank its keys; the profile carries it. None: the paper's with `by="mass"`, else the
            default, and with `by="measured"` a few others are tried with the best lengths.
        by: `"measured"`: proposals by all criteria below, alone and blended with uniform lengths, are measured on every
            third sample, which is set aside; the best is improved by gradient (descent.py) and measured again, and the
            best of all is kept; a warning says if it does not beat uniform lengths. `"mass"`: the paper's search on the
            scores (arXiv 2412.03409), as `lengths="search"` on each prompt. `"reconstruction"`: one pool of how much
            attention keys get when the prompt is repeated (KVzip, arXiv 2505.23416). `"loss"`: what each unit costs.
        unit: `"layer"`: one length a layer, or `"head"`: one for each key head (with `"measured"`, both are tried).
        budgets: the grid of the profile, fractions kept, in (0, 1].
        metadata: more to write into the profile, string to string, such as `{"source": "MM-Vet, 10 samples"}`.
        progress: called with the number of prompts done after each one; a sample is looked at several times.
        on_error: called with the index of a failed sample and the exception; by default a warning is given.
        state_file: where to keep what was found, every few seconds and whenever the calibration ends early; one that
            is there is continued (with the samples in the same order). Deleted at the end.

    Returns:
        The profile. Its metadata has the method, the proposal (`by`), the samples' number, lengths in tokens and, where
        lengths were counted, standard deviation (`spread`), and what was measured (`measured`).

    Raises:
        TypeError, ValueError: an argument is not as above, the model cannot be pruned, samples are too few or failed, a
            budget is too small for prompts this short, `state_file` is that of another calibration.
        UnobservedAttentionError: the model computes attention by code of its own.
    """
    plan = Plan.asked(method, by, unit, budgets)
    check_model(model)
    described = {**describe_model(model), **check_metadata(metadata)}
    state = CalibrationState(state_file, fingerprint_calibration(model, plan) if state_file else {})
    state.read()
    run = Run(model, plan, state, on_error or _warn, progress)
    aside, improve_on = list[Job](), list[Job]()
    with run:
        run.work(_kept_back(_one_by_one(samples), plan, aside, improve_on), aside, improve_on)
    profile = run.profile(described)
    state.delete()
    if not (profile.measured or {}).get("beats_uniform", True):
        warnings.warn("the profile does not beat uniform lengths on the samples set aside", stacklevel=2)
    return profile


def check_model(model: Any) -> None:
    """Refuse a model that no sample could be measured on, before one is looked at, by a TypeError or ValueError."""
    cache_layers(model.config)


def check_metadata(metadata: Mapping[str, str] | None) -> Mapping[str, str]:
    """The metadata, if a profile can hold it: found out at the end, it would cost the whole calibration."""
    metadata = {} if metadata is None else metadata
    for name in WRITTEN:
        if isinstance(metadata, Mapping) and name in metadata:
            raise ValueError(f"metadata: {name!r} is written by the calibration, by what it finds; leave it out")
    PrefixProfile([1.0], [[1.0]], metadata)
    return metadata


def _warn(index: int, error: Exception) -> None:
    warnings.warn(f"sample {index} was skipped: {describe_error(error)}", stacklevel=2)


def _one_by_one(samples: Iterable[Mapping[str, Any]]) -> Iterator[Job]:
    indices = count()  # enumerate would hold on to a sample until the next one is made, which is once too often
    for sample in samples:
        yield Job((next(indices),), lambda _, sample=sample: sample)
        del sample


def _kept_back(jobs: Iterator[Job], plan: Plan, set_aside: list[Job], first: list[Job]) -> Iterator[Job]:
    """The jobs that proposals are made of, the first of them put into a list, and the others into another."""
    for job in jobs:
        if plan.sets_aside(job.indices[0]):
            set_aside.append(job)
        else:
            if plan.is_measured and len(first) < IMPROVED_ON:
                first.append(job)
            yield job
        del job


# What tells one calibration from another.


def describe_model(model: Any) -> dict[str, str]:
    """The fields of a profile that tell the model: its hub id, or the last part of its path, and how it was run."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if os.path.isabs(name) or os.path.isdir(name):  # the rest of a path says only where it lay on this machine
        name = os.path.basename(os.path.normpath(name))
    return {
        "model": name or model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
    }


def fingerprint_calibration(model: Any, plan: Plan, **more: Any) -> dict[str, Any]:
    """What has to be the same for one calibration to go on where another one stopped."""
    return {
        **fingerprint_model(model),
        "method": plan.method.spell(full=True),
        "rankings": [each.spell(full=True) for each in plan.rankings],
        "by": plan.by,
        "unit": plan.unit,
        "budgets": list(plan.budgets),
        **more,
    }
