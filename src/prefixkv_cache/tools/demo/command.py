"""`prefixkv demo`: its arguments."""

from __future__ import annotations

import argparse

from ..arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` reads."""
    parser.add_argument("--seed", type=int, default=2_000_000_017, help="which scene to draw (default: a held-out one)")
    parser.add_argument("--out", default="out/demo.png", metavar="PNG", help="picture of what was kept (%(default)s)")
    parser.add_argument("--model", metavar="M", help="another model folder than the bundled one")
    parser.add_argument("--method", metavar="M", help="compare with this one, too; such as snapkv or 'h2o:recent=0.3'")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads for torch (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Table on standard output, picture in a file."""
    from .run import run_demo

    run_demo(arguments.seed, arguments.out, arguments.model, arguments.method, arguments.threads)
