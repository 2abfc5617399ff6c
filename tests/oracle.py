"""The reference that the library is held against: slow, obvious, and without a line in common with it.

`Oracle(model, kept)` runs a copy of the model with a `DynamicCache` that stores everything, and hides pruned pairs with
masks. Its attention is a plain softmax, which it registers with transformers under the name "oracle". What is hidden is
decided by `kept`:

- `Given(log)`: positions that somebody else (a cache under test) says it kept, after each forward pass. This checks
  that pruning equals masking, whatever was selected.
- `Rule(...)`: the oracle's own selection and its own decode rule, in plain loops over plain attention weights. This
  checks what was selected.

Positions are columns of the padded batch as it was fed. A set of kept positions is a rising or insertion-ordered Python
list, one for each row of each prunable layer: `kept[layer][row]`; where heads keep keys of their own, one for each key
head of each row: `kept[layer][row][head]`. The rules of other papers are in `rules.py`.
"""

import copy
import math

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.masking_utils import eager_mask

from models import attention_modules, prunable_layers


def open_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """softmax(q k^T * scaling + mask) v in float32, with the oracle's extra mask where the module belongs to one."""
    queries_per_key = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(queries_per_key, dim=1).float()
    value = value.repeat_interleave(queries_per_key, dim=1).float()
    scores = query.float() @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask.float()
    oracle = getattr(module, "oracle", None)
    if oracle is not None and oracle.hidden.get(module.layer_idx) is not None:
        hidden = oracle.hidden[module.layer_idx].repeat_interleave(queries_per_key, dim=1)
        scores = scores.masked_fill(hidden[:, :, None, :], -math.inf)
    weights = torch.softmax(scores, dim=-1)
    if oracle is not None:
        oracle.weights[module.layer_idx] = weights
    return (weights @ value).transpose(1, 2).to(query.dtype).contiguous(), weights


AttentionInterface.register("oracle", open_attention)
AttentionMaskInterface.register("oracle", eager_mask)


class Oracle:
    """A full cache with masks, used like the pair of a model and its cache: `feed(oracle.model, ..., oracle.cache)`."""

    def __init__(self, model, kept=None):
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("oracle")
        self.cache = DynamicCache(config=self.model.config)
        self.kept = kept
        self.prunable = prunable_layers(self.model)
        self.hidden = {}  # layer -> bool [rows, key heads, keys], what this forward pass must not see
        self.weights = {}  # layer -> [rows, heads, queries, keys], the attention of the last forward pass
        for module in attention_modules(self.model):
            module.oracle = self
        # Not on the outer model: some releases of transformers feed the chunks of a prompt past its hooks.
        self.model.model.register_forward_pre_hook(self._before, with_kwargs=True)
        self.model.model.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, _, args, kwargs):
        seen, fed = self.cache.get_seq_length(), kwargs["input_ids"].shape[1]
        self.hidden = {}
        if self.kept is None or seen == 0:
            return
        rows = len(kwargs["input_ids"])
        for layer, visible in self.kept.before(self.real(kwargs, rows, seen + fed), fed).items():
            heads = self.cache.layers[layer].keys.shape[1]
            hidden = torch.zeros(rows, heads, seen + fed, dtype=torch.bool)
            for row in range(rows):
                for head, positions in enumerate(by_head(visible[row], heads)):
                    hidden[row, head, :seen] = True
                    hidden[row, head, positions] = False
            self.hidden[layer] = hidden

    def _after(self, _, args, kwargs, output):
        if self.kept is not None:
            rows, fed = kwargs["input_ids"].shape
            seen = self.cache.get_seq_length()
            weights = {layer: self.weights[layer] for layer in self.prunable}
            self.kept.after(self.real(kwargs, rows, seen), fed, weights)

    def replace(self, layer, row, head, position, key=None, value=None):
        """From now on, this pair's key or value is another one."""
        if key is not None:
            self.cache.layers[layer].keys[row, head, position] = key
        if value is not None:
            self.cache.layers[layer].values[row, head, position] = value

    @staticmethod
    def real(kwargs, rows, seen):
        """The positions that are not padding, a list for each row."""
        mask = kwargs.get("attention_mask")
        return [[at for at in range(seen) if mask is None or mask[row, at]] for row in range(rows)]


def by_head(positions, heads):
    """The kept positions of one row as one list for each key head, also where all heads share one."""
    return positions if positions and isinstance(positions[0], list) else [positions] * heads


class Given:
    """What a cache said that it kept: `log[step][layer][row]`, one entry for each forward pass so far."""

    def __init__(self, log):
        self.log, self.step = log, 0

    def before(self, real, fed):
        # A single token is stored, and the leaving pair gone, before its attention; a prompt sees all that was kept.
        return self.log[self.step if fed == 1 else self.step - 1]

    def after(self, real, fed, weights):
        self.step += 1


class Rule:
    """The oracle's own selection at the prompt and its own decode rule; `log` as in `Given`.

    keep: keep ratio for each prunable layer, or None to search on each row's own prompt with `budget`.
    """

    def __init__(self, *, keep=None, budget=None, queries="all", sink=1, distance=25):
        self.keep, self.budget, self.queries, self.sink, self.distance = keep, budget, queries, sink, distance
        self.kept, self.log = None, []
        self.importance, self.counts = {}, {}  # layer -> row -> list of floats (real keys only) | count

    def before(self, real, fed):
        if fed != 1:
            raise NotImplementedError("a second prompt: hold the cache against Given")
        for layer, rows in self.kept.items():
            for row, positions in enumerate(rows):
                positions.append(real[row][-1])
                self._evict(positions, self.lengths[layer][row], self.ratios[layer][row], len(real[row]))
        return self.kept

    def _evict(self, positions, length, ratio, seen):
        if self.distance is None or ratio == 1 or len(positions) - seen * ratio < 1:
            return
        at = length - self.distance
        del positions[at if at >= 1 else length // 2]

    def after(self, real, fed, weights):
        if self.kept is None:
            self._prompt(real, weights)
        self.log.append({layer: [list(positions) for positions in rows] for layer, rows in self.kept.items()})

    def _prompt(self, real, weights):
        layers = list(weights)
        self.importance = {at: [importance(weights[at][row], real[row], self.queries) for row in range(len(real))]
                           for at in layers}  # fmt: skip
        self.counts = {layer: [] for layer in layers}
        self.ratios = {layer: [] for layer in layers}
        for row, positions in enumerate(real):
            n = len(positions)
            if self.keep is None:
                counts = search([self.importance[layer][row] for layer in layers], self.budget, self.sink)
                ratios = [count / n for count in counts]
            else:
                ratios = [float(ratio) for ratio in self.keep]
                counts = [prompt_count(n, ratio, self.sink) for ratio in ratios]
            for layer, count, ratio in zip(layers, counts, ratios, strict=True):
                self.counts[layer].append(count)
                self.ratios[layer].append(ratio)
        self.kept = {
            layer: [
                [positions[index] for index in select(self.importance[layer][row], self.counts[layer][row], self.sink)]
                for row, positions in enumerate(real)
            ]
            for layer in layers
        }
        self.lengths = {layer: [len(positions) for positions in rows] for layer, rows in self.kept.items()}


def importance(weights, real, queries):
    """Attention that each real key receives, summed over the queries that count, averaged over the heads.

    weights: [heads, queries, keys] of one row of the prompt; real: its positions that are not padding.
    """
    counting = real if queries == "all" else real[-queries:]
    received = []
    for key in real:
        total = torch.zeros(weights.shape[0], dtype=torch.float32)
        for query in counting:
            total = total + weights[:, query, key]
        received.append(float(total.mean()))
    return received


def prompt_count(n, keep, sink=1):
    """How many of a row's `n` real tokens a layer with this keep ratio holds; Python's `round` is half-even."""
    return min(n, max(sink + 1, n - round(n * (1 - keep))))


def select(received, count, sink=1):
    """Indices kept, rising: the sinks, the last, and the most important of the rest (of equals, the earlier)."""
    n = len(received)
    kept = set(range(min(sink, n))) | {n - 1}
    for index in sorted(range(n), key=lambda index: (-received[index], index)):
        if len(kept) >= count:
            break
        kept.add(index)
    return sorted(kept)


def search(importances, budget, sink=1):
    """Counts for each layer from one global threshold on cumulative mass: tries every threshold there is."""
    n_layers, n_keys = len(importances), len(importances[0])
    target = round(budget * n_layers * n_keys)
    least = min(sink + 1, n_keys)

    falling = []  # layer -> masses, largest first, summing to 1
    for received in importances:
        total = sum(received)
        masses = [each / total for each in received] if total > 0 else [1 / n_keys] * n_keys
        falling.append(sorted(masses, reverse=True))
    reached = []  # layer -> mass of the first 1, 2, ... keys
    for masses in falling:
        sums = []
        for mass in masses:
            sums.append((sums[-1] if sums else 0.0) + mass)
        reached.append(sums)

    def counts_at(threshold):
        counts = []
        for sums in reached:
            enough = [at + 1 for at, mass in enumerate(sums) if mass >= threshold]
            counts.append(max(least, enough[0] if enough else n_keys))
        return counts

    counts = [least] * n_layers
    for threshold in sorted({mass for sums in reached for mass in sums}):
        if sum(counts_at(threshold)) > target:
            break
        counts = counts_at(threshold)
    while sum(counts) < target:  # pairs still free
        open_layers = [layer for layer in range(n_layers) if counts[layer] < n_keys]
        best = max(open_layers, key=lambda layer: falling[layer][counts[layer]])
        counts[best] += 1
    return counts


class _Forced(LogitsProcessor):
    """Makes `generate` continue with given tokens, and calls `watch()` after each forward pass."""

    def __init__(self, tokens, watch):
        self.tokens, self.watch, self.step = tokens, watch, 0

    def __call__(self, input_ids, scores):
        self.watch()
        forced = torch.full_like(scores, -math.inf)
        forced.scatter_(1, self.tokens[:, self.step, None], 0.0)
        self.step += 1
        return forced


def feed(model, inputs, tokens, cache, watch=lambda: None):
    """Runs `generate` along `tokens` [rows, n]: n forward passes, the first of them the prompt.

    Returns the logits [rows, n, vocabulary] and the ids fed, prompt included.
    """
    output = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=tokens.shape[1], do_sample=False, output_logits=True,
        return_dict_in_generate=True, logits_processor=LogitsProcessorList([_Forced(tokens, watch)]),
    )  # fmt: skip
    return torch.stack(output.logits, dim=1), output.sequences
