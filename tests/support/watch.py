"""One way to use the cache, run beside the reference, and everything there is to compare.

A `Case` names a method, a model, a batch and where the lengths come from. `run(case)` feeds its prompts and fixed
tokens, turn after turn, and writes down what the cache says of itself after every forward pass. `follow(case)` does the
same with an `Oracle` and its `Rule`, and asserts that both keep the same and give the same logits.
"""

import functools
from dataclasses import dataclass, replace

import torch

import compat
import models
from models import IMAGE, PADDED, VIDEO
from oracle import Given, Oracle, Rule, feed, recorded
from prefixkv_cache import PrefixKVCache, PrefixProfile
from prefixkv_cache.methods import Method

CLOSE = 1e-9  # of logits of size 1, in float64
BUDGETS = (0.1, 0.25, 0.4, 0.7, 1.0)


def make_profile(n_layers, n_heads=1, method="prefixkv", budgets=BUDGETS):
    """Keep ratios that differ from layer to layer, or head to head, rise with the budget, and have it as their mean."""
    n = n_layers * n_heads
    lean = torch.linspace(-1, 1, n, dtype=torch.float64)[torch.arange(n).mul(7 if n % 7 else 5).remainder(n)]
    keep = torch.stack([budget + min(0.8 * budget, 1 - budget) * lean for budget in budgets])
    metadata = {"source": "tests", "method": Method.parse(method).spell(full=True)}
    return PrefixProfile(torch.tensor(budgets, dtype=torch.float64), keep.view(-1, n_layers, n_heads), metadata)


@dataclass(frozen=True)
class Case:
    """profile: None: none, "layer" or "head": one made by `make_profile` for this method, which says the method, too.
    image: whether the cache is told where the image is. turns: forward passes of each turn, the first its prompt."""

    method: str
    family: str = "llava_gqa"
    attn: str = "sdpa"
    lengths: tuple = PADDED
    profile: str | None = None
    budget: float = 0.4
    image: bool = False
    turns: tuple = (15, 6)

    def __post_init__(self):
        object.__setattr__(self, "attn", compat.seen(self.attn))

    def __str__(self):
        words = [self.method, self.profile and f"by-{self.profile}", self.family, self.attn, f"{len(self.lengths)}row"]
        return "-".join([*filter(None, words), f"b{self.budget}", *["image"] * self.image])

    @property
    def as_method(self):
        return Method.parse(self.method)

    @property
    def model(self):
        """One model for all tests, which change nothing about it."""
        return models.shared(self.family, self.attn)

    @property
    def layers(self):
        return models.prunable_layers(models.weights(self.family))

    @property
    def heads(self):
        return models.weights(self.family).config.get_text_config().num_key_value_heads

    def read(self):
        """The profile of this case."""
        return make_profile(len(self.layers), self.heads if self.profile == "head" else 1, self.method)

    def cache(self, row=None, **changes):
        """The cache under test, for all rows or for one."""
        given = {"config": models.weights(self.family).config, "budget": self.budget}
        given |= {"profile": self.read()} if self.profile else {"method": self.as_method}
        if self.image:
            given["image_mask"] = self.image_mask(row)
        return PrefixKVCache(**{**given, **changes})

    def rule(self, prompts=None):
        """The reference's own reading of the same."""
        profile = self.read() if self.profile else None
        image = [row.nonzero().flatten().tolist() for row in self.image_mask()] if self.image else None
        return Rule(self.as_method, self.budget, profile=profile, image=image, prompts=prompts)

    def image_mask(self, row=None):
        ids = self.prompt(row)["input_ids"]
        return (ids == IMAGE) | (ids == VIDEO)

    def prompt(self, row=None):
        """The inputs of all rows, or of one alone; without an image where there is no room for one."""
        if min(self.lengths) > 20:
            return (
                models.batch(self.family, self.lengths) if row is None else models.alone(self.family, self.lengths, row)
            )
        rows = [models.words(1, length, seed=length)[0].tolist() for length in self.lengths]
        rows = rows if row is None else rows[row : row + 1]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(each)) + each for each in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def kept_by_head(cache, layer, heads):
    """row -> key head -> positions, rising; heads that share one set all have it."""
    positions = cache.kept_positions(layer)
    if positions.ndim == 2:
        positions = positions[:, None].expand(-1, heads, -1)
    return [[sorted(each for each in head if each >= 0) for head in row] for row in positions.tolist()]


class Watch:
    """Called after each forward pass; writes down what the cache says of itself."""

    def __init__(self, cache, family):
        config = models.weights(family).config
        self.cache, self.layers = cache, models.prunable_layers(models.weights(family))
        self.n_heads = config.get_text_config().num_key_value_heads
        self.kept = []  # forward pass -> layer -> row -> head -> positions
        self.seen, self.nbytes, self.lengths, self.lengths_by_head, self.taken = [], [], [], [], []

    def __call__(self):
        self.kept.append({layer: kept_by_head(self.cache, layer, self.n_heads) for layer in self.layers})
        self.seen.append(int(self.cache.get_seq_length()))
        self.nbytes.append(self.cache.nbytes)
        self.lengths.append(self.cache.stored_lengths())
        self.lengths_by_head.append(self.cache.stored_lengths(heads=True))
        self.taken.append(bytes_of_pairs(self.cache, self.layers))

    @property
    def prompts(self):
        """What was kept after each forward pass that was a prompt."""
        before = [0, *self.seen]
        return [kept for at, kept in enumerate(self.kept) if at == 0 or self.seen[at] > before[at] + 1]


def pairs_of(*things):
    """All tensors of keys and values that can be reached from these objects of the library."""
    todo, known = list(things), {}
    while todo:
        thing = todo.pop()
        if id(thing) in known:
            continue
        known[id(thing)] = thing
        if isinstance(thing, (list, tuple)):
            todo += thing
        elif isinstance(thing, dict):
            todo += thing.values()
        elif type(thing).__module__.startswith("prefixkv_cache"):
            slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
            todo += [getattr(thing, name, None) for name in slots if name != "__weakref__"]
            todo += getattr(thing, "__dict__", {}).values()
    tensors = [thing for thing in known.values() if isinstance(thing, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.ndim == 4 and tensor.is_floating_point()]


def memory_of(*things):
    """Bytes of all these keys and values, each memory once."""
    storages = [tensor.untyped_storage() for tensor in pairs_of(*things)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bytes_of_pairs(cache, prunable):
    """What keys and values take: of pruned layers all that can be reached, of other layers what they show, which may be
    a part of what transformers holds."""
    others = [layer for at, layer in enumerate(cache.layers) if at not in prunable and layer.keys is not None]
    pruned = memory_of(*(cache.layers[at] for at in prunable))
    return pruned + sum(layer.keys.nbytes + layer.values.nbytes for layer in others)


def talk(model, case, cache, watch=lambda: None, row=None):
    """Prompts and forced tokens, turn after turn: logits [rows, forward passes, vocabulary], ids."""
    inputs, n_rows = case.prompt(row), len(case.lengths)
    rows = slice(None) if row is None else slice(row, row + 1)
    logits, sequences = [], None
    for turn, n in enumerate(case.turns):
        of_turn, sequences = feed(model, inputs, models.words(n_rows, n, seed=3 + turn)[rows], cache, watch)
        logits.append(of_turn)
        ids = torch.cat([sequences, models.words(n_rows, 9 + 4 * turn, seed=30 + turn)[rows]], dim=1)
        mask = torch.ones_like(ids)
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        inputs = {"input_ids": ids, "attention_mask": mask}
    return torch.cat(logits, dim=1), sequences


@functools.cache
def run(case, row=None, **changes):
    """Logits and `Watch` of the cache under test; the watch lets go of the cache."""
    watch = Watch(case.cache(row, **changes), case.family)
    logits, _ = talk(case.model, case, watch.cache, watch, row)
    watch.cache = None
    return logits, watch


def prompt_kept(case, **changes):
    """layer -> row -> head -> positions, after the prompt alone."""
    return run(replace(case, turns=(1,)), **changes)[1].kept[0]


@functools.cache
def follow(case):
    """Asserts that the cache does what its method says; returns its logits, its `Watch` and the `Rule`."""
    logits, watch = run(case)
    rule = case.rule(watch.prompts)
    oracle = Oracle(case.model, rule)
    wanted, _ = talk(oracle.model, case, oracle.cache)
    for step, (kept, by_rule) in enumerate(zip(watch.kept, rule.log, strict=True)):
        for layer in watch.layers:
            assert kept[layer] == by_rule[layer], f"after forward pass {step}, layer {layer}"
    assert (logits - wanted).abs().max() < CLOSE
    return logits, watch, rule


def masked(case, watch):
    """Logits of a full cache that is masked, head by head, by what a cache says that it kept."""
    oracle = Oracle(case.model, Given(watch.kept))
    return talk(oracle.model, case, oracle.cache)[0]


def greedy(model, inputs, cache, new=12, **options):
    """The ids that the model goes on with by itself, and the logits."""
    with recorded(model) as logits:
        ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, **{"do_sample": False, **options})
    return ids, torch.stack(logits, dim=1)
