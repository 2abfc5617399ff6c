"""How two texts are compared. Pure functions; the `rouge-score` package is imported only to score."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L (F measure, without stemming) by the `rouge-score` package, in [0, 1].

    Equal texts score 1, also where the package finds no word in them (it reads Latin letters and digits only).

    Raises:
        ImportError: the package is not there.
    """
    if text == reference:
        return 1.0
    return float(_scorer().score(reference, text)["rougeL"].fmeasure)


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the rouge-score package: pip install 'prefixkv-cache[evaluate]'") from error
    return RougeScorer(["rougeL"], use_stemmer=False)


def check_rouge() -> None:
    """Raise the ImportError now rather than after the first batch."""
    _scorer()


def first_difference(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token in which two texts differ, the end of the shorter one included; None: they do not."""
    for index, (one, other) in enumerate(zip(tokens, reference, strict=False)):
        if one != other:
            return index
    return None if len(tokens) == len(reference) else min(len(tokens), len(reference))
