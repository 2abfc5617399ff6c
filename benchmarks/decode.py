"""What a decode step costs: with the full cache, with a pruned one, and with an ideal one that does nothing.

    python benchmarks/decode.py [--geometry quarter] [--lengths 1024,4096,8192] [--batch 1] [--budgets 1,0.5,0.2]

For each budget three caches stand at the end of the same prompt and take turns, a step each: transformers'
`DynamicCache` with every pair; ours, bookkeeping included; and the *ideal* of ours, tensors of exactly the lengths that
ours has stored, where the new pair goes to one fixed slot and nothing else is done. A step is one call of the model
with one token a row. Goals: ours over the ideal at most 1.03; ours at budget 1 over the full cache at most 0.9.
Before anything is timed, the logits of the pruned cache are held against those of the full cache, in which the pairs
that ours dropped are masked out.
"""

from __future__ import annotations

from typing import Any

import torch
from geometry import build, keep_profile, prompt
from measure import numbers, parser, ratio, show, store, take_turns
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import eager_mask

from prefixkv_cache import PAPER, PrefixKVCache

TO_IDEAL, TO_FULL = 1.03, 0.9


class IdealLayer(CacheLayerMixin):
    """Keys and values of a fixed length; each step overwrites the last slot. The least that a cache can do."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, seen: int):
        super().__init__()
        self.keys, self.values, self.seen, self.is_initialized = keys, values, seen, True
        self.last_key, self.last_value = keys[:, :, -1:], values[:, :, -1:]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.last_key.copy_(key_states)
        self.last_value.copy_(value_states)
        return self.keys, self.values  # pyright: ignore[reportReturnType]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1


def ideal_of(cache: PrefixKVCache) -> Cache:
    """An ideal cache that holds what `cache` holds, in memory of its own."""
    layers: list[Any] = [
        IdealLayer(layer.keys.clone(), layer.values.clone(), cache.get_seq_length()) for layer in cache.layers
    ]
    return Cache(layers=layers)


@torch.no_grad()
def prefilled(model: Any, ids: Tensor, cache: Cache) -> Cache:
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def ours(model: Any, name: str, budget: float, **options: Any) -> PrefixKVCache:
    """The cache that is measured: a window of 32 queries, and the papers' decode rule.

    By that rule each step overwrites a pair, as a long answer does with any rule. With the default's slack the first
    steps would add pairs instead, and the tensors grow away from those of the ideal cache.
    """
    layers = model.config.num_hidden_layers
    profile = None if budget == 1.0 else keep_profile(name, layers, budget)
    return PrefixKVCache(profile, budget, config=model.config, **{**PAPER, "queries": 32, **options})


@torch.no_grad()
def step(model: Any, cache: Cache, token: Tensor) -> Tensor:
    return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]


def measure(model: Any, arguments: Any, tokens: int) -> list[dict[str, Any]]:
    ids = prompt(model, tokens, arguments.batch)
    token = ids[:, :1].contiguous()
    caches: dict[str, Cache] = {"full": prefilled(model, ids, DynamicCache(config=model.config))}
    for budget in arguments.budgets:
        pruned = ours(model, arguments.geometry, budget)
        prefilled(model, ids, pruned)
        step(model, pruned, token)  # its first step makes room
        caches[f"ours {budget:g}"], caches[f"ideal {budget:g}"] = pruned, ideal_of(pruned)
    calls = {name: lambda cache=cache: step(model, cache, token) for name, cache in caches.items()}
    times = take_turns(calls, arguments.turns, warm_up=3)
    rows = []
    for budget in arguments.budgets:
        for base, goal in (("full", TO_FULL if budget == 1.0 else None), (f"ideal {budget:g}", TO_IDEAL)):
            row = {"tokens": tokens, "batch": arguments.batch, "budget": budget, "goal": goal}
            row |= ratio(times, f"ours {budget:g}", base)
            rows.append(row)
            show(f"{tokens:>6} tokens, batch {arguments.batch}", row, goal)
    return rows


class Masked:
    """Attention over the full cache that sees, layer by layer, only the columns it is given. Written apart."""

    def __init__(self) -> None:
        self.visible: dict[int, Tensor] = {}
        AttentionInterface.register("benchmark_masked", self)
        AttentionMaskInterface.register("benchmark_masked", eager_mask)

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Any:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1).float(), value.repeat_interleave(group, 1).float()
        scores = query.float() @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + mask.float()
        if module.layer_idx in self.visible:  # [batch, 1 or key heads, columns]
            visible = self.visible[module.layer_idx]
            visible = visible.repeat_interleave(group, 1) if visible.shape[1] > 1 else visible
            scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).to(query.dtype).contiguous(), None


@torch.no_grad()
def check(model: Any, pruned: PrefixKVCache, tokens: int = 256, steps: int = 4) -> float:
    """Largest difference of the pruned cache's logits from the masked full cache's, relative to the largest logit."""
    ids, masked, full = prompt(model, tokens, 2), Masked(), DynamicCache(config=model.config)
    prefilled(model, ids, pruned)
    model.set_attn_implementation("benchmark_masked")
    prefilled(model, ids, full)
    worst = 0.0
    for index in range(steps):
        token = ids[:, index : index + 1]
        model.set_attn_implementation("sdpa")
        found = step(model, pruned, token)
        for layer in range(len(pruned.layers)):
            kept = pruned.kept_positions(layer).view(2, -1, pruned.stored_lengths()[layer]).to(ids.device)
            visible = torch.zeros(2, kept.shape[1], tokens + index + 1, dtype=torch.bool, device=ids.device)
            masked.visible[layer] = visible.scatter_(2, kept, True)
        model.set_attn_implementation("benchmark_masked")
        expected = step(model, full, token)
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    model.set_attn_implementation("sdpa")
    return worst


def checked_model(arguments: Any) -> Any:
    """The model of these arguments; ends the program where pruning does not equal masking on it."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = build(arguments.geometry, layers=arguments.layers, dtype=arguments.dtype, device=arguments.device)
    must_agree(model, ours(model, arguments.geometry, 0.5), arguments.dtype)
    return model


def must_agree(model: Any, pruned: PrefixKVCache, dtype: str, what: str = "pruned") -> None:
    """End the program where this cache, which is empty, does not give what masking gives."""
    error = check(model, pruned)
    print(f"{what} against masked: largest relative difference of the logits {error:.1e}", flush=True)
    if not error < (1e-4 if dtype == "float32" else 5e-2):
        raise SystemExit("pruning does not equal masking; nothing was timed")


def main() -> None:
    made = parser(__doc__, geometry="quarter", dtype="float32", layers=None)
    made.add_argument("--lengths", type=numbers, default=[1024, 4096, 8192])
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--budgets", type=lambda text: [float(part) for part in text.split(",")], default=[1.0, 0.5, 0.2])
    made.add_argument("--turns", type=int, default=40)
    arguments = made.parse_args()
    model = checked_model(arguments)
    store("decode", arguments, [row for tokens in arguments.lengths for row in measure(model, arguments, tokens)])


if __name__ == "__main__":
    main()
