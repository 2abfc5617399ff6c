"""A context that comes before its questions: its tokens, and those of a question behind it, by the chat template.

The template is asked for a prompt with a marker in the question's place; what stands before the marker is the context.
Tokenizers join what lies side by side, so the context ends at the last token that is the same whatever question
follows: the tokens of context and question are those of the whole prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..cache.cache import PrefixKVCache
from .loading import LoadError, chat_text, prepare_texts

_MARKERS = ("XQUESTIONX", "XANOTHER QUESTION, WHICH IS LONGERX")
_PROBES = ("What is it?", "a", "1 + 1", '"Is it?"', "(b)", "été", "- c", "?", "I", "the price")
_TAIL = 200  # characters of the context that the question is tokenized with
_NOTE = "question"


class Questions:
    """How a question is put behind a context.

    Args:
        tokenizer: of the model.
        before: text that the question's tokens may depend on: the end of the context, and more of the prompt behind it.
        after: text behind the question.
        skip: so many tokens of `before` belong to the context.
    """

    def __init__(self, tokenizer: Any, before: str, after: str, skip: int):
        self._tokenizer, self.before, self.after, self.skip = tokenizer, before, after, skip

    @classmethod
    def of_note(cls, processor: Any, cache: PrefixKVCache) -> Questions:
        """What `note` has written into a cache.

        Raises:
            ValueError: the cache has no such note, or no context.
        """
        try:
            found = json.loads(cache.notes[_NOTE])
            made = cls(tokenizer_of(processor), str(found["before"]), str(found["after"]), int(found["skip"]))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            made = None
        if made is None or made.skip < 1 or cache.context_ids is None or len(cache.context_ids) != 1:
            raise ValueError(
                "this cache does not say how a question is put behind its context; expected one that `prefixkv "
                "compress` has written"
            )
        return made

    def note(self, cache: PrefixKVCache) -> None:
        """Write this into a cache's notes."""
        said = {"before": self.before, "after": self.after, "skip": self.skip}
        cache.notes = {**cache.notes, _NOTE: json.dumps(said)}

    def behind(self, context_ids: Tensor, question: str) -> dict[str, Tensor]:
        """What `model.generate(**inputs, past_key_values=cache)` takes: the context's tokens and the question's.

        Args:
            context_ids: int64 [1, n].
            question: what is asked.

        Raises:
            ValueError: the question is empty, or its first characters become one token with the context's last.
        """
        if not question.strip():
            raise ValueError("the question is empty; say what the model shall answer")
        ids, usual = (
            tokens(self._tokenizer, self.before + text.strip() + self.after) for text in (question, _PROBES[0])
        )
        if ids[: self.skip] != usual[: self.skip] or len(ids) <= self.skip:
            raise ValueError(
                f"the tokens of the context change when {question.strip()[:40]!r} stands behind it; begin the question "
                "with a plain word"
            )
        more = torch.tensor([ids[self.skip :]], device=context_ids.device)
        whole = torch.cat([context_ids, more], dim=1)
        return {"input_ids": whole, "attention_mask": torch.ones_like(whole)}


def context_inputs(
    processor: Any, prefix: str, pictures: Sequence[Image.Image], device: Any = None
) -> tuple[Mapping[str, Any], Questions]:
    """The inputs of a context, and how questions are put behind it.

    The prompt is that of `loading.prepare`: pictures, then the prefix, an empty line, and the question.

    Args:
        processor: of the model.
        prefix: text before the question; may be empty where there are pictures.
        pictures: before the text.
        device: where the tensors shall be.

    Raises:
        LoadError: the chat template, or the processor, does not put the question behind the context.
    """
    between = "" if not prefix or prefix[-1].isspace() else "\n\n"
    before, after = _around(processor, prefix + between, len(pictures))
    tokenizer = tokenizer_of(processor)
    own = tokens(tokenizer, before)
    wholes = [tokens(tokenizer, before + probe + after) for probe in _PROBES]
    n = _common(own, *wholes)
    if n == 0 or tokenizer("a")["input_ids"][-1] != tokens(tokenizer, "a")[-1]:
        raise LoadError("this tokenizer adds tokens behind a text, so no question can come later")
    inputs = prepare_texts(processor, [before], [list(pictures)], device)
    ids = inputs["input_ids"]
    kept = ids.shape[1] - (len(own) - n)
    for name, value in inputs.items():  # what has a value for each token
        if isinstance(value, Tensor) and value.shape == ids.shape:
            inputs[name] = value[:, :kept]
    return inputs, _questions(tokenizer, before, after, wholes, n)


def _questions(tokenizer: Any, before: str, after: str, wholes: Sequence[list[int]], n: int) -> Questions:
    """By the end of the context alone where that gives the same tokens, else by all of it."""
    tail = before[-_TAIL:]
    short = [tokens(tokenizer, tail + probe + after) for probe in _PROBES]
    skip = len(short[0]) - (len(wholes[0]) - n)
    alike = all(each[max(0, skip) :] == whole[n:] for each, whole in zip(short, wholes, strict=True))
    ends = skip > 0 and all(each[:skip] == short[0][:skip] for each in short)
    return Questions(tokenizer, tail, after, skip) if alike and ends else Questions(tokenizer, before, after, n)


def _around(processor: Any, prefix: str, n_images: int) -> tuple[str, str]:
    """What the chat template writes before and behind a question that follows the prefix."""
    found = []
    for marker in _MARKERS:
        text = chat_text(processor, prefix + marker, n_images)
        if text.count(marker) != 1:
            raise LoadError("this model's chat template rewrites what the user says, so no question can come later")
        before, _, after = text.partition(marker)
        found.append((before, after))
    if len(set(found)) != 1:
        raise LoadError("this model's chat template looks at the question before it, so no question can come later")
    return found[0]


def _common(first: list[int], *others: list[int]) -> int:
    """Tokens with which all begin."""
    n = min(map(len, (first, *others)))
    return next((at for at in range(n) if any(each[at] != first[at] for each in others)), n)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, which may be one itself."""
    return getattr(processor, "tokenizer", processor)


def tokens(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without what a tokenizer puts around a whole one."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
