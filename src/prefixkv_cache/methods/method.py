"""`Method`: how a cache prunes, as one frozen value of four parts, and its spelling.

A method says how keys are ranked, where lengths come from without a profile, what is protected, and what happens while
decoding. The cache, the calibrator, profiles and the command line all read the same value. It holds no tensor and
computes nothing: the functions that do are in `rules/`, and the order in which they run is `cache/pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..rules.checks import check_choice, check_fraction, check_integer, to_float
from .scores import SCORES

LONGEST_SPELLING = 1000  # characters; no method needs half of it, and a profile from a stranger may hold anything
LARGEST = 10**9  # tokens, of any field


@dataclass(frozen=True)
class Ranking:
    """How the keys of a layer are ranked.

    Attributes:
        score: name of a scoring rule (`methods/scores.py`): `"attention"`, `"recency"`, `"random"`, ...
        queries: observation window: the last so many valid prompt tokens, or `"all"` of them.
        context: that many evenly spaced prompt queries (or `"all"`) count beside the window: a key's score is the
            larger of its two shares. 0: the window alone.
        heads: how the key heads agree on keys: `"mean"` or `"max"` of their scores, or `"each"`: every head its own.
        pooling: odd width, in keys, over which the window's importance spreads to neighbours; 1: none.
        pooling_by: `"max"` (SnapKV, arXiv 2404.14469) or `"mean"` of the neighbours.
        value_norm: whether the score is multiplied by the L2 norm of the value (after arXiv 2406.12335).
    """

    score: str = "attention"
    queries: int | str = 32
    context: int | str = 0
    heads: str = "mean"
    pooling: int = 1
    pooling_by: str = "max"
    value_norm: bool = False

    def __post_init__(self) -> None:
        check_choice("score", self.score, tuple(SCORES))
        _set(self, "queries", _check_queries("queries", self.queries, 1))
        _set(self, "context", _check_queries("context", self.context, 0))
        check_choice("heads", self.heads, ("mean", "max", "each"))
        _set(self, "pooling", _check_tokens("pooling", self.pooling, 1))
        if self.pooling % 2 == 0:
            raise ValueError(f"pooling must be an odd number of keys, such as 7; got {self.pooling}")
        check_choice("pooling_by", self.pooling_by, ("max", "mean"))
        if not isinstance(self.value_norm, bool):
            raise TypeError(f"value_norm must be True or False; got {self.value_norm!r}")


@dataclass(frozen=True)
class Lengths:
    """How many pairs each layer, or key head, keeps.

    Attributes:
        lengths: where they come from when there is no profile: `"uniform"`, `"pyramid"` (PyramidKV, arXiv 2406.02069),
            `"search"`: one threshold on cumulative importance for each layer of the prompt (PrefixKV, arXiv
            2412.03409), or `"pool"`: one pool of scores over all layers and key heads of the prompt.
        floor: tokens that every key head keeps at least, or below 1 that share of the prompt; the others are scaled so
            that the budget stays.
    """

    lengths: str = "uniform"
    floor: int | float = 0

    def __post_init__(self) -> None:
        check_choice("lengths", self.lengths, ("search", "uniform", "pyramid", "pool"))
        _set(self, "floor", _check_tokens_or_share("floor", self.floor, 0))

    @property
    def need_all_layers(self) -> bool:
        """Whether, without a profile, no layer's length is known before the last layer's scores are."""
        return self.lengths in ("search", "pool")


@dataclass(frozen=True)
class Protect:
    """What is kept whatever its score, and what becomes of the pairs that are not.

    Attributes:
        sink: first tokens of the prompt that always stay. Its last token does, too.
        recent: recency window: so many last tokens of the prompt always stay, or below 1 that share of what a head
            keeps, while decoding as well where the least important pair leaves.
        text_floor: share of the prompt's text tokens that goes before all image tokens, the best by score, in [0, 1].
            Means something only with an `image_mask`.
        merge: whether each pruned pair is merged, as a mean, into its nearest kept pair (Elastic Cache, arXiv
            2407.18121).
    """

    sink: int = 1
    recent: int | float = 1
    text_floor: float = 0.0
    merge: bool = False

    def __post_init__(self) -> None:
        _set(self, "sink", _check_tokens("sink", self.sink, 0))
        _set(self, "recent", _check_tokens_or_share("recent", self.recent, 1))
        _set(self, "text_floor", check_fraction("text_floor", self.text_floor))
        if not isinstance(self.merge, bool):
            raise TypeError(f"merge must be True or False; got {self.merge!r}")


@dataclass(frozen=True)
class Decode:
    """What leaves while decoding.

    Attributes:
        evict: `"fixed-point"` (Elastic Cache), `"oldest"` behind the sink, or `"least-important"` by the attention
            received so far (H2O, arXiv 2306.14048).
        distance: of the fixed point from the prompt's end, in pairs. None: nothing leaves; the other rules take None.
        headroom: pairs that a head may hold beyond its share before one leaves.
    """

    evict: str = "fixed-point"
    distance: int | None = None
    headroom: int = 0

    def __post_init__(self) -> None:
        check_choice("evict", self.evict, ("fixed-point", "oldest", "least-important"))
        if self.distance is not None:
            _set(self, "distance", _check_tokens("distance", self.distance, 1))
            if self.evict != "fixed-point":
                raise ValueError(
                    f"distance={self.distance} says where the fixed point lies, and evict={self.evict!r} has none; "
                    "write distance=None"
                )
        _set(self, "headroom", _check_tokens("headroom", self.headroom, 0))


@dataclass(frozen=True)
class Method:
    """How a cache prunes. Frozen and checked when made; equal parts are equal methods.

    Attributes:
        ranking: how keys are ranked.
        lengths: where lengths come from without a profile.
        protect: what always stays.
        decode: what leaves while decoding.

    Raises:
        TypeError, ValueError: a combination that cannot work; the message names the fields.
    """

    ranking: Ranking = field(default_factory=Ranking)
    lengths: Lengths = field(default_factory=Lengths)
    protect: Protect = field(default_factory=Protect)
    decode: Decode = field(default_factory=Decode)

    def __post_init__(self) -> None:
        for name, kind in _PARTS.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}; got {getattr(self, name)!r}")
        ranking = self.ranking
        plain = (ranking.score, ranking.context, ranking.pooling, ranking.value_norm) == ("attention", 0, 1, False)
        if self.decode.evict == "least-important" and not plain:
            raise ValueError(
                "evict='least-important' counts attention, so keys must be ranked by attention alone: "
                "score='attention', context=0, pooling=1, value_norm=False"
            )
        if self.lengths.lengths == "pool" and ranking.heads != "each":
            raise ValueError(
                f"lengths='pool' finds a length for each key head, so heads must be 'each'; got {ranking.heads!r}"
            )

    @property
    def flat(self) -> dict[str, Any]:
        """All fields of the four parts by their flat names, in order."""
        return {name: value for part in self._parts() for name, value in vars(part).items()}

    @property
    def name(self) -> str:
        """Name of the nearest named method: the one that differs in the fewest fields."""
        return self._nearest()[0]

    def replace(self, **changes: Any) -> Method:
        """The same method with some fields changed, by flat names: `SNAPKV.replace(queries=64, floor=28)`.

        Raises:
            TypeError: there is no such field.
            ValueError: a value or a combination that cannot work.
        """
        unknown = [name for name in changes if name not in FLAT_NAMES]
        if unknown:
            raise TypeError(f"a method has no field {unknown[0]!r}; there are {', '.join(FLAT_NAMES)}")
        parts = {
            name: replace(getattr(self, name), **{each: changes[each] for each in _names(kind) if each in changes})
            for name, kind in _PARTS.items()
        }
        return Method(**parts)

    def spell(self, full: bool = False) -> str:
        """The method as text that `parse` reads back: `snapkv`, `snapkv:queries=64;pooling=5`.

        Args:
            full: spell out every field, so that the text means the same whatever the named values become. Profiles
                keep this form.
        """
        name, differing = self._nearest()
        if full:
            differing = dict(self.flat)
        options = ";".join(f"{each}={_text(value)}" for each, value in differing.items())
        return f"{name}:{options}" if options else name

    @classmethod
    def parse(cls, text: str) -> Method:
        """The method of a spelling: a name, and after a colon the fields that differ, with semicolons between.

        Raises:
            TypeError: the text is no string.
            ValueError: there is no such name or field, or a value that the field does not take.
        """
        if not isinstance(text, str):
            raise TypeError(f"a method is spelled as text, such as 'snapkv:queries=64'; got {text!r}")
        if len(text) > LONGEST_SPELLING:
            raise ValueError(f"a method's spelling has at most {LONGEST_SPELLING} characters; got {len(text)}")
        name, _, rest = (part.strip() for part in text.partition(":"))
        if name not in NAMED:
            raise ValueError(f"there is no method {name!r}; there are {', '.join(NAMED)}")
        options: dict[str, Any] = {}
        for part in rest.split(";") if rest else []:
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or key not in FLAT_NAMES:
                raise ValueError(f"method {text!r}: {part!r} is no field=value; fields are {', '.join(FLAT_NAMES)}")
            if key in options:
                raise ValueError(f"method {text!r}: {key} is there twice")
            options[key] = _value(value)
        try:
            return NAMED[name].replace(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"method {text!r}: {error}") from None

    def _parts(self) -> tuple[Ranking, Lengths, Protect, Decode]:
        return self.ranking, self.lengths, self.protect, self.decode

    def _nearest(self) -> tuple[str, dict[str, Any]]:
        """Name of the nearest named method, and the fields in which this one differs; of equals the first."""
        own = self.flat
        found = {
            name: {key: value for key, value in own.items() if _differs(value, theirs[key])}
            for name, theirs in ((name, other.flat) for name, other in NAMED.items())
        }
        name = min(found, key=lambda each: len(found[each]))
        return name, found[name]


NAMED: dict[str, Method] = {}
"""Methods by the names that spellings begin with; filled by `methods/__init__.py`."""

_PARTS: Mapping[str, type] = {"ranking": Ranking, "lengths": Lengths, "protect": Protect, "decode": Decode}


def _names(part: type) -> list[str]:
    return [f.name for f in fields(part)]


FLAT_NAMES = tuple(name for part in _PARTS.values() for name in _names(part))
"""The fields of all four parts, by which `replace`, `spell` and `parse` know them."""


def _set(part: Any, name: str, value: Any) -> None:
    object.__setattr__(part, name, value)


def _differs(one: Any, other: Any) -> bool:
    return one != other or type(one) is not type(other)  # 1 and 1.0, or 1 and True, are not one recency window


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, (bool, type(None))) else str(value)


def _value(text: str) -> Any:
    words = {"none": None, "true": True, "false": False}
    if text in words:
        return words[text]
    readers: tuple[Callable[[str], Any], ...] = (int, float)
    for read in readers:
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _check_queries(name: str, value: Any, least: int) -> int | str:
    return check_choice(name, value, ("all",)) if isinstance(value, str) else _check_tokens(name, value, least)


def _check_tokens(name: str, value: Any, least: int) -> int:
    number = check_integer(name, value, least)
    if number > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}; it has {len(str(number))} digits")
    return number


def _check_tokens_or_share(name: str, value: Any, least: int) -> int | float:
    if isinstance(value, float) and not value.is_integer():
        share = to_float(value)
        if not 0.0 < share < 1.0:
            raise ValueError(f"{name} must be a number of tokens, {least} or more, or a share in (0, 1); got {value!r}")
        return share
    return _check_tokens(name, int(value) if isinstance(value, float) else value, least)
