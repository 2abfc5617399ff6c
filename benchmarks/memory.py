"""The peak of the KV memory, from the prompt's first layer to the last token, against what the budget promises.

    python benchmarks/memory.py [--geometry quarter] [--lengths 1024,4096] [--new-tokens 128] [--budgets 1,0.5,0.2]
    python benchmarks/memory.py --ranking-only --geometry llava-1.5-7b --dtype bfloat16

Counted are the bytes of all key and value tensors that stand at one time: whenever a layer is updated, and in the
middle of a prune or of growing, where the old and the new tensors of a layer stand side by side. With a profile, the
promise is budget x full + one layer, *full* being what `DynamicCache` holds at that moment (in the end, where
`max_new_tokens` allocates for all tokens at once) and *one layer* its part for one layer; the goal is at most 1 % more,
at every moment. The search on the prompt needs the whole prompt cache, once.
The peak of all tensors of the prompt phase, by torch's own count, is measured beside; and what ranking the keys of one
layer allocates on the way, for each candidate, over the layer's own keys and values. The goal is less than 1.
"""

from __future__ import annotations

from typing import Any

import torch
from decode import checked_model, ours, prefilled, step
from geometry import GEOMETRIES, prompt
from measure import numbers, parser, peak_bytes, store
from transformers import DynamicCache

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.scoring import Ranking, rank_keys

GOAL, RANKING_GOAL = 1.01, 1.0
RANKINGS = {
    "default": Ranking(diversity=0.5, novelty=8.0),
    "diversity": Ranking(diversity=0.5),
    "novelty": Ranking(novelty=8.0),
    "max": Ranking(heads="max"),
    "each": Ranking(heads="each"),
    "each, default": Ranking(heads="each", diversity=0.5, novelty=8.0),
    "pooling": Ranking(pooling=7),
    "value_norm": Ranking(value_norm=True),
}


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
def measure(model: Any, arguments: Any, tokens: int, budget: float, planned: bool) -> dict[str, Any]:
    ids, geometry = prompt(model, tokens, arguments.batch), GEOMETRIES[arguments.geometry]
    n_layers = model.config.num_hidden_layers
    cache = ours(model, arguments.geometry, budget, max_new_tokens=arguments.new_tokens if planned else None)
    layer = arguments.batch * geometry.pair_bytes(model.dtype)
    watch = Watch(cache, budget, layer, n_layers)
    watch.planned = tokens + arguments.new_tokens if planned else 0
    prefilled(model, ids, cache)
    watch.look(layer * tokens)  # the last layer, whole, beside what was made of it
    token = ids[:, :1].contiguous()
    for _ in range(arguments.new_tokens):
        step(model, cache, token)
    full = layer * n_layers * (tokens + arguments.new_tokens)
    row = {
        "tokens": tokens,
        "batch": arguments.batch,
        "budget": budget,
        "max_new_tokens": arguments.new_tokens if planned else None,
        "peak_mib": round(watch.peak / 2**20, 2),
        "end_mib": round(cache.nbytes / 2**20, 2),
        "full_end_mib": round(full / 2**20, 2),
        "ratio": round(watch.worst, 4),
        "worst_at_tokens": watch.at,
        "goal": GOAL,
    }
    print(
        f"{tokens:>6} tokens, budget {budget:g}{', planned' if planned else ''}: at most {row['ratio']:.3f} of "
        f"budget x full + one layer (at {watch.at} tokens), peak {row['peak_mib']} MiB, end {row['end_mib']} MiB of "
        f"{row['full_end_mib']}   goal {GOAL}: {'met' if row['ratio'] <= GOAL else 'MISSED'}",
        flush=True,
    )
    return row


def prompt_peaks(model: Any, arguments: Any, tokens: int) -> dict[str, Any]:
    """Peak of all tensors in the prompt phase, activations too."""
    ids = prompt(model, tokens, arguments.batch)
    made: dict[str, Any] = {"full": lambda: DynamicCache(config=model.config)}
    for budget in arguments.budgets:
        made[f"{budget:g}"] = lambda budget=budget: ours(model, arguments.geometry, budget)
    peaks = {name: peak_bytes(lambda new=new: prefilled(model, ids, new()), model.device) for name, new in made.items()}
    row = {"tokens": tokens, "batch": arguments.batch}
    row |= {f"prompt_peak_mib_{name}": round(peak / 2**20, 1) for name, peak in peaks.items()}
    print(f"{tokens:>6} tokens, peak of all tensors in the prompt phase, MiB: {row}", flush=True)
    return row


def ranking_peaks(arguments: Any, tokens: int) -> list[dict[str, Any]]:
    """What ranking allocates at its peak, importance given, over the keys and values of the layer."""
    geometry, dtype = GEOMETRIES[arguments.geometry], getattr(torch, arguments.dtype)
    # As projections leave them: one token's heads side by side.
    shape = (arguments.batch, tokens, geometry.kv_heads, geometry.head_dim)
    keys, values = (torch.randn(shape, device=arguments.device).to(dtype).transpose(1, 2) for _ in range(2))
    rows = []
    for name, ranking in RANKINGS.items():
        heads = geometry.kv_heads if ranking.by_head else 1
        importance = torch.rand(arguments.batch, heads, tokens, device=arguments.device)
        peak = peak_bytes(
            lambda ranking=ranking, importance=importance: rank_keys(importance, keys, values, ranking), keys.device
        )
        share = peak / (arguments.batch * tokens * geometry.pair_bytes(dtype))
        row = {"tokens": tokens, "batch": arguments.batch, "ranking": name, "goal": RANKING_GOAL}
        rows.append(row | {"ranking_mib": round(peak / 2**20, 2), "of_layer": round(share, 3)})
        told = f"goal {RANKING_GOAL}: {'met' if share < RANKING_GOAL else 'MISSED'}"
        print(f"{tokens:>6} tokens, ranking by {name}: {share:.3f} of the layer   {told}", flush=True)
    return rows


def main() -> None:
    made = parser(__doc__, geometry="quarter", dtype="float32", layers=None)
    made.add_argument("--lengths", type=numbers, default=[1024, 4096])
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--budgets", type=lambda text: [float(part) for part in text.split(",")], default=[1.0, 0.5, 0.2])
    made.add_argument("--new-tokens", type=int, default=128)
    made.add_argument("--ranking-only", action="store_true", help="nothing but what ranking allocates; runs no model")
    arguments = made.parse_args()
    ranking = [row for tokens in arguments.lengths for row in ranking_peaks(arguments, tokens)]
    if arguments.ranking_only:
        store("ranking", arguments, ranking)
        return
    model = checked_model(arguments)
    rows = [
        measure(model, arguments, tokens, budget, planned)
        for tokens in arguments.lengths
        for budget in arguments.budgets
        for planned in (False, True)
    ]
    rows += [prompt_peaks(model, arguments, tokens) for tokens in arguments.lengths]
    store("memory", arguments, rows + ranking)


if __name__ == "__main__":
    main()
