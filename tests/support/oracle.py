"""The reference that the library is held against: a full cache, in float64, that hides pruned pairs with masks.

`Oracle(model, kept)` runs a copy of the model with a `DynamicCache` that stores everything. Its attention is a plain
softmax, registered with transformers under the name "oracle". What each key head may see is decided by `kept`:

- `Given(log)`: what somebody else (a cache under test) says it kept, after each forward pass. This checks that pruning
  equals masking, whatever was selected.
- `Rule(method, budget)`: the oracle's own reading of a `Method`, in plain loops over plain attention weights
  (`rules.py`). This checks what was selected, merged and evicted.

Positions are columns of the padded batch as it was fed; what is kept is `kept[layer][row][head]`, rising lists.
"""

import copy
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.masking_utils import eager_mask

import rules
from models import attention_modules, prunable_layers


def open_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """softmax(q k^T * scaling + mask) v, in float32 at least, with the mask of the module's oracle, if any."""
    wide = torch.promote_types(query.dtype, torch.float32)
    queries_per_key = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(queries_per_key, dim=1).to(wide)
    value = value.repeat_interleave(queries_per_key, dim=1).to(wide)
    scores = query.to(wide) @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask.to(wide)
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
        self.weights = {}  # layer -> [rows, query heads, queries, keys], the attention of the last forward pass
        for module in attention_modules(self.model):
            module.oracle = self
        # Not on the outer model: some releases of transformers feed the chunks of a prompt past its hooks.
        self.model.model.register_forward_pre_hook(self._before, with_kwargs=True)
        self.model.model.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, _, args, kwargs):
        seen, (rows, fed) = self.cache.get_seq_length(), kwargs["input_ids"].shape
        self.hidden = {}
        if self.kept is None or seen == 0:
            return
        for layer, visible in self.kept.before(self.valid(kwargs, rows, seen + fed), fed).items():
            heads = self.cache.layers[layer].keys.shape[1]
            hidden = torch.zeros(rows, heads, seen + fed, dtype=torch.bool)
            hidden[:, :, :seen] = True
            for row in range(rows):
                for head in range(heads):
                    hidden[row, head, visible[row][head]] = False
            self.hidden[layer] = hidden

    def _after(self, _, args, kwargs, output):
        if self.kept is not None:
            rows, fed = kwargs["input_ids"].shape
            valid = self.valid(kwargs, rows, self.cache.get_seq_length())
            self.kept.after(valid, fed, {layer: self.weights[layer] for layer in self.prunable}, self.cache)

    @staticmethod
    def valid(kwargs, rows, seen):
        """The positions that are not padding, a list for each row."""
        mask = kwargs.get("attention_mask")
        return [[at for at in range(seen) if mask is None or mask[row, at]] for row in range(rows)]


class Given:
    """What a cache said that it kept: `log[step][layer][row][head]`, one entry for each forward pass so far."""

    def __init__(self, log):
        self.log, self.step = log, 0

    def before(self, valid, fed):
        # A single token is stored, and the leaving pair gone, before its attention; a prompt sees all that was kept.
        return self.log[self.step if fed == 1 else self.step - 1]

    def after(self, valid, fed, weights, cache):
        self.step += 1


@dataclass
class Head:
    """One key head of one row of one layer."""

    kept: list = field(default_factory=list)  # positions, rising
    ratio: float = 1.0
    held: int = 0  # pairs after the last prompt
    origin: int | None = None  # pairs before the first answer, once a second turn has come
    received: dict = field(default_factory=dict)  # position -> attention so far
    limit: float = math.inf  # of the fixed point: a crop into the prompt takes it with it


class Rule:
    """What a `Method` keeps.

    budget: a ratio, or an integer: pairs a head. profile: None, or what has `keep` [budgets, layers, heads or 1] and
    gives `keep_ratios(budget)`. image: row -> positions of image tokens. prompts: what a cache kept after each forward
    pass that was a prompt, for scores that are taken as given: random ones, and those that the oracle does not know.
    """

    def __init__(self, method, budget, *, profile=None, image=None, prompts=None):
        self.method, self.budget, self.profile, self.image = method, budget, profile, image
        self.prompts = iter(prompts or ())
        self.given = method.ranking.score not in ("attention", "recency", "key-difference", "combined")
        self.heads = None  # layer -> row -> [Head]
        self.steps = 0  # since the last prompt
        self.log = []  # forward pass -> layer -> row -> head -> positions

    def _all(self):
        for layer, rows in self.heads.items():
            for row, heads in enumerate(rows):
                for head in heads:
                    yield layer, row, head

    def before(self, valid, fed):
        """What the next forward pass may see of the tokens before it."""
        if fed == 1:
            for _, row, head in self._all():
                head.kept.append(valid[row][-1])
                self._evict(head, len(valid[row]))
        return self._kept()

    def after(self, valid, fed, weights, cache):
        seen = cache.get_seq_length()
        new = [[position for position in positions if position >= seen - fed] for positions in valid]
        weights = {layer: of_layer.tolist() for layer, of_layer in weights.items()}
        if self.heads is None or fed > 1:
            self._prompt(valid, new, weights, seen - fed, cache)
        else:
            self.steps += 1
            self._accumulate(new, weights, seen - fed)
        self.log.append(self._kept())

    def _kept(self):
        return {layer: [[list(head.kept) for head in heads] for heads in rows] for layer, rows in self.heads.items()}

    # Decoding.

    def _evict(self, head, seen):
        """The newcomer is in the list already; does one leave for it, and which?"""
        decode, kept = self.method.decode, head.kept
        if not self.evicts(head) or len(kept) - seen * head.ratio < 1 + decode.headroom:
            return
        if decode.evict == "least-important":
            # The window is the text's last tokens: so many, or a share of what is kept.
            recent = self.method.protect.recent
            window = round(recent * (len(kept) - 1)) if recent < 1 else recent
            behind_sink = kept[self.method.protect.sink : -1]
            leaving = [each for each in behind_sink if each <= kept[-1] - window] or behind_sink[:1]
            kept.remove(min(leaving, key=lambda position: head.received[position]))
        elif len(kept) - 1 > self._point(head):  # the newcomer is not the one to go
            del kept[self._point(head)]

    def evicts(self, head):
        decode = self.method.decode
        return head.ratio < 1 and not (decode.evict == "fixed-point" and decode.distance is None)

    def _point(self, head):
        """Index of the first pair that may leave."""
        if self.method.decode.evict == "oldest":
            return min(self.method.protect.sink, head.held, head.limit)
        point = head.held - self.method.decode.distance
        return min(point if point >= 1 else head.held // 2, head.limit)

    def _begin_turn(self, tokens):
        """Of what came behind the first prompt, the oldest leave, as many as are held beyond the share."""
        for _, row, head in self._all():
            if self.evicts(head):
                head.origin = self._point(head) if head.origin is None else head.origin
                beyond = math.floor(max(0, len(head.kept) - tokens[row] * head.ratio))
                del head.kept[head.origin : head.origin + min(self.method.decode.headroom, beyond)]

    def _accumulate(self, new, weights, first_new):
        """Heavy hitters: add what the pairs that are held have received from the newest queries."""
        if self.method.decode.evict != "least-important":
            return
        for layer, rows in self.heads.items():
            for row, heads in enumerate(rows):
                groups = in_groups(weights[layer][row], len(heads))
                if self.method.ranking.heads != "each":  # what they keep together, they vote on together
                    groups = [weights[layer][row]] * len(heads)
                queries = rules.last_queries(len(new[row]), self.method.ranking.queries)
                for head, group in zip(heads, groups, strict=True):
                    for position in head.kept:
                        total = sum(each[new[row][q] - first_new][position] for each in group for q in queries)
                        head.received[position] = head.received.get(position, 0.0) + total / len(group)

    # A prompt.

    def _prompt(self, valid, new, weights, first_new, cache):
        layers, rows = list(weights), range(len(new))
        first, given = self.heads is None, next(self.prompts, None)
        sink = self.method.protect.sink if first else 0
        if first:
            n_heads = {layer: cache.layers[layer].keys.shape[1] for layer in layers}
            self.heads = {layer: [[Head() for _ in range(n_heads[layer])] for _ in rows] for layer in layers}
        elif self.steps > 0 and self.method.decode.evict != "least-important":
            self._begin_turn([len(all_of) - len(of_row) for all_of, of_row in zip(valid, new, strict=True)])
        if not first:
            self._accumulate(new, weights, first_new)
        for row in rows:
            scores = {
                layer: self._scores(cache.layers[layer], new[row], row, weights[layer][row], first_new, sink)
                for layer in layers
            }
            if first:
                counts = self._first_counts(scores, len(new[row]), row, given)
            else:
                counts = self._later_counts(len(new[row]), row)
            for layer in layers:
                self._keep(layer, row, new[row], scores[layer], counts[layer], sink, given, cache.layers[layer])
        self.steps = 0

    def _scores(self, pairs, new, row, weights, first_new, sink):
        """key head -> score of each of the row's new keys."""
        ranking, heads = self.method.ranking, range(pairs.keys.shape[1])
        values = pairs.values[row].double()
        if ranking.score == "recency":
            scores = [[float(position) for position in new] for _ in heads]
        elif self.given:
            scores = [[0.0] * len(new) for _ in heads]
        elif ranking.score == "key-difference":
            scores = self._differences(pairs, row, new)
        else:
            scores = []
            for group in in_groups(weights, len(heads)):
                among_new = [[[each[query - first_new][key] for key in new] for query in new] for each in group]
                scores.append(rules.attention_scores(among_new, ranking, sink) if new else [])
        if ranking.value_norm:
            norms = [[rules.norm(value) for value in values[head, new].tolist()] for head in heads]
            scores = [[a * b for a, b in zip(scores[head], norms[head], strict=True)] for head in heads]
        if ranking.score == "combined":
            image = [] if self.image is None else [i for i, position in enumerate(new) if position in self.image[row]]
            differences = self._differences(pairs, row, new)
            scores = [rules.combined(*each, image) for each in zip(scores, differences, strict=True)]
        return rules.join(scores, ranking.heads)

    def _differences(self, pairs, row, new):
        return [rules.differences_from_mean(pairs.keys[row, head, new].tolist()) for head in range(pairs.keys.shape[1])]

    def _first_counts(self, scores, n, row, given):
        """layer -> head -> how many of the row's first `n` tokens stay; sets the keep ratios."""
        lengths, protect, layers = self.method.lengths, self.method.protect, list(scores)
        budget = min(1, self.budget / n) if isinstance(self.budget, int) else self.budget
        least, n_heads = protect.sink + 1, {layer: len(scores[layer]) for layer in layers}
        ratios = {layer: [budget] * n_heads[layer] for layer in layers}
        if self.profile is not None:
            groups, of_layers = self.profile.keep.mean(0).tolist(), self.profile.keep_ratios(budget).tolist()
            for layer, keep, by in zip(layers, of_layers, groups, strict=True):
                ratios[layer] = rules.grouped(keep, by) * (n_heads[layer] // len(keep))
        elif lengths.lengths == "pyramid":
            for layer, ratio in zip(layers, rules.pyramid(budget, len(layers)), strict=True):
                ratios[layer] = [ratio] * n_heads[layer]
        if lengths.floor:
            flat = iter(rules.raised([each for layer in layers for each in ratios[layer]], self._floor(n)))
            ratios = {layer: [next(flat) for _ in ratios[layer]] for layer in layers}
        if self.profile is not None or budget == 1:
            counts = {layer: [rules.prompt_count(n, ratio, least - 1) for ratio in ratios[layer]] for layer in layers}
        elif lengths.lengths in ("search", "pool"):
            if self.given:
                counts = {layer: [len(head) for head in given[layer][row]] for layer in layers}
            elif lengths.lengths == "search":
                found = rules.search([rules.mean_over_heads(scores[layer]) for layer in layers], budget, protect.sink)
                counts = {layer: [count] * n_heads[layer] for layer, count in zip(layers, found, strict=True)}
            else:
                counts = dict(zip(layers, self._pool(list(scores.values()), n, budget), strict=True))
            if round(budget * sum(n_heads.values()) * n) >= least * sum(n_heads.values()):  # else nothing was found out
                ratios = {layer: [count / n for count in counts[layer]] for layer in layers}
        else:
            counts = {
                layer: [rules.staggered_count(n, ratio, place, len(layers), least - 1) for ratio in ratios[layer]]
                for place, layer in enumerate(layers)
            }
        for layer in layers:
            for head, ratio in zip(self.heads[layer][row], ratios[layer], strict=True):
                head.ratio = ratio
        return counts

    def _floor(self, n):
        floor = self.method.lengths.floor
        return floor if isinstance(floor, float) else floor / n

    def _pool(self, scores, n, budget):
        """[layer][head] from one pool; more than four heads are grouped by what a budget of 0.2 gives."""
        n_heads, least = sum(map(len, scores)), max(self.method.protect.sink + 1, round(n * self._floor(n)))
        wanted, at_a_fifth = (rules.pool_of_all(scores, round(each * n * n_heads), least) for each in (budget, 0.2))
        if len(scores[0]) <= 4:
            return wanted
        return [[int(x) for x in rules.grouped(*of_layer)] for of_layer in zip(wanted, at_a_fifth, strict=True)]

    def _later_counts(self, n, row):
        """The same ratios over the new tokens, and half of the headroom beyond that where an answer has come before."""
        shaped = self.profile is None and self.method.lengths.lengths in ("uniform", "pyramid")
        evict, headroom = self.method.decode.evict, self.method.decode.headroom
        allowance = headroom // 2 if self.steps > 0 and evict != "least-important" else 0
        counts = {}
        for place, (layer, rows) in enumerate(self.heads.items()):
            counts[layer] = []
            for head in rows[row]:
                count = rules.prompt_count(n, head.ratio, 0)
                if shaped and head.ratio < 1:
                    count = rules.staggered_count(n, head.ratio, place, len(self.heads), 0)
                counts[layer].append(min(n, count + allowance))
        return counts

    def _keep(self, layer, row, new, scores, counts, sink, given, pairs):
        """Select, merge what is pruned into what stays, and write down what the row's heads hold now."""
        protect = self.method.protect
        named = set()
        if self.image is not None and protect.text_floor:
            means = rules.mean_over_heads(scores)
            text = [index for index in range(len(new)) if new[index] not in self.image[row]]
            best = sorted(text, key=lambda index: (-means[index], index))
            named = set(best[: math.ceil(len(text) * protect.text_floor)])
        for at, (head, count) in enumerate(zip(self.heads[layer][row], counts, strict=True)):
            recent = round(protect.recent * count) if protect.recent < 1 else protect.recent
            chosen = [new[index] for index in rules.select(scores[at], count, sink, recent, named)] if new else []
            if self.given:
                chosen = [position for position in given[layer][row][at] if position in new]
                assert len(chosen) == count and set(new[:sink] + new[-1:]) <= set(chosen)
            if protect.merge:
                merge(pairs, row, at, rules.members(new, chosen, sink))
            head.kept = head.kept + chosen
            head.held, head.limit = len(head.kept), math.inf
            head.received.update(zip(new, scores[at], strict=True))


def merge(pairs, row, head, joined):
    """Each anchor becomes the mean of itself and of what is merged into it."""
    for tensor in (pairs.keys, pairs.values):
        before = tensor[row, head].clone()
        for anchor, own in joined.items():
            tensor[row, head, anchor] = before[[anchor, *own]].mean(0)


def in_groups(heads, n_groups):
    """Query heads that share a key head, side by side: a list of n_groups lists."""
    size = len(heads) // n_groups
    return [heads[at * size : (at + 1) * size] for at in range(n_groups)]


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


@contextmanager
def recorded(model):
    """A list of each forward pass's logits of the last token, [rows, vocabulary], in the dtype of the model.

    (What `generate` returns is float32.)
    """
    logits = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, output: logits.append(output[:, -1]))
    yield logits
    handle.remove()


def feed(model, inputs, tokens, cache, watch=lambda: None):
    """Runs `generate` along `tokens` [rows, n]: n forward passes, the first of them the prompt.

    Returns the logits [rows, n, vocabulary] and the ids fed, prompt included.
    """
    with recorded(model) as logits:
        sequences = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=tokens.shape[1], do_sample=False,
            logits_processor=LogitsProcessorList([_Forced(tokens, watch)]),
        )  # fmt: skip
    return torch.stack(logits, dim=1), sequences
