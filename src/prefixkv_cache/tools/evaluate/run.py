"""A model and samples in; a table, a summary, drawings and the exact command out.

What stands around measure.py when it is run as a command: what is asked for, who measures which batch, what is kept of
an interrupted run, and what is written at the end. Batches are fixed by the samples' order, so that neither an
interruption nor the number of processes changes a digit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...calibration.processes import Processes, Report, join_processes
from ...calibration.state import fingerprint_model
from ...profiles.files import write_atomically
from ..arguments import load, out_folder
from .measure import Batch, Row, check_memory
from .methods import FULL, Candidate, parse_candidates
from .plots import draw_all, have_matplotlib
from .report import csv_text, summary_text, tasks_of
from .results import Results, Unit
from .tasks import Sample, read_samples

TABLE, SUMMARY, RUN = "results.csv", "summary.md", "run.json"
_PACKAGES = ("prefixkv-cache", "torch", "transformers", "tokenizers", "numpy", "pillow")


def run_evaluate(arguments: argparse.Namespace) -> None:
    """The command. What can be wrong with the arguments is found before the model is loaded.

    Raises:
        TypeError, ValueError, OSError, ImportError: bad input, in one line.
    """
    candidates = parse_candidates(arguments.methods, arguments.profile)
    reference = _check_reference(arguments.reference, candidates)
    samples = read_samples(arguments)
    out = _check_out(arguments.out, arguments.resume)
    batches = batches_of(samples, arguments.batch_size)
    with join_processes(arguments) as processes:
        report = Report(processes, "evaluating")
        report.say(f"loading {arguments.model}")
        model, processor = load(arguments)
        check_memory(model, processor, batches)
        wanted = _units(len(batches), candidates, arguments.budgets, model)
        results = _open_results(out, _fingerprint(model, samples, arguments), processes, arguments.resume)
        total, done = (
            _answers(units, batches) for units in (wanted, [unit for unit in wanted if unit in results.units])
        )
        report.say(f"evaluating {len(samples)} samples: {total} answers, {done} of them done before")
        started = time.monotonic()
        try:
            _measure(model, processor, batches, candidates, wanted, results, report)
        except KeyboardInterrupt:
            kept = _answers(results.units, batches)
            said = f"{kept} answers are kept in {out}; go on with --resume" if kept else "nothing is kept yet"
            report.write(f"prefixkv evaluate: {said}")
            raise
        processes.wait()
        if processes.rank == 0:
            results.read()  # what the other processes measured
            names = [candidate.name for candidate in candidates if candidate.name != FULL]
            tasks = tasks_of(rows := _rows(results, wanted), names, arguments.budgets, arguments.seed)
            run = _describe_run(arguments, model, time.monotonic() - started)
            title = f"{Path(arguments.model).name or arguments.model} on {Path(arguments.data).name}"
            write_atomically(out / TABLE, csv_text(rows))
            write_atomically(out / SUMMARY, summary_text(tasks, reference, title))
            write_atomically(out / RUN, json.dumps(run, indent=2) + "\n")
            none = "no drawings (they need matplotlib: pip install '.[plot]' in a checkout)"
            drawn = f"{len(draw_all(tasks, out))} drawings" if have_matplotlib() else none
            print(f"{out}: {len(rows)} rows in {TABLE}, {SUMMARY}, {RUN}, {drawn}")


# What is asked for.


def _check_reference(name: str | None, candidates: Sequence[Candidate]) -> str:
    names = [candidate.name for candidate in candidates if candidate.name != FULL]
    if name is not None and name not in names:
        raise ValueError(f"--reference is {name!r}, which is not among the methods: {', '.join(names)}")
    return names[0] if name is None else name


def _check_out(text: str, resume: bool) -> Path:
    path = out_folder(text)
    if path.is_dir() and any(path.iterdir()) and not resume:
        raise ValueError(f"--out is {text!r}, which is not empty; give another folder, or --resume to go on with it")
    return path


# What is measured, and by whom.


def batches_of(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Batches of one task each, in the samples' order."""
    batches = []
    for _, of_task in itertools.groupby(samples, lambda sample: sample.task):
        group = list(of_task)
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def _units(n_batches: int, candidates: Sequence[Candidate], budgets: Sequence[float], model: Any) -> list[Unit]:
    """All that is asked for: in each batch the full cache, then every candidate at every budget."""
    cells = [(FULL, 1.0, "")]
    for candidate in candidates:
        if candidate.name != FULL:
            candidate.make(model, budgets[0])  # finds what does not fit this model
            cells += [(candidate.name, budget, candidate.identity) for budget in budgets]
    return [Unit(batch, *cell) for batch in range(n_batches) for cell in cells]


def _answers(units: Iterable[Unit], batches: Sequence[Sequence[Sample]]) -> int:
    """How many answers these units are."""
    return sum(len(batches[unit.batch]) for unit in units)


def _measure(
    model: Any,
    processor: Any,
    batches: Sequence[Sequence[Sample]],
    candidates: Sequence[Candidate],
    wanted: Sequence[Unit],
    results: Results,
    report: Report,
) -> None:
    """This process's share: every n-th batch, one at a time in memory."""
    rank, count = report.processes.rank, report.processes.count
    todo = [unit for unit in wanted if unit not in results.units and unit.batch % count == rank]
    named = {candidate.name: candidate for candidate in candidates}
    with report.bar(_answers(todo, batches), "answer") as progress:
        done = 0
        for index, units in itertools.groupby(todo, lambda unit: unit.batch):
            batch = Batch(model, processor, batches[index])
            for unit in units:
                batch.progress = lambda ended, done=done: progress(done + ended)
                full = unit.method == FULL
                results.add(unit, batch.full() if full else batch.candidate(named[unit.method], unit.budget))
                progress(done := done + len(batches[index]))


def _open_results(out: Path, fingerprint: Mapping[str, Any], processes: Processes, resume: bool) -> Results:
    processes.wait()  # nobody makes the folder before all have seen that it is empty
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out, dict(fingerprint), processes.rank)
    if resume:
        results.read()
    processes.wait()  # nobody writes before all have read
    return results


def _fingerprint(model: Any, samples: Sequence[Sample], arguments: argparse.Namespace) -> dict[str, Any]:
    """What has to be the same for one evaluation to go on where another one stopped."""
    asked = [(each.id, each.task, each.prompt, each.answer, each.n_pictures, each.limit) for each in samples]
    return {
        **fingerprint_model(model),
        "data": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
        "batch_size": arguments.batch_size,
        **{name: found for name, found in _versions().items() if name in ("prefixkv-cache", "torch", "transformers")},
    }


def _rows(results: Results, wanted: Sequence[Unit]) -> list[Row]:
    """All rows that were asked for: by task and sample, the full cache first."""
    rows = []
    for _, of_batch in itertools.groupby(wanted, lambda unit: unit.batch):
        for of_sample in zip(*(results.units[unit] for unit in of_batch), strict=True):
            rows += of_sample
    return rows


def _describe_run(arguments: argparse.Namespace, model: Any, seconds: float) -> dict[str, Any]:
    return {
        "command": arguments.command_line,
        "versions": _versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(model.device),
        "model": fingerprint_model(model),
        "seconds": round(seconds, 1),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
