"""`prefixkv report`: arguments checked first, then the model loaded, asked and looked at, and the page written."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..generate import cache_options
from ..loading import open_image
from ..profile import check_budget
from .collect import collect_report
from .page import write_page

BUDGETS = (0.7, 0.5, 0.3, 0.2, 0.1)


def run_report(arguments: argparse.Namespace, load: Callable[[], tuple[Any, Any]]) -> None:
    """The command: one page, and on standard error what is being done. Bad input fails before the model loads.

    Raises:
        ValueError, OSError: arguments or files that will not do.
    """
    out = Path(arguments.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out is {arguments.out!r}; a page's name ends in .html")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(out.parent)!r} to write {out.name!r} in")
    if not arguments.prompt.strip():
        raise ValueError("--prompt is empty; say what the model shall answer")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1; got {arguments.max_new_tokens}")
    budgets = [check_budget(budget) for budget in arguments.budgets or BUDGETS]
    options = cache_options(arguments)
    pictures = [(Path(path).name, open_image(path)) for path in arguments.image]

    _say(f"loading {arguments.model}")
    model, processor = load()
    report = collect_report(
        model,
        processor,
        arguments.prompt,
        pictures,
        budgets,
        max_new_tokens=arguments.max_new_tokens,
        say=_say,
        **options,
    )
    write_page(report, out)
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB; open it in a browser")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
