"""The peak of the KV memory, from the prompt's first layer to the last token, against what the budget promises.

    python benchmarks/memory.py [--geometry quarter] [--lengths 1024,4096] [--new-tokens 128] [--budgets 1,0.5,0.2]

Counted are the bytes of all key and value tensors that stand at one time: whenever a layer is updated, and in the
middle of growing, where the old and the new tensors of a layer stand side by side. With a profile, the promise is
budget x full + one layer, *full* being what `DynamicCache` holds at that moment (in the end, where `max_new_tokens`
allocates for all tokens at once) and *one layer* its part for one layer. Goals, at every moment: at most 1 % more with
a profile by layer; with one by head (four segments) at most 3 % in the prompt phase and 1 % while decoding.
The peak of all tensors of the prompt phase, by torch's own count, is measured beside.
"""

from __future__ import annotations

from typing import Any

import torch
from decode import checked_model, ours, prefilled, step
from geometry import GEOMETRIES, prompt
from measure import fractions, numbers, parser, peak_bytes, store, verdict
from transformers import DynamicCache

from prefixkv_cache import PrefixKVCache

GOAL, PROMPT_GOAL_BY_HEAD = 1.01, 1.03


class Watch:
    """The largest ratio of bytes held to bytes promised, over all the moments of a run."""

    def __init__(self, cache: PrefixKVCache, budget: float, layer_bytes: int, n_layers: int):
        self.cache, self.budget, self.layer_bytes, self.n_layers = cache, budget, layer_bytes, n_layers
        self.worst, self.at, self.peak, self.seen = 0.0, 0, 0, 0
        self.planned = 0  # tokens in the end, where all of them have their memory from the prompt on
        update, cache.update = cache.update, self  # pyright: ignore[reportAttributeAccessIssue]
        self._update = update

    def __call__(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        before = self._layer_bytes(layer_idx)
        handed = self._update(keys, values, layer_idx, *args, **kwargs)
        if layer_idx == 0:
            self.seen += keys.shape[2]
        grown = self._layer_bytes(layer_idx) > before > 0
        self.look(before if grown else 0)
        return handed

    def _layer_bytes(self, layer_idx: int) -> int:
        return self.cache.layers[layer_idx].nbytes if layer_idx < len(self.cache.layers) else 0

    def look(self, beside: int = 0) -> None:
        held = self.cache.nbytes + beside
        self.peak = max(self.peak, held)
        promised = (self.budget * self.n_layers + 1) * self.layer_bytes * max(self.seen, self.planned)
        if held / promised > self.worst:
            self.worst, self.at = held / promised, self.seen


@torch.no_grad()
def measure(model: Any, arguments: Any, tokens: int, budget: float, segments: int, planned: bool) -> dict[str, Any]:
    ids, n_layers = prompt(model, tokens, arguments.batch), model.config.num_hidden_layers
    new_tokens = arguments.new_tokens
    cache = ours(model, budget, segments, max_new_tokens=new_tokens if planned else None)
    layer = arguments.batch * GEOMETRIES[arguments.geometry].pair_bytes(model.dtype)
    watch = Watch(cache, budget, layer, n_layers)
    watch.planned = tokens + new_tokens if planned else 0
    prefilled(model, ids, cache)
    watch.look(layer * tokens)  # the last layer, whole, beside what was made of it
    in_prompt, watch.worst = watch.worst, 0.0
    token = ids[:, :1].contiguous()
    for _ in range(new_tokens):
        step(model, cache, token)
    prompt_goal = PROMPT_GOAL_BY_HEAD if segments else GOAL
    row = {
        "tokens": tokens,
        "batch": arguments.batch,
        "budget": budget,
        "segments": segments,
        "max_new_tokens": new_tokens if planned else None,
        "peak_mib": round(watch.peak / 2**20, 2),
        "end_mib": round(cache.nbytes / 2**20, 2),
        "full_end_mib": round(layer * n_layers * (tokens + new_tokens) / 2**20, 2),
        "ratio": round(max(in_prompt, watch.worst), 4),
        "prompt_ratio": round(in_prompt, 4),
        "decode_ratio": round(watch.worst, 4),
        "goal": GOAL,
    }
    print(
        f"{tokens:>6} tokens, budget {budget:g}{f', {segments} segments' if segments else ''}"
        f"{', planned' if planned else ''}: of budget x full + one layer at most "
        f"{in_prompt:.3f} in the prompt phase{verdict(in_prompt, prompt_goal)}, {watch.worst:.3f} while decoding"
        f"{verdict(watch.worst, GOAL)}; end {row['end_mib']} MiB of {row['full_end_mib']}",
        flush=True,
    )
    return row


def prompt_peaks(model: Any, arguments: Any, tokens: int) -> dict[str, Any]:
    """Peak of all tensors in the prompt phase, activations too."""
    ids = prompt(model, tokens, arguments.batch)
    made: dict[str, Any] = {"full": lambda: DynamicCache(config=model.config)}
    for budget in arguments.budgets:
        made[f"{budget:g}"] = lambda budget=budget: ours(model, budget)
    peaks = {name: peak_bytes(lambda new=new: prefilled(model, ids, new()), model.device) for name, new in made.items()}
    row = {"tokens": tokens, "batch": arguments.batch}
    row |= {f"prompt_peak_mib_{name}": round(peak / 2**20, 1) for name, peak in peaks.items()}
    print(f"{tokens:>6} tokens, peak of all tensors in the prompt phase, MiB: {row}", flush=True)
    return row


def main() -> None:
    made = parser(__doc__, geometry="quarter", dtype="float32", layers=None)
    made.add_argument("--lengths", type=numbers, default=[1024, 4096])
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--budgets", type=fractions, default=[1.0, 0.5, 0.2])
    made.add_argument("--new-tokens", type=int, default=128)
    arguments = made.parse_args()
    model = checked_model(arguments)
    rows = [
        measure(model, arguments, tokens, budget, segments, planned)
        for tokens in arguments.lengths
        for budget in arguments.budgets
        for segments in ((0, 4) if budget < 1 else (0,))
        for planned in (False, True)
    ]
    rows += [prompt_peaks(model, arguments, tokens) for tokens in arguments.lengths]
    store("memory", arguments, rows)


if __name__ == "__main__":
    main()
