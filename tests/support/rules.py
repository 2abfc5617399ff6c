"""The single rules of DESIGN.md and of the papers, on Python lists: slow, obvious, without a line of the library.

They take the valid keys of one row (of one key head, or a list of heads), with no padding in between; the indices that
they return are into these lists. `oracle.py` puts them together into a cache.
"""

import itertools
import math


def last_queries(n, window):
    """Indices of the observation window among `n` queries."""
    return list(range(n)) if window == "all" else list(range(max(0, n - window), n))


def even_queries(n, number):
    """Indices of `number` evenly spaced queries."""
    if number == "all" or n <= number:
        return list(range(n))
    return [(i + 1) * n // number - 1 for i in range(number)]


def importance(weights, queries):
    """weights: [query head][query][key]. Attention that each key receives: summed over the queries that count, averaged
    over the query heads."""
    return [sum(head[q][key] for head in weights for q in queries) / len(weights) for key in range(len(weights[0][0]))]


def pool(scores, width, by="max"):
    """The largest, or the mean, of each score and its width // 2 neighbours on either side."""
    reach, pooled = width // 2, []
    for at in range(len(scores)):
        near = scores[max(0, at - reach) : at + reach + 1]
        pooled.append(max(near) if by == "max" else sum(near) / len(near))
    return pooled


def without_sink(scores, sink):
    """The sink's scores zeroed, and then a sum of 1."""
    rest = [0.0 if at < sink else score for at, score in enumerate(scores)]
    total = sum(rest)
    return [score / total if total else 0.0 for score in rest]


def attention_scores(weights, ranking, sink):
    """Of one key head. weights: [query head that shares it][query][key], of valid queries and keys alone."""
    n = len(weights[0])
    window = pool(importance(weights, last_queries(n, ranking.queries)), ranking.pooling, ranking.pooling_by)
    if not ranking.context:
        return window
    context = importance(weights, even_queries(n, ranking.context))
    return [max(pair) for pair in zip(without_sink(window, sink), without_sink(context, sink), strict=True)]


def norm(vector):
    return math.sqrt(sum(each * each for each in vector))


def combined(by_attention, by_difference, image=()):
    """Image columns by key difference; the others by attention, and from a fifth of the keys on two by key difference
    for each one. Of equals the first column."""
    rankings = [
        sorted(range(len(scores)), key=lambda column, scores=scores: (-scores[column], column))
        for scores in (by_attention, by_difference)
    ]
    alone, found = len(by_attention) // 5, {}
    steps = [(place, column) for place, column in enumerate(rankings[0]) if column not in image]
    steps += [
        (place + 1 / 2 if column in image else alone + place / 2 + 1 / 4, column)
        for place, column in enumerate(rankings[1])
    ]
    for step, column in sorted(steps):
        found.setdefault(column, 1.0 / (1.0 + 4 * step))
    return [found[column] for column in range(len(by_attention))]


def differences_from_mean(keys):
    """1 - cosine between each key and the mean of the keys' directions (KeyDiff)."""
    directions = [[each / norm(key) for each in key] for key in keys]
    mean = [sum(each) / len(directions) for each in zip(*directions, strict=True)]
    return [1 - sum(a * b for a, b in zip(each, mean, strict=True)) / norm(mean) for each in directions]


def join(scores, how):
    """scores: [key head][key]. What each head ranks its keys by."""
    if how == "each":
        return scores
    columns = list(zip(*scores, strict=True))
    return [[max(each) if how == "max" else sum(each) / len(each) for each in columns]] * len(scores)


def mean_over_heads(scores):
    return [sum(each) / len(each) for each in zip(*scores, strict=True)]


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


def members(valid, kept, sink=1):
    """anchor -> the positions merged into it, nearest by place, ties to the lower; sink and last are no anchors."""
    anchors = [position for position in valid[sink:-1] if position in kept]
    joined = {anchor: [] for anchor in anchors}
    for place, position in enumerate(valid):
        if position not in kept and anchors:
            nearest = min(anchors, key=lambda anchor: (abs(valid.index(anchor) - place), anchor))
            joined[nearest].append(position)
    return joined


# Lengths.


def prompt_count(n, keep, sink=1):
    """How many of a row's `n` valid tokens a head with this keep ratio holds; Python's `round` is half-even."""
    return min(n, max(sink + 1, n - round(n * (1 - keep))))


def staggered_count(n, ratio, place, n_layers, sink=1):
    """The count where no profile says it: rounded up in the deeper layers, down in the others, so that layers of one
    ratio together keep what is nearest to their share."""
    return min(n, max(sink + 1, math.floor(n * ratio + (2 * place + 1) / (2 * n_layers))))


def pyramid(budget, n_layers, steepness=20):
    """From 2 * budget - last down to budget / steepness, or as steep as it gets with the first at 1."""
    if n_layers == 1:
        return [budget]
    last = budget / steepness
    first = 2 * budget - last
    if first > 1:
        first, last = 1.0, 2 * budget - 1
    return [first + (last - first) * layer / (n_layers - 1) for layer in range(n_layers)]


def raised(ratios, floor):
    """None below the floor, the mean unchanged, the others scaled by one factor, found by halving."""
    total = sum(ratios)
    if floor * len(ratios) >= total:
        return [total / len(ratios)] * len(ratios)
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        fits = sum(max(floor, middle * ratio) for ratio in ratios) <= total
        low, high = (middle, high) if fits else (low, middle)
    return [max(floor, low * ratio) for ratio in ratios]


def grouped(ratios, by=None, most=4):
    """Each head's number replaced by the mean of its group. The groups are runs of the sorted `by` (None: the numbers
    themselves): of all ways to cut it into at most `most` runs, the one with the least sum of squared distances."""
    by = ratios if by is None else by
    values = sorted(set(by))

    def groups(cuts):
        runs = [values[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(values)])]
        return [[head for head, value in enumerate(by) if value in run] for run in runs]

    def mean(numbers, heads):
        return sum(numbers[head] for head in heads) / len(heads)

    def spread(groups):
        return sum((by[head] - mean(by, heads)) ** 2 for heads in groups for head in heads)

    n_cuts = min(most, len(values)) - 1
    best = min(map(groups, itertools.combinations(range(1, len(values)), n_cuts)), key=spread)
    means = {head: mean(ratios, heads) for heads in best for head in heads}
    return [means[head] for head in range(len(ratios))]


def pool_of_all(scores, total, least):
    """Counts, [layer][head], from one pool of scores [layer][head][key]; each head first gets its `least` best."""
    counts = [[min(least, len(keys)) for keys in heads] for heads in scores]
    queue = [
        (-score, layer, head, place)
        for layer, heads in enumerate(scores)
        for head, keys in enumerate(heads)
        for place, score in enumerate(sorted(keys, reverse=True)[least:])
    ]
    for _, layer, head, _ in sorted(queue)[: max(0, total - sum(map(sum, counts)))]:
        counts[layer][head] += 1
    return counts


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
    reached = [list(itertools.accumulate(masses)) for masses in falling]  # layer -> mass of the first 1, 2, ... keys

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
