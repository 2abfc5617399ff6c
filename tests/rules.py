"""What the papers say that a cache keeps, in plain loops over Python lists: the slow side of every method's tests.

`Rules(...)` is used like `Rule` of `oracle.py`, as the `kept` of an `Oracle`: it looks at the attention weights of the
full model, decides what every key head of every row keeps after the prompt and after each decode step, merges what is
pruned into what stays, and writes down both. It knows rows and heads one at a time, and has no line of the library.

The functions below it are the single rules. They take the real keys of one row (of one head, or a list of heads), with
no padding in between, as lists of floats; what they return are indices into these lists.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from oracle import by_head, prompt_count, search

PLAIN = {"queries": 32, "distance": 25, "slack": 0, "novelty": 0.0, "diversity": 0.0}
"""What `Rules` goes by where nothing else is said, as arguments of a cache, whose default is another."""


@dataclass
class Rules:
    """One method. The fields are named as the arguments of `PrefixKVCache`; `keep` is what a profile says: keep ratios,
    or a function of the budget that gives them."""

    budget: float = 0.5
    keep: object = None
    queries: object = 32
    average: str = "sum"
    heads: str = "mean"
    pooling: int = 1
    value_norm: bool = False
    diversity: float = 0.0
    novelty: float = 0.0
    lengths: str = "search"
    floor: float = 0.0
    cap: float | None = None
    temperature: float = 0.0
    sink: int = 1
    recent: float = 1
    evict: str = "fixed-point"
    distance: int | None = 25
    slack: int = 0
    merge: str | None = None
    text_floor: float = 0.5
    image: list | None = None  # row -> positions of the first prompt's image tokens
    as_published: bool = False
    newest_first: bool = False  # StreamingLLM: no attention, the newest are the best
    at_prompt: dict | None = None  # layer -> row -> head -> positions: taken as given, for keys drawn at random

    oracle: object = None  # whose weights, keys and values these are
    kept: dict | None = None  # layer -> row -> head -> positions, rising
    received: dict = field(default_factory=dict)  # layer -> row -> head -> {position: attention so far}
    steps: int = 0  # since the last prompt
    origins: dict = field(default_factory=dict)  # (layer, row) -> pairs before the first answer, after the first turn
    log: list = field(default_factory=list)

    # What the oracle calls.

    def before(self, real, fed):
        """What the next forward pass may see of the tokens before it."""
        if fed == 1:
            for layer, rows in self.kept.items():
                for row, heads in enumerate(rows):
                    for head, positions in enumerate(heads):
                        positions.append(real[row][-1])
                        self._evict(layer, row, head, len(real[row]))
        return self.kept

    def after(self, real, fed, weights):
        seen = self.oracle.cache.get_seq_length()
        new = [[position for position in positions if position >= seen - fed] for positions in real]
        if self.kept is not None:
            self.steps += fed == 1
            if fed > 1 and self.steps and self.evict != "least-important":
                self._begin_turn([len(all_of) - len(of_row) for all_of, of_row in zip(real, new, strict=True)])
        if self.kept is None or fed > 1:
            self._prompt(new, {layer: weights[layer].tolist() for layer in weights}, seen - fed)
        elif self.evict == "least-important":
            self._accumulate(new, {layer: weights[layer].tolist() for layer in weights}, seen - 1)
        self.log.append({layer: [[list(head) for head in row] for row in rows] for layer, rows in self.kept.items()})

    # Decoding.

    def _evict(self, layer, row, head, seen):
        """The newcomer is in the list already; does one leave for it, and which?"""
        positions, ratio = self.kept[layer][row][head], self.ratios[layer][row]
        if self.distance is None or ratio == 1 or len(positions) - seen * ratio < 1 + self.slack:
            return
        if self.evict == "oldest":
            sink = min(self.sink, self.first[row])
            if len(positions) - 1 > sink:  # the newcomer is not the one to go
                del positions[sink]
        elif self.evict == "least-important":
            # The window is the text's last tokens, as many as a share of what is kept.
            window = round(self.recent * (len(positions) - 1)) if self.recent < 1 else 0
            leaving = [each for each in positions[self.sink : -1] if each <= positions[-1] - window]
            received = self.received[layer][row][head]
            positions.remove(min(leaving, key=lambda position: received[position]))
        else:
            del positions[self._point(layer, row)]

    def _point(self, layer, row):
        if self.evict == "oldest":
            return min(self.sink, self.held[layer][row])
        length = self.held[layer][row]
        return length - self.distance if length - self.distance >= 1 else length // 2

    def _begin_turn(self, tokens):
        """Of what came behind the first prompt, the oldest leave, as many as are held beyond the share."""
        for layer, rows in self.kept.items():
            for row, heads in enumerate(rows):
                ratio = self.ratios[layer][row]
                if self.distance is None or ratio == 1:
                    continue
                origin = self.origins.setdefault((layer, row), self._point(layer, row))
                for positions in heads:
                    beyond = math.floor(max(0, len(positions) - tokens[row] * ratio))
                    del positions[origin : origin + min(self.slack, beyond)]

    def _accumulate(self, new, weights, first_new):
        """Add what the pairs that were there have received from the newest queries."""
        for layer, rows in self.kept.items():
            for row, heads in enumerate(rows):
                counting = self._counting(new[row], row)
                groups = in_groups(weights[layer][row], len(heads))
                if self.heads != "each":  # what they keep together, they vote on together
                    groups = [weights[layer][row]] * len(heads)
                for head, positions in enumerate(heads):
                    for position in positions:
                        total = 0.0
                        for of_query_head in groups[head]:
                            for query in counting:
                                total += of_query_head[query - first_new][position]
                        if self.average == "visible":
                            total /= len(counting)
                        received = self.received[layer][row][head]
                        received[position] = received.get(position, 0.0) + total / len(groups[head])

    # A prompt.

    def _counting(self, new, row):
        """The new positions whose queries count."""
        if self.queries == "all":
            return new
        if self.queries == "text":
            text = [position for position in new if position not in self.image[row]]
            image = [position for position in new if position in self.image[row]]
            if not image:
                return text
            behind = [position for position in text if position > min(image)]
            ends_in_image = max(new) in image
            return [position for position in new if position in behind or (ends_in_image and position in new[-32:])]
        return new[-self.queries :]

    def _scores(self, layer, new, row, weights, first_new):
        """Of the new keys of one row: head -> list of floats."""
        keys = self.oracle.cache.layers[layer].keys[row].double()
        values = self.oracle.cache.layers[layer].values[row].double()
        counting = self._counting(new, row)
        if self.newest_first:
            return [[float(position) for position in new]]
        scores = []
        for group in in_groups(weights, len(keys)):
            here = [[[each[query - first_new][key] for key in new] for query in counting] for each in group]
            visible = [sum(query >= key for query in counting) for key in new]
            scores.append(importance(here, visible if self.average == "visible" else None))
        if self.value_norm:
            scores = [times_norm(scores[head], values[head, new].tolist()) for head in range(len(keys))]
        scores = [pool(of_head, self.pooling) for of_head in scores]
        if self.heads == "mean":
            scores = [[sum(each) / len(each) for each in zip(*scores, strict=True)]]
        elif self.heads == "max":
            scores = [[max(each) for each in zip(*scores, strict=True)]]
        if self.diversity:
            away = [distances_from_mean(keys[head, new].tolist()) for head in range(len(keys))]
            if self.heads != "each":
                away = [[sum(each) / len(each) for each in zip(*away, strict=True)]]
            scores = [mix(scores[head], away[head], self.diversity) for head in range(len(scores))]
        if self.novelty:
            if self.heads == "each":
                of_keys = [values[head, new].tolist() for head in range(len(values))]
            else:
                of_keys = [values[:, new].transpose(0, 1).flatten(1).tolist()]
            scores = [without_repetition(*each, self.novelty) for each in zip(scores, of_keys, strict=True)]
        return scores

    def _ratios(self, n_layers):
        def source(budget):
            if self.keep is not None:
                return self.keep(budget) if callable(self.keep) else self.keep
            return pyramid(budget, n_layers) if self.lengths == "pyramid" else [budget] * n_layers

        ratios = clipped(source, self.budget, self.floor, self.cap)
        return [self.temperature * self.budget + (1 - self.temperature) * ratio for ratio in ratios]

    def _counts(self, n, ratios, sink):
        if self.lengths == "search":
            return [prompt_count(n, ratio, sink) for ratio in ratios]
        return [staggered_count(n, ratio, place, len(ratios), sink) for place, ratio in enumerate(ratios)]

    def _prompt(self, new, weights, first_new):
        layers, rows, first = list(weights), range(len(new)), self.kept is None
        sink = self.sink if first else 0
        scores = {
            layer: [self._scores(layer, new[row], row, weights[layer][row], first_new) for row in rows]
            for layer in layers
        }
        if first:
            self.kept = {layer: [[] for _ in rows] for layer in layers}
            self.ratios = {layer: [None for _ in rows] for layer in layers}
            self.held = {layer: [0 for _ in rows] for layer in layers}
            self.received = {layer: [[] for _ in rows] for layer in layers}
            self.first = [len(positions) for positions in new]
        elif self.evict == "least-important":
            self._accumulate(new, weights, first_new)
        steps, self.steps = self.steps, 0
        for row in rows:
            n = len(new[row])
            if not first:
                ratios = [self.ratios[layer][row] for layer in layers]
                allowance = self.slack // 2 if steps and self.evict != "least-important" else 0
                counts = [min(count + allowance, n) for count in self._counts(n, ratios, 0)]
            elif self.keep is None and self.lengths == "search":
                means = [[sum(each) / len(each) for each in zip(*scores[layer][row], strict=True)] for layer in layers]
                if self.floor or self.cap is not None:
                    counts = search_between(means, self.budget, self.floor, self.cap, sink)
                else:
                    counts = search(means, self.budget, sink)
                counts = share_out(counts, self.temperature)
                ratios = [count / n for count in counts]
            else:
                ratios = self._ratios(len(layers))
                counts = self._counts(n, ratios, sink)
            for layer, count, ratio in zip(layers, counts, ratios, strict=True):
                chosen = self._choose(scores[layer][row], count, sink, new[row], layer, row)
                self._merge(layer, row, chosen, new[row], sink)
                self.ratios[layer][row] = ratio
                heads = self.oracle.cache.layers[layer].keys.shape[1]
                before = self.kept[layer][row] or [[] for _ in range(heads)]
                self.kept[layer][row] = [old + kept for old, kept in zip(before, by_head(chosen, heads), strict=True)]
                self.held[layer][row] = len(self.kept[layer][row][0])
                known = self.received[layer][row] or [{} for _ in range(heads)]
                for head in range(heads):
                    known[head].update(zip(new[row], scores[layer][row][head % len(scores[layer][row])], strict=True))
                self.received[layer][row] = known

    def _choose(self, scores, count, sink, new, layer, row):
        """Positions kept: a list, or one for each head."""
        if self.at_prompt is not None:
            return self.at_prompt[layer][row]
        n = len(new)
        recent = round(self.recent * count) if self.recent < 1 else int(self.recent)
        before_others = set()
        if self.image is not None and self.text_floor:
            means = [sum(each) / len(each) for each in zip(*scores, strict=True)]
            text = [index for index in range(n) if new[index] not in self.image[row]]
            best = sorted(text, key=lambda index: (-means[index], index))
            before_others = set(best[: math.ceil(len(text) * self.text_floor)])
        if self.as_published:
            scores = [permutation_as_scores(of_head, sink) for of_head in scores]
        chosen = [select(of_head, count, sink, recent, before_others) for of_head in scores]
        positions = [[new[index] for index in indices] for indices in chosen]
        return positions[0] if len(positions) == 1 else positions

    def _merge(self, layer, row, chosen, new, sink):
        if self.merge is None:
            return
        cached = self.oracle.cache.layers[layer]
        for head, kept in enumerate(by_head(chosen, cached.keys.shape[1])):
            joined = members(new, kept, sink, sink if self.as_published else 0)
            for what in ("keys", "values") if self.merge == "kv" else ("values",):
                pairs = getattr(cached, what)[row, head].clone()
                for anchor, own in joined.items():
                    mean = torch.stack([pairs[each] for each in [anchor, *own]]).mean(0)
                    self.oracle.replace(layer, row, head, anchor, **{what.removesuffix("s"): mean})


def in_groups(heads, n_groups):
    """Query heads that share a key head, side by side: a list of n_groups lists."""
    size = len(heads) // n_groups
    return [heads[at * size : (at + 1) * size] for at in range(n_groups)]


def importance(weights, visible=None):
    """weights: [query head][query that counts][key]. Summed over the queries, averaged over the heads, and divided by
    the number of queries that can see the key, where these are given."""
    received = []
    for key in range(len(weights[0][0])):
        total = 0.0
        for of_head in weights:
            for of_query in of_head:
                total += of_query[key]
        total /= len(weights)
        received.append(total if visible is None else total / max(1, visible[key]))
    return received


def times_norm(scores, values):
    return [score * math.sqrt(sum(each * each for each in value)) for score, value in zip(scores, values, strict=True)]


def pool(scores, width):
    """The largest within width // 2 keys on either side."""
    reach = width // 2
    return [max(scores[max(0, at - reach) : at + reach + 1]) for at in range(len(scores))]


def distances_from_mean(keys):
    """1 - cosine between each key and the mean of the keys' directions."""
    directions = []
    for key in keys:
        length = math.sqrt(sum(each * each for each in key))
        directions.append([each / length if length else 0.0 for each in key])
    mean = [sum(each) / len(directions) for each in zip(*directions, strict=True)]
    length = math.sqrt(sum(each * each for each in mean))
    if not length:
        return [1.0] * len(keys)
    return [1 - sum(a * b for a, b in zip(each, mean, strict=True)) / length for each in directions]


def mix(scores, away, share):
    """Both with a sum of 1 first (of all zeros: zeros)."""
    first, second = sum(scores) or 1.0, sum(away) or 1.0
    return [(1 - share) * a / first + share * b / second for a, b in zip(scores, away, strict=True)]


def cosine(one, other):
    lengths = math.sqrt(sum(each * each for each in one)) * math.sqrt(sum(each * each for each in other))
    return sum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0


def without_repetition(scores, values, exponent):
    """Each score times (1 - s) ** exponent: s is the largest similarity of its value with a better key's, or 0."""
    by_score = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    kept = list(scores)
    for place, index in enumerate(by_score):
        repeated = max([0.0, *(cosine(values[index], values[better]) for better in by_score[:place])])
        kept[index] = scores[index] * max(0.0, 1 - repeated) ** exponent
    return kept


def select(scores, count, sink=0, recent=1, before_others=()):
    """Indices kept, rising: sink and last, then the recent ones, newest first, then those named, then all others."""
    n = len(scores)
    by_score = sorted(range(n), key=lambda index: (-scores[index], index))
    queue = [*range(min(sink, n)), n - 1]
    queue += range(n - 1, max(-1, n - 1 - recent), -1)
    queue += [index for index in by_score if index in before_others] + by_score
    kept = []
    for index in queue:
        if len(kept) < count and index not in kept:
            kept.append(index)
    return sorted(kept)


def permutation_as_scores(scores, sink):
    """Published code: between sink and last key, the j-th key's score is the index of the j-th smallest score."""
    inner = scores[sink:-1]
    order = sorted(range(len(inner)), key=lambda index: (inner[index], index))
    return [0.0] * min(sink, len(scores) - 1) + [float(index) for index in order] + [0.0]


def members(real, kept, sink=1, shift=0):
    """anchor -> the positions merged into it. real: positions of the row, rising; no gaps where shift is given."""
    inner = [position for at, position in enumerate(real) if at >= sink and at < len(real) - 1]
    anchors = [position for position in inner if position in kept]
    joined = {anchor: [] for anchor in anchors}
    for position in real:
        if position in kept or not anchors:
            continue
        position -= shift
        place = real.index(position)
        nearest = min(anchors, key=lambda anchor: (abs(real.index(anchor) - place), anchor))
        joined[nearest].append(position)
    return joined


def pyramid(budget, n_layers, steepness=20):
    """From 2 * budget - last down to budget / steepness, or as steep as it gets with the first at 1."""
    if n_layers == 1:
        return [budget]
    last = budget / steepness
    first = 2 * budget - last
    if first > 1:
        first, last = 1.0, 2 * budget - 1
    return [first + (last - first) * layer / (n_layers - 1) for layer in range(n_layers)]


def staggered_count(n, ratio, place, n_layers, sink=1):
    """How many of n tokens a layer keeps where no profile says it: rounded up in the deeper layers, down in the others,
    so that layers of one ratio together keep what is nearest to their share."""
    return min(n, max(sink + 1, math.floor(n * ratio + (2 * place + 1) / (2 * n_layers))))


def clipped(source, budget, floor, cap):
    """The source's ratios at the smallest budget at which, clipped, they add up to what this budget allows."""
    if floor == 0 and cap is None:
        return source(budget)
    low, high = floor * budget, 1 if cap is None else min(1, cap * budget)

    def at(place):
        return [min(high, max(low, ratio)) for ratio in source(place)]

    place, step = 1.0, 0.5
    while step > 1e-16:
        if sum(at(place - step)) >= budget * len(at(place)) - 1e-13:
            place -= step
        step /= 2
    return at(place)


def search_between(importances, budget, floor, cap, sink=1):
    """The search on one prompt, with a floor and a cap in whole pairs: for each total from the least to the largest the
    lengths there, none of which ever falls, and of these the last that fit. Pairs still free: as the search goes."""
    n_layers, n_keys = len(importances), len(importances[0])
    least = min(sink + 1, n_keys)
    target = max(round(budget * n_layers * n_keys), n_layers * least)
    floor, cap = Fraction(floor), Fraction(n_keys if cap is None else cap)
    path = one_by_one(importances, least)
    searched, read, fitting = [least] * n_layers, 0, None
    for total in range(n_layers * least, n_layers * n_keys + 1):
        low, high = (min(n_keys, max(least, each * total / n_layers)) for each in (floor, cap))

        def clip(counts, low=low, high=high):
            return [min(high, max(low, count)) for count in counts]

        while read < len(path):
            more = [count + (layer == path[read]) for layer, count in enumerate(searched)]
            if sum(clip(more)) > total:
                break
            searched, read = more, read + 1
        nearest = [math.floor(each + Fraction(1, 2)) for each in (low, high)]
        lengths = clip(searched, *nearest)
        if sum(lengths) > target:
            break
        fitting = lengths
    place = [least] * n_layers
    for layer in path:
        if sum(fitting) < target and fitting[layer] <= place[layer] < lengths[layer]:
            fitting[layer] += 1
        place[layer] += 1
    return fitting


def one_by_one(importances, least):
    """The order in which the search gives pairs to layers: always to the layer that has reached least mass so far."""
    falling = []
    for received in importances:
        total = math.fsum(received)
        falling.append(sorted((each / total if total else 1 / len(received) for each in received), reverse=True))
    counts, order = [least] * len(falling), []
    while open_layers := [layer for layer, masses in enumerate(falling) if counts[layer] < len(masses)]:

        def standing(layer):
            masses, count = falling[layer], counts[layer]
            return sum(masses[:count]), -masses[count], count, layer

        order.append(min(open_layers, key=standing))
        counts[order[-1]] += 1
    return order


def share_out(counts, temperature):
    """A share of each count is handed out equally; largest remainders are rounded up (ties: the lower layer)."""
    temperature, total = Fraction(temperature), sum(counts)
    shares = [temperature * total / len(counts) + (1 - temperature) * count for count in counts]
    whole = [math.floor(share) for share in shares]
    for layer in sorted(range(len(counts)), key=lambda layer: (whole[layer] - shares[layer], layer)):
        if sum(whole) < total:
            whole[layer] += 1
    return whole
