"""What long commands share: the processes of a launcher (by accelerate), and lines and a progress bar (by tqdm).

Work is dealt out by whole batches, and only small results are exchanged. Knows nothing of what the work is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Processes:
    """This process among those of `accelerate launch` or `torchrun`; alone without them."""

    rank: int = 0
    count: int = 1

    def wait(self) -> None:
        """Wait until all others have come here, too."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def gather(self, own: Any) -> list[Any]:
        """What all processes bring here, by rank; anything that can be pickled."""
        if self.count == 1:
            return [own]
        from accelerate.utils import gather_object

        return gather_object([own])


@contextmanager
def join_processes(arguments: argparse.Namespace) -> Iterator[Processes]:
    """Join the others, by the environment that the launcher has set; `arguments.device` becomes this process's own.

    Raises:
        ValueError: one model is to be spread over all devices, and each process has its own.
        ImportError: there are several processes, and accelerate is not installed.
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
    from accelerate import PartialState

    if arguments.device is None and torch.cuda.is_available():
        arguments.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    # By gloo, also beside GPUs: only small results are exchanged. One process may be much slower than the others.
    state = PartialState(cpu=True, timeout=timedelta(days=7))
    try:
        yield Processes(state.process_index, state.num_processes)
    finally:
        state.destroy_process_group()


@dataclass(frozen=True)
class Report:
    """Lines and a progress bar on standard error, from the first process.

    Attributes:
        processes: this process among the others.
        doing: what the bar says.
    """

    processes: Processes
    doing: str

    def say(self, line: str) -> None:
        """A line of the first process."""
        if self.processes.rank == 0:
            self.write(line)

    def write(self, line: str) -> None:
        """A line of any process, above the bar while there is one."""
        tqdm.write(line, file=sys.stderr)

    @contextmanager
    def bar(self, total: int, unit: str = "sample") -> Iterator[Callable[[int], None]]:
        """Show a progress bar for the first process.

        Args:
            total: samples, or others of this unit, that this process will do.
            unit: what is counted.

        Yields:
            what to call with the number done.
        """
        share = "" if self.processes.count == 1 else f" (1 of {self.processes.count} processes)"
        hidden = self.processes.rank != 0
        with tqdm(total=total, unit=unit, desc=self.doing + share, file=sys.stderr, disable=hidden) as bar:
            yield lambda done: _update(bar, done)


def _update(bar: Any, done: int) -> None:
    if done != bar.n:
        bar.update(done - bar.n)
