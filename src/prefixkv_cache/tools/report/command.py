"""`prefixkv report`: arguments checked first, then the model loaded, asked and looked at, and the page written."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..arguments import add_cache, add_model, add_prompt, budgets, cache_options, load, positive, read_prompt

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
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="of each answer (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    """One page, and on standard error what is being done. Bad input fails before the model is loaded.

    Raises:
        ValueError, OSError: arguments or files that will not do.
    """
    out = Path(arguments.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out is {arguments.out!r}; a page's name ends in .html")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(out.parent)!r} to write {out.name!r} in")
    options = cache_options(arguments)
    prompt, images = read_prompt(arguments)
    pictures = list(zip((Path(path).name for path in arguments.image), images, strict=True))
    from ...profiles.files import write_atomically
    from .collect import collect_report
    from .page import render_page

    _say(f"loading {arguments.model}")
    model, processor = load(arguments)
    limit = arguments.max_new_tokens
    report = collect_report(
        model, processor, prompt, pictures, arguments.budgets, max_new_tokens=limit, say=_say, **options
    )
    write_atomically(out, render_page(report))
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB; open it in a browser")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
