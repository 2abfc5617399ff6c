"""What pruning a prompt costs, for any lengths, without pruning it: pruning equals masking.

The prompt is fed once, with a full cache, and the model answers greedily. From then on each candidate is one row of a
forward of the answer's tokens in which the attention hook hides the pruned pairs, head by head. Cost is the KL
divergence of the next-token distributions from the full cache's, and the share of tokens on which both agree. What
leaves while decoding is not part of it. The same full cache reads the prompt a second time for the reconstruction
scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cache.lengths import RatioLengths, Share, length_source
from ..cache.pipeline import kept_of_prompt
from ..cache.prompt import Prompt as LayerPrompt
from ..cache.reconstruct import LargestAttention
from ..methods import Method
from ..profiles.profile import PrefixProfile
from ..rules.importance import DEFAULT_MAX_BYTES
from ..rules.scoring import join_heads
from .forwards import Forwards
from .observe import ObservedCache, ScoreKey, Scores, check_observed, evaluating, model_inputs, score_key, valid_rows

ANSWER_TOKENS = 100
"""Length of the answers, at most."""
_LEAD, _REPEATED = 24, 64  # tokens of a prompt that are fed once more: first some that are not measured
_LADDER = 64  # steps in which it is found at which ratio a pair comes in


@dataclass(frozen=True)
class Cost:
    """What pruning costs an answer, for each row: float64 [batch].

    Attributes:
        divergence: KL(full cache || pruned) of the next-token distributions in nats, the mean over the answer's tokens.
        agreement: share of the tokens that both caches hold most likely.
        exact: 1.0 where every token of the answer is the most likely one, so that greedy decoding writes it; else 0.0.
        later: the divergence in a part of the prompt that is fed once more, where that was asked for and the prompt is
            long text; else that of the answer.
    """

    divergence: Tensor
    agreement: Tensor
    exact: Tensor
    later: Tensor

    def table(self) -> Tensor:
        """[batch, 4]: divergence, agreement, exact, later."""
        return torch.stack([self.divergence, self.agreement, self.exact, self.later], dim=-1)


@dataclass(frozen=True)
class Continuation:
    """Tokens behind a prompt, and what the full cache makes of them.

    Attributes:
        fed: int64 [batch, n_fed].
        skipped: logits of so many first tokens are not measured.
        targets: int64 [batch, n_fed - skipped], the token that follows each of the others.
        counting: bool, like targets: those that are measured.
        full: log-probabilities with the full cache, [batch, n_fed - skipped, vocabulary].
    """

    fed: Tensor
    skipped: int
    targets: Tensor
    counting: Tensor
    full: Tensor

    def divergence(self, pruned: Tensor) -> Tensor:
        """KL(full || pruned) in nats, the mean over the tokens measured: float64 [batch]."""
        of_tokens = (self.full.exp() * (self.full - pruned)).sum(-1).clamp_min(0.0)
        return _mean(of_tokens, self.counting)

    def exact(self, log_probs: Tensor) -> Tensor:
        """Whether greedy decoding writes every token measured: float64 [batch], 1.0 or 0.0."""
        return ((log_probs.argmax(-1) == self.targets) | ~self.counting).all(1).double()


class AnsweredPrompt:
    """A sample with its full cache, the scores of its keys, and an answer.

    Args:
        model: a transformers model that can generate, of a kind that `PrefixKVCache` can prune, in eval mode.
        sample: what `model.generate(**sample)` takes, padded on the left or not.
        methods: whose scores will be asked for.
        image: bool [batch, n], True at image tokens, or None.
        max_bytes: ceiling for the temporaries of the importance computation, per layer.
        answer_tokens: length of the model's own greedy answer, at most.
        given: int64 [batch, n_lead], [batch, n_answer]: what is fed behind the prompt and not measured, and the answer,
            instead of the model's own.
        answer: int64 [batch, n_answer], the model's own answer, where another `AnsweredPrompt` has found it.

    Attributes:
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
        methods: Sequence[Method],
        *,
        image: Tensor | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        answer_tokens: int = ANSWER_TOKENS,
        given: tuple[Tensor, Tensor] | None = None,
        answer: Tensor | None = None,
    ):
        _check(model)
        self.model, self.max_bytes = model, max_bytes
        inputs = model_inputs(model, sample)
        self.cache = ObservedCache(model.config, stored=True)
        self.layers = self.cache.prunable
        self._mask: Tensor | None = inputs.get("attention_mask")
        scores = Scores(methods, max_bytes, image)
        with evaluating(model), Forwards(model, self.cache) as forwards:
            self.cache.observer = scores
            new = max(2, answer_tokens if given is None and answer is None else 0)
            options = {"do_sample": False, "num_beams": 1, "min_new_tokens": 1, "max_new_tokens": new}
            sequences = model.generate(**inputs, past_key_values=self.cache, **options)
        self.cache.observer = None
        check_observed(model, self.layers, scores.seen)
        if scores.ranks.count > 1:
            raise NotImplementedError("tensor-parallel ranks see some heads only; calibrate by='mass' and unit='layer'")
        self._scores, self.valid, self._forwards = scores, scores.valid, forwards
        forwards.restore()
        self._prompts: dict[ScoreKey, list[LayerPrompt]] = {}
        for method in methods:
            self._prompts.setdefault(score_key(method), [self._prompt(index, method, image) for index in self.layers])
        own = sequences[:, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :] if answer is None else answer
        self._ids: Tensor | None = inputs.get("input_ids")
        self._has_image = image is not None and bool(image.any())
        self._answer = self._take_answer(own, given)

    def _take_answer(self, own: Tensor, given: tuple[Tensor, Tensor] | None) -> Continuation:
        """The answer as a continuation; the first token of the model's own comes from the prompt's forward."""
        lead, self.answer = (own[:, :0], own) if given is None else given
        fed = torch.cat([lead, self.answer], dim=1)
        skipped = max(0, lead.shape[1] - 1)
        counting = self._counting_tokens(fed) if given is None else torch.ones_like(fed[:, 1:]).bool()
        return self._continuation(fed, skipped, counting)

    def _continuation(self, tokens: Tensor, skipped: int, counting: Tensor) -> Continuation:
        """Of these tokens [batch, n], each predicted from those before it; counting: bool [batch, n - 1]."""
        fed, targets = tokens[:, :-1], tokens[:, 1 + skipped :]
        with torch.no_grad():
            full = self._forwards.log_probs(fed, self._mask)[:, skipped:]
        return Continuation(fed, skipped, targets, counting[:, skipped:], full)

    def continuations(self) -> list[Continuation]:
        """The answer; and for prompts of text, a part of the prompt once more, as a later question might need any.

        The part lies where the answer's length says, so that prompts differ and a prompt gives the same each time.
        """
        n, span = min(self.n_tokens), _LEAD + _REPEATED
        if self._ids is None or self._has_image or n < 2 * span:
            return [self._answer]
        width = self._ids.shape[1]
        start = width - n + 1 + (37 * int(self.answer.sum())) % (n - span)
        tokens = self._ids[:, start : start + span]
        return [self._answer, self._continuation(tokens, _LEAD - 1, torch.ones_like(tokens[:, 1:]).bool())]

    @property
    def n_tokens(self) -> list[int]:
        """Valid tokens of each row."""
        prompt = next(iter(self._prompts.values()))[0]
        return list(prompt.lengths)

    @property
    def n_layers_and_heads(self) -> tuple[int, int]:
        """Prunable layers, and key heads that each stores."""
        prompt = next(iter(self._prompts.values()))[0]
        return len(self.layers), prompt.keys.shape[1]

    def rows_of_scores(self, method: Method) -> list[Tensor]:
        """For each row, float32 [n_layers, 1 or kv_heads, n_valid] on the CPU: the method's scores."""
        of_layer = self._scores.of[score_key(method)]
        return valid_rows(torch.stack([of_layer[index].cpu() for index in self.layers]), self.valid)

    def kept(self, method: Method, profile: PrefixProfile | None, budget: float) -> dict[int, Tensor]:
        """What a cache of this method, profile and budget keeps of the prompt.

        Args:
            method: one of those that the prompt was scored for, or one that differs from it in lengths or protection.
            profile: None: the lengths are the method's own.
            budget: a fraction, or pairs a head.

        Returns:
            bool [batch, kv_heads, n] by layer index.
        """
        source = length_source(method, profile, budget, len(self.layers))
        prompts = self._prompts[score_key(method)]
        shares = source.shares(prompts, range(len(self.layers)))
        return {
            index: _kept_mask(prompt, share, method)
            for index, prompt, share in zip(self.layers, prompts, shares, strict=True)
        }

    def losses(self, method: Method, ratios: Sequence[float], unit: str) -> list[Tensor]:
        """What it costs when one layer, or one key head, keeps so much and all others keep everything.

        Args:
            method: how keys are ranked.
            ratios: keep ratios.
            unit: `"layer"` or `"head"`.

        Returns:
            For each row, float64 [n_ratios, n_layers, n_heads or 1].
        """
        table = torch.stack([self._losses(method, place, ratios, unit) for place in range(len(self.layers))])
        return list(table.permute(3, 1, 0, 2))

    def _losses(self, method: Method, place: int, ratios: Sequence[float], unit: str) -> Tensor:
        """float64 [n_ratios, n_heads or 1, batch], of one layer."""
        prompt, index = self._prompts[score_key(method)][place], self.layers[place]
        masks = []
        for ratio in ratios:
            kept = _kept_at(ratio, prompt, method)
            heads = torch.eye(kept.shape[1], dtype=torch.bool, device=kept.device)[..., None]
            masks += [kept] if unit == "layer" else [kept | ~head for head in heads]
        found = torch.stack([cost.divergence for cost in self.costs([{index: mask} for mask in masks])]).cpu()
        return found.view(len(ratios), -1, found.shape[1])

    def costs(self, kept: Sequence[Mapping[int, Tensor]], later: bool = False) -> list[Cost]:
        """What it costs the answer when only some pairs of the prompt are there, for each of several choices of them.

        The first token of a model's own answer comes from the prompt's own forward, before anything is pruned; it is
        left out.

        Args:
            kept: bool [batch, kv_heads, n] by layer index; a layer that is not there keeps everything.
            later: whether a part of the prompt is fed once more, too.
        """
        answer, found = self._answer, list[Cost]()
        for pruned in self._under(answer, kept):
            divergence = answer.divergence(pruned)
            agrees = _mean(pruned.argmax(-1) == answer.full.argmax(-1), answer.counting)
            found.append(Cost(divergence, agrees, answer.exact(pruned), divergence))
        for repeated in self.continuations()[1:] if later else []:
            divergences = [repeated.divergence(pruned) for pruned in self._under(repeated, kept)]
            found = [replace(cost, later=own) for cost, own in zip(found, divergences, strict=True)]
        return found

    def _under(self, continuation: Continuation, kept: Sequence[Mapping[int, Tensor]]) -> Iterator[Tensor]:
        """For each choice of pairs, the log-probabilities [batch, n, vocabulary] of what is measured."""
        together = self._forwards.together(continuation.fed)
        for start in range(0, len(kept), together):
            some = kept[start : start + together]
            with torch.no_grad():
                rows, copies = _as_rows(some), len(some)
                of_rows = self._forwards.log_probs(continuation.fed, self._mask, kept=rows, copies=copies)
            yield from of_rows[:, continuation.skipped :].chunk(len(some))

    def full_exact(self) -> Tensor:
        """float64 [batch], 1.0 where the full cache writes the answer."""
        return self._answer.exact(self._answer.full)

    def entry_ratios(self, method: Method) -> dict[int, Tensor]:
        """For each pair the least keep ratio at which its head keeps it; 0 where it always stays.

        Found by asking for what is kept at a ladder of ratios: so whatever the method protects is protected.

        Returns:
            float32 [batch, kv_heads, n] by layer index.
        """
        found = {}
        for index, prompt in zip(self.layers, self._prompts[score_key(method)], strict=True):
            kept = torch.stack([_kept_at((step - 0.5) / _LADDER, prompt, method) for step in range(1, _LADDER)])
            missing = (~kept).sum(0).float()
            found[index] = torch.where(kept[0], torch.zeros_like(missing), missing / _LADDER)
        return found

    def faded_divergences(self, gates: Sequence[Mapping[int, Tensor]], continuation: Continuation) -> Iterator[Tensor]:
        """What it costs when pairs are seen to a degree: float64 [n, batch] for the first n choices, and so on.

        Differentiable. Choices that go through the model together come together, so that their graph can be freed.

        Args:
            gates: [batch, kv_heads, n] by layer index, added to the attention logits of the prompt's pairs.
            continuation: what is fed.
        """
        together = self._forwards.together(continuation.fed)
        for start in range(0, len(gates), together):
            some = gates[start : start + together]
            rows, copies = _as_rows(some), len(some)
            of_rows = self._forwards.log_probs(continuation.fed, self._mask, gates=rows, copies=copies)
            parts = of_rows[:, continuation.skipped :].chunk(len(some))
            yield torch.stack([continuation.divergence(pruned) for pruned in parts])

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Without gradients for the model's weights."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def reconstruction(self) -> list[Tensor]:
        """How much attention each key gets when the prompt is repeated (KVzip, arXiv 2505.23416, section 3.2).

        The prompt's own embeddings are fed once more behind themselves, at the positions that follow, and a key's score
        is the largest attention that any of these tokens gives it in any query head of its key head. KVzip asks the
        model to repeat the context first, in parts; on SmolLM2 the lengths are as good without.

        Returns:
            For each row, float32 [n_layers, kv_heads, n_valid] on the CPU.
        """
        self._forwards.restore()
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

    def _prompt(self, index: int, method: Method, image: Tensor | None) -> LayerPrompt:
        """One layer's prompt, as the pipeline takes it."""
        pairs: Any = self.cache.layers[index]
        keys, of_all = pairs.keys, self._scores.of[score_key(method)][index]
        # A model that stores other heads than it attends with (latent attention) cannot keep keys by head.
        scores = of_all if of_all.shape[1] in (1, keys.shape[1]) else join_heads(of_all, "mean")
        valid, image = (None if each is None else each.to(keys.device) for each in (self.valid, image))
        lengths = [keys.shape[2]] * keys.shape[0] if valid is None else valid.sum(1).tolist()
        return LayerPrompt(
            keys, pairs.values, [], scores=scores, scores_of_all=of_all, valid=valid, image=image, lengths=lengths
        )

    def _counting_tokens(self, fed: Tensor) -> Tensor:
        """Bool [batch, n_answer - 1]: the answer's tokens from the second to the first that ends it."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        ended = torch.isin(fed, torch.tensor(ends, device=fed.device, dtype=fed.dtype))
        return (ended.cumsum(1) - ended.long() == 0)[:, 1:]


def _check(model: Any) -> None:
    """Refuse a model whose answers cannot be measured."""
    if not getattr(model, "can_generate", lambda: False)():
        raise TypeError(f"{type(model).__name__} cannot generate, so what pruning costs it cannot be measured")
    backend = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None) or "eager"
    if "flash" in backend:
        raise ValueError(f"{backend} cannot hide pairs of single heads; load the model with sdpa or eager attention")


def _as_rows(choices: Sequence[Mapping[int, Tensor]]) -> dict[int, Tensor]:
    """What is chosen for each layer, one choice behind the other along the batch; what one lacks hides nothing."""
    examples = {index: mask for choice in choices for index, mask in choice.items()}
    nothing = {index: torch.ones_like(mask) for index, mask in examples.items()}
    return {index: torch.cat([choice.get(index, nothing[index]) for choice in choices]) for index in examples}


def _mean(of_tokens: Tensor, counting: Tensor) -> Tensor:
    return (of_tokens.double() * counting).sum(1) / counting.sum(1)


def _kept_at(ratio: float, prompt: LayerPrompt, method: Method) -> Tensor:
    """Bool [batch, kv_heads, n]: what all heads of a layer keep at one ratio, whatever the floor."""
    sink = method.protect.sink
    source = RatioLengths(lambda _: [[ratio]], ratio, 0, sink=sink, floor=0, dithered=False, source="this layer")
    return _kept_mask(prompt, source.shares([prompt], [0])[0], method)


def _kept_mask(prompt: LayerPrompt, share: Share, method: Method) -> Tensor:
    """Bool [batch, kv_heads, n]: what a layer keeps of its prompt."""
    batch, n_heads, n = prompt.keys.shape[:3]
    mask = torch.zeros(batch, n_heads, n + 1, dtype=torch.bool, device=prompt.keys.device)
    for kept in kept_of_prompt(prompt, share, method):
        heads = list(range(n_heads) if kept.heads is None else kept.heads)
        columns = kept.columns.masked_fill(kept.columns < 0, n).expand(-1, len(heads), -1)
        mask[:, heads] = mask[:, heads].scatter(2, columns, True)
    return mask[..., :n]
