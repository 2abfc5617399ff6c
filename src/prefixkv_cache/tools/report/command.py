"""`prefixkv report`: arguments checked first, then the model loaded, asked and looked at, and the page written."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..arguments import (
    add_cache,
    add_model,
    add_prompt,
    budgets,
    cache_options,
    load,
    out_path,
    positive,
    read_prompt,
    write_out,
)

BUDGETS = (0.7, 0.5, 0.3, 0.2, 0.1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` reads."""
    add_model(parser)
    add_prompt(parser)
    parser.add_argument("--out", default="report.html", metavar="FILE", help="page to write (%(default)s)")
    parser.add_argument(
        "--budgets", type=budgets, default=BUDGETS, metavar="B,...",
        help="fractions of the KV pairs kept, or numbers of pairs a head (0.7,0.5,0.3,0.2,0.1)",
    )  # fmt: skip
    add_cache(parser)
    parser.add_argument("--beside", metavar="M", help="a second method, shown beside the first at the same budgets")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="of each answer (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    """One page, and on standard error what is being done. Bad input fails before the model is loaded.

    Raises:
        ValueError, OSError: arguments or files that will not do.
    """
    from ...methods import resolve

    out = out_path(arguments.out, "a page", ".html", ".htm")
    options = cache_options(arguments)
    beside = None if arguments.beside is None else resolve(arguments.beside)
    prompt, images = read_prompt(arguments)
    pictures = list(zip((Path(path).name for path in arguments.image), images, strict=True))
    from .collect import collect_report
    from .page import render_page

    _say(f"loading {arguments.model}")
    model, processor = load(arguments)
    limit = arguments.max_new_tokens
    report = collect_report(
        model, processor, prompt, pictures, arguments.budgets,
        max_new_tokens=limit, beside=beside, say=_say, **options,
    )  # fmt: skip
    write_out(out, render_page(report))
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB; open it in a browser")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
