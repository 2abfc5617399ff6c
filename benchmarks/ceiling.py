"""What the best selection of keys would give: an oracle that tries keys against the reference answer.

    python benchmarks/ceiling.py --model models/scene-llava --data scenes --budgets 0.2,0.1 --samples 100

No cache can do this: it looks at the answer. It says how much of what a method misses is the method's fault. For each
sample, over the same pairs of (layer, prompt token) and with the same total as the default cache at that budget:

- *default*: what `PrefixKVCache` keeps; nothing leaves while decoding, so that only the choice at the prompt counts;
- *attention*: the pairs that the answer's own tokens attend to most in the full cache;
- *exchange*: from the better of these two, pairs inside and outside change places as long as the answer becomes more
  likely. Which ones are tried is told by the gradient at a gate on every pair, 1 for kept and 0 for pruned.

What each finds is kept by a real cache that then writes freely, and marked as `prefixkv evaluate` does. The last row
takes the best of the three for each sample. The best that was found is not the best there is: the ceiling is there or
above.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.evaluate.measure import Batch, Plan
from prefixkv_cache.evaluate.methods import Method, parse_methods
from prefixkv_cache.evaluate.statistics import Bootstrap
from prefixkv_cache.evaluate.tasks import TASKS, drawn_samples
from prefixkv_cache.evaluate.token_loop import TokenLoop
from prefixkv_cache.loading import load_model

DEFAULT, ATTENTION, EXCHANGE = "default", "attention", "exchange"
BEST = "best of these, sample by sample"
GATED = "gated"  # the name of our attention function


class ChosenCache(PrefixKVCache):
    """A cache that keeps what it is told.

    Args:
        chosen: bool [rows, layers, n_prompt].
        config: of the model.
    """

    def __init__(self, chosen: Tensor, config: Any):
        super().__init__(budget=0.5, config=config, distance=None)
        self.chosen = chosen

    def _prune_by_search(self) -> None:
        for layer, own in zip(self._waiting(), self.chosen.unbind(1), strict=True):
            prompt = layer.prompt
            assert prompt is not None
            prompt.scores = own[:, None].float()
            counts: list[int] = own.sum(1).tolist()
            ratios = [count / length for count, length in zip(counts, prompt.lengths, strict=True)]
            self._prune(layer, prompt, counts, ratios, self.sink)


@dataclass(frozen=True)
class Chosen(Method):
    """A method of the evaluation whose cache keeps what was chosen for this batch."""

    chosen: Tensor | None = None

    def make(self, model: Any, budget: float, inputs: Any = None) -> PrefixKVCache:
        """The cache; the budget is in what was chosen."""
        assert self.chosen is not None
        return ChosenCache(self.chosen, model.config)


class Gates:
    """An attention function with a gate on every pair of (layer, prompt token), before the answer's queries.

    A gate multiplies the weight of its key in the softmax: 0 is as good as pruned, 1 as kept; and the gradient at 0
    tells what opening it would do, where that of a mask would be 0.

    Attributes:
        values: float32 [rows, layers, n_prompt], or None: all open.
        received: for each layer, what its prompt keys received from each of the answer's queries, averaged over the
            heads: float32 [rows, n_answer, n_prompt].
    """

    def __init__(self, n_prompt: int):
        self.n_prompt = n_prompt
        self.values: Tensor | None = None
        self.received: dict[int, Tensor] = {}

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """As eager attention, and through the gates."""
        groups, first = query.shape[1] // key.shape[1], self.n_prompt
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = (query @ key.transpose(2, 3)).float() * scaling + attention_mask
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        if self.values is not None:
            gates = self.values[:, module.layer_idx, None, None, :]
            of_answer = torch.cat([weights[..., first:, :first] * gates, weights[..., first:, first:]], -1)
            weights = torch.cat([weights[..., :first, :], of_answer], 2)
        weights = weights / weights.sum(-1, keepdim=True)
        self.received[module.layer_idx] = weights[:, :, first:, :first].detach().mean(1)
        return (weights.to(value.dtype) @ value).transpose(1, 2), weights


class Oracle:
    """The searches, over one batch of samples whose answers are known.

    Args:
        model: in eval mode.
        batch: of the evaluation.
    """

    def __init__(self, model: Any, batch: Batch):
        self.model, self.batch = model, batch
        ids = batch.inputs["input_ids"]
        self.n_prompt = ids.shape[1]
        self.n_layers: int = model.config.get_text_config(decoder=True).num_hidden_layers
        mask = batch.inputs.get("attention_mask", torch.ones_like(ids))
        self.real = mask.bool()
        place = self.real.cumsum(1)
        # The sink and the prompt's last token always stay.
        self.fixed = self.real & ((place == 1) | (place == place[:, -1:]))
        longest = max(map(len, batch.answers))
        self.there = torch.tensor([[place < len(own) for place in range(longest)] for own in batch.answers])
        self.answer = torch.tensor([[*own, *[0] * (longest - len(own))] for own in batch.answers])
        self.inputs = {
            name: F.pad(value, (0, longest)) if isinstance(value, Tensor) and value.shape == ids.shape else value
            for name, value in batch.inputs.items()
        }
        self.inputs["input_ids"] = torch.cat([ids, self.answer], 1)
        self.inputs["attention_mask"] = torch.cat([mask, self.there.to(mask)], 1)
        self.gates = Gates(self.n_prompt)

    def nll(self, gates: Tensor | None) -> Tensor:
        """Minus the log-likelihood of each row's answer through these gates: float32 [rows]."""
        self.gates.values = gates
        AttentionInterface.register(GATED, self.gates.attend)
        AttentionMaskInterface.register(GATED, eager_mask)
        before = self.model.config.get_text_config(decoder=True)._attn_implementation
        self.model.set_attn_implementation({"text_config": GATED})
        try:
            logits = self.model(**self.inputs, use_cache=False).logits[:, self.n_prompt - 1 : -1].float()
        finally:
            self.model.set_attn_implementation({"text_config": before})
        return (F.cross_entropy(logits.transpose(1, 2), self.answer, reduction="none") * self.there).sum(1)

    def gradient(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The nll of each row where these pairs are kept, and its gradient at all gates."""
        gates = chosen.float().requires_grad_()
        nll = self.nll(gates)
        return nll.detach(), torch.autograd.grad(nll.sum(), gates)[0]

    def kept_by(self, method: Method, budget: float) -> Tensor:
        """What a method's cache keeps of the prompts: bool [rows, layers, n_prompt]."""
        cache = method.make(self.model, budget, self.batch.inputs)
        assert isinstance(cache, PrefixKVCache)
        TokenLoop(self.model, self.batch.inputs, cache).read_prompt()
        kept = torch.zeros(len(self.real), self.n_layers, self.n_prompt + 1, dtype=torch.bool)
        for layer in range(self.n_layers):
            kept[:, layer].scatter_(1, cache.kept_positions(layer) % (self.n_prompt + 1), True)  # -1 goes to the end
        return kept[..., :-1] & self.real[:, None]

    def by_attention(self, totals: Tensor) -> Tensor:
        """The pairs that the answer attends to most, so many in each row: bool [rows, layers, n_prompt]."""
        with torch.inference_mode():
            self.nll(None)
        received = torch.stack([self.gates.received[layer] for layer in range(self.n_layers)], 1)
        scores = (received * self.there[:, None, :, None]).sum(2) * self.real[:, None]
        # Of each layer's attention to the prompt, as the search for one threshold has it.
        scores = scores / scores.sum(2, keepdim=True)
        scores = scores.masked_fill(~self.real[:, None], -1.0).masked_fill(self.fixed[:, None], torch.inf).flatten(1)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return (rank < totals[:, None]).view(len(totals), self.n_layers, -1)

    def exchange(self, chosen: Tensor, rounds: int) -> Tensor:
        """Let pairs inside and outside change places while a row's answer becomes more likely.

        Args:
            chosen: bool [rows, layers, n_prompt], where to begin.
            rounds: each costs a forward and a backward pass.
        """
        free = (self.real & ~self.fixed)[:, None]
        best, (least, gradient) = chosen, self.gradient(chosen)
        shares = torch.full_like(least, 0.1)  # of a row's pairs, tried at once; halved where a trial fails
        for _ in range(rounds):
            leave = gradient.masked_fill(~(best & free), -torch.inf).flatten(1).sort(dim=1, descending=True)
            enter = gradient.masked_fill(best | ~free, torch.inf).flatten(1).sort(dim=1)
            # Best exchanges first; those that promise nothing are left out.
            number = (best.flatten(1).sum(1) * shares).long().clamp_min(1)[:, None]
            pays = (leave.values > enter.values) & (torch.arange(leave.values.shape[1]) < number)
            trial = best.flatten(1).clone()
            for row, of_row in enumerate(pays):
                trial[row, leave.indices[row, of_row]] = False
                trial[row, enter.indices[row, of_row]] = True
            trial = trial.view_as(best)
            nll, new = self.gradient(trial)
            better = nll < least
            best = torch.where(better[:, None, None], trial, best)
            gradient = torch.where(better[:, None, None], new, gradient)
            least = torch.where(better, nll, least)
            shares = torch.where(better, shares, shares / 2)
        return best

    def search(self, method: Method, budget: float, rounds: int) -> dict[str, Tensor]:
        """What each of the oracles keeps, by name: bool [rows, layers, n_prompt]."""
        default = self.kept_by(method, budget)
        attention = self.by_attention(default.sum((1, 2)))
        with torch.inference_mode():
            better = self.nll(attention.float()) < self.nll(default.float())
        start = torch.where(better[:, None, None], attention, default)
        return {DEFAULT: default, ATTENTION: attention, EXCHANGE: self.exchange(start, rounds)}


def measure(
    model: Any, processor: Any, samples: Sequence[Any], budgets: Sequence[float], method: Method, rounds: int
) -> list[dict[str, Any]]:
    """The rows of the evaluation for one batch: the full cache, and what every oracle keeps at every budget."""
    batch = Batch(model, processor, samples, Plan(metrics=("ppl", "accuracy")))
    rows = batch.full()
    oracle = Oracle(model, batch)
    with torch.inference_mode():
        _check("the model with all gates open does not say what it says without", oracle.nll(None), rows)
    for budget in budgets:
        for name, chosen in oracle.search(method, budget, rounds).items():
            found = batch.method(Chosen(name, "online", {}, chosen=chosen), budget)
            with torch.inference_mode():
                _check("closed gates are not what pruning does", oracle.nll(chosen.float()), found)
            rows += found
    return rows


def _check(what: str, nll: Tensor, rows: Sequence[Mapping[str, Any]]) -> None:
    expected = torch.tensor([row["nll"] for row in rows]).float()
    if not torch.allclose(nll, expected, rtol=1e-2, atol=1e-2):
        raise RuntimeError(f"{what}: nll {nll.tolist()}, expected {expected.tolist()}")


def table(rows: Sequence[Mapping[str, Any]], budgets: Sequence[float]) -> str:
    """Right answers of each oracle, and of the best one for each sample, with half the 95 % interval."""
    names = (DEFAULT, ATTENTION, EXCHANGE)
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        full = [row["accuracy"] for row in of_task if row["method"] == "full"]
        bootstrap = Bootstrap(len(full))
        lines += ["", f"{task}, {len(full)} samples; full cache {bootstrap.mean(full).value:.3f}", ""]
        lines.append("| kept | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " |")
        lines.append("| --- |" + " --- |" * len(budgets))
        right: dict[str, list[str]] = {name: [] for name in (*names, BEST)}
        for budget in budgets:
            found = {
                name: [row["accuracy"] for row in of_task if row["method"] == name and row["budget"] == budget]
                for name in names
            }
            found[BEST] = [max(of_sample) for of_sample in zip(*found.values(), strict=True)]
            for name, values in found.items():
                estimate = bootstrap.mean(values)
                right[name].append(f"{estimate.value:.3f} ± {(estimate.high - estimate.low) / 2:.3f}")
        lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in right.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="models/scene-llava")
    parser.add_argument("--data", default="scenes", help="scenes or boards")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--kinds", default=None, help="of questions; as in prefixkv evaluate")
    parser.add_argument("--budgets", default="0.5,0.3,0.2,0.1,0.05")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--split", default="test", help="validation or test")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=60, help="of the exchange")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default=None, help="a JSON file for the rows of all samples")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    budgets = [float(text) for text in arguments.budgets.split(",")]
    model, processor = load_model(arguments.model, device="cpu")
    (method,) = parse_methods("online:distance=none")
    rows: list[dict[str, Any]] = []
    for task in arguments.tasks.split(","):
        kinds = arguments.kinds.split(",") if arguments.kinds else None
        samples = drawn_samples(
            arguments.data, split=arguments.split, n=arguments.samples, tasks=[task], kinds=kinds, limit=112
        )
        for start in range(0, len(samples), arguments.batch_size):
            some = samples[start : start + arguments.batch_size]
            rows += measure(model, processor, some, budgets, method, arguments.rounds)
            print(f"{task}: {start + len(some)} of {len(samples)}", flush=True)
    print(table(rows, budgets))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps([{**row, "text": None} for row in rows], indent=0) + "\n")


if __name__ == "__main__":
    main()
