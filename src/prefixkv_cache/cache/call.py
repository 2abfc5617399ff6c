"""`AttentionCall`: what one call of a model's attention function is given, as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..rules.importance import DEFAULT_MAX_BYTES, attention_importance
from ..rules.masks import at_queries, own_mask, readable
from ..rules.queries import Picks
from .heads import HeadGroup
from .segments import Shown


@dataclass(slots=True)
class AttentionCall:
    """One attention call, of a whole layer or of one segment's heads.

    Attributes:
        module: the attention module.
        query: [batch, query_heads, n_queries, head_dim].
        key, value: [batch, kv_heads, n_keys, head_dim].
        mask: as the backend takes it; see rules/masks.py.
        backend: name of the attention implementation.
        args, options: what else the function is given.
        log_sum_exp: float32 [batch, query_heads, n_queries], where the kernel has told it.
    """

    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    backend: str
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    log_sum_exp: Tensor | None = None

    def run(self, function: Callable) -> Any:
        """Call the attention function."""
        return function(self.module, self.query, self.key, self.value, self.mask, *self.args, **self.options)

    def importance(
        self, picks: Picks = None, valid: Tensor | None = None, max_bytes: int = DEFAULT_MAX_BYTES
    ) -> Tensor:
        """Attention that each key receives from the queries picked: float32 [batch, kv_heads, n_keys]."""
        return attention_importance(
            self.query,
            self.key,
            readable(self.mask),
            picks=picks,
            valid=valid,
            scaling=self.options.get("scaling"),
            softcap=self.options.get("softcap"),
            sink_logits=self.options.get("s_aux"),
            log_sum_exp=self.log_sum_exp,
            max_bytes=max_bytes,
        )

    def split(self, n: int) -> tuple[AttentionCall, AttentionCall]:
        """The call of the first queries over the keys before the last `n`, and that of the last `n` queries."""
        before = self.query.shape[2] - n
        return (
            replace(
                self,
                query=self.query[:, :, :before],
                key=self.key[:, :, :-n],
                value=self.value[:, :, :-n],
                mask=at_queries(self.mask, 0, before, n),
                options=_options_of_queries(self.options, slice(None, before), self.query.shape[2]),
            ),
            replace(
                self,
                query=self.query[:, :, before:],
                mask=at_queries(self.mask, before, before + n),
                options=_options_of_queries(self.options, slice(before, None), self.query.shape[2]),
            ),
        )

    def of_segment(self, shown: Shown, n_kv_heads: int) -> AttentionCall:
        """The call for one segment: its own keys and values, its query heads, its columns of the mask."""
        if shown.group is None:
            mask = mask_of(shown, self.mask, self.query, self.backend)
            return self if mask is self.mask else replace(self, mask=mask)
        assert shown.keys is not None and shown.values is not None, "segments of some heads show their own pairs"
        heads, group = shown.group, self.query.shape[1] // n_kv_heads
        query, mask = heads.take(self.query, group=group), self.mask
        if shown.own_mask or mask is not None:
            mask = mask_of(shown, mask, query, self.backend, heads.index(group, query.device))
        module = _module_of_heads(self.module, heads, group)
        options = _options_of_heads(self.options, heads, group)
        return AttentionCall(module, query, shown.keys, shown.values, mask, self.backend, self.args, options)


def mask_of(shown: Shown, mask: Any, query: Tensor, backend: str, query_heads: Tensor | None = None) -> Any:
    """The mask of one segment: the model's own where it fits, else the columns of the segment's pairs.

    Args:
        shown: what the segment reads.
        mask: the model's.
        query: [batch, query_heads, n_queries, head_dim], the segment's.
        backend: name of the attention implementation.
        query_heads: int64, which of the model's query heads they are. None: all.
    """
    if shown.own_mask and (mask is not None or shown.ragged or query.shape[2] > 1):
        return own_mask(mask, shown.read_positions(), shown.ragged, query, backend, query_heads)
    if query_heads is not None and isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] > 1:
        return mask.index_select(1, query_heads)
    return mask


def join_queries(outputs: list[Any]) -> Any:
    """The outputs of calls of some queries each, as one.

    Args:
        outputs: `(output [batch, n_queries, heads, head_dim], weights or None)` of each call.
    """
    joined = torch.cat([output[0] for output in outputs], dim=1)
    weights = [output[1] for output in outputs if output[1] is not None]
    return joined, torch.cat(_equally_wide(weights), dim=2) if weights else None


def _equally_wide(weights: list[Tensor]) -> list[Tensor]:
    longest = max(each.shape[-1] for each in weights)
    return [torch.nn.functional.pad(each, (0, longest - each.shape[-1])) for each in weights]


def join_outputs(outputs: list[Any], groups: list[HeadGroup], group: int) -> Any:
    """The outputs of all segments' calls as one, in head order.

    Args:
        outputs: `(output [batch, n_queries, heads, head_dim], weights or None)` of each segment.
        groups: their key heads.
        group: query heads that share a key head.
    """
    order = [head for each in groups for head in each.heads]
    back = HeadOrder.of(tuple(order), group)
    joined = back.restore(torch.cat([output[0] for output in outputs], dim=2), 2)
    weights = [output[1] for output in outputs if output[1] is not None]
    if not weights:
        return joined, None
    return joined, back.restore(torch.cat(_equally_wide(weights), dim=1), 1)


class HeadOrder:
    """From the order of segments back to the order of heads.

    Args:
        heads: key heads in the order of segments.
        group: query heads that share a key head.
    """

    _known: ClassVar[dict[tuple[tuple[int, ...], int], HeadOrder]] = {}

    def __init__(self, heads: tuple[int, ...], group: int):
        places = {head: place for place, head in enumerate(heads)}
        self._back = [places[head] * group + each for head in range(len(heads)) for each in range(group)]
        self._ordered = self._back == sorted(self._back)
        self._indices: dict[torch.device, Tensor] = {}

    @classmethod
    def of(cls, heads: tuple[int, ...], group: int) -> HeadOrder:
        """The order for these heads, made once: layers of one model share few of them."""
        found = cls._known.get((heads, group))
        if found is None:
            found = cls(heads, group)
            if not torch.compiler.is_compiling() and len(cls._known) < 4096:
                cls._known[heads, group] = found
        return found

    def restore(self, tensor: Tensor, dim: int) -> Tensor:
        """Put the query heads along `dim` into the model's order."""
        if self._ordered:
            return tensor
        index = self._indices.get(tensor.device)
        if index is None:
            index = torch.tensor(self._back, device=tensor.device)
            if not torch.compiler.is_compiling():
                self._indices[tensor.device] = index
        return tensor.index_select(dim, index)


class _ModuleOfHeads:
    """An attention module as a segment's heads see it: what the module holds for each head is narrowed to them."""

    def __init__(self, module: Any, narrowed: dict[str, Any]):
        self._module = module
        self.__dict__.update(narrowed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_BY_HEAD = ("sinks",)  # learned scores in the softmax (gpt-oss), [query_heads]


def _module_of_heads(module: Any, heads: HeadGroup, group: int) -> Any:
    held = {name: getattr(module, name) for name in _BY_HEAD if isinstance(getattr(module, name, None), Tensor)}
    if not held:
        return module
    return _ModuleOfHeads(module, {name: heads.take(each, 0, group) for name, each in held.items()})


def _options_of_heads(options: dict[str, Any], heads: HeadGroup, group: int) -> dict[str, Any]:
    s_aux = options.get("s_aux")
    return options if s_aux is None else {**options, "s_aux": heads.take(s_aux, 0, group)}


def _options_of_queries(options: dict[str, Any], span: slice, n_queries: int) -> dict[str, Any]:
    position_ids = options.get("position_ids")
    if not isinstance(position_ids, Tensor) or position_ids.shape[-1] != n_queries:
        return options
    return {**options, "position_ids": position_ids[..., span]}
