"""From a model and some samples to a profile: propose lengths, measure what they cost, keep what wins.

One sample after the other goes through the model (observe.py, measure.py); of each only small tables of numbers are
kept, from which proposals are made (propose.py, plan.py). With `by="measured"` the proposals are compared on a third of
the samples, which was set aside. Reads no data files and prints nothing: that is the command's part
(tools/calibrate.py). Interrupted calibrations go on from a file (state.py).
"""

from __future__ import annotations

import hashlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
import transformers
from torch import Tensor

from ..cache.architecture import cache_layers
from ..cache.guards import image_mask_of
from ..methods import Method, resolve
from ..profiles.profile import PrefixProfile
from .measure import ANSWER_TOKENS, AnsweredPrompt
from .observe import UnobservedAttentionError, observe
from .plan import DEFAULT_BUDGETS, MEASURED, WRITTEN, Plan, Row, make_profile
from .propose import LOSS_RATIOS, mass_counts, reconstruction_counts
from .state import CalibrationState, fingerprint_model

OnError = Callable[[int, Exception], None]
Progress = Callable[[int], None]
FOUND = "found"
"""Stage of the samples that proposals are made of."""


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

    Streams: one sample is in memory at a time (of those set aside, the inputs). Each row of a padded batch is a sample.
    A sample that fails is reported and skipped. Out of memory ends the calibration: skipping long prompts would bias
    the profile. What was found until then, or until Ctrl-C, is in `state_file`.

    Args:
        model: a transformers model of a kind that `PrefixKVCache` can prune, in any dtype, on one device or several.
        samples: dicts that `model(**sample)` takes, such as what a processor returns; any iterable.
        method: how the cache will rank its keys; None: the default. The profile carries it.
        by: `"measured"`: proposals by all criteria below, alone and blended with uniform lengths, are measured on every
            third sample, which is set aside, and the best is kept; a warning says so if it does not beat uniform
            lengths. `"mass"`: the paper's search on the scores (arXiv 2412.03409): of one sample, what
            `lengths="search"` finds on that prompt. `"reconstruction"`: one pool of how much attention each key gets
            when the prompt is repeated (KVzip, arXiv 2505.23416). `"loss"`: what pruning each unit alone costs answers.
        unit: `"layer"`: one length a layer, or `"head"`: one for each key head (with `"measured"`, both are tried).
        budgets: the grid of the profile, fractions kept, in (0, 1].
        metadata: more to write into the profile, string to string, such as `{"source": "MM-Vet, 10 samples"}`.
        progress: called with the number of samples done after each one.
        on_error: called with the index of a failed sample and the exception; by default a warning is given.
        state_file: where to keep what was found, every few seconds and whenever the calibration ends early; one that
            is there is continued (with the samples in the same order). Deleted at the end.

    Returns:
        The profile. Its metadata has the method, the proposal (`by`), the samples' number, lengths in tokens and, where
        lengths were counted, standard deviation (`spread`), and what was measured (`measured`).

    Raises:
        TypeError, ValueError: an argument is not as above, the model cannot be pruned, samples are too few or all
            failed, a budget is too small for prompts this short, or `state_file` is that of another calibration.
        UnobservedAttentionError: the model computes attention by code of its own.
    """
    plan = Plan(resolve(method), by, unit, tuple(budgets))
    check_model(model)  # what cannot be calibrated is refused before the first sample is looked at
    described = {**describe_model(model), **check_metadata(metadata)}
    state = CalibrationState(state_file, fingerprint_calibration(model, plan) if state_file else {})
    state.read()
    run = Run(model, plan, state, on_error or _warn, progress)
    set_aside: list[Job] = []
    with run:
        run.find(_kept_back(_one_by_one(samples), plan, set_aside))
        run.measure(set_aside)
    profile = run.profile(described)
    state.delete()
    if profile.measured is not None and not profile.measured["beats_uniform"]:
        warnings.warn("the profile does not beat uniform lengths on the samples set aside", stacklevel=2)
    return profile


def check_model(model: Any) -> None:
    """Refuse a model that no sample could be measured on, by a TypeError or ValueError."""
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


# Jobs: samples on their way through the model.


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


def _kept_back(jobs: Iterator[Job], plan: Plan, set_aside: list[Job]) -> Iterator[Job]:
    """The jobs that proposals are made of; the others are put into the list."""
    for job in jobs:
        if plan.sets_aside(job.indices[0]):
            set_aside.append(job)
        else:
            yield job
        del job


@dataclass
class Run:
    """A calibration on its way: a context in which jobs are done, and whose findings are saved when it ends early.

    Attributes:
        model, plan, state: what is calibrated, how, and what was found.
        on_error: called with each failed sample.
        progress: called with the number of samples done.
        failures: the failed samples, by index.
    """

    model: Any
    plan: Plan
    state: CalibrationState
    on_error: OnError
    progress: Progress | None = None
    failures: dict[int, Exception] = field(default_factory=dict)
    _done: int = 0

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: Any) -> None:
        self.state.save()

    def find(self, jobs: Iterable[Job]) -> None:
        """Find what proposals are made of."""
        self._each(jobs, FOUND, partial(find, self.model, self.plan))

    def measure(self, jobs: Sequence[Job]) -> None:
        """Measure what all proposals cost, on samples that were set aside."""
        if not self.plan.is_measured or not self.rows(FOUND):
            return
        self._each(jobs, self._measured, partial(weigh, self.model, self.plan, self.candidates()))

    def candidates(self) -> dict[str, Tensor]:
        """All proposals."""
        return self.plan.candidates(self.rows(FOUND))

    def rows(self, stage: str) -> list[Row]:
        """What was found in a stage, by the index of the sample."""
        return [row for rows in self.state.stage(stage) for row in rows]

    def measured(self) -> list[Row]:
        """What the proposals cost; empty where the plan is not to measure."""
        return self.rows(self._measured) if self.plan.is_measured and self.rows(FOUND) else []

    @property
    def _measured(self) -> str:
        """Stage of what these proposals cost: another one for others, as when a sample failed the time before."""
        numbers = {name: keep.tolist() for name, keep in self.candidates().items()}
        return f"cost of {hashlib.sha256(repr(numbers).encode()).hexdigest()[:16]}"

    def profile(self, metadata: Mapping[str, str]) -> PrefixProfile:
        """The profile of all that was found.

        Raises:
            ValueError: nothing was found, or nothing measured; or a budget is too small for prompts this short.
        """
        rows, measured = self.rows(FOUND), self.measured()
        _refuse_if_nothing_left(rows, self.failures, "there are no samples; one is the least that a profile needs")
        if self.plan.is_measured:
            few = "by='measured' sets every third sample aside, so it needs two; by='reconstruction' does with one"
            _refuse_if_nothing_left(measured, self.failures, few)
        return make_profile(self.plan, rows, metadata, measured)

    def _each(self, jobs: Iterable[Job], stage: str, work: Callable[[Mapping[str, Any]], list[Row]]) -> None:
        for job in jobs:
            left = tuple(index for index in job.indices if f"{stage}/{index}" not in self.state)
            if left:
                self._do(Job(left, job.load), stage, work)
            self._done += len(job.indices)
            if self.progress is not None:
                self.progress(self._done)
            del job

    def _do(self, job: Job, stage: str, work: Callable[[Mapping[str, Any]], list[Row]]) -> None:
        try:
            rows = work(job.load(job.indices))
            of_index = [rows] if len(job.indices) == 1 else [[row] for row in rows]
            found = dict(zip(job.indices, of_index, strict=True))
        except UnobservedAttentionError:
            raise
        except Exception as error:
            # The frames hold the activations of the forward that failed.
            traceback.clear_frames(error.__traceback__)
            failed = error
        else:
            for index, own in found.items():
                self.state.add(f"{stage}/{index}", own)
            return
        if len(job.indices) > 1:  # one bad image must not take its batch with it
            for index in job.indices:
                self._do(Job((index,), job.load), stage, work)
            return
        if is_out_of_memory(failed):
            raise failed
        for index in job.indices:
            self.failures[index] = failed
            self.on_error(index, failed)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out."""
    # On a CPU, torch has no class of its own for it.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def describe_error(error: BaseException) -> str:
    """One line: the message, with the kind of the error where the message alone would say little."""
    message = " ".join(str(error).split())
    known = isinstance(error, (ValueError, RuntimeError, OSError)) and message
    return message if known else f"{type(error).__name__}: {message}".rstrip(": ")


def _refuse_if_nothing_left(rows: Sequence[Row], failures: Mapping[int, Exception], few: str) -> None:
    if rows:
        return
    if not failures:
        raise ValueError(few)
    last = list(failures.values())[-1]
    raise ValueError(f"all samples failed ({len(failures)}); the last one: {describe_error(last)}") from last


# What is found in one sample.


def find(model: Any, plan: Plan, sample: Mapping[str, Any]) -> list[Row]:
    """The tables of each row of a sample that proposals are made of."""
    names = plan.proposals
    if names == ("mass/layer",):
        scores = observe(model, sample, plan.method, max_bytes=plan.max_bytes)
        return [_row(each.shape[1], {names[0]: mass_counts(each[:, None], plan.budgets, plan.sink)}) for each in scores]
    prompt = _answered(model, plan, sample)
    tables: dict[str, list[Tensor]] = {}
    for name in names:
        by, _, unit = name.partition("/")
        if by == "mass":
            scores = [each.mean(1, keepdim=True) if unit == "layer" else each for each in prompt.rows_of_scores()]
            tables[name] = [mass_counts(each, plan.budgets, plan.sink) for each in scores]
        elif by == "loss":
            tables[name] = prompt.losses(LOSS_RATIOS, unit)
        elif (scores := _reconstruction(prompt, plan)) is not None:
            tables[name] = [reconstruction_counts(each, plan.budgets, plan.sink, unit) for each in scores]
    return [
        _row(n_tokens, {name: of_rows[row] for name, of_rows in tables.items()})
        for row, n_tokens in enumerate(prompt.n_tokens)
    ]


def _answered(model: Any, plan: Plan, sample: Mapping[str, Any]) -> AnsweredPrompt:
    image = image_mask_of(sample, model.config) if isinstance(sample, Mapping) else None
    tokens = ANSWER_TOKENS if plan.by in (MEASURED, "loss") else 2
    return AnsweredPrompt(model, sample, plan.method, image=image, max_bytes=plan.max_bytes, answer_tokens=tokens)


def _row(n_tokens: int, tables: Mapping[str, Tensor]) -> Row:
    return {"n_tokens": n_tokens, "tables": {name: each.tolist() for name, each in tables.items()}}


def _reconstruction(prompt: AnsweredPrompt, plan: Plan) -> list[Tensor] | None:
    """The scores of a second pass; None, and a warning, where there are other proposals and the model cannot do it."""
    try:
        return prompt.reconstruction()
    except Exception as error:
        if not plan.is_measured or is_out_of_memory(error):
            raise
        warnings.warn(f"reconstruction is left out: {describe_error(error)}", stacklevel=2)
        return None


def weigh(model: Any, plan: Plan, candidates: Mapping[str, Tensor], sample: Mapping[str, Any]) -> list[Row]:
    """What all candidates cost in each row of a sample: [divergence, agreement] at each budget."""
    prompt = _answered(model, plan, sample)
    tables = {}
    for name, keep in candidates.items():
        profile = PrefixProfile(list(plan.budgets), keep.expand(-1, len(prompt.layers), -1))
        costs = [prompt.cost(prompt.kept(profile, budget)) for budget in plan.budgets]
        tables[name] = torch.stack([torch.stack(pair, dim=-1) for pair in costs], dim=1)  # [batch, n_budgets, 2]
    return [
        _row(n_tokens, {name: of_rows[row] for name, of_rows in tables.items()})
        for row, n_tokens in enumerate(prompt.n_tokens)
    ]


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
        "by": plan.by,
        "unit": plan.unit,
        "budgets": list(plan.budgets),
        **more,
    }
