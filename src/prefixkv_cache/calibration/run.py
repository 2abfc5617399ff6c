"""A calibration on its way: samples go through the model, findings are kept, and the next round follows from them.

Rounds: find what proposals are made of; measure all proposals; measure the best lengths with other rankings; improve
the best by gradient, above each floor, and measure that; measure the one that won at all budgets. What a sample gives
is in find.py, the arithmetic in plan.py and descent.py.
"""

from __future__ import annotations

import hashlib
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..profiles.profile import PrefixProfile
from .descent import Descent
from .find import answered, as_row, describe_error, find, is_out_of_memory, weigh
from .observe import UnobservedAttentionError
from .plan import REFERENCES, Candidate, Plan, Row, best, make_profile, mean_costs
from .state import CalibrationState

OnError = Callable[[int, Exception], None]
Progress = Callable[[int], None]
FOUND = "found"
"""Stage of the samples that proposals are made of."""


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


@dataclass(frozen=True)
class Round:
    """What is measured on the samples set aside.

    Attributes:
        candidates: by name.
        budgets: fractions kept, at which they are measured.
    """

    candidates: Mapping[str, Candidate]
    budgets: tuple[float, ...]

    @property
    def stage(self) -> str:
        """Name of what these candidates cost: another one for others, as when a sample failed the time before."""
        said = {name: (each.keep.tolist(), each.method.spell()) for name, each in self.candidates.items()}
        return f"cost of {hashlib.sha256(repr((said, self.budgets)).encode()).hexdigest()[:16]}"


@dataclass
class Run:
    """A calibration on its way: a context in which jobs are done, and whose findings are saved when it ends early.

    Attributes:
        model, plan, state: what is calibrated, how, and what was found.
        on_error: called with each failed sample.
        progress: called with the number of samples done.
        failures: the failed samples, by index.
        share: called after each step; where several processes work, it brings their findings together.
    """

    model: Any
    plan: Plan
    state: CalibrationState
    on_error: OnError
    progress: Progress | None = None
    failures: dict[int, Exception] = field(default_factory=dict)
    share: Callable[[], None] = lambda: None
    _done: int = 0

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: Any) -> None:
        self.state.save()

    def work(self, jobs: Iterable[Job], aside: Sequence[Job], improve_on: Sequence[Job]) -> None:
        """Do everything.

        Args:
            jobs: what proposals are made of.
            aside: what candidates are measured on.
            improve_on: what lengths are improved on by gradient; empty: another process does that.
        """
        self._each(jobs, FOUND, partial(find, self.model, self.plan))
        self.share()
        for each in self._rounds(improve_on):
            self._each(aside, each.stage, partial(weigh, self.model, self.plan, each.candidates, each.budgets))
            self.share()

    def _rounds(self, improve_on: Sequence[Job] | None = None) -> Iterator[Round]:
        """What to measure, one after the other; what comes next depends on what the last ones cost.

        All lengths; the best of them with other rankings; the best of all, improved by gradient; and the one that won,
        with the references, at all budgets.

        Args:
            improve_on: as above; None: everything was done before.
        """
        rows = self.rows(FOUND)
        if not self.plan.is_measured or not rows:
            return
        few = self.plan.compared_at
        rounds = [Round(self.plan.candidates(rows), few)]
        yield rounds[-1]
        if self.plan.rankings and (won := self._best(rounds)):
            rounds.append(Round(self.plan.ranked(won[0], won[1].keep), few))
            yield rounds[-1]
        if (won := self._best(rounds)) and (some := self._improved(won[1], improve_on)):
            rounds.append(Round(some, few))
            yield rounds[-1]
        if won := self._best(rounds):
            references = {name: each for name, each in rounds[0].candidates.items() if name in REFERENCES}
            yield Round({won[0]: won[1], **references}, self.plan.budgets)

    def _improved(self, candidate: Candidate, jobs: Sequence[Job] | None) -> dict[str, Candidate]:
        """A candidate's lengths after a descent above each floor; nothing where that could not be done."""
        floors = {str(floor): floor for floor in self.plan.floors}  # as a state file names them
        methods = {name: candidate.method.replace(floor=floor) for name, floor in floors.items()}
        starts = {name: Candidate(candidate.keep, method) for name, method in methods.items()}
        stage = f"improved {Round(starts, self.plan.budgets).stage}"
        if f"{stage}/0" not in self.state and jobs is not None:
            keeps = self._descend(starts, jobs) if jobs else {}
            if keeps:
                self.state.add(f"{stage}/0", [as_row(1, keeps)])
            self.share()
        rows = self.rows(stage)
        if not rows:
            return {}
        tables = rows[0]["tables"]
        return self.plan.improved({floors[name]: torch.tensor(tables[name], dtype=torch.float64) for name in starts})

    def _best(self, rounds: Sequence[Round]) -> tuple[str, Candidate] | None:
        """The best of the candidates so far; None where nothing could be measured."""
        measured = self._costs(rounds)
        if not measured:
            return None
        name = best(mean_costs(measured))
        return name, {name: each for some in rounds for name, each in some.candidates.items()}[name]

    def _descend(self, starts: Mapping[str, Candidate], jobs: Sequence[Job]) -> dict[str, Tensor]:
        """Lengths improved on samples: float64 [n_budgets, n_layers, n_heads or 1] by name. Empty: it failed.

        Args:
            starts: candidates by name, whose methods differ in their floors alone.
        """
        method = next(iter(starts.values())).method
        descents: dict[str, Descent] = {}
        seen: dict[tuple[int, ...], tuple[Tensor, dict[int, Tensor]]] = {}  # small beside the prompt's cache
        try:
            visits = self.plan.visits(len(jobs))
            for visit in range(visits):
                job = jobs[visit % len(jobs)]
                answer, entries = seen.get(job.indices, (None, None))
                prompt = answered(self.model, self.plan, job.load(job.indices), [method], answer)
                entries = prompt.entry_ratios(method) if entries is None else entries
                seen[job.indices] = prompt.answer, entries
                if not descents:
                    size = prompt.n_layers_and_heads, max(prompt.n_tokens)
                    descents = {name: self.plan.descent(start, *size, visits) for name, start in starts.items()}
                for descent in descents.values():
                    descent.step(prompt, entries)
                self._count(1)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            warnings.warn(f"lengths are not improved by gradient: {describe_error(error)}", stacklevel=2)
            return {}
        return {name: descent.at_budgets(self.plan.budgets) for name, descent in descents.items()}

    def rows(self, stage: str) -> list[Row]:
        """What was found in a stage, by the index of the sample."""
        return [row for _, rows in self.state.of(stage) for row in rows]

    def compared(self) -> list[Row]:
        """What all candidates cost in the samples that all of them were measured on, at a few budgets."""
        return self._costs(list(self._rounds())[:-1])

    def _costs(self, rounds: Sequence[Round]) -> list[Row]:
        """What all candidates of these rounds cost, for each sample that all were measured on."""
        found = [{key.rpartition("/")[2]: rows for key, rows in self.state.of(each.stage)} for each in rounds]
        places = sorted(set.intersection(*map(set, found)), key=int) if found else []
        return [
            {
                "n_tokens": same[0]["n_tokens"],
                "tables": {name: each for row in same for name, each in row["tables"].items()},
            }
            for place in places
            for same in zip(*(of_round[place] for of_round in found), strict=True)
        ]

    def profile(self, metadata: Mapping[str, str]) -> PrefixProfile:
        """The profile of all that was found.

        Raises:
            ValueError: nothing was found, or nothing measured; or a budget is too small for prompts this short.
        """
        rows, last = self.rows(FOUND), list(self._rounds())[-1:]
        measured = self._costs(last)
        _refuse_if_nothing_left(rows, self.failures, "there are no samples; one is the least that a profile needs")
        if self.plan.is_measured:
            few = "by='measured' sets every third sample aside, so it needs two; by='reconstruction' does with one"
            _refuse_if_nothing_left(measured, self.failures, few)
        return make_profile(self.plan, rows, metadata, measured, last[0].candidates if last else {})

    def _each(self, jobs: Iterable[Job], stage: str, work: Callable[[Mapping[str, Any]], list[Row]]) -> None:
        for job in jobs:
            left = tuple(index for index in job.indices if f"{stage}/{index}" not in self.state)
            if left:
                self._do(Job(left, job.load), stage, work)
            self._count(len(job.indices))
            del job

    def _count(self, steps: int) -> None:
        self._done += steps
        if self.progress is not None:
            self.progress(self._done)

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


def _refuse_if_nothing_left(rows: Sequence[Row], failures: Mapping[int, Exception], few: str) -> None:
    if rows:
        return
    if not failures:
        raise ValueError(few)
    last = list(failures.values())[-1]
    raise ValueError(f"all samples failed ({len(failures)}); the last one: {describe_error(last)}") from last
