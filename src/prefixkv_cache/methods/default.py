"""The default: what this library uses where neither a method nor a profile says otherwise.

Every key head keeps its own keys, all heads equally many, a fifth of them the newest. Image tokens are ranked by key
difference: how far a key points away from the others (keydiff.py). Text is ranked by attention: the larger of two
shares, each without the sink, from the prompt's last 16 tokens, averaged over 13 neighbours, and from 64 tokens spread
evenly over the prompt; times the norm of the value. Where more than a fifth of the prompt stays, unlike keys of text
come in as well. Attention sees what the question asks for and what a summary needs; an unlike key is what an answer may
yet come to, or a later question ask for (docs/study.md). With a profile no head keeps less than a fiftieth of the
prompt. The prompt's pairs stay while decoding, and an answer has 64 pairs a head to itself.
"""

import torch
from torch import Tensor

from ..rules.selection import places
from .keydiff import key_difference
from .method import Decode, Lengths, Method, Protect, Ranking
from .scores import ScoreInputs, attention, score_rule

_ALONE = 5  # attention alone ranks the first fifth of a text's keys


@score_rule("combined")
def combined(inputs: ScoreInputs) -> Tensor:
    """By attention and by key difference: float32 [batch, kv_heads, n], in (0, 1].

    The place of an image token is that by key difference. The place of a text token is the better of two: that by
    attention, and a fifth of the row's keys plus half of that by key difference, so that from there on two keys come in
    for their direction where one does for attention.
    """
    first, second = (_places(rule(inputs), inputs.valid) for rule in (attention, key_difference))
    n = first.shape[-1] if inputs.valid is None else inputs.valid.sum(1)[:, None, None]
    # In quarters of a place, so that no two keys have the same.
    place = torch.minimum(4 * first, 4 * (n // _ALONE) + 2 * second + 1)
    if inputs.image is not None:
        place = torch.where(inputs.image[:, None], 4 * second + 2, place)
    return 1.0 / (1.0 + place.float())


def _places(scores: Tensor, valid: Tensor | None) -> Tensor:
    """int64, 0 for the highest score; padding comes last, and so does what is not finite."""
    lowest = scores.float().nan_to_num(nan=-1.0, posinf=torch.finfo(torch.float32).max)
    if valid is not None:
        lowest = lowest.masked_fill(~valid[:, None], -1.0)
    return places(lowest.argsort(dim=-1, descending=True, stable=True))


DEFAULT = Method(
    Ranking("combined", queries=16, context=64, heads="each", pooling=13, pooling_by="mean", value_norm=True),
    Lengths("uniform", floor=0.02),
    Protect(recent=0.2, text_floor=0.5),
    Decode(distance=1, headroom=64),
)
