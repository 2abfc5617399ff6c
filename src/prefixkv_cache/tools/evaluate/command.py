"""`prefixkv evaluate` and `prefixkv recommend`: their arguments. What is done with them is in run.py and recommend.py.

`--help` imports no torch.
"""

from __future__ import annotations

import argparse

from ..arguments import add_cache, add_model, budgets, count, positive, share
from .drawn import SPLITS, TASKS

RECOMMENDED_FROM = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add_model(parser)
    _add_data(parser)
    add("--out", required=True, metavar="DIR", help="folder for tables, drawings and the state")
    add(
        "--methods", metavar="M,...", default="default,prefixkv,elastic,h2o,streaming,snapkv,pyramidkv,uniform,random",
        help="also full, profile (see --profile); with options: 'snapkv:queries=64;pooling=5' (%(default)s)",
    )  # fmt: skip
    add("--profile", metavar="P", help="file or bundled name: what the method `profile` means")
    add(
        "--budgets", type=budgets, metavar="B,...", default=(0.05, 0.1, 0.2, 0.3, 0.5),
        help="fractions kept, or pairs a head (0.05,0.1,0.2,0.3,0.5)",
    )  # fmt: skip
    add("--reference", metavar="M", help="method for paired differences; default: the first one")
    add("--resume", action="store_true", help="go on where an interrupted run stopped, or add to it")


def add_recommend_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prefixkv recommend`."""
    add_model(parser)
    _add_data(parser)
    add_cache(parser)
    parser.add_argument(
        "--max-loss", type=share, default=0.02, metavar="L",
        help="share of the right answers that may go wrong; of the tokens, where data has no answers (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--budgets", type=budgets, metavar="B,...", default=RECOMMENDED_FROM,
        help="those to try: fractions kept, or pairs a head (0.05,0.1,0.2,0.3,0.5,0.7)",
    )  # fmt: skip


def _add_data(parser: argparse.ArgumentParser) -> None:
    """What is asked; `tasks.read_samples` reads it."""
    add = parser.add_argument
    drawn = "scenes, boards or pages (drawn), or a file as for `prefixkv calibrate`"
    add("--data", required=True, metavar="D", help=drawn)
    add("--images", metavar="DIR", help="where the file's images lie")
    add("--prompt", metavar="TEXT", help="said to every image, instead of what the file says")
    add("--samples", type=count, metavar="N", help="pictures (100), or records of a file (all)")
    add("--seed", type=int, default=0, help="which records; of the intervals (%(default)s)")
    add("--split", choices=SPLITS, help="of drawn pictures (validation)")
    add("--task", choices=TASKS, help="of drawn pictures; default: both")
    add("--kinds", metavar="K,...", help="kinds of questions, such as object,colour,size; default: all")
    add("--max-new-tokens", type=positive, default=128, metavar="N", help="of a generated text (%(default)s)")
    add("--batch-size", type=positive, default=25, metavar="N", help="samples in a batch (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """The command `evaluate`."""
    from .run import run_evaluate

    run_evaluate(arguments)


def run_recommend(arguments: argparse.Namespace) -> None:
    """The command `recommend`."""
    from .recommend import run_recommend

    run_recommend(arguments)
