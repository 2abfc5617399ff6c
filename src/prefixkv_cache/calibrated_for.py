"""What a profile was calibrated for, and whether a cache ranks its keys likewise.

Lengths are searched on scores, so they belong to the ranking that made the scores: with another one a profile still
says how much each layer keeps, but no longer what that layer's keys would ask for. The calibrator writes the ranking
into the profile's metadata (`queries` and `ranking`), the cache compares it with its own, and tells a difference once.
Reads metadata and nothing else: it knows neither files nor caches.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .scoring import Ranking

DEFAULT = Ranking(32, average="sum", heads="mean", pooling=1, value_norm=False, diversity=0.5, novelty=8.0)
"""How `PrefixKVCache` and `calibrate` rank unless told otherwise."""

_FIELDS = ("average", "heads", "pooling", "value_norm", "diversity", "novelty")  # what `ranking` holds, in this order
_WORDS = {"true": True, "false": False}
_LONGEST = 150  # characters; whatever is longer was not written here


class ProfileMismatchWarning(UserWarning):
    """A cache was given a profile that was calibrated for another ranking than its own. Nothing is lost by that.

    Attributes:
        options: with which `prefixkv generate`, `report` and `bench` rank as the profile was made; None: with none.
    """

    options: str | None = None


def plain_ranking(queries: int | str) -> Ranking:
    """The papers' ranking by the attention of these queries: the mean over the heads of its sum, and nothing else."""
    return Ranking(queries, average="sum", heads="mean", pooling=1, value_norm=False, diversity=0.0, novelty=0.0)


# One line of metadata.


def write_ranking(ranking: Ranking) -> str:
    """All of a ranking but its queries: `average=sum heads=mean pooling=1 value_norm=false diversity=0.5 novelty=8.0`.

    Equal rankings give equal text, whatever kinds of numbers they hold.
    """
    return " ".join(f"{name}={_text(_value(ranking, name))}" for name in _FIELDS)


def read_ranking(text: str, queries: int | str) -> Ranking:
    """The ranking that `write_ranking` has written, and no other text.

    Args:
        text: as it stands in the metadata.
        queries: whose attention counts.

    Raises:
        ValueError: fields are missing, unknown or not in their order, or a value is not what its field takes; the
            message names the field and what was expected.
    """
    if len(text) > _LONGEST or not (text.isascii() and text.isprintable()):  # so that all of it can be shown
        raise ValueError(f"is {text[:20]!r}... ({len(text)} characters); expected such as {write_ranking(DEFAULT)!r}")
    pairs = [part.partition("=")[::2] for part in text.split(" ")]
    if tuple(name for name, _ in pairs) != _FIELDS:
        raise ValueError(f"is {text!r}; expected name=value for each of {', '.join(_FIELDS)}, in this order")
    values = {name: _read_value(name, value) for name, value in pairs}
    try:
        ranking = Ranking(queries, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"is {text!r}; expected what a ranking takes: {error}") from None
    if write_ranking(ranking) != text:  # " 1", 0x1, 1e0, 08: a reader that takes them takes what nobody has written
        raise ValueError(f"is {text!r}; expected it as {write_ranking(ranking)!r}")
    return ranking


def _value(ranking: Ranking, name: str) -> Any:
    """A field's value as a plain int, float, bool or str; -0.0 becomes 0.0."""
    value = getattr(ranking, name)
    if name in ("diversity", "novelty"):
        return float(value) + 0.0
    return int(value) if name == "pooling" else value


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_value(name: str, text: str) -> Any:
    if name in ("average", "heads"):
        return text
    kinds = {"pooling": ("an odd number of keys", int), "value_norm": ("true or false", _WORDS.__getitem__)}
    expected, read = kinds.get(name, ("a number, 0 or more", float))
    try:
        return read(text)
    except (ValueError, KeyError):
        raise ValueError(f"has {name}={text!r}; expected {expected}") from None


# Is it this cache's?


def calibrated_ranking(metadata: Mapping[str, str]) -> Ranking | None:
    """The ranking that a profile's lengths were measured by; the plain one where it does not say, as none did once.

    Args:
        metadata: of a profile, so `queries` and `ranking` are whole.

    Returns:
        None: nothing is known, not even whose attention counted.
    """
    queries: int | str = metadata.get("queries", "unknown")
    if queries == "unknown":
        return None
    queries = int(queries) if queries.isdecimal() else queries
    text = metadata.get("ranking")
    return plain_ranking(queries) if text is None else read_ranking(text, queries)


def explain_mismatch(metadata: Mapping[str, str], ranking: Ranking) -> str | None:
    """What to say to somebody who gives a profile to a cache that ranks otherwise; None where there is nothing to say.

    Args:
        metadata: of the profile.
        ranking: of the cache.
    """
    fields = ("model", "created", "queries", "ranking")
    return _explain(tuple((name, metadata[name]) for name in fields if name in metadata), ranking)


@functools.lru_cache(maxsize=256)  # a server makes a cache for each request, and of few kinds
def _explain(described: tuple[tuple[str, str], ...], ranking: Ranking) -> str | None:
    metadata = dict(described)
    made_for = calibrated_ranking(metadata)
    if made_for is None or not (differing := _differing(made_for, ranking)):
        return None
    name, created = (metadata.get(key, "unknown")[:100] for key in ("model", "created"))
    theirs, ours = (", ".join(_arguments(each, differing)) for each in (made_for, ranking))
    return (
        f"the profile of {name!r} (created {created!r}) was calibrated for {theirs}, and this cache ranks keys by "
        f"{ours}. Its lengths are used all the same; they fit best with the ranking that they were measured by. Make a "
        f"profile for this ranking, `{_command(ranking)} ...`, or rank as the profile was made: {spell_cache(made_for)}"
    )


def spell_ranking(ranking: Ranking) -> str:
    """Its queries and what is not plain in it, for a title: `queries: 32, diversity: 0.5, novelty: 8.0`."""
    names = ["queries", *_differing(ranking, plain_ranking(ranking.queries))]
    return ", ".join(f"{name}: {_text(_value(ranking, name))}" for name in names)


def spell_cache(ranking: Ranking) -> str:
    """How to ask for a cache that ranks so: `PrefixKVCache(profile, budget)` where that is the default."""
    asked = f"PrefixKVCache({', '.join(['profile', 'budget', *_arguments(ranking, _differing(ranking, DEFAULT))])})"
    # The paper's rule for decoding comes with it, so it is not the same.
    return f"{asked}, or PrefixKVCache.paper(profile, budget)" if _is_paper(ranking) else asked


def spell_options(ranking: Ranking) -> str | None:
    """How to ask `prefixkv generate`, `report` and `bench` for a cache that ranks so; None where nothing there does."""
    if ranking.queries == "text":
        return None
    if ranking == DEFAULT:
        return "neither --queries nor --paper"
    for option, base in (("", DEFAULT), ("--paper", plain_ranking("all"))):
        differing = _differing(ranking, base)
        if not differing:
            return option
        if differing == ["queries"]:
            return f"{option} --queries {ranking.queries}".strip()
    return None


def _differing(one: Ranking, other: Ranking) -> list[str]:
    names = ("queries", *_FIELDS)
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _is_paper(ranking: Ranking) -> bool:
    return not _differing(ranking, plain_ranking("all"))


def _arguments(ranking: Ranking, names: Sequence[str]) -> list[str]:
    return [f"{name}={_value(ranking, name)!r}" for name in names]


def _command(ranking: Ranking) -> str:
    """The calibration that makes a profile for this ranking, without the model and its data."""
    if _is_paper(ranking):
        return "prefixkv calibrate --paper"
    options = [f"--{name}={_text(_value(ranking, name))}" for name in _differing(ranking, DEFAULT)]
    named = [option.replace("_", "-").removesuffix("=true") for option in options]
    return " ".join(["prefixkv calibrate", *named])


_told: dict[tuple[str, ...], None] = {}
_told_lock = threading.Lock()
_MOST_TOLD = 1024  # so that a process which makes profiles for ever does not remember all of them


def tell_mismatch(metadata: Mapping[str, str], ranking: Ranking) -> None:
    """Warn that a cache ranks otherwise than its profile: once in a process for each two of a kind.

    The warning points to the line outside this package that asked for the cache. Where warnings are errors, it is
    raised every time.

    Args:
        metadata: of the profile.
        ranking: of the cache.
    """
    message = explain_mismatch(metadata, ranking)
    if message is None:
        return
    # Two profiles of one model made in the same second, from other samples, are two.
    key = (message, metadata.get("source", ""), metadata.get("samples", ""))
    with _told_lock:
        if key in _told:
            return
        while len(_told) >= _MOST_TOLD:
            del _told[next(iter(_told))]
        _told[key] = None
    try:
        # Not under the lock: what shows warnings is somebody else's code, and may ask for a cache.
        warnings.warn(_warning(message, metadata), stacklevel=_level_outside())
    except BaseException:
        with _told_lock:
            _told.pop(key, None)
        raise


def _warning(message: str, metadata: Mapping[str, str]) -> ProfileMismatchWarning:
    warning, made_for = ProfileMismatchWarning(message), calibrated_ranking(metadata)
    warning.options = None if made_for is None else spell_options(made_for)
    return warning


def _level_outside() -> int:
    """The stack level, for a warning by the caller, of the first frame that is not of this package."""
    package = __name__.partition(".")[0]
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    return level
