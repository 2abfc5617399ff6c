"""What pruning by kvpress costs SmolLM2-135M-Instruct, on the prompts of study.py and by its measure.

    python benchmarks/kvpress_study.py --out out/kvpress.jsonl [--cases 16] [--length 8000 --tasks summary,lookup,turn2]
    python benchmarks/study.py table out/report.jsonl out/kvpress.jsonl    # both in one table

kvpress 0.5.5 needs transformers before 5.3, hence an environment of its own; `make study-kvpress` makes it. This
library runs there from its source, for the prompts alone: the caches are those of transformers.

As in kvpress' own pipeline, the prompt goes through the model with a press around it, and what follows without one, at
the positions that it has with a full cache. All of the prompt is the press's context, as it is ours: the chat's frame
and the question of a look-up too. Rows are those of study.py. For each budget they have a field more: `bytes`, what
the tensors of the cache take behind the prompt, as a fraction of the full cache's (a press that only masks leaves it at
1).
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import kvpress
import torch
from study import ANSWER_TOKENS, BUDGETS, load, rows
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

from prefixkv_cache.tools.tasks.passages import PASSAGE, digest
from prefixkv_cache.tools.tasks.tasks import TASKS, cases

# By the fraction to remove; everything else is as kvpress has it, unless the name says so.
PRESSES: dict[str, Callable[[float], Any]] = {
    "kvpress Compactor": lambda removed: kvpress.CompactorPress(removed),
    "kvpress KeyDiff": lambda removed: kvpress.KeyDiffPress(removed),
    "kvpress ExpectedAttention": lambda removed: kvpress.ExpectedAttentionPress(removed),
    "kvpress SnapKV": lambda removed: kvpress.SnapKVPress(removed),  # a window of 64, pooled over 5
    "kvpress SnapKV window=32": lambda removed: kvpress.SnapKVPress(removed, window_size=32, kernel_size=7),
    "kvpress AdaKV of SnapKV": lambda removed: kvpress.AdaKVPress(kvpress.SnapKVPress(removed)),
}
KVZIP = "kvpress KVzip"  # in a second pass


@dataclass
class Pruned:
    """A cache behind the prompt: pairs by layer, [1, kv_heads, n_stored, head_dim], and the indices of masked ones."""

    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    masked: list[Any] = field(default_factory=list)

    def filled(self, model: Any) -> DynamicCache:
        """A copy to go on with; kvpress finds the mask at the model's layers."""
        made = DynamicCache()
        for index, (layer, pair) in enumerate(zip(model.model.layers, self.pairs, strict=True)):
            made.update(*pair, index)
            layer.self_attn.masked_key_indices = self.masked[index]
        return made

    @property
    def nbytes(self) -> int:
        """What the tensors take."""
        return sum(tensor.nbytes for pair in self.pairs for tensor in pair)

    def held(self, n: int) -> float:
        """Pairs that later tokens see, as a fraction of those of a prompt of n tokens."""
        stored = sum(keys.shape[1] * keys.shape[2] for keys, _ in self.pairs)
        masked = sum(len(mask[0]) for mask in self.masked if mask is not None)
        return (stored - masked) / sum(keys.shape[1] * n for keys, _ in self.pairs)


@dataclass
class Together(kvpress.BasePress):
    """Several presses on one prompt, each with a cache of its own; the model's own cache stays full."""

    presses: list[Any]

    def __post_init__(self) -> None:
        self.found = [Pruned() for _ in self.presses]

    def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        for press, found in zip(self.presses, self.found, strict=True):
            torch.manual_seed(module.layer_idx)  # of Compactor's sketch
            module.masked_key_indices = None
            found.pairs.append(press.compress(module, hidden_states, keys, values, attentions, kwargs))
            found.masked.append(module.masked_key_indices)
        module.masked_key_indices = None
        return keys, values


@dataclass
class KVzipAtAll(kvpress.KVzipPress):
    """KVzip that reads the prompt a second time once, and prunes it to several fractions."""

    removed: tuple[float, ...] = ()

    def compress_post(self, model: Any) -> None:
        self.masked = []
        for each in self.removed:
            self.compression_ratio = each
            super().compress_post(model)
            self.masked.append([layer.self_attn.masked_key_indices for layer in model.model.layers])


class PressedCase:
    """One case: the full cache's answer and distributions, and what each press changes.

    Args:
        model: with sdpa attention; kvpress masks no other.
        tokens: of the prompt, of what is fed unmeasured, and of the answer, which is the model's own if empty.
        budgets: fractions kept.
    """

    @torch.no_grad()
    def __init__(self, model: Any, tokens: tuple[list[int], list[int], list[int]], budgets: Sequence[float] = BUDGETS):
        self.model, (prompt, self.lead, answer) = model, tokens
        self.n, removed = len(prompt), [1 - budget for budget in budgets]
        cache = DynamicCache()
        kvzip = KVzipAtAll(removed[0], removed=tuple(removed))
        together = Together([press(each) for press in PRESSES.values() for each in removed])
        with kvzip(model), together(model):  # the second pass comes when all is left
            states = model.model(input_ids=torch.tensor([prompt]), past_key_values=cache).last_hidden_state
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        self.whole = Pruned(pairs, [None] * len(pairs))
        self.found = {KVZIP: [Pruned(pairs, masked) for masked in kvzip.masked]}
        for place, name in enumerate(PRESSES):
            self.found[name] = together.found[place * len(budgets) : (place + 1) * len(budgets)]
        # Without a lead the first token comes from the prompt's own forward, before anything is pruned.
        self.first = [] if self.lead else [int(model.lm_head(states[:, -1]).argmax())]
        answer = answer or self.greedy(self.whole)
        self.n_answer = len(answer) if self.lead else len(answer) - 1
        self.fed, self.answer = [*self.lead, *answer[:-1]], torch.tensor(answer[-self.n_answer :])
        self.full = self.follow(self.whole)

    def _logits(self, behind: DynamicCache, tokens: list[int], place: int, n_last: int = 1) -> Tensor:
        """[n_last, vocabulary] of tokens fed behind the prompt, the first of them `place` tokens behind it."""
        positions = torch.arange(self.n + place, self.n + place + len(tokens))[None]
        where = {"past_key_values": behind, "position_ids": positions, "logits_to_keep": n_last}
        return self.model(input_ids=torch.tensor([tokens]), **where).logits[0]

    @torch.no_grad()
    def greedy(self, pruned: Pruned) -> list[int]:
        """The answer that a cache gives."""
        behind, found, tokens, place = pruned.filled(self.model), [*self.first], [*self.lead, *self.first], 0
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        while len(found) < ANSWER_TOKENS and not ends.intersection(found):
            found.append(int(self._logits(behind, tokens, place).argmax()))
            place, tokens = place + len(tokens), found[-1:]
        return found

    @torch.no_grad()
    def follow(self, pruned: Pruned, at_once: bool = True) -> Tensor:
        """Log-probabilities [n_answer, vocabulary] of the answer's tokens.

        A press that masks needs one fake key for all tokens of a forward; where there is none, they go one by one.
        """
        n, behind = len(self.fed), pruned.filled(self.model)
        try:
            bounds = [0, n] if at_once else [0, *range(n - self.n_answer + 1, n + 1)]
            n_last = self.n_answer if at_once else 1
            logits = [self._logits(behind, self.fed[start:stop], start, n_last) for start, stop in pairwise(bounds)]
        except ValueError:
            if not at_once:
                raise
            return self.follow(pruned, at_once=False)
        return torch.cat(logits).log_softmax(-1)

    def cost(self, pruned: Pruned) -> dict[str, float]:
        """The fields of a row, for one cache."""
        found = self.follow(pruned)
        own, best = found.argmax(-1), self.full.argmax(-1)
        return {
            "kl": (self.full.exp() * (self.full - found)).sum(-1).clamp_min(0).mean().item(),
            "agreement": (own == best).double().mean().item(),
            "exact": float(torch.equal(own, self.answer)),
            "full_exact": float(torch.equal(best, self.answer)),
            "held": pruned.held(self.n),
            "bytes": pruned.nbytes / self.whole.nbytes,
        }


def save_tokenizer(tokenizer: Any, folder: Path, chat: bool) -> None:
    """KVzip reads the chat's frame from a tokenizer on disk; for plain text from one that knows no chat.

    Saved as it is, a tokenizer read from GGUF comes back as another class, which splits text in another way.
    """
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    plain.chat_template = tokenizer.chat_template if chat else None
    plain.save_pretrained(folder)
    text = "<|im_start|>user\nRepeat the previous context, 123.\n<|im_end|>"
    if AutoTokenizer.from_pretrained(folder)(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise RuntimeError(f"the tokenizer in {folder} splits text in another way than the study's")


def run(options: argparse.Namespace, scratch: Path) -> None:
    """All cases of the tasks asked for, a line each; cases that the file already has are left out."""
    model, tokenizer = load()
    for chat in (True, False):
        save_tokenizer(tokenizer, scratch / str(chat), chat)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["task"], row["case"], row["length"]) for row in rows([out])} if out.exists() else set()
    of_task = {task: cases(task, "report", options.cases, options.length) for task in options.tasks.split(",")}
    for index, task in ((index, task) for index in range(options.cases) for task in of_task):
        if (task, index, options.length) in done:
            continue
        start, case = time.monotonic(), of_task[task][index]
        model.config.name_or_path = str(scratch / str(case.chat))
        pressed = PressedCase(model, case.tokens(tokenizer))
        row = {"split": "report", "task": task, "case": index, "length": options.length, "passages": digest()}
        found = {name: [pressed.cost(pruned) for pruned in of_name] for name, of_name in pressed.found.items()}
        row |= {"tokens": pressed.n, "found": found}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{task} {index}: {pressed.n} tokens, {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--cases", type=int, default=8, help="of each task")
    parser.add_argument("--length", type=int, default=PASSAGE, help="characters of a passage")
    parser.add_argument("--tasks", default=",".join(TASKS))
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip says each time that it takes two passes
    with TemporaryDirectory(prefix="kvpress-study-") as scratch:
        run(parser.parse_args(), Path(scratch))


if __name__ == "__main__":
    main()
