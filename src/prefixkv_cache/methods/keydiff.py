"""KeyDiff (arXiv 2504.15364, section 3): keys that point away from the mean direction of their head stay.

A key's score is minus its cosine similarity with the mean of the head's normalised keys; no attention is looked at.
Where we differ from the paper: it prunes while the prompt comes in, block by block; here the prompt is pruned once. The
paper says nothing of protected tokens; sink and last token stay, as in all methods here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rules.scoring import vector_norms
from .method import Decode, Lengths, Method, Protect, Ranking
from .scores import ScoreInputs, score_rule


@score_rule("key-difference")
def key_difference(inputs: ScoreInputs) -> Tensor:
    """1 minus the cosine similarity with the mean direction of the head's valid keys: float32 [batch, kv_heads, n]."""
    keys = inputs.keys.nan_to_num()
    shrink = 1.0 / vector_norms(keys).clamp_min(torch.finfo(torch.float32).tiny)
    if inputs.valid is not None:
        shrink = shrink * inputs.valid[:, None]
    # By matrix products in the keys' own dtype: normalised keys would be a copy of the layer in float32.
    mean = F.normalize((shrink[:, :, None].to(keys.dtype) @ keys).float(), dim=-1)
    similarity = (keys @ mean.transpose(-1, -2).to(keys.dtype)).squeeze(-1).float() * shrink
    return (1.0 - similarity).clamp_min(0.0)


KEYDIFF = Method(
    Ranking(score="key-difference", heads="each"), Lengths("uniform"), Protect(), Decode(distance=1, headroom=64)
)
