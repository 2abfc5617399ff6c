"""`prefixkv calibrate`: data files and a model's name in, a profile file out.

What stands around calibration/calibrate.py when it is run as a command: which records are taken, how they become
batches, which process takes which, the progress bar, and the state file. Several processes each take every n-th batch,
and the first one writes the profile; findings are kept by the record's index, so the file is the one that a single
process writes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_method, add_model, budgets, count, load, out_path, positive

if TYPE_CHECKING:
    from ..calibration.plan import Plan
    from ..calibration.processes import Processes, Report
    from ..calibration.run import Job, Run
    from .data import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prefixkv calibrate`."""
    add_model(parser)
    parser.add_argument("--data", metavar="FILE", help="LLaVA conversation JSON, MM-Vet JSON, or JSONL of either")
    parser.add_argument("--images", metavar="DIR", help="where the file's images lie; without --data: all images there")
    parser.add_argument("--prompt", metavar="TEXT", help="said to every image, instead of what the file says")
    parser.add_argument("--out", required=True, metavar="P", help="profile to write, a name in .safetensors")
    add_method(parser, default="the default method")
    parser.add_argument(
        "--by",
        choices=["mass", "reconstruction", "loss", "measured"],
        default="measured",
        help="where lengths come from; mass: the paper's search; measured: all of them are tried, and the best on "
        "samples set aside is kept (%(default)s)",
    )
    parser.add_argument("--unit", choices=["layer", "head"], default="layer", help="what has a length (%(default)s)")
    parser.add_argument("--samples", type=count, default=10, metavar="N", help="records, or 'all' (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which records (%(default)s)")
    parser.add_argument("--budgets", type=budgets, metavar="B,...", help="grid, fractions kept (default: 0.05 to 1.0)")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="records a forward (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted calibration stopped")


def run(arguments: argparse.Namespace) -> None:
    """The command. What can be wrong with the arguments is found before the model is loaded.

    Raises:
        TypeError, ValueError, OSError: bad input, in one line.
    """
    from ..calibration.plan import DEFAULT_BUDGETS, Plan
    from ..calibration.processes import Report, join_processes
    from .data import read_records

    chosen = arguments.budgets or DEFAULT_BUDGETS
    plan = Plan.asked(arguments.method, arguments.by, arguments.unit, chosen)
    out = _check_out(arguments.out, arguments.resume)
    all_records = read_records(arguments.data, arguments.images, arguments.prompt)
    records = _choose(all_records, arguments.samples, arguments.seed)
    with join_processes(arguments) as processes:
        report = Report(processes, "calibrating")
        report.say(f"loading {arguments.model}")
        model, processor = load(arguments)
        running = _start(model, plan, records, out, report, arguments.resume)
        done = len(running.state.samples)
        report.say(f"calibrating on {len(records)} of {len(all_records)} records, {done} of them done before")
        _work(running, _Records(records, arguments.batch_size, processes, model, processor), report)
        if processes.rank == 0:
            _write(running, out, _source(arguments, len(all_records)))


def _check_out(out: str, resume: bool) -> Path:
    from ..profiles.file import SUFFIX

    path = out_path(out, "a profile", SUFFIX)
    if not resume and (left := _state_files(path)):
        raise ValueError(
            f"{os.fspath(left[0])!r} holds what an interrupted calibration found: go on with --resume, or delete it"
        )
    return path


def _choose(records: list[Record], n: int | None, seed: int) -> list[Record]:
    """That many records at random, in their old order; all of them where there are no more, or n is None."""
    if n is None or n >= len(records):
        return records
    return [records[index] for index in sorted(random.Random(seed).sample(range(len(records)), n))]


def _source(arguments: argparse.Namespace, n_records: int) -> str:
    """Where the samples come from, without saying where that lies on this machine."""
    name = Path(arguments.images if arguments.data is None else arguments.data).resolve().name
    chosen = arguments.samples is not None and arguments.samples < n_records
    return f"{name}, seed {arguments.seed}" if chosen else f"{name}, all {n_records} records"


# Records to what the model takes.


class _Records:
    """Records, and how they become jobs of this process. Pictures are opened when their turn comes."""

    def __init__(self, records: Sequence[Record], batch_size: int, processes: Processes, model: Any, processor: Any):
        self.records, self.batch_size, self.processes = records, batch_size, processes
        self._model, self._processor = model, processor

    def jobs(self, indices: Sequence[int], shared: bool = True) -> list[Job]:
        """Batches of these records in order; this process's share of them, or all."""
        from ..calibration.run import Job

        starts = range(0, len(indices), self.batch_size)
        starts = starts[self.processes.rank :: self.processes.count] if shared else starts
        return [Job(tuple(indices[start : start + self.batch_size]), self._load) for start in starts]

    def _load(self, indices: tuple[int, ...]) -> Mapping[str, Any]:
        from .loading import open_image, prepare

        chosen = [self.records[index] for index in indices]
        requests = [(record.prompt, [open_image(path) for path in record.images]) for record in chosen]
        return prepare(self._processor, requests, self._model.device)


def _work(running: Run, records: _Records, report: Report) -> None:
    """Find and measure, this process's share; what the others have found is brought together after each."""
    from ..calibration.calibrate import IMPROVED_ON

    aside = [index for index in range(len(records.records)) if running.plan.sets_aside(index)]
    others = sorted({*range(len(records.records))} - {*aside})
    jobs, jobs_aside = records.jobs(others), records.jobs(aside)
    improve_on = records.jobs(others[:IMPROVED_ON], shared=False) if records.processes.rank == 0 else []
    running.on_error = _say_failed(report, records.records)
    running.share = partial(_gather, records.processes, running)
    try:
        n_found, n_aside = (sum(len(job.indices) for job in each) for each in (jobs, jobs_aside))
        with report.bar(running.plan.steps(n_found, n_aside), "prompt") as progress, running:
            running.progress = progress
            running.work(jobs, jobs_aside, improve_on)
    except KeyboardInterrupt:
        kept = len(running.state.samples)
        said = (
            f"{kept} samples are kept in {running.state.path}; go on with --resume" if kept else "nothing is kept yet"
        )
        print(f"prefixkv calibrate: {said}", file=sys.stderr)
        raise


def _say_failed(report: Report, records: Sequence[Record]) -> Callable[[int, Exception], None]:
    """What to call with each failed sample, in the process that has it."""
    from ..calibration.find import describe_error

    return lambda index, error: report.write(f"skipped record {records[index].id!r}: {describe_error(error)}")


def _gather(processes: Processes, running: Run) -> None:
    """Bring what all have found together in the state of each, and the failures of all."""
    from ..calibration.find import describe_error

    if processes.count == 1:
        return
    messages = {index: describe_error(error) for index, error in running.failures.items()}
    for samples, failures in processes.gather((running.state.samples, messages)):
        running.state.samples.update(samples)
        running.failures.update({index: ValueError(message) for index, message in failures.items()})


def _write(running: Run, out: Path, source: str) -> None:
    from ..calibration.calibrate import describe_model
    from ..calibration.plan import mean_costs, table

    profile = running.profile({**describe_model(running.model), "source": source})
    profile.save(out)
    for path in _state_files(out):
        path.unlink(missing_ok=True)
    if profile.measured is not None:
        print("\n".join(table(mean_costs(running.compared()), running.plan.compared_at)))
        beats = "beats" if profile.measured["beats_uniform"] else "does not beat"
        print(f"kept: {profile.metadata['by']}, which {beats} uniform lengths on the samples set aside")
    skipped = f", {len(running.failures)} skipped" if running.failures else ""
    heads = f" of {profile.n_heads} key heads" if profile.n_heads > 1 else ""
    print(f"{out}: {profile.n_layers} layers{heads} from {profile.metadata['samples']} samples{skipped}")


# What an interrupted run leaves behind: a file for each process, read by all.


def _start(model: Any, plan: Plan, records: Sequence[Record], out: Path, report: Report, resume: bool) -> Run:
    from ..calibration.calibrate import check_model, fingerprint_calibration
    from ..calibration.run import Run
    from ..calibration.state import CalibrationState

    check_model(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    processes = report.processes
    asked = [(record.id, record.prompt, [path.name for path in record.images]) for record in records]
    data = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    name = f"{out.name}.state.json" if processes.count == 1 else f"{out.name}.state-{processes.rank}.json"
    state = CalibrationState(out.with_name(name), fingerprint_calibration(model, plan, data=data))
    if resume:
        for path in _state_files(out):
            state.read(path)
    processes.wait()  # nobody writes before all have read
    return Run(model, plan, state, _say_failed(report, records))


def _state_files(out: Path) -> list[Path]:
    ours = re.compile(re.escape(out.name) + r"\.state(-\d+)?\.json")
    there = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    return [path for path in there if ours.fullmatch(path.name)]
