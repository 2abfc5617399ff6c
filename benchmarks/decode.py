"""What a decode step costs: with the full cache, with a pruned one, and with an ideal one that does nothing.

    python benchmarks/decode.py [--geometry quarter] [--lengths 1024,4096,8192] [--batch 1] [--budgets 1,0.5,0.2]
    python benchmarks/decode.py --compiled --lengths 1024        # planned shapes and torch.compile: minutes more

At the end of the same prompt several caches take turns, a step each: transformers' `DynamicCache` with every pair;
ours, bookkeeping included, at each budget; at 20 % ours with the key heads of every layer in 1, 2, 3 and 4 segments of
different lengths, the same bytes in all; and the *ideal* of ours: tensors of exactly as many pairs, one segment, where
the new pair goes to one fixed slot and nothing else is done. A step is one call of the model with one token a row.
Goals: ours over the ideal at most 1.03, several segments over it at most 1.10; ours at budget 1 over the full cache at
most 0.9; several segments over one at most 1.1, also when compiled.
Before anything is timed, the logits of the pruned cache are held against those of the full cache, in which the pairs
that ours dropped are masked out; those of compiled steps against steps that are not compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from geometry import build, keep_profile, prompt
from measure import fractions, numbers, parser, ratio, show, store
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import eager_mask

from prefixkv_cache import Method, PrefixKVCache
from prefixkv_cache.tools.bench import take_turns

# By the paper's rule each step overwrites a pair, as a long answer does with any rule. With the default's headroom the
# first steps would add pairs instead, and the tensors grow away from those of the ideal cache.
METHOD = Method.parse("prefixkv:queries=32")
TO_IDEAL, TO_FULL, SEGMENTS_TO_IDEAL, SEGMENTS_TO_ONE = 1.03, 0.9, 1.10, 1.1
SEGMENTS_BUDGET = 0.2
WARM_UP = 3


class IdealLayer(CacheLayerMixin):
    """Keys and values of a fixed length; each step overwrites the last slot. The least that a cache can do."""

    is_sliding = False

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor, seen: int):
        super().__init__()
        self.keys, self.values = torch.randn(shape).to(like), torch.randn(shape).to(like)
        self.seen, self.is_initialized = seen, True
        self.last_key, self.last_value = self.keys[:, :, -1:], self.values[:, :, -1:]

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


def ideal_of(model: Any, cache: PrefixKVCache, batch: int) -> Cache:
    """An ideal cache of as many pairs as `cache` holds."""
    config, like = model.config, next(model.parameters())
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    seen = int(cache.get_seq_length())
    layers: list[Any] = [IdealLayer((batch, heads, n, size), like, seen) for n in cache.stored_lengths()]
    return Cache(layers=layers)


@torch.no_grad()
def prefilled(model: Any, ids: Tensor, cache: Cache) -> Cache:
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def ours(model: Any, budget: float, segments: int = 0, **options: Any) -> PrefixKVCache:
    """The cache that is measured, by a profile of this many segments, see `keep_profile`."""
    profile = keep_profile(model, budget, METHOD, segments)
    return PrefixKVCache(profile, budget, config=model.config, **options)


@torch.no_grad()
def step(model: Any, cache: Cache, token: Tensor) -> Tensor:
    return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]


def measure(model: Any, arguments: Any, tokens: int) -> list[dict[str, Any]]:
    """Rows of this length, steps not compiled."""
    ids = prompt(model, tokens, arguments.batch)
    token = ids[:, :1].contiguous()
    caches: dict[str, Any] = {"full": prefilled(model, ids, DynamicCache(config=model.config))}
    pairs: list[tuple[float, str, str, float | None]] = []
    for budget in arguments.budgets:
        name, ideal = f"ours {budget:g}", f"ideal {budget:g}"
        caches[name] = made = ours(model, budget)
        prefilled(model, ids, made)
        step(model, made, token)  # its first step makes room
        caches[ideal] = ideal_of(model, made, arguments.batch)
        pairs += [(budget, name, "full", TO_FULL if budget == 1.0 else None), (budget, name, ideal, TO_IDEAL)]
    for n in arguments.segments:
        caches[segments(n)] = made = ours(model, SEGMENTS_BUDGET, n)
        prefilled(model, ids, made)
        step(model, made, token)
        if n == 1:
            caches["ideal of 1 segment"] = ideal_of(model, made, arguments.batch)
        pairs += _segment_pairs(n, ["full", "ideal of 1 segment", segments(1)])
    times = take_turns(
        {name: lambda cache=cache: step(model, cache, token) for name, cache in caches.items()},
        arguments.turns, WARM_UP,
    )  # fmt: skip
    nbytes = {name: getattr(cache, "nbytes", None) for name, cache in caches.items()}
    return _rows(times, pairs, tokens, arguments, nbytes)


def segments(n: int, how: str = "") -> str:
    return f"{n} segment{'s' if n > 1 else ''}{how}"


def _segment_pairs(n: int, bases: list[str], how: str = "") -> list[tuple[float, str, str, float | None]]:
    goals = {"ideal of 1 segment": TO_IDEAL if n == 1 else SEGMENTS_TO_IDEAL, segments(1, how): SEGMENTS_TO_ONE}
    name = segments(n, how)
    return [(SEGMENTS_BUDGET, name, base, goals.get(base)) for base in bases if base != name]


def _rows(times: Any, pairs: Any, tokens: int, arguments: Any, nbytes: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for budget, name, base, goal in pairs:
        row = {"tokens": tokens, "batch": arguments.batch, "budget": budget, "goal": goal, "nbytes": nbytes[name]}
        rows.append(row | ratio(times, name, base))
        show(f"{tokens:>6} tokens, batch {arguments.batch}", rows[-1], goal)
    return rows


def measure_compiled(model: Any, arguments: Any, tokens: int) -> list[dict[str, Any]]:
    """Rows of planned shapes and `torch.compile`: each number of segments over one, and over `DynamicCache`."""
    ids = prompt(model, tokens, arguments.batch)
    token = ids[:, :1].contiguous()
    n_steps = arguments.turns + WARM_UP + 3
    calls: dict[str, Any] = {}
    pairs, nbytes = [], {}
    for n in arguments.segments:
        plain, cache = (ours(model, SEGMENTS_BUDGET, n, max_new_tokens=n_steps) for _ in range(2))
        compiled = torch.compile(model.forward, fullgraph=True, dynamic=False)
        expected = step(model, prefilled(model, ids, plain), token)
        prefilled(model, ids, cache)
        run = _compiled_step(compiled, cache, token)
        error = float((run() - expected).abs().max() / expected.abs().max())
        _refuse(error, arguments.dtype, f"{segments(n)} compiled against not compiled", "compiling changes logits")
        name = segments(n, ", compiled")
        calls[name], nbytes[name] = run, cache.nbytes
        pairs += _segment_pairs(n, ["full", segments(1, ", compiled")], ", compiled")
    full = prefilled(model, ids, DynamicCache(config=model.config))
    calls["full"] = lambda: step(model, full, token)
    return _rows(take_turns(calls, arguments.turns, WARM_UP), pairs, tokens, arguments, nbytes)


def _compiled_step(compiled: Any, cache: Cache, token: Tensor) -> Any:
    @torch.no_grad()
    def run() -> Tensor:
        return compiled(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]

    return run


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


def _visible(cache: PrefixKVCache, layer: int, n: int, device: torch.device) -> Tensor:
    """Bool [batch, 1 or key heads, n], the columns whose pairs the layer holds."""
    kept = cache.kept_positions(layer).to(device)
    kept = kept[:, None] if kept.dim() == 2 else kept
    visible = torch.zeros(*kept.shape[:2], n + 1, dtype=torch.bool, device=device)
    return visible.scatter_(2, kept.masked_fill(kept < 0, n), True)[..., :n]


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
        n = tokens + index + 1
        masked.visible = {at: _visible(pruned, at, n, ids.device) for at in range(model.config.num_hidden_layers)}
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
    for n in (0, 2, min(4, model.config.num_key_value_heads)):
        must_agree(model, ours(model, 0.5, n), arguments.dtype, segments(n) if n else "pruned")
    return model


def must_agree(model: Any, pruned: PrefixKVCache, dtype: str, what: str) -> None:
    """End the program where this cache, which is empty, does not give what masking gives."""
    _refuse(check(model, pruned), dtype, f"{what} against masked", "pruning does not equal masking")


def _refuse(error: float, dtype: str, what: str, otherwise: str) -> None:
    print(f"{what}: largest relative difference of the logits {error:.1e}", flush=True)
    if not error < (1e-4 if dtype == "float32" else 5e-2):
        raise SystemExit(f"{otherwise}; nothing was timed")


def main() -> None:
    made = parser(__doc__, geometry="quarter", dtype="float32", layers=None)
    made.add_argument("--lengths", type=numbers, default=[1024, 4096, 8192])
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--budgets", type=fractions, default=[1.0, 0.5, 0.2])
    made.add_argument("--segments", type=numbers, default=[1, 2, 3, 4], help="beginning with 1")
    made.add_argument("--compiled", action="store_true", help="compiled steps, too")
    made.add_argument("--turns", type=int, default=40)
    arguments = made.parse_args()
    model = checked_model(arguments)
    rows = [row for tokens in arguments.lengths for row in measure(model, arguments, tokens)]
    if arguments.compiled:
        rows += [row for tokens in arguments.lengths for row in measure_compiled(model, arguments, tokens)]
    store("decode", arguments, rows)


if __name__ == "__main__":
    main()
