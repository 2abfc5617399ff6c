"""The way of a prompt through one layer: importance -> scores -> counts -> kept columns -> layer.prune.

`prune_after_attention` is that line; the cache calls it after each layer's prompt attention, and the calibrator calls
`score_calls` of it with nothing pruned. Each step is a pure function of rules/ or methods/, or a source of lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..methods import Method
from ..methods.scores import SCORES, ScoreInputs
from ..rules.queries import Picks
from ..rules.scoring import join_heads
from ..rules.selection import places, select_keys
from .call import AttentionCall
from .heads import HeadGroup, Kept
from .layer import PrunedLayer
from .lengths import LengthSource, Share
from .prompt import Prompt
from .tensor_parallel import HeadRanks


@torch.no_grad()
def prune_after_attention(
    calls: Sequence[AttentionCall],
    layer: PrunedLayer,
    ready: Sequence[PrunedLayer],
    method: Method,
    source: LengthSource,
    max_bytes: int,
) -> None:
    """Rank the keys of a prompt that a layer has just attended to, and prune the layers that are ready for it.

    Args:
        calls: the layer's attention calls, by segment.
        layer: whose prompt it is.
        ready: layers whose lengths are known once this one is scored: this layer, or all, or none yet.
        method: how keys are ranked and what is protected.
        source: of the lengths.
        max_bytes: ceiling for the temporaries of the importance computation.
    """
    prompt = layer.prompt
    assert prompt is not None, "the cache asks only for layers with a prompt"
    prompt.ranks = HeadRanks.of(calls[0].module)
    if not _keeps_all(layer, prompt, source):
        sink = 0 if layer.pruned_before or prompt.cut else method.protect.sink  # the sink is the first prompt's
        groups = [shown.group for shown in prompt.shown] or [None]
        scores = score_calls(calls, groups, method, prompt.n_new, prompt.valid, prompt.image, sink, max_bytes)
        prompt.scores = _agreed(scores, method.ranking.heads, prompt)
        if source.waits:
            prompt.scores_of_all = prompt.ranks.gather(scores) if method.ranking.heads == "each" else prompt.scores
        if layer.rule.counts_received:
            _count_for_old_pairs(layer, calls, prompt, max_bytes)
    prompt.attended = True
    if layer.pruned_before:
        layer.prune(_kept_of_turn(layer, prompt, method, source))
    elif ready:
        prune_ready(ready, method, source)


def prune_ready(ready: Sequence[PrunedLayer], method: Method, source: LengthSource) -> None:
    """Prune the first prompts of layers whose scores are known: counts -> kept columns -> layer.prune."""
    waiting = [(layer, layer.prompt) for layer in ready if layer.prompt is not None]
    shares = source.shares([prompt for _, prompt in waiting], [layer.place for layer, _ in waiting])
    for (layer, prompt), share in zip(waiting, shares, strict=True):
        layer.prune(kept_of_prompt(prompt, share, method))


def _keeps_all(layer: PrunedLayer, prompt: Prompt, source: LengthSource) -> bool:
    if layer.pruned_before:
        return all(ratio == 1.0 for segment in layer.segments for ratio in segment.of_rows("keep", 1.0))
    return source.keeps_all(layer.place, prompt.lengths)


# Importance -> scores.


def score_calls(
    calls: Sequence[AttentionCall],
    groups: Sequence[HeadGroup | None],
    method: Method,
    n_new: int,
    valid: Tensor | None,
    image: Tensor | None,
    sink: int,
    max_bytes: int,
) -> Tensor:
    """Scores of a prompt's keys, before heads agree: float32 [batch, kv_heads, n_new], the key heads of this rank.

    Args:
        calls: of the prompt, by segment.
        groups: the key heads of each call. [None]: there is one call, of all heads.
        method: how keys are ranked.
        n_new: the last so many keys are the prompt's.
        valid: bool [batch, n_new], False at padding. None: no padding.
        image: bool [batch, n_new], True at image tokens. None: nothing is known of images.
        sink: first valid tokens that are the attention sink.
        max_bytes: ceiling for the temporaries of the importance computation.
    """

    def importance(picks: Picks) -> Tensor:
        return joined([call.importance(picks, valid, max_bytes)[..., -n_new:] for call in calls])

    def joined(parts: list[Tensor]) -> Tensor:
        if groups[0] is None:
            return parts[0]
        heads = [head for group in groups if group is not None for head in group.heads]
        return torch.cat(parts, 1)[:, sorted(range(len(heads)), key=heads.__getitem__)]

    keys, values = (joined([getattr(call, name)[:, :, -n_new:] for call in calls]) for name in ("key", "value"))
    layer_idx = getattr(calls[0].module, "layer_idx", None) or 0
    inputs = ScoreInputs(keys, values, valid, image, method.ranking, sink, layer_idx, importance)
    return SCORES[method.ranking.score](inputs)


def _agreed(scores: Tensor, how: str, prompt: Prompt) -> Tensor:
    """[batch, kv_heads, n] -> [batch, 1, n] where heads agree on keys, those of other ranks too; else as it is."""
    if how != "each":
        return join_heads(prompt.ranks.gather(scores), how)
    # A model that stores other heads than it attends with (latent attention) cannot keep keys by head.
    return scores if scores.shape[1] == prompt.keys.shape[1] else join_heads(scores, "mean")


def _count_for_old_pairs(layer: PrunedLayer, calls: Sequence[AttentionCall], prompt: Prompt, max_bytes: int) -> None:
    """What the pairs of earlier turns receive from a new prompt counts for their importance, too."""
    for segment, call in zip(layer.segments, calls, strict=False):
        importance = call.importance(None, prompt.valid, max_bytes)
        segment.add_received(importance[..., : importance.shape[2] - prompt.n_new], layer.seen)


# Counts -> kept columns.


def kept_of_prompt(prompt: Prompt, share: Share, method: Method) -> list[Kept]:
    """What each segment-to-be keeps of a first prompt."""
    sink, protected = 0 if prompt.cut else method.protect.sink, _protected_text(prompt, method.protect.text_floor)
    return [_keep(prompt, *segment, method, sink, protected) for segment in share.by_segment()]


def _kept_of_turn(layer: PrunedLayer, prompt: Prompt, method: Method, source: LengthSource) -> list[Kept]:
    """What each segment keeps of a later prompt: by the ratios that its rows have, and what its headroom allows."""
    kept, protected = [], _protected_text(prompt, method.protect.text_floor)
    for segment in layer.segments:
        ratios, allowances = segment.of_rows("keep", 0.0), segment.of_rows("allowance", 0)
        counts = [
            min(source.count(ratio, n, layer.place) + allowance, n)
            for ratio, allowance, n in zip(ratios, allowances, prompt.lengths, strict=True)
        ]
        heads = None if segment.group is None else segment.group.heads
        kept.append(_keep(prompt, heads, counts, ratios, method, 0, protected))
    return kept


def _keep(
    prompt: Prompt,
    heads: tuple[int, ...] | None,
    counts: list[int],
    ratios: list[float],
    method: Method,
    sink: int,
    protected: Tensor | None,
) -> Kept:
    scores = prompt.scores
    if scores is not None and heads is not None and scores.shape[1] > 1:
        scores = scores[:, list(heads)]
    recent, whole = method.protect.recent, counts == prompt.lengths and set(ratios) == {1.0} and not prompt.window
    columns = select_keys(
        None if counts == prompt.lengths else scores,
        counts,
        valid=prompt.valid,
        sink=sink,
        recent=int(recent) if recent >= 1 else [round(recent * count) for count in counts],
        protected=protected,
        n_keys=prompt.n_new,
        device=prompt.keys.device,
    )
    return Kept(heads, columns, counts, ratios, whole)


def _protected_text(prompt: Prompt, text_floor: float) -> Tensor | None:
    """The text tokens that go before all image tokens, bool [batch, n_new]; None: no token does."""
    if prompt.image is None or prompt.scores is None or text_floor == 0.0:
        return None
    text = ~prompt.image if prompt.valid is None else ~prompt.image & prompt.valid
    scores = prompt.scores.mean(1).masked_fill(~text, -torch.inf)
    rank = places(scores.argsort(dim=1, descending=True, stable=True))
    return text & (rank < (text.sum(1, keepdim=True) * text_floor).ceil())
