"""EleutherAI's evaluation harness with our cache: `lm_eval --model prefixkv --model_args pretrained=M,budget=0.2`.

    python -m prefixkv_cache.tools.lm_eval run --model prefixkv --model_args pretrained=M,budget=0.2 --tasks T

The harness finds models only in its own list, so this module enters ours there and hands over to its command line.
Tokenizing, batches of generation and metrics are the harness's own; here is which cache a request gets. A text that is
generated has a fresh cache for its prompt. A continuation that is scored is teacher-forced behind its pruned context by
the loop of `prefixkv evaluate`. docs/evaluation.md says what that means.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..cache.cache import PrefixKVCache
from ..rules.checks import check_integer
from .evaluate.token_loop import TokenLoop, write

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    needed = "the harness is not installed: pip install '.[lm-eval]' in a checkout, 'prefixkv-cache[lm-eval]' elsewhere"
    raise (SystemExit if __name__ == "__main__" else ImportError)(f"{needed} ({error})") from None

Request = tuple[Any, list[int], list[int]]
"""What the harness calls it, the tokens of its context, and those of its continuation."""


class PrunedLM(HFLM):
    """What our models do otherwise than the harness's own.

    Args:
        budget: as of `PrefixKVCache`.
        method, profile: likewise; not given: the model's measured profile, if there is one.
        hold_back: so many tokens at the end of a context are fed after it was pruned, and not scored. With 0 the first
            token of a continuation comes from the unpruned prompt, as it does when a model generates.
        kwargs: those of the harness's own model, such as `pretrained`, `dtype` and `batch_size`.

    Raises:
        TypeError, ValueError: no cache can be made of these, or the model's cache cannot be pruned.
    """

    def __init__(self, *args: Any, budget: float | int = 0.5, hold_back: int = 1, **kwargs: Any):
        self._options = {name: kwargs.pop(name) for name in ("method", "profile") if name in kwargs}
        self._budget, self._hold_back = budget, check_integer("hold_back", hold_back, 0)
        PrefixKVCache(budget=budget, **self._options)  # what cannot be is found before the model is loaded
        super().__init__(*args, **kwargs)
        self._new_cache()

    def _new_cache(self, **inputs: Any) -> PrefixKVCache:
        return PrefixKVCache.for_model(self.model, self._budget, inputs=inputs or None, **self._options)

    # Texts that are generated.

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super()._model_generate(context, *args, past_key_values=self._new_cache(input_ids=context), **kwargs)

    # Continuations that are scored.

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 1)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring continuations") as bar:
            for batch in _batches(requests, size):
                for index, answer in self._score(requests, batch):
                    found[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                    bar.update(1)
        return [found[index] for index in range(len(requests))]

    def _score(self, requests: list[Request], batch: list[list[int]]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Score some contexts with equally many continuations each, given by the requests' indices."""
        longest = max(len(requests[index][2]) for indices in batch for index in indices)
        contexts = [requests[indices[0]][1][-(self.max_length - longest) :] for indices in batch]
        held = [min(self._hold_back, len(context) - 1) for context in contexts]
        prompts = [context[: len(context) - n] for context, n in zip(contexts, held, strict=True)]
        inputs = _left_padded(prompts, self._pad, self.device)
        sources = [
            Continuations([context[len(context) - n :] for context, n in zip(contexts, held, strict=True)],
                          [requests[indices[place]][2] for indices in batch], self._pad, self.device)
            for place in range(len(batch[0]))
        ]  # fmt: skip
        write(TokenLoop(self.model, inputs, self._new_cache(**inputs)), sources)
        for place, source in enumerate(sources):
            for indices, likelihood, greedy in zip(
                batch, source.log_likelihood.tolist(), source.greedy.tolist(), strict=True
            ):
                yield indices[place], (likelihood, greedy)

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.eot_token_id if pad is None else pad

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Refused: a text that is scored from its first token on has no prompt that could be pruned."""
        raise NotImplementedError(
            "loglikelihood_rolling scores whole texts, which have no prompt to prune; "
            "take tasks of loglikelihood or generate_until"
        )


@register_model("prefixkv")
class PrefixKVLM(PrunedLM):
    """A language model with our cache."""


@register_model("prefixkv-multimodal")
class PrefixKVMultimodalLM(PrunedLM, HFMultimodalLM):
    """A vision-language model with our cache; generation only, as in the harness's own `hf-multimodal`."""

    def _model_multimodal_generate(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        cache = self._new_cache(**inputs)
        return super()._model_multimodal_generate(inputs, *args, past_key_values=cache, **kwargs)


class Continuations:
    """A token source (see evaluate/token_sources.py) of given tokens, whose likelihood it sums up.

    Args:
        held_back: tokens fed first, in each row, and not scored.
        continuations: tokens that are scored, in each row; at least one.
        pad: token for rows that have ended.
        device: of the logits.

    Attributes:
        log_likelihood: float64 [rows], of the continuation so far, in nats.
        greedy: bool [rows], whether each of its tokens was the most likely one.
    """

    def __init__(
        self, held_back: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], pad: int, device: Any
    ):
        rows = [[*before, *scored] for before, scored in zip(held_back, continuations, strict=True)]
        width = max(map(len, rows)) + 1
        self._tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
        self._first = torch.tensor([len(before) for before in held_back], device=device)
        self._lengths = torch.tensor([len(row) for row in rows], device=device)
        self._step = 0
        self.log_likelihood = torch.zeros(len(rows), dtype=torch.float64, device=device)
        self.greedy = torch.ones(len(rows), dtype=torch.bool, device=device)

    @property
    def ended(self) -> Tensor:
        """Which rows have ended, bool [rows]."""
        return self._step >= self._lengths

    def next(self, logits: Tensor) -> Tensor:
        """The next token of each row, int64 [rows], from float32 [rows, vocabulary]."""
        tokens = self._tokens[:, min(self._step, self._tokens.shape[1] - 1)]
        scored = ~self.ended & (self._step >= self._first)
        own = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].double()
        self.log_likelihood += own * scored
        self.greedy &= (logits.argmax(-1) == tokens) | ~scored
        self._step += 1
        return tokens


def _batches(requests: Sequence[Request], size: int) -> Iterator[list[list[int]]]:
    """Indices of the requests by context, so many contexts together that have equally many continuations each."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (_, context, _) in enumerate(requests):
        by_context.setdefault(tuple(context), []).append(index)
    groups = sorted(by_context.items(), key=lambda item: (len(item[1]), len(item[0])), reverse=True)
    while groups:
        together = [indices for _, indices in groups[:size] if len(indices) == len(groups[0][1])]
        yield together
        groups = groups[len(together) :]


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*[pad] * (width - len(row)), *row] for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def main() -> None:
    """The harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[0] = "lm_eval"
    cli_evaluate()


if __name__ == "__main__":
    main()
