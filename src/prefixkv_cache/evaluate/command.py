"""`prefixkv evaluate`: a model and samples in; a table, a summary, drawings and the exact command out.

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
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..calibration_state import fingerprint_model
from ..processes import Processes, Report, join_processes
from ..profile import check_budget
from .measure import METRICS, Batch, Plan, Row, check_answers, check_samples
from .methods import FULL, Method, parse_methods
from .metrics import check_rouge
from .plots import draw_all, have_matplotlib
from .report import csv_text, summary_text, tasks_of
from .results import Results, Unit
from .tasks import DEFAULT_DRAWN, DRAWN, SPLITS, TASKS, Sample, drawn_samples, file_samples

TABLE, SUMMARY, RUN = "results.csv", "summary.md", "run.json"


def run_evaluate(arguments: argparse.Namespace, load: Callable[[], tuple[Any, Any]]) -> None:
    """The command. What can be wrong with the arguments is found before the model is loaded.

    Args:
        arguments: as `prefixkv evaluate` parses them.
        load: makes model and processor; may look at `arguments.device`, which is set for each process.

    Raises:
        TypeError, ValueError, OSError, ImportError: bad input, in one line.
    """
    methods = parse_methods(arguments.methods, profile=arguments.profile, as_published=arguments.as_published)
    budgets = _check_budgets(arguments.budgets)
    reference = _check_reference(arguments.reference, methods)
    plan = Plan(_check_metrics(arguments.metrics), arguments.as_published, arguments.seed)
    if arguments.batch_size < 1 or arguments.max_new_tokens < 1:
        raise ValueError("--batch-size and --max-new-tokens must be at least 1")
    samples = _read_samples(arguments)
    check_samples(samples, plan)
    if "rouge" in plan.metrics:
        check_rouge()
    out = _check_out(arguments.out, arguments.resume)
    batches = _batches(samples, arguments.batch_size)
    with join_processes(arguments) as processes:
        report = Report(processes, "evaluating")
        report.say(f"loading {arguments.model}")
        model, processor = load()
        check_answers(model, processor, batches, plan)
        wanted = _units(len(batches), methods, budgets, model)
        results = _open_results(out, _fingerprint(model, samples, plan, arguments), processes, arguments.resume)
        done = sum(unit in results for unit in wanted)
        report.say(f"evaluating {len(samples)} samples, {len(wanted)} units of work, {done} of them done before")
        work = _Work(model, processor, batches, {method.name: method for method in methods}, plan)
        started = time.perf_counter()
        try:
            measured = _measure(work, wanted, results, processes, report)
        except KeyboardInterrupt:
            print(f"prefixkv evaluate: {len(results)} units are kept; go on with --resume", file=sys.stderr)
            raise
        of_all = processes.gather((results.units, measured))
        seconds = time.perf_counter() - started
        if processes.rank == 0:
            for units, _ in of_all:
                results.merge(units)
            results.settle()
            names = [method.name for method in methods if method.name != FULL]
            run = _describe_run(arguments, model, seconds, sum(each for _, each in of_all))
            _write(out, _rows(results, wanted), names, budgets, reference, arguments, run)


# What is asked for.


def _check_budgets(budgets: Sequence[float]) -> tuple[float, ...]:
    return tuple(sorted({check_budget(budget) for budget in budgets}))


def _check_metrics(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
    if not names:
        raise ValueError(f"--metrics names none; there are {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in names)


def _check_reference(name: str | None, methods: Sequence[Method]) -> str:
    names = [method.name for method in methods if method.name != FULL]
    if not names:
        raise ValueError("--methods names the full cache only, which is measured anyway; name a method to compare")
    if name is not None and name not in names:
        raise ValueError(f"--reference is {name!r}, which is not among the methods: {', '.join(names)}")
    return names[0] if name is None else name


def _check_out(text: str, resume: bool) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out is {text!r}, which is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not resume:
        raise ValueError(f"--out is {text!r}, which is not empty; give another folder, or --resume to go on with it")
    return path


def _read_samples(arguments: argparse.Namespace) -> list[Sample]:
    limit = arguments.max_new_tokens
    if arguments.data in DRAWN:
        for option in ("images", "prompt"):
            if getattr(arguments, option) is not None:
                raise ValueError(f"--{option} is for data files; {arguments.data} have their own")
        tasks = TASKS if arguments.task is None else (arguments.task,)
        kinds = None if arguments.kinds is None else [kind.strip() for kind in arguments.kinds.split(",")]
        n = DEFAULT_DRAWN if arguments.samples is None else arguments.samples
        if n == "all":
            raise ValueError(f"--samples is 'all', but {arguments.data} never end; give a number")
        return drawn_samples(
            arguments.data, split=arguments.split or SPLITS[0], n=n, tasks=tasks, kinds=kinds, limit=limit
        )
    for option in ("task", "split", "kinds"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is for the drawn tasks ({', '.join(DRAWN)}), not for data files")
    n = None if arguments.samples in (None, "all") else arguments.samples
    if n is not None and n < 1:
        raise ValueError(f"--samples is {n}; at least 1")
    return file_samples(arguments.data, arguments.images, arguments.prompt, n=n, seed=arguments.seed, limit=limit)


# What is measured, and by whom.


def _batches(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Batches of one task each, in the samples' order."""
    batches = []
    for _, of_task in itertools.groupby(samples, lambda sample: sample.task):
        group = list(of_task)
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def _units(n_batches: int, methods: Sequence[Method], budgets: Sequence[float], model: Any) -> list[Unit]:
    """All that is asked for: in each batch the full cache, then every method at every budget."""
    cells = [(FULL, 1.0, "")]
    for method in methods:
        if method.base != FULL:
            profile = _profile_digest(method.make(model, budgets[0]))  # also finds what does not fit this model
            cells += [(method.name, budget, profile) for budget in budgets]
    return [Unit(batch, *cell) for batch in range(n_batches) for cell in cells]


def _profile_digest(cache: Any) -> str:
    profile = getattr(cache, "profile", None)
    return "" if profile is None else _digest([profile.budgets.tolist(), profile.keep.tolist()])


@dataclass(frozen=True)
class _Work:
    """What is measured with what."""

    model: Any
    processor: Any
    batches: Sequence[Sequence[Sample]]
    methods: Mapping[str, Method]
    plan: Plan


def _measure(work: _Work, wanted: Sequence[Unit], results: Results, processes: Processes, report: Report) -> int:
    """This process's share: every n-th batch. Returns how many rows were measured."""
    todo = [unit for unit in wanted if unit not in results and unit.batch % processes.count == processes.rank]
    measured = 0
    with report.bar(sum(len(work.batches[unit.batch]) for unit in todo)) as progress:
        for number, units in itertools.groupby(todo, lambda unit: unit.batch):
            batch = Batch(work.model, work.processor, work.batches[number], work.plan)
            for unit in units:
                full = unit.method == FULL
                results.add(unit, batch.full() if full else batch.method(work.methods[unit.method], unit.budget))
                measured += len(work.batches[number])
                progress(measured)
    return measured


def _open_results(out: Path, fingerprint: dict[str, Any], processes: Processes, resume: bool) -> Results:
    processes.wait()  # nobody makes the folder before all have seen that it is empty
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out, fingerprint, processes.rank)
    if resume:
        results.read()
        processes.wait()  # nobody writes before all have read
        if processes.rank == 0:
            results.settle()
        processes.wait()
    return results


def _fingerprint(model: Any, samples: Sequence[Sample], plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """What has to be the same for one evaluation to go on where another one stopped."""
    asked = [(each.id, each.task, each.prompt, each.answer, each.n_pictures, each.limit) for each in samples]
    return {
        **fingerprint_model(model),
        "data": _digest(asked),
        "metrics": list(plan.metrics),
        "as_published": plan.shift_positions,
        "seed": plan.seed,
        "batch_size": arguments.batch_size,
        **{name: found for name, found in _versions().items() if name in ("prefixkv-cache", "torch", "transformers")},
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


# What is written.


def _rows(results: Results, wanted: Sequence[Unit]) -> list[Row]:
    """All rows that were asked for: by task and sample, the full cache first."""
    units = results.units
    rows = []
    for _, of_batch in itertools.groupby(wanted, lambda unit: unit.batch):
        of_units = [units[unit] for unit in of_batch]
        n = len(of_units[-1])
        rows += [row for index in range(n) for of_unit in of_units for row in of_unit[index::n]]
    return rows


def _write(
    out: Path,
    rows: Sequence[Row],
    names: Sequence[str],
    budgets: Sequence[float],
    reference: str,
    arguments: argparse.Namespace,
    run: dict[str, Any],
) -> None:
    tasks = tasks_of(rows, names, budgets, arguments.seed)
    title = f"{Path(arguments.model).name or arguments.model} on {Path(arguments.data).name}"
    (out / TABLE).write_text(csv_text(rows), encoding="utf-8")
    summary = summary_text(tasks, reference, title=title, as_published=arguments.as_published)
    (out / SUMMARY).write_text(summary, encoding="utf-8")
    (out / RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    drawn = len(draw_all(tasks, out)) if have_matplotlib() else 0
    pictures = f"{drawn} drawings" if drawn else "no drawings, which need matplotlib ('prefixkv-cache[plot]')"
    print(f"{out}: {len(rows)} rows in {TABLE}, {SUMMARY}, {RUN}, {pictures}")


def _describe_run(arguments: argparse.Namespace, model: Any, seconds: float, measured: int) -> dict[str, Any]:
    return {
        "command": arguments.command_line,
        "versions": _versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(model.device),
        "model": fingerprint_model(model),
        "seed": arguments.seed,
        "seconds": round(seconds, 1),
        "rows_a_second": round(measured / seconds, 2) if measured else None,
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **dict(_found_versions())}


def _found_versions() -> Iterator[tuple[str, str]]:
    for name in ("prefixkv-cache", "torch", "transformers", "tokenizers", "numpy", "rouge-score", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)
