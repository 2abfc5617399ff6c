"""Passages of prose, of which the text tasks are made: the language reference that comes with Python.

The text is `pydoc_data.topics`, what `help("import")` shows. Only its paragraphs of sentences are taken, each once;
grammar, code, tables and lists are left out. Nothing is random and nothing is downloaded, but other releases of Python
have other texts: `digest` tells them apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from pydoc_data.topics import topics

from ...rules.checks import check_choice

SPLITS = ("choose", "report")
"""Methods and profiles are chosen on the first half of the passages; what is reported is of the second half."""
PASSAGE = 1700
"""Least length of a passage in characters; it ends with a paragraph."""
_SHORTEST, _LETTERS = 150, 0.93


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph, on one line, is sentences: long, ended, and nearly all letters, blanks, commas and dots."""
    letters = sum(char.isalpha() or char in " ,." for char in paragraph)
    return len(paragraph) >= _SHORTEST and paragraph[-1] == "." and letters >= _LETTERS * len(paragraph)


def paragraphs() -> Iterator[str]:
    """All paragraphs of prose, topic after topic in order of name; each on one line, and once."""
    seen = set()
    for name in sorted(topics):
        for block in topics[name].split("\n\n"):
            paragraph = " ".join(block.translate({ord(mark): None for mark in '*"'}).split())
            if is_prose(paragraph) and paragraph not in seen:
                seen.add(paragraph)
                yield paragraph


@cache
def _all() -> tuple[str, ...]:
    found, own = [], []
    for paragraph in paragraphs():
        own.append(paragraph)
        if sum(map(len, own)) >= PASSAGE:
            found.append(" ".join(own))
            own = []
    return tuple(found)


def passages(split: str) -> tuple[str, ...]:
    """The passages of a split: the first half in order of topics is to choose by, the second to report."""
    check_choice("split", split, SPLITS)
    half = len(_all()) // 2
    return _all()[:half] if split == SPLITS[0] else _all()[half:]


def digest() -> str:
    """Eight hex digits that tell one release's passages from another's."""
    return hashlib.sha256("\n".join(_all()).encode()).hexdigest()[:8]
