"""Scoring rules by name: what the keys of a prompt are ranked by.

A rule gets the prompt's new keys and values and may ask for their importance; it returns one score for each key of each
key head. How heads agree, how many keys stay and which are protected is decided afterwards (`cache/pipeline.py`). A
method that ranks otherwise registers a rule of its own in its file, as `keydiff.py` does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..rules.queries import Picks, even_queries, last_queries
from ..rules.scoring import normalised_without_sink, pool_neighbours, vector_norms


@dataclass(frozen=True)
class ScoreInputs:
    """What a scoring rule may look at.

    Attributes:
        keys, values: [batch, kv_heads, n, head_dim], of the prompt's new tokens.
        valid: bool [batch, n], False at padding; None: no padding.
        image: bool [batch, n], True at image tokens; None: nothing is known of images.
        ranking: the method's.
        sink: first valid tokens that are the attention sink; 0 in a later turn.
        layer_idx: of the decoder layer.
        importance: gives float32 [batch, kv_heads, n], the attention that the keys receive from the queries picked.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None
    image: Tensor | None
    ranking: Any
    sink: int
    layer_idx: int
    importance: Callable[[Picks], Tensor]


ScoreRule: TypeAlias = Callable[[ScoreInputs], Tensor]
SCORES: dict[str, ScoreRule] = {}


def score_rule(name: str) -> Callable[[ScoreRule], ScoreRule]:
    """Decorator: register a scoring rule under a name, for `Ranking(score=name)`."""

    def register(rule: ScoreRule) -> ScoreRule:
        SCORES[name] = rule
        return rule

    return register


@score_rule("attention")
def attention(inputs: ScoreInputs) -> Tensor:
    """Attention received from the observation window, and from an even sample of the prompt where asked for.

    The window's importance is pooled over neighbours (SnapKV, arXiv 2404.14469, section 4.2). With a context, both are
    normalised without the sink, whose share says nothing of the others, and the larger one counts.
    """
    ranking, n_new = inputs.ranking, inputs.keys.shape[2]
    window = inputs.importance(None if ranking.queries == "all" else last_queries(n_new, ranking.queries, inputs.valid))
    scores = pool_neighbours(window, ranking.pooling, ranking.pooling_by, inputs.valid)
    if ranking.context:
        picks = None if ranking.context == "all" else even_queries(n_new, ranking.context, inputs.valid)
        context = inputs.importance(picks)
        both = (normalised_without_sink(each, inputs.sink, inputs.valid) for each in (scores, context))
        scores = torch.maximum(*both)
    if ranking.value_norm:
        scores = scores * vector_norms(inputs.values)
    return scores


@score_rule("recency")
def recency(inputs: ScoreInputs) -> Tensor:
    """The newer, the better (StreamingLLM, arXiv 2309.17453)."""
    batch, heads, n_new, _ = inputs.keys.shape
    return torch.arange(n_new, dtype=torch.float32, device=inputs.keys.device).expand(batch, heads, n_new)


@score_rule("random")
def random(inputs: ScoreInputs) -> Tensor:
    """Drawn by layer and number of valid tokens alone, so that a row of a batch keeps what it keeps alone."""
    batch, _, n_new, _ = inputs.keys.shape
    valid = torch.ones(batch, n_new, dtype=torch.bool) if inputs.valid is None else inputs.valid.cpu()
    drawn = torch.zeros(batch, n_new)
    for row, own in enumerate(valid):
        length = int(own.sum())
        source = torch.Generator().manual_seed(zlib.crc32(f"{inputs.layer_idx}/{length}".encode()))
        drawn[row, own] = torch.rand(length, generator=source)
    return drawn[:, None].expand(-1, inputs.keys.shape[1], -1).to(inputs.keys.device)
