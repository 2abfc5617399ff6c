"""`prefixkv calibrate`: data files and a model's name in, a profile file out.

What stands around calibrate.py when it is run as a command: which records are taken, how they become batches, who
measures which where several processes were launched, the progress bar, and the state file. Where there are several
processes, each measures every n-th batch, and the first one gathers the lengths and writes the profile: whole numbers
by the record's index, so that the file is the one that a single process writes.
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
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .calibrate import (
    DEFAULT_BUDGETS,
    Job,
    Settings,
    check_model,
    describe_error,
    describe_model,
    fingerprint_calibration,
    make_profile,
    measure,
    refuse_if_nothing_left,
)
from .calibrated_for import DEFAULT, plain_ranking
from .calibration_state import CalibrationState
from .data import Record, read_records
from .loading import open_image, prepare
from .processes import Processes, Report, join_processes
from .profile import SUFFIX
from .scoring import Ranking


def run_calibrate(arguments: argparse.Namespace, load: Callable[[], tuple[Any, Any]]) -> None:
    """The command. What can be wrong with the arguments is found before the model is loaded.

    Args:
        arguments: as `prefixkv calibrate` parses them.
        load: makes model and processor; may look at `arguments.device`, which is set for each process.

    Raises:
        TypeError, ValueError, OSError: bad input, in one line.
    """
    settings = Settings(arguments.budgets or DEFAULT_BUDGETS, _ranking(arguments), arguments.sink)
    out = _check_out(arguments.out)
    if arguments.batch_size < 1 or (arguments.samples is not None and arguments.samples < 1):
        raise ValueError("--samples and --batch-size must be at least 1")
    all_records = read_records(arguments.data, arguments.images, arguments.prompt)
    records = _choose(all_records, arguments.samples, arguments.seed)
    with join_processes(arguments) as processes:
        report = Report(processes, "calibrating")
        report.say(f"loading {arguments.model}")
        model, processor = load()
        check_model(model, settings)
        state = _open_state(model, settings, records, out, processes, arguments.resume)
        report.say(f"calibrating on {len(records)} of {len(all_records)} records, {len(state)} of them done before")
        jobs = _jobs(records, arguments.batch_size, processes, model, processor)
        try:
            with report.bar(sum(len(job.indices) for job in jobs)) as progress:
                failures = measure(
                    model, jobs, settings, state, progress=progress, on_error=_say_failed(report, records)
                )
        except KeyboardInterrupt:
            print(f"prefixkv calibrate: {len(state)} samples are kept; go on with --resume", file=sys.stderr)
            raise
        failures = _gather(processes, state, failures)
        if processes.rank == 0:
            refuse_if_nothing_left(state.measurements(), failures)
            metadata = {**describe_model(model), "source": _source(arguments, len(all_records))}
            profile = make_profile(state.measurements(), settings, metadata)
            profile.save(out)
            _remove(_state_files(out))
            skipped = f", {len(failures)} skipped" if failures else ""
            print(f"{out}: {profile.n_layers} layers from {profile.metadata['samples']} samples{skipped}")


def _ranking(arguments: argparse.Namespace) -> Ranking:
    """How the cache will rank its keys: the default, and what was asked for instead."""
    asked = {each.name: value for each in fields(Ranking) if (value := getattr(arguments, each.name)) is not None}
    if not arguments.paper:
        return replace(DEFAULT, **asked)
    if asked:
        option = next(iter(asked)).replace("_", "-")
        raise ValueError(f"--paper says all of the ranking, the plain one of all queries; leave --{option} out")
    return plain_ranking("all")


def _check_out(out: str) -> Path:
    path = Path(out)
    if path.suffix != SUFFIX:
        raise ValueError(f"--out is {out!r}; a profile's name ends in {SUFFIX}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out is {out!r}; there is no folder {os.fspath(path.parent)!r}")
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


def _jobs(records: Sequence[Record], batch_size: int, processes: Processes, model: Any, processor: Any) -> list[Job]:
    """Batches of records in order, this process's share of them. Pictures are opened when their turn comes."""

    def load(indices: tuple[int, ...]) -> Mapping[str, Any]:
        requests = [(records[i].prompt, [open_image(path) for path in records[i].images]) for i in indices]
        return prepare(processor, requests, model.device)

    starts = range(0, len(records), batch_size)[processes.rank :: processes.count]
    return [Job(tuple(range(start, min(start + batch_size, len(records)))), load) for start in starts]


def _say_failed(report: Report, records: Sequence[Record]) -> Callable[[int, Exception], None]:
    """What to call with each failed sample, in the process that has it."""
    return lambda index, error: report.write(f"skipped record {records[index].id!r}: {describe_error(error)}")


def _gather(processes: Processes, state: CalibrationState, failures: dict[int, Exception]) -> dict[int, Exception]:
    """Bring what all have measured together in the state; returns the failures of all."""
    if processes.count == 1:
        return failures
    messages = {index: describe_error(error) for index, error in failures.items()}
    of_all = processes.gather((state.samples, messages))
    for samples, _ in of_all:
        state.merge(samples)
    return {index: ValueError(message) for _, messages in of_all for index, message in messages.items()}


# What an interrupted run leaves behind: a file for each process, read by all.


def _open_state(
    model: Any, settings: Settings, records: Sequence[Record], out: Path, processes: Processes, resume: bool
) -> CalibrationState:
    asked = [(record.id, record.prompt, [path.name for path in record.images]) for record in records]
    data = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    name = f"{out.name}.state.json" if processes.count == 1 else f"{out.name}.state-{processes.rank}.json"
    state = CalibrationState(out.with_name(name), fingerprint_calibration(model, settings, data=data))
    if resume:
        for path in _state_files(out):
            state.read(path)
    elif processes.rank == 0:
        _remove(_state_files(out))
    processes.wait()  # nobody writes before all have read, or the old files are gone
    return state


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _state_files(out: Path) -> list[Path]:
    ours = re.compile(re.escape(out.name) + r"\.state(-\d+)?\.json")
    return [path for path in sorted(out.parent.iterdir()) if ours.fullmatch(path.name)]
