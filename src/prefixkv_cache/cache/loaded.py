"""From a file to a cache: what the file claims is held against itself and against the model, then layers are made.

Format version 1, described in docs/compress.md; written by saved.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from ..methods import Method
from ..profiles.file import shown
from ..profiles.profile import PrefixProfile
from ..rules.eviction import Eviction, QueueEviction
from .architecture import decoder_config, kv_heads
from .decode import STEPS_PER_GROWTH
from .layer import PrunedLayer
from .segments import Segment
from .storage import Pairs
from .stored import StoredPairs
from .tensor_file import SavedCacheError, TensorFile

C = TypeVar("C", bound=Cache)
FORMAT, FORMAT_VERSION = "prefixkv-cache", "1"
MAX_LAYERS, MAX_TOKENS, MAX_STEPS = 1024, 2**31, 2**17
_REQUIRED = ("format", "format_version", "library_version", "model", "dtype", "n_layers", "n_heads", "batch", "seen",
             "method", "budget", "max_new_tokens", "layers", "sha256")  # fmt: skip
KEYLESS = "DummyLayer"  # of layers that read the keys of another one
COUNTERS = ("stored", "seen", "point", "first_origin", "began", "queue")  # columns of `rows`; -1: None

_TOKENS = re.compile("[0-9]{1,9}:[0-9a-f]{64}")


def name_of(config: Any) -> str:
    """What a model is called: the last part of its name or path; empty where none is known."""
    return str(getattr(config, "_name_or_path", "") or "").replace("\\", "/").rstrip("/").rpartition("/")[2]


def hash_of(input_ids: Any, most: int) -> str:
    """`n:` and the SHA-256 of the first n tokens of each row."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids must be an int tensor [batch, n]; got {shown(type(input_ids).__name__)}")
    ids = input_ids[:, :most].to("cpu", torch.int64).contiguous()
    return f"{ids.shape[1]}:{hashlib.sha256(repr(list(ids.shape)).encode() + ids.numpy().tobytes()).hexdigest()}"


def check_format(metadata: dict[str, str]) -> None:
    """Refuse what is no saved cache of this version."""
    _expect("format", metadata.get("format"), FORMAT)
    _expect("format_version", metadata.get("format_version"), FORMAT_VERSION)
    for key in _REQUIRED:
        if key not in metadata:
            raise SavedCacheError(f"{key}: is missing from the metadata; expected {', '.join(_REQUIRED)}")


def check_metadata(metadata: dict[str, str], model: Any) -> dict[str, str]:
    """Refuse what is no saved cache of this version, or one of another model."""
    check_format(metadata)
    config = getattr(model, "config", None)
    if config is None:
        raise TypeError(f"load takes the model itself, not its {type(model).__name__}: load(path, model)")
    name, own = metadata["model"], name_of(config)
    if name and own:
        _expect("model", name, own)
    text = decoder_config(config)
    _expect("n_layers", metadata["n_layers"], str(getattr(text, "num_hidden_layers", metadata["n_layers"])))
    heads = {kv_heads(text), getattr(text, "num_global_key_value_heads", None)} - {None}
    if heads and metadata["n_heads"] not in map(str, heads):
        _expect("n_heads", metadata["n_heads"], " or ".join(sorted(map(str, heads))))
    return metadata


def check_tokens(said: str | None, input_ids: Tensor | None) -> None:
    """Refuse a file that says of which tokens it is, and these are others."""
    if said is None:
        return
    _need(_TOKENS.fullmatch(said), "tokens", "a number of tokens, a colon and a SHA-256")
    if input_ids is not None:
        _expect("tokens", said, hash_of(input_ids, int(said.partition(":")[0])))


def _expect(field: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise SavedCacheError(f"{field}: is {shown(found)}; expected {shown(expected)}")


def _need(holds: Any, field: str, expected: str) -> None:
    if not bool(holds):
        raise SavedCacheError(f"{field}: expected {expected}")


def _integer(field: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit() and len(value) < 12:
        value = int(value)
    if type(value) is not int or not least <= value <= most:
        raise SavedCacheError(f"{field}: is {shown(value)}; expected an integer from {least} to {most}")
    return value


class Reader:
    """Makes a cache of a file whose metadata is this version's."""

    def __init__(self, file: TensorFile, metadata: Mapping[str, str], model: Any):
        self._file, self._metadata, self._model = file, metadata, model
        self._batch = _integer("batch", metadata["batch"], 1, MAX_TOKENS)
        self._seen = _integer("seen", metadata["seen"], 1, MAX_TOKENS)
        self._heads = _integer("n_heads", metadata["n_heads"], 1, MAX_TOKENS)
        self._layers = _list_of_objects("layers", _json("layers", metadata["layers"]), MAX_LAYERS)
        _expect("layers", len(self._layers), int(metadata["n_layers"]))
        self._names: set[str] = set()
        self._read: dict[str, Tensor] = {}

    def cache(self, cls: type[C]) -> C:
        """The cache itself."""
        self._names.update(
            {"profile.budgets", "profile.keep", "image_mask", "position_deltas", "context_ids"} & set(self._file.shapes)
        )
        if "position_deltas" in self._names:
            self._shape("position_deltas", (self._batch, 1), torch.int64)
        if "context_ids" in self._names:
            n = self._shape("context_ids", (self._batch, None), torch.int64)[1]
            _need(0 < n <= self._seen, "context_ids", f"1 to {self._seen} tokens a row")
        for index, layer in enumerate(self._layers):
            self._check_layer(index, layer)
        extra = sorted(self._file.shapes.keys() - self._names)
        _expect("tensors", extra, [])
        devices = _devices(self._model, len(self._layers))
        self._read = self._file.read(lambda name, tensor: _to_model(name, tensor, devices, self._model))
        cache: Any = self._empty(cls)
        for index, (layer, told) in enumerate(zip(cache.layers, self._layers, strict=True)):
            self._fill(layer, told, index)
        cache._model_name, cache._tokens = self._metadata["model"], self._metadata.get("tokens", "")
        cache._position_deltas = self._read.get("position_deltas")
        cache.context_ids = cache._first_ids = self._context_ids()
        if notes := self._notes():
            cache.notes = notes
        return cache

    def _context_ids(self) -> Tensor | None:
        ids = self._read.get("context_ids")
        if ids is not None:
            vocabulary = getattr(decoder_config(self._model.config), "vocab_size", 2**31)
            _need(((ids >= 0) & (ids < vocabulary)).all(), "context_ids", f"token ids below {vocabulary}")
        return ids

    def _notes(self) -> dict[str, str]:
        notes = _json("notes", self._metadata.get("notes", "{}"))
        _need(isinstance(notes, dict) and all(isinstance(text, str) for text in notes.values()), "notes", "strings")
        return notes

    def _empty(self, cls: type[C]) -> C:
        made: Any = cls
        metadata, profile = self._metadata, None
        _expect("profile", "profile" in metadata, "profile.keep" in self._read)
        try:
            method = Method.parse(metadata["method"])
            number = _json("budget", metadata["budget"])
            if "profile.keep" in self._read:
                about = _json("profile", metadata.get("profile", "null"))
                _need(isinstance(about, dict) and "profile.budgets" in self._read, "profile", "an object, and budgets")
                profile = PrefixProfile(self._read["profile.budgets"], self._read["profile.keep"], about)
            steps = metadata["max_new_tokens"]
            return made(
                profile,
                number,
                method=None if profile is not None and profile.method == method else method,
                config=self._model.config,
                image_mask=self._read.get("image_mask"),
                max_new_tokens=None if steps == "None" else _integer("max_new_tokens", steps, 1, MAX_STEPS),
            )
        except SavedCacheError:
            raise
        except (TypeError, ValueError, KeyError) as error:
            raise SavedCacheError(f"method, budget or profile: {shown(error)}; expected those of a cache") from None

    # Each layer's claims, before its tensors are read.

    def _check_layer(self, index: int, told: dict[str, Any]) -> None:
        if not told:
            return
        if "segments" not in told:
            _expect(f"layers[{index}].seen", told.get("seen"), self._seen)
            for name in ("keys", "values"):
                self._shape(f"{index}.{name}", (self._batch, None, None, None))
            return
        segments = _list_of_objects(f"layers[{index}].segments", told["segments"], self._heads)
        heads: list[Any] = [segment.get("heads") for segment in segments]
        if heads != [None]:
            whole = all(isinstance(each, list) and each and all(type(h) is int for h in each) for each in heads)
            flat = sorted(head for each in heads for head in each) if whole else []
            rising = whole and all(each == sorted(each) for each in heads)
            _need(rising and flat == list(range(self._heads)), f"layers[{index}].heads", "each key head once")
        for place, segment in enumerate(segments):
            of = self._heads if segment.get("heads") is None else len(segment["heads"])
            self._check_segment(f"{index}.{place}.", segment, of)

    def _check_segment(self, prefix: str, told: dict[str, Any], heads: int) -> None:
        width = self._shape(prefix + "keys", (self._batch, heads, None, None))[2]
        self._shape(prefix + "values", (self._batch, heads, width, None))
        n = self._shape(prefix + "positions", (self._batch, None, width), torch.int64)[1]
        _need(n in (1, heads), prefix + "positions", f"1 or {heads} heads")
        if prefix + "received" in self._file.shapes:
            n = self._shape(prefix + "received", (self._batch, None, width), torch.float32)[1]
            _need(n in (1, heads), prefix + "received", f"1 or {heads} heads")
        rows = self._shape(prefix + "rows", (None, len(COUNTERS)), torch.int64)[0]
        _need(rows in (1, self._batch), prefix + "rows", f"1 or {self._batch} rows")
        self._shape(prefix + "keep", (rows,), torch.float64)
        self._shape(prefix + "queue", (rows, None), torch.int64)
        _need(type(told.get("in_place")) is bool, prefix + "in_place", "true or false")
        _integer(prefix + "received_at", told.get("received_at"), -1, self._seen)
        steps = told.get("steps")
        if steps is not None:
            _integer(
                prefix + "steps", steps, 0, _integer("max_new_tokens", self._metadata["max_new_tokens"], 1, MAX_STEPS)
            )
        room = width + STEPS_PER_GROWTH if steps is None else width + steps
        _integer(prefix + "capacity", told.get("capacity"), width, room)

    def _shape(self, name: str, expected: tuple[int | None, ...], dtype: torch.dtype | None = None) -> tuple[int, ...]:
        """Refuse a tensor that is missing or of another shape (None: any size) or dtype; return the shape."""
        self._names.add(name)
        found = self._file.shapes.get(name)
        if found is None:
            raise SavedCacheError(f"{name}: is missing; expected a tensor of that name")
        fits = len(found) == len(expected) and all(e in (None, f) for e, f in zip(expected, found, strict=True))
        if dtype is None:
            fits = fits and str(self._file.dtypes[name]) == f"torch.{self._metadata['dtype']}"
        if not fits or self._file.dtypes[name] != (dtype or self._file.dtypes[name]):
            sizes = ["any" if each is None else str(each) for each in expected]
            what = self._metadata["dtype"] if dtype is None else str(dtype)
            raise SavedCacheError(
                f"{name}: is {self._file.dtypes[name]} {list(found)}; expected {shown(what)} [{', '.join(sizes)}]"
            )
        return found

    # Layers of what was read.

    def _fill(self, layer: Any, told: dict[str, Any], index: int) -> None:
        _expect(f"layers[{index}]", "segments" in told, isinstance(layer, PrunedLayer))
        if isinstance(layer, PrunedLayer):
            made = [self._segment(layer, each, f"{index}.{p}.") for p, each in enumerate(told["segments"])]
            layer.lazy_initialization(made[0].stored.keys, made[0].stored.values)
            layer.stored, layer._seen = StoredPairs(made, self._heads), self._seen
            layer._planned_steps = layer._steps_planned_for(self._seen)
            return
        _expect(f"layers[{index}]", type(layer).__name__, DynamicSlidingWindowLayer.__name__ if told else KEYLESS)
        if not told:
            return
        keys, values = self._read[f"{index}.keys"], self._read[f"{index}.values"]
        held = min(self._seen, layer.sliding_window - 1)
        _need(keys.shape[:3] == values.shape[:3] and keys.shape[2] == held, f"{index}.keys", f"{held} pairs")
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, self._seen

    def _segment(self, layer: PrunedLayer, told: dict[str, Any], prefix: str) -> Segment:
        parts = {name: self._read.get(prefix + name) for name in ("keys", "values", "positions", "received")}
        pairs = Pairs(**parts)  # pyright: ignore[reportArgumentType]
        width = pairs.capacity
        _expect(prefix + "received", pairs.received is not None, layer.rule.counts_received)
        rows = [self._row(layer, prefix, row) for row in range(len(self._read[prefix + "keep"]))]
        held = torch.tensor([row.stored for row in rows], device=pairs.positions.device)[:, None]
        positions = pairs.positions
        inside = bool(((positions >= -1) & (positions < self._seen)).all()) and int(held.max()) == width
        if told["in_place"]:
            there = (positions < 0) | (positions == torch.arange(width, device=positions.device))
            _need(inside and bool(there.all()), prefix + "positions", "0, 1, 2, ...")
        if not (told["in_place"] and all(row.keep == 1.0 for row in rows)):  # there padding leaves its places empty
            all_there = bool(((positions >= 0).sum(-1) == held).all())
            _need(inside and all_there, prefix + "positions", "one for each pair held")
        segment = Segment(None if told["heads"] is None else tuple(told["heads"]), layer.rule)
        segment.width, segment.in_place, segment._received_at = width, told["in_place"], told["received_at"]
        segment._step = segment._growing(rows)
        segment.pairs = pairs if told["capacity"] == width else pairs.grown(told["capacity"] - width)
        if told["steps"] is not None:
            slots = torch.arange(width, device=positions.device).expand(*positions.shape[:2], -1)
            segment._rebuild(pairs, slots, told["steps"], self._seen)
        return segment

    def _row(self, layer: PrunedLayer, prefix: str, place: int) -> Eviction:
        stored, seen, point, origin, began, queued = self._read[prefix + "rows"][place].tolist()
        keep, queue = float(self._read[prefix + "keep"][place]), self._read[prefix + "queue"][place].tolist()
        name = f"{prefix}rows[{place}]"
        _need(
            0 <= stored <= self._read[prefix + "keys"].shape[2] and 0 <= seen <= self._seen, name, "no more than seen"
        )
        _need(0.0 <= keep <= 1.0, prefix + "keep", "ratios in [0, 1]")
        _need(-1 <= point <= stored and -1 <= origin <= stored, name, "places of stored pairs")
        _need(-1 <= began <= MAX_TOKENS, name, "a number of tokens")  # above `seen` where tokens were taken back
        _need(0 <= queued <= len(queue), name, "the length of its queue")
        _need(set(queue[queued:]) <= {-1} and _distinct(queue[:queued], stored), prefix + "queue", "slots, each once")
        rule: Any = layer.rule.policy
        if layer.rule.counts_received:
            return rule(stored, seen, keep, None)
        row = QueueEviction(stored, seen, keep, None, rule.args[0].headroom)
        row.first_origin = None if origin < 0 else origin
        row.point, row.began, row.queue = None if point < 0 else point, began, deque(queue[:queued])
        return row


def _distinct(slots: list[int], stored: int) -> bool:
    return len(set(slots)) == len(slots) and all(0 <= slot < stored for slot in slots)


def _json(field: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SavedCacheError(f"{field}: is damaged ({shown(error)}); expected JSON") from None


def _list_of_objects(field: str, found: Any, most: int) -> list[dict[str, Any]]:
    fits = isinstance(found, list) and 1 <= len(found) <= most and all(isinstance(each, dict) for each in found)
    _need(fits, field, f"a list of at most {most} JSON objects")
    return found


def _devices(model: Any, n_layers: int) -> list[torch.device]:
    """Where the pairs of each layer belong."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = getattr(decoder, "layers", None)
    own = [next(layer.parameters()).device for layer in layers] if layers is not None else []
    own = own if len(own) == n_layers else [model.device] * n_layers
    return [model.device if each.type == "meta" else each for each in own]


def _to_model(name: str, tensor: Tensor, devices: list[torch.device], model: Any) -> Tensor:
    if name == "position_deltas":
        return tensor.to(model.device)
    index, _, rest = name.partition(".")
    if not index.isdigit() or rest.rpartition(".")[2] in ("rows", "keep", "queue"):
        return tensor
    dtype = model.dtype if rest.endswith(("keys", "values")) else tensor.dtype
    return tensor.to(devices[int(index)], dtype)
