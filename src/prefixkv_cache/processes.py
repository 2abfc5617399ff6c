"""What long commands share: who this process is among those of a launcher, and what the person at the terminal sees.

`accelerate launch` and `torchrun` tell each process by its environment who it is. Work is dealt out by whole batches,
and only small results are exchanged, so gloo will do on GPUs, too. Knows nothing of what the work is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

_SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Processes:
    """Who we are among the processes of `accelerate launch` or `torchrun`; alone without them."""

    rank: int = 0
    count: int = 1

    def wait(self) -> None:
        """For all others to come here, too."""
        if self.count > 1:
            distributed.barrier()

    def gather(self, own: Any) -> list[Any]:
        """What all processes bring here, by rank; anything that can be pickled."""
        if self.count == 1:
            return [own]
        of_all: list[Any] = [None] * self.count
        distributed.all_gather_object(of_all, own)
        return of_all


@contextmanager
def join_processes(arguments: argparse.Namespace) -> Iterator[Processes]:
    """Join the others, by the environment that the launcher has set; `arguments.device` becomes this process's own.

    Raises:
        ValueError: one model is to be spread over all devices, and each process has its own.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    if arguments.device_map is not None:
        raise ValueError(
            f"--device-map spreads one model over all devices, and there are {count} processes, each with its own "
            "model; take one of the two"
        )
    if arguments.device is None and torch.cuda.is_available():
        arguments.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    # One process may be much slower than the others.
    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Processes(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()


@dataclass
class Report:
    """Lines and a progress bar on standard error, from the first process.

    Attributes:
        processes: who we are.
        doing: what the bar says.
        write: prints a line, above the bar while there is one.
    """

    processes: Processes
    doing: str
    write: Callable[[str], Any] = field(default=lambda line: print(line, file=sys.stderr))

    def say(self, line: str) -> None:
        """A line of the first process."""
        if self.processes.rank == 0:
            self.write(line)

    @contextmanager
    def bar(self, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar by tqdm, or a line every few seconds where that is not installed.

        Args:
            total: samples that this process will do.

        Yields:
            what to call with the number of samples done.
        """
        if self.processes.rank != 0:
            yield lambda done: None
            return
        of_all = "" if self.processes.count == 1 else f" (1 of {self.processes.count} processes)"
        try:
            from tqdm import tqdm
        except ImportError:
            yield _lines(self.write, total, of_all)
            return
        with tqdm(total=total, unit="sample", desc=f"{self.doing}{of_all}", file=sys.stderr) as bar:
            before, self.write = self.write, lambda line: bar.write(line, file=sys.stderr)
            try:
                yield lambda done: _update(bar, done)
            finally:
                self.write = before


def _update(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def _lines(write: Callable[[str], Any], total: int, of_all: str) -> Callable[[int], None]:
    started = time.monotonic()
    last = [started]

    def progress(done: int) -> None:
        now = time.monotonic()
        if done < total and now - last[0] < _SECONDS_BETWEEN_LINES:
            return
        last[0] = now
        rate = done / max(now - started, 1e-9)
        write(f"{done} of {total} samples{of_all}, {rate:.2f} samples/s, {(total - done) / rate:.0f} s left")

    return progress
