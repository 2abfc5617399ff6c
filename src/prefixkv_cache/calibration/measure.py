"""What pruning a prompt costs, for any lengths, without pruning it: pruning equals masking.

The prompt is fed once, with a full cache, and the model answers greedily. From then on each candidate is one forward of
the answer's tokens in which the attention hook hides the pruned pairs, head by head. Cost is the KL divergence of the
next-token distributions from the full cache's, and the share of tokens on which both agree. What leaves while decoding
is not part of it. The same full cache reads the prompt a second time for the reconstruction scores.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache.architecture import whole_layer_kinds
from ..cache.lengths import RatioLengths, Share, length_source
from ..cache.pipeline import kept_of_prompt
from ..cache.prompt import Prompt as LayerPrompt
from ..cache.reconstruct import LargestAttention
from ..methods import Method
from ..profiles.profile import PrefixProfile
from ..rules.importance import DEFAULT_MAX_BYTES
from ..rules.scoring import join_heads
from .observe import ObservedCache, Scores, check_observed, evaluating, model_inputs, valid_rows

ANSWER_TOKENS = 40
"""Length of the answers, at most."""

# What a decoder is given in the prompt's forward and shall not be given again.
_OF_ONE_FORWARD = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache",
                   "cache_position", "return_dict")  # fmt: skip


class AnsweredPrompt:
    """A sample with its full cache and the model's own answer.

    Args:
        model: a transformers model that can generate, of a kind that `PrefixKVCache` can prune, in eval mode.
        sample: what `model.generate(**sample)` takes, padded on the left or not.
        method: how keys are ranked.
        image: bool [batch, n], True at image tokens, or None.
        max_bytes: ceiling for the temporaries of the importance computation, per layer.
        answer_tokens: length of the answer, at most.

    Attributes:
        scores: float32 [batch, 1 or kv_heads, n] by layer index.
        layers: indices of the prunable layers.
        valid: bool [batch, n], False at padding; None: no padding.
        answer: int64 [batch, n_answer].

    Raises:
        UnobservedAttentionError: the model computes the attention of a layer by code of its own.
        TypeError, ValueError: the model cannot be pruned, or cannot generate.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        sample: Mapping[str, Any],
        method: Method,
        *,
        image: Tensor | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        answer_tokens: int = ANSWER_TOKENS,
    ):
        if not getattr(model, "can_generate", lambda: False)():
            raise TypeError(f"{type(model).__name__} cannot generate, so what pruning costs it cannot be measured")
        backend = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None) or "eager"
        if "flash" in backend:
            raise ValueError(
                f"{backend} cannot hide pairs of single heads; load the model with sdpa or eager attention"
            )
        self.model, self.method, self.max_bytes = model, method, max_bytes
        inputs = model_inputs(model, sample)
        self.cache = ObservedCache(model.config, stored=True)
        self.layers = self.cache.prunable
        self._mask: Tensor | None = inputs.get("attention_mask")
        scores = Scores(method, max_bytes)
        with evaluating(model), _Forwards(model, self.cache) as forwards:
            self.cache.observer = scores
            sequences = model.generate(
                **inputs,
                past_key_values=self.cache,
                do_sample=False,
                num_beams=1,
                min_new_tokens=2,
                max_new_tokens=max(2, answer_tokens),
            )
        self.cache.observer = None
        check_observed(model, self.layers, scores.of_layer)
        if scores.ranks.count > 1:
            raise NotImplementedError("tensor-parallel ranks see some heads only; calibrate by='mass' and unit='layer'")
        self.scores, self.valid, self._forwards = scores.of_layer, scores.valid, forwards
        self.answer: Tensor = sequences[:, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :]
        forwards.restore(self.cache)
        self._prompts = [self._prompt(index, image) for index in self.layers]
        # Linear layers go on from their state one token at a time only.
        self._at_once = not {kind for kind in whole_layer_kinds(model.config) if "sliding" not in kind}
        self._counting = self._counting_tokens()
        self._full = self._log_probs({})

    @property
    def n_tokens(self) -> list[int]:
        """Valid tokens of each row."""
        batch, n = self.answer.shape[0], self.scores[self.layers[0]].shape[2]
        return [n] * batch if self.valid is None else self.valid.sum(1).tolist()

    def rows_of_scores(self) -> list[Tensor]:
        """For each row, float32 [n_layers, 1 or kv_heads, n_valid] on the CPU."""
        return valid_rows(torch.stack([self.scores[index].cpu() for index in self.layers]), self.valid)

    def kept(self, profile: PrefixProfile, budget: float) -> dict[int, Tensor]:
        """What a cache of this profile and budget keeps of the prompt: bool [batch, kv_heads, n] by layer index."""
        source = length_source(self.method, profile, budget, len(self.layers))
        shares = source.shares(self._prompts, range(len(self.layers)))
        prompts = zip(self.layers, self._prompts, shares, strict=True)
        return {index: _kept_mask(prompt, share, self.method) for index, prompt, share in prompts}

    def losses(self, ratios: Sequence[float], unit: str) -> list[Tensor]:
        """What it costs when one layer, or one key head, keeps so much and all others keep everything.

        Args:
            ratios: keep ratios.
            unit: `"layer"` or `"head"`.

        Returns:
            For each row, float64 [n_ratios, n_layers, n_heads or 1].
        """
        table = [[self._loss(place, ratio, unit) for place in range(len(self.layers))] for ratio in ratios]
        return list(torch.stack([torch.stack(row) for row in table]).permute(3, 0, 1, 2))

    def _loss(self, place: int, ratio: float, unit: str) -> Tensor:
        """float64 [n_heads or 1, batch]."""
        protect, prompt, index = self.method.protect, self._prompts[place], self.layers[place]
        floor = self.method.lengths.floor
        source = RatioLengths(
            lambda _: [[ratio]], ratio, 0, sink=protect.sink, floor=floor, dithered=False, source="this layer"
        )
        kept = _kept_mask(prompt, source.shares([prompt], [place])[0], self.method)
        if unit == "layer":
            return self.cost({index: kept})[0][None].cpu()
        others = torch.ones_like(kept)
        heads = torch.eye(kept.shape[1], dtype=torch.bool, device=kept.device)[..., None]
        return torch.stack([self.cost({index: torch.where(head, kept, others)})[0] for head in heads]).cpu()

    def cost(self, kept: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """What it costs the answer when only these pairs of the prompt are there.

        The first token of an answer comes from the prompt's own forward, before anything is pruned; it is left out.

        Args:
            kept: bool [batch, kv_heads, n] by layer index; a layer that is not there keeps everything.

        Returns:
            (divergence, agreement): float64 [batch] each: the mean over the answer's tokens of KL(full || pruned) in
            nats, and the share of tokens that both hold most likely.
        """
        pruned = self._log_probs(kept)
        divergence = (self._full.exp() * (self._full - pruned)).sum(-1).clamp_min(0.0)
        agreement = self._full.argmax(-1) == pruned.argmax(-1)
        return _mean(divergence, self._counting), _mean(agreement, self._counting)

    @torch.no_grad()
    def reconstruction(self) -> list[Tensor]:
        """How much attention each key gets when the prompt is repeated (KVzip, arXiv 2505.23416, section 3.2).

        The prompt's own embeddings are fed once more behind themselves, at the positions that follow, and a key's score
        is the largest attention that any of these tokens gives it in any query head of its key head. KVzip asks the
        model to repeat the context first, in parts; on SmolLM2 the lengths are as good without.

        Returns:
            For each row, float32 [n_layers, kv_heads, n_valid] on the CPU.
        """
        self._forwards.restore(self.cache)
        # Padding goes behind the second copy: between the two, it would use up sliding windows.
        order = None if self.valid is None else (~self.valid).long().argsort(dim=1, stable=True)
        valid = None if self.valid is None or order is None else self.valid.gather(1, order)
        self.cache.observer = largest = LargestAttention(valid, self.max_bytes)
        try:
            with evaluating(self.model):
                self._forwards.repeat_prompt(self._mask, order)
        finally:
            self.cache.observer = None
        return valid_rows(torch.stack([largest.of_layer[index] for index in self.layers]), self.valid)

    def _prompt(self, index: int, image: Tensor | None) -> LayerPrompt:
        """One layer's prompt, as the pipeline takes it."""
        pairs: Any = self.cache.layers[index]
        keys, scores = pairs.keys, self.scores[index]
        # A model that stores other heads than it attends with (latent attention) cannot keep keys by head.
        scores = scores if scores.shape[1] == keys.shape[1] else join_heads(scores, "mean")
        valid, image = (None if each is None else each.to(keys.device) for each in (self.valid, image))
        return LayerPrompt(keys, pairs.values, [], scores=scores, valid=valid, image=image, lengths=self.n_tokens)

    def _counting_tokens(self) -> Tensor:
        """Bool [batch, n_answer - 1]: the answer's tokens from the second to the first that ends it."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        ended = torch.isin(self.answer, torch.tensor(ends, device=self.answer.device, dtype=self.answer.dtype))
        return (ended.cumsum(1) - ended.long() == 0)[:, 1:]

    @torch.no_grad()
    def _log_probs(self, kept: Mapping[int, Tensor]) -> Tensor:
        """[batch, n_answer - 1, vocabulary], of the answer's tokens from the second on."""
        self._forwards.restore(self.cache)
        self.cache.kept = kept
        tokens, positions = self.answer[:, :-1], self._forwards.positions
        width = tokens.shape[1] if self._at_once else 1
        found = []
        with evaluating(self.model):
            for start in range(0, tokens.shape[1], width):
                more: dict[str, Any] = {}
                if positions is not None:
                    more["position_ids"] = positions[..., start : start + width]
                if self._mask is not None:
                    more["attention_mask"] = torch.nn.functional.pad(self._mask, (0, start + width), value=1)
                some = tokens[:, start : start + width]
                found.append(self.model(input_ids=some, past_key_values=self.cache, use_cache=True, **more).logits)
        self.cache.kept = {}
        logits = torch.cat(found, dim=1)
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def _mean(of_tokens: Tensor, counting: Tensor) -> Tensor:
    return (of_tokens.double() * counting).sum(1) / counting.sum(1)


class _Forwards:
    """What `generate` gives the model's decoder, and the full cache as it is after the prompt.

    Used as a context around `generate`; a hook on the decoder sees the prompt's forward and each step.

    Attributes:
        positions: of the answer's tokens that were fed, int64 [..., batch, n_answer - 1]; None: the decoder finds them.
    """

    def __init__(self, model: Any, cache: ObservedCache):
        self._decoder, self._cache = model.get_decoder(), cache
        self._prompt: dict[str, Any] = {}
        self._steps: list[Tensor | None] = []
        self._saved: list[dict[str, Any]] = []

    def __enter__(self) -> _Forwards:
        self._handle = self._decoder.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()

    def _note(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        if not self._prompt:
            self._prompt = {**kwargs, **({"input_ids": args[0]} if args else {})}
            return
        if not self._saved:
            self._saved = [_state(layer) for layer in self._cache.layers]
        self._steps.append(positions)

    @property
    def positions(self) -> Tensor | None:
        steps = [step for step in self._steps if step is not None]
        return torch.cat(steps, dim=-1) if steps else None

    def restore(self, cache: ObservedCache) -> None:
        """Bring the cache back to the end of the prompt."""
        for layer, saved in zip(cache.layers, self._saved, strict=True):
            own = vars(layer)
            own.clear()
            own.update(copy.deepcopy(saved) if _is_in_place(layer) else saved)

    def repeat_prompt(self, mask: Tensor | None, order: Tensor | None) -> None:
        """Feed the decoder the prompt once more, behind itself.

        Args:
            mask: int64 [batch, n], 0 at padding; None: no padding.
            order: int64 [batch, n], in which order each row's tokens are fed; None: as they were.
        """
        again = dict(self._prompt)
        if again.get("position_ids") is not None:
            again["position_ids"] = positions_behind(again["position_ids"])
        if order is not None:
            again = {name: _in_order(value, order, name) for name, value in again.items()}
        more = {name: value for name, value in again.items() if name not in _OF_ONE_FORWARD}
        if mask is not None:
            more["attention_mask"] = torch.cat([mask, mask if order is None else mask.gather(1, order)], dim=1)
        for name in ("inputs_embeds", "input_ids", "position_ids"):
            if again.get(name) is not None and not (name == "input_ids" and "inputs_embeds" in more):
                more[name] = again[name]
        self._decoder(past_key_values=self._cache, use_cache=True, **more)


def _in_order(value: Any, order: Tensor, name: str) -> Any:
    """A tensor of tokens, [batch, n, ...] or positions [..., batch, n], with each row's tokens in this order."""
    if not isinstance(value, Tensor):
        return value
    if name == "position_ids":
        return value.expand(*value.shape[:-2], *order.shape).gather(-1, order.expand(*value.shape[:-2], -1, -1))
    if value.shape[:2] != order.shape:
        return value
    return value.take_along_dim(order.view(*order.shape, *[1] * (value.ndim - 2)), 1)


def _is_in_place(layer: Any) -> bool:
    """Whether the layer's tensors change in place, as the states of linear attention do."""
    return not hasattr(layer, "keys") or hasattr(layer, "conv_states")


def _state(layer: Any) -> dict[str, Any]:
    return copy.deepcopy(vars(layer)) if _is_in_place(layer) else dict(vars(layer))


def positions_behind(positions: Tensor) -> Tensor:
    """The same positions, moved so that they follow the last one: [batch or 1, n], or [3 or 4, batch, n] of M-RoPE.

    The three axes of M-RoPE move together; a fourth, which stands first, is that of the text and moves by itself.
    """
    if positions.ndim == 2:
        return positions + positions.amax(1, keepdim=True) + 1
    text, axes = positions[:-3], positions[-3:]
    moved = axes + axes.amax((0, 2), keepdim=True) + 1
    return torch.cat([text + text.amax(2, keepdim=True) + 1, moved]) if len(text) else moved


def _kept_mask(prompt: LayerPrompt, share: Share, method: Method) -> Tensor:
    """Bool [batch, kv_heads, n]: what a layer keeps of its prompt."""
    batch, n_heads, n = prompt.keys.shape[:3]
    mask = torch.zeros(batch, n_heads, n + 1, dtype=torch.bool, device=prompt.keys.device)
    for kept in kept_of_prompt(prompt, share, method):
        heads = list(range(n_heads) if kept.heads is None else kept.heads)
        columns = kept.columns.masked_fill(kept.columns < 0, n).expand(-1, len(heads), -1)
        mask[:, heads] = mask[:, heads].scatter(2, columns, True)
    return mask[..., :n]
