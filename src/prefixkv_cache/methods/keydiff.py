"""KeyDiff (arXiv 2504.15364, section 3): keys that point away from the mean direction of their head stay.

A key's score is minus its cosine similarity with the mean of the head's normalised keys; no attention is looked at.
Where we differ from the paper: it prunes while the prompt comes in, block by block; here the prompt is pruned once. The
paper says nothing of protected tokens; sink and last token stay, as in all methods here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .method import Decode, Lengths, Method, Protect, Ranking
from .scores import ScoreInputs, score_rule


@score_rule("key-difference")
def key_difference(inputs: ScoreInputs) -> Tensor:
    """1 minus the cosine similarity with the mean direction of the head's valid keys: float32 [batch, kv_heads, n]."""
    directions = F.normalize(inputs.keys.float().nan_to_num(), dim=-1)
    if inputs.valid is not None:
        directions = directions * inputs.valid[:, None, :, None]
    mean = F.normalize(directions.sum(2, keepdim=True), dim=-1)
    return (1.0 - directions @ mean.transpose(-1, -2)).squeeze(-1).clamp_min(0.0).to(torch.float32)


KEYDIFF = Method(
    Ranking(score="key-difference", heads="each"), Lengths("uniform"), Protect(), Decode(distance=1, headroom=64)
)
