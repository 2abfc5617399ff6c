"""The laws of the cache, 1 to 8, and what it must do with bad input and with the rest of transformers' cache API.

Only the public names are used. `oracle.py` is the reference: a full cache with masks, written without a look at the
library. Everything is float32 on the CPU with tiny random models (`models.py`) unless a test says otherwise.

A `Case` is one way to use the cache; `run(case)` feeds its prompt and then `STEPS` fixed tokens, and writes down after
each forward pass what the cache says that it keeps. Several laws read the same run.

A case goes by the paper's rule, or by the default, which are two sets of arguments. Both are spelled out here for the
oracle, and not asked of the library.
"""

import copy
import functools
import gc
import itertools
import math
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import compat
import models
from models import FAMILIES, PADDED
from oracle import Given, Oracle, Rule, feed, prompt_count
from prefixkv_cache import PAPER, PrefixKVCache, PrefixProfile
from rules import Rules

STEPS = 45  # decode steps of a run: eviction has gone round
STEPS_OF_DEFAULT = 105  # until the slack is used up in every layer, and pairs leave
SLACK_OF_DEFAULT = 64
BUDGETS = (0.2, 0.25, 0.35, 0.5, 0.7, 1.0)
WINDOW_OVER_ALL = 50  # longer than the shortest row of the padded batch


def profile(n_layers, budgets=BUDGETS):
    """Keep ratios that differ from layer to layer, rise with the budget, and have exactly the budget as their mean.

    A hybrid model has one for each of its prunable layers.
    """
    lean = torch.linspace(-1, 1, n_layers, dtype=torch.float64)
    lean = lean[torch.arange(n_layers).mul(3).remainder(n_layers) if n_layers % 3 else torch.arange(n_layers).flip(0)]
    keep = torch.stack([budget + min(0.6 * budget, 1 - budget) * lean for budget in budgets])
    return PrefixProfile(budgets=torch.tensor(budgets, dtype=torch.float64), keep=keep, metadata={"source": "tests"})


@dataclass(frozen=True)
class Case:
    family: str
    attn: str = "sdpa"
    lengths: tuple = (61,)
    source: str = "profile"  # where the lengths come from: a profile, or "online": a search on the prompt itself
    budget: float = 0.5
    queries: object = 32
    distance: object = 25
    rule: str = "paper"  # or "default", with its own distance

    def __post_init__(self):
        object.__setattr__(self, "attn", compat.seen(self.attn))
        if self.rule == "default":
            object.__setattr__(self, "distance", 1)

    def __str__(self):
        rows = f"{len(self.lengths)}row"
        if self.rule == "default":
            return f"{self.family}-{self.attn}-{rows}-{self.source}-b{self.budget}-default"
        return f"{self.family}-{self.attn}-{rows}-{self.source}-b{self.budget}-q{self.queries}-d{self.distance}"

    @property
    def layers(self):
        return models.prunable_layers(models.weights(self.family))

    @property
    def keep(self):
        """The profile's keep ratios at this budget, or None: search."""
        if self.source == "online":
            return None
        return profile(len(self.layers)).keep_ratios(self.budget).tolist()

    def cache(self, **changes):
        chosen = profile(len(self.layers)) if self.source == "profile" else None
        given = {"config": models.weights(self.family).config, **changes}
        if self.rule == "default":
            return PrefixKVCache(chosen, self.budget, **given)
        return PrefixKVCache.paper(chosen, self.budget, **{"queries": self.queries, "distance": self.distance, **given})

    def by_rules(self):
        """What the oracle goes by."""
        if self.rule == "default":
            return Rules(keep=self.keep, budget=self.budget, queries=32, diversity=0.5, novelty=8.0, distance=1,
                         slack=SLACK_OF_DEFAULT)  # fmt: skip
        return Rule(keep=self.keep, budget=self.budget, queries=self.queries, distance=self.distance)

    @property
    def steps(self):
        return STEPS_OF_DEFAULT if self.rule == "default" else STEPS

    @property
    def slack(self):
        return SLACK_OF_DEFAULT if self.rule == "default" else 0


def covering_cases():
    """Every pair of two settings somewhere, not their full product."""
    cases = []
    for index, (family, source, attn, lengths) in enumerate(
        itertools.product(FAMILIES, ("profile", "online"), ("eager", "sdpa"), ((61,), PADDED))
    ):
        turn = index // 4
        budget = (0.5, 0.25)[(index // 3) % 2]
        queries = ("all", 8, 32, WINDOW_OVER_ALL)[(index + turn) % 4]
        distance = (25, 5, None)[(index + index // 3) % 3]
        cases.append(Case(family, attn, lengths, source, budget, queries, distance))
    for index, (family, source) in enumerate(itertools.product(FAMILIES, ("profile", "online"))):
        attn, lengths = ("eager", "sdpa")[(index + index // 4) % 2], ((61,), PADDED)[(index + index // 2) % 2]
        cases.append(Case(family, attn, lengths, source, budget=0.2, rule="default"))
    return cases


CASES = covering_cases()
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_family = pytest.mark.parametrize("family", FAMILIES)
each_backend = pytest.mark.parametrize("attn", compat.BACKENDS)
each_batch = pytest.mark.parametrize("lengths", [(61,), PADDED], ids=["one", "padded"])


@dataclass
class Record:
    """Called after each forward pass; writes down what the cache says of itself. Holds the cache while it records."""

    cache: object
    layers: list
    kept: list = field(default_factory=list)  # step -> layer -> row -> positions, rising
    stored: list = field(default_factory=list)  # step -> physical length of each layer
    seen: list = field(default_factory=list)
    nbytes: list = field(default_factory=list)

    def __call__(self):
        self.kept.append({layer: kept_rows(self.cache, layer) for layer in self.layers})
        self.stored.append(list(self.cache.stored_lengths()))
        self.seen.append(int(self.cache.get_seq_length()))
        self.nbytes.append(self.cache.nbytes)


def kept_rows(cache, layer):
    return [sorted(position for position in row if position >= 0) for row in cache.kept_positions(layer).tolist()]


@functools.cache
def run(case):
    """Prompt and STEPS tokens: (logits, record without its cache)."""
    record = Record(case.cache(), case.layers)
    model, inputs = models.build(case.family, case.attn), models.batch(case.family, case.lengths)
    logits, _ = feed(model, inputs, models.words(len(case.lengths), case.steps + 1), record.cache, record)
    record.cache = None
    return logits, record


@functools.cache
def expected(case):
    """What the oracle's own selection and decode rule give for the same case: (logits, kept as in `Record`)."""
    rules = case.by_rules()
    oracle = rules.oracle = Oracle(models.build(case.family), rules)
    inputs = models.batch(case.family, case.lengths)
    logits, _ = feed(oracle.model, inputs, models.words(len(case.lengths), case.steps + 1), oracle.cache)
    return logits, rising(one_for_all_heads(rules.log) if case.rule == "default" else rules.log)


def one_for_all_heads(log):
    """`Rules` writes down every head by itself; here they agree."""
    assert all(head == row[0] for step in log for rows in step.values() for row in rows for head in row)
    return [{layer: [row[0] for row in rows] for layer, rows in step.items()} for step in log]


def difference(actual, wanted):
    return (actual - wanted).abs().max().item()


def rising(log):
    return [{layer: [sorted(row) for row in rows] for layer, rows in step.items()} for step in log]


# Law 1: nothing pruned, nothing changed.


def greedy(model, inputs, cache, **options):
    output = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=16, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits, dim=1)


@each_batch
@each_backend
@each_family
def test_law_1_two_turns_as_with_dynamic_cache(family, attn, lengths):
    model = models.build(family, attn)
    for make in (PrefixKVCache, PrefixKVCache.paper):
        ours = make(budget=1.0, config=model.config)
        theirs = DynamicCache(config=model.config)
        inputs = models.batch(family, lengths)
        for _turn in range(2):
            wanted_ids, wanted = greedy(model, inputs, theirs)
            ids, logits = greedy(model, inputs, ours)
            assert torch.equal(ids, wanted_ids)
            assert difference(logits, wanted) < 1e-5
            assert ours.get_seq_length() == theirs.get_seq_length()
            inputs = models.next_turn(inputs, ids, 9)


@each_batch
@each_backend
@each_family
def test_law_1_beams(family, attn, lengths):
    model, inputs = models.build(family, attn), models.batch(family, lengths)
    wanted_ids, wanted = greedy(model, inputs, DynamicCache(config=model.config), num_beams=3)
    ids, logits = greedy(model, inputs, PrefixKVCache(budget=1.0, config=model.config), num_beams=3)
    assert torch.equal(ids, wanted_ids)
    assert difference(logits, wanted) < 1e-5


@each_family
def test_law_1_with_a_profile(family):
    case = Case(family, lengths=PADDED, budget=1.0)
    logits, record = run(case)
    model = models.build(family, case.attn)
    wanted, _ = feed(model, models.batch(family, PADDED), models.words(3, STEPS + 1), DynamicCache(config=model.config))
    assert difference(logits, wanted) < 1e-5
    assert [record.stored[-1][layer] for layer in case.layers] == [61 + STEPS] * len(case.layers)


# Law 2: pruning equals masking.


@each_case
def test_law_2_logits_are_those_of_the_masked_full_cache(case):
    """Given what the cache says that it keeps: independent of how it chose."""
    logits, record = run(case)
    oracle = Oracle(models.build(case.family), Given(record.kept))
    tokens = models.words(len(case.lengths), case.steps + 1)
    wanted, _ = feed(oracle.model, models.batch(case.family, case.lengths), tokens, oracle.cache)
    assert difference(logits, wanted) < 1e-4
    full, _ = feed(
        models.build(case.family), models.batch(case.family, case.lengths), tokens,
        DynamicCache(config=oracle.model.config),
    )  # fmt: skip
    assert difference(logits, full) > 1e-2, "nothing was pruned: the test shows nothing"


@each_case
def test_law_2_positions_are_those_of_the_rules(case):
    """Selection at the prompt and every eviction, entry for entry, by plain loops over plain attention weights."""
    logits, record = run(case)
    wanted, by_rules = expected(case)
    for step, (kept, by_rule) in enumerate(zip(record.kept, by_rules, strict=True)):
        assert kept == by_rule, f"after forward pass {step}"
    assert difference(logits, wanted) < 1e-4


# Law 3: a batch is its members.


@pytest.mark.parametrize("case", [case for case in CASES if len(case.lengths) > 1], ids=str)
def test_law_3_a_padded_row_is_the_row_alone(case):
    logits, record = run(case)
    tokens = models.words(len(case.lengths), case.steps + 1)
    for row, length in enumerate(case.lengths):
        single = Record(case.cache(), case.layers)
        inputs = models.alone(case.family, case.lengths, row)
        wanted, _ = feed(models.build(case.family, case.attn), inputs, tokens[row : row + 1], single.cache, single)
        padding = max(case.lengths) - length
        for step, (kept, alone) in enumerate(zip(record.kept, single.kept, strict=True)):
            for layer in case.layers:
                shifted = [position - padding for position in kept[layer][row]]
                assert shifted == alone[layer][0], f"row {row}, layer {layer}, after forward pass {step}"
        assert difference(logits[row], wanted[0]) < 1e-4


# Law 4: more budget never keeps less.


@pytest.mark.parametrize("rule", ["paper", "default"])
@pytest.mark.parametrize("source", ["profile", "online"])
@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl", "gemma3"])
def test_law_4_kept_sets_are_nested(family, source, rule):
    model, inputs = models.build(family), models.batch(family, PADDED)
    layers = models.prunable_layers(model)
    smaller = None
    for budget in (0.1, 0.2, 0.3, 0.35, 0.5, 0.65, 0.7, 0.9, 1.0):
        cache = Case(family, lengths=PADDED, source=source, budget=budget, rule=rule).cache()
        feed(model, inputs, models.words(3, 1), cache)
        kept = {layer: kept_rows(cache, layer) for layer in layers}
        if smaller is not None:
            for layer, row in itertools.product(layers, range(3)):
                assert set(smaller[layer][row]) <= set(kept[layer][row]), f"budget {budget}, layer {layer}, row {row}"
        smaller = kept


# Law 5: counts are exact.


@each_case
def test_law_5_counts_are_exact(case):
    _, record = run(case)
    for row, length in enumerate(case.lengths):
        counts = [len(record.kept[0][layer][row]) for layer in case.layers]
        if case.keep is None:
            assert sum(counts) == round(case.budget * len(case.layers) * length)
            ratios = [count / length for count in counts]
        else:
            assert counts == [prompt_count(length, keep) for keep in case.keep]
            ratios = case.keep
        for step in range(1, case.steps + 1):
            for layer, ratio, count in zip(case.layers, ratios, counts, strict=True):
                stored = len(record.kept[step][layer][row])
                if case.distance is None:
                    assert stored == count + step
                else:
                    assert stored - (length + step) * ratio < 1 + case.slack + 1e-9
                    # Not one pair leaves before it has to.
                    assert stored == count + step or stored + 1 - (length + step) * ratio >= 1 + case.slack - 1e-9
        if case.distance is not None:
            lengths = [len(record.kept[case.steps][layer][row]) for layer in case.layers]
            assert any(stored < count + case.steps for stored, count in zip(lengths, counts, strict=True)), (
                "nothing has left: the test shows nothing"
            )


@each_case
def test_law_5_lengths_are_what_is_stored(case):
    """`stored_lengths` is the longest row; `get_seq_length` is what was fed, whatever is stored."""
    _, record = run(case)
    for step, stored in enumerate(record.stored):
        for layer in case.layers:
            assert stored[layer] == max(len(row) for row in record.kept[step][layer])
    assert record.seen == [max(case.lengths) + step for step in range(case.steps + 1)]


@each_case
def test_memory_is_what_is_stored_and_a_little_spare(case):
    """Spare capacity is under 12 % of the stored pairs or 64 pairs a layer, whichever is more."""
    _, record = run(case)
    text = models.weights(case.family).config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pair = len(case.lengths) * 2 * text.num_key_value_heads * head_dim * 4
    for stored, nbytes in zip(record.stored, record.nbytes, strict=True):
        assert pair * sum(stored) <= nbytes <= pair * sum(max(1.12 * pairs, pairs + 64) for pairs in stored)


@pytest.mark.parametrize("family", ["llava_mha", "llava_gqa", "qwen2_5_vl"])
def test_a_layer_is_pruned_before_the_next_one_runs(family):
    """So the peak is the pruned cache and one layer. (Without a profile the search needs all layers first.)"""
    case = Case(family, budget=0.25)
    model, cache = models.build(family, case.attn), case.cache()
    wanted = [prompt_count(61, keep) for keep in case.keep]
    looked = []

    def look(module, args, kwargs):
        if not looked or looked[-1] < module.layer_idx:  # at the prompt only
            assert cache.stored_lengths()[: module.layer_idx] == wanted[: module.layer_idx]
            looked.append(module.layer_idx)

    for attention in models.attention_modules(model)[1:]:
        attention.register_forward_pre_hook(look, with_kwargs=True)
    feed(model, models.batch(family), models.words(1, 1), cache)
    assert looked == case.layers[1:]


# Law 6: positions are true.

TURNS = [
    case
    for family in FAMILIES
    for case in (
        Case(family, "eager", (61,), source="online", distance=25),
        Case(family, "sdpa", PADDED, distance=5, budget=0.35),
        Case(family, "sdpa", PADDED, source="online", budget=0.25, rule="default"),
    )
]


@pytest.mark.parametrize("case", TURNS, ids=str)
def test_law_6_in_later_turns_too(case):
    """Three turns by `generate`: each one's logits are those of the full cache, masked, at its own true positions."""
    record = Record(case.cache(), case.layers)
    model = models.build(case.family, case.attn)
    inputs, turns = models.batch(case.family, case.lengths), []
    for turn in range(3):
        tokens = models.words(len(case.lengths), 14, seed=turn)
        logits, sequences = feed(model, inputs, tokens, record.cache, record)
        turns.append((inputs, tokens, logits))
        assert record.cache.get_seq_length() == sequences.shape[1] - 1
        inputs = models.next_turn(inputs, sequences, 9 + turn)

    oracle = Oracle(models.build(case.family), Given(record.kept))
    for turn, (inputs, tokens, logits) in enumerate(turns):
        wanted, _ = feed(oracle.model, inputs, tokens, oracle.cache)
        assert difference(logits, wanted) < 1e-4, f"turn {turn}"


@pytest.mark.parametrize("case", TURNS, ids=str)
def test_law_6_earlier_pairs_stay_when_a_later_prompt_is_pruned(case):
    record = Record(case.cache(), case.layers)
    model, inputs = models.build(case.family, case.attn), models.batch(case.family, case.lengths)
    _, sequences = feed(model, inputs, models.words(len(case.lengths), 6), record.cache, record)
    before, seen = record.kept[-1], record.cache.get_seq_length()
    feed(model, models.next_turn(inputs, sequences, 20), models.words(len(case.lengths), 1), record.cache, record)
    for layer, row in itertools.product(case.layers, range(len(case.lengths))):
        after, earlier = record.kept[-1][layer][row], before[layer][row]
        stayed = [position for position in after if position < seen]
        # With slack, what the first turn held beyond its share has left: of what came behind its prompt, the oldest.
        left = len(earlier) - len(stayed)
        first = min(set(earlier) - set(stayed), default=0)
        assert stayed == [each for each in earlier if each < first] + [each for each in earlier if each >= first][left:]
        assert left == 0 if case.slack == 0 else left <= 6 and first >= seen - 7
        assert after[-1] == record.cache.get_seq_length() - 1


@each_backend
def test_law_6_an_unrelated_prompt_without_reset_goes_on(attn):
    """By hand, without `generate`: the second prompt continues the first, as with DynamicCache."""
    model = models.build("llava_gqa", attn)
    first, second = models.batch("llava_gqa"), models.batch("llava_gqa", (44,), seed=5)
    second = {"input_ids": second["input_ids"], "pixel_values": second["pixel_values"]}
    steps = [first, second] + [{"input_ids": models.words(1, 1, seed=step)} for step in range(12)]

    whole, theirs = PrefixKVCache(budget=1.0), DynamicCache()
    record = Record(PrefixKVCache.paper(profile(6), budget=0.35, queries=32, distance=5), list(range(6)))
    pruned = []
    for step in steps:
        wanted = model(**step, past_key_values=theirs).logits
        assert difference(model(**step, past_key_values=whole).logits, wanted) < 1e-5
        pruned.append(model(**step, past_key_values=record.cache).logits)
        record()
        assert record.seen[-1] == theirs.get_seq_length()

    oracle = Oracle(model, Given(record.kept))
    for step, logits in zip(steps, pruned, strict=True):
        assert difference(logits, oracle.model(**step, past_key_values=oracle.cache).logits) < 1e-4


# Law 7: save then load is the identity.


def test_law_7_a_saved_profile_is_the_same_profile(tmp_path):
    made = profile(4)
    made.save(tmp_path / "one.safetensors")
    loaded = PrefixProfile.load(tmp_path / "one.safetensors")
    loaded.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert torch.equal(loaded.keep, made.keep) and torch.equal(loaded.budgets, made.budgets)
    assert loaded.metadata == made.metadata

    model, inputs, tokens = models.build("llava_mha"), models.batch("llava_mha"), models.words(1, 30)
    by_object, _ = feed(model, inputs, tokens, PrefixKVCache(made, budget=0.4))
    by_path, _ = feed(model, inputs, tokens, PrefixKVCache(tmp_path / "one.safetensors", budget=0.4))
    assert torch.equal(by_object, by_path)


# Law 8: nothing is left behind.


def transformers_state(*and_models):
    """Everything of transformers (and of these models) that a door could have been fixed to."""
    places = [AttentionInterface, AttentionMaskInterface, transformers.Cache, DynamicCache, *AttentionInterface.__mro__]
    places += [transformers.modeling_utils, transformers.masking_utils, transformers.cache_utils]
    state = {(str(place), name): value for place in places for name, value in vars(place).items() if callable(value)}
    for interface in (AttentionInterface, AttentionMaskInterface):
        state.update({(str(interface), name): value for name, value in interface._global_mapping.items()})
    state["bound"] = getattr(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, compat.DOOR)
    for model in and_models:
        for name, module in model.named_modules():
            state[name] = (module.__class__, module.__class__.forward, sorted(vars(module)))
            state[name, "hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
    return state


NO_CACHE_ALIVE = transformers_state()


@pytest.mark.parametrize("rule", ["paper", "default"])
@pytest.mark.parametrize("source", ["profile", "online"])
def test_law_8_after_the_last_cache_transformers_is_as_it_was(source, rule):
    gc.collect()
    case = Case("llava_gqa", "sdpa", PADDED, source=source, rule=rule)
    model = models.build(case.family, case.attn)
    feed(model, models.batch(case.family, PADDED), models.words(3, 2), DynamicCache())  # it has hooks of its own to set
    before = transformers_state(model)
    caches = [case.cache(), case.cache()]
    for cache in caches:
        feed(model, models.batch(case.family, PADDED), models.words(3, 5), cache)
    del caches, cache
    gc.collect()
    assert transformers_state(model) == before
    assert transformers_state() == NO_CACHE_ALIVE


def test_law_8_importing_changes_nothing():
    script = """
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers import masking_utils, modeling_utils
def state():
    places = [*AttentionInterface.__mro__, *DynamicCache.__mro__, modeling_utils, masking_utils]
    found = [(str(at), name, id(value)) for at in places for name, value in vars(at).items() if callable(value)]
    return found + sorted(AttentionInterface._global_mapping) + sorted(AttentionMaskInterface._global_mapping)
before = state()
import prefixkv_cache
prefixkv_cache.PrefixKVCache, prefixkv_cache.PrefixProfile
assert state() == before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rule", ["paper", "default"])
@pytest.mark.parametrize("source", ["profile", "online"])
@pytest.mark.parametrize("family", ["llava_gqa", "gemma3"])
def test_law_8_reset_is_like_new(family, source, rule):
    case = Case(family, source=source, distance=5, budget=0.25, rule=rule)
    model, cache = models.build(family, case.attn), case.cache()
    wanted = Record(case.cache(), case.layers)
    logits, _ = feed(model, models.batch(family, seed=9), models.words(1, 20), wanted.cache, wanted)
    feed(model, models.batch(family, PADDED), models.words(3, 20), cache)
    for _again in range(2):
        cache.reset()
        assert cache.get_seq_length() == 0
        assert not any(cache.stored_lengths())
        record = Record(cache, case.layers)
        actual, _ = feed(model, models.batch(family, seed=9), models.words(1, 20), cache, record)
        assert torch.equal(actual, logits)
        assert (record.kept, record.stored, record.seen) == (wanted.kept, wanted.stored, wanted.seen)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("rule", ["paper", "default"])
@pytest.mark.parametrize("source", ["profile", "online"])
@pytest.mark.parametrize("at_forward", [0, 1, 4], ids=["prompt", "first_step", "later"])
def test_law_8_an_exception_in_a_forward_harms_nobody_else(source, at_forward, rule):
    case = Case("llava_gqa", source=source, distance=5, rule=rule)
    inputs, tokens = models.batch(case.family, PADDED), models.words(3, 12)

    def two_turns(model, cache, between):
        first, sequences = feed(model, inputs, tokens, cache)
        between()
        second, _ = feed(model, models.next_turn(inputs, sequences, 9), tokens, cache)
        return torch.cat([first, second], dim=1)

    wanted = two_turns(models.build(case.family, case.attn), case.cache(), lambda: None)

    failing, failed = models.build(case.family, case.attn), case.cache()
    forwards = itertools.count()

    def interrupt(*_):
        if next(forwards) == at_forward:
            raise Interrupted

    def fail():
        hook = models.attention_modules(failing)[2].register_forward_hook(interrupt)
        with pytest.raises(Interrupted):
            feed(failing, inputs, tokens, failed)
        hook.remove()

    assert torch.equal(two_turns(models.build(case.family, case.attn), case.cache(), fail), wanted)
    assert torch.equal(two_turns(failing, case.cache(), lambda: None), wanted)
    failed.reset()
    assert torch.equal(two_turns(failing, failed, lambda: None), wanted)


def test_law_8_an_exception_keeps_nothing_alive():
    gc.collect()
    case = Case("llava_gqa")
    model, cache = models.build(case.family), case.cache()
    before = NO_CACHE_ALIVE

    def interrupt(*_):
        raise Interrupted

    models.attention_modules(model)[2].register_forward_hook(interrupt)
    raised = False
    try:  # not pytest.raises, which keeps the traceback and with it the cache
        feed(model, models.batch(case.family), models.words(1, 3), cache)
    except Interrupted:
        raised = True
    assert raised
    del cache
    gc.collect()
    assert transformers_state() == before


def test_law_8_others_at_the_same_time_are_untouched():
    """Threads: one with DynamicCache, two with caches of ours; each gives what it gives alone."""
    jobs = []
    for case in (Case("llava_gqa", lengths=PADDED), Case("llava_mha", source="online", rule="default"), None):
        family = case.family if case else "qwen2_5_vl"
        lengths = case.lengths if case else PADDED

        def job(case=case, family=family, lengths=lengths):
            model = models.build(family, "sdpa")
            cache = case.cache() if case else DynamicCache(config=model.config)
            return feed(model, models.batch(family, lengths), models.words(len(lengths), 40), cache)[0]

        jobs.append(job)
    wanted = [job() for job in jobs]

    results = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(index):
        start.wait()
        results[index] = jobs[index]()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, alone in zip(results, wanted, strict=True):
        assert result is not None and torch.equal(result, alone)


@pytest.mark.parametrize("rule", ["paper", "default"])
def test_law_8_other_caches_on_the_same_model_are_untouched(rule):
    """Ours and DynamicCache by turns, step by step, on one model."""
    model, inputs = models.build("llava_gqa", "sdpa"), models.batch("llava_gqa")
    steps = [{key: inputs[key] for key in ("input_ids", "pixel_values")}]
    steps += [{"input_ids": models.words(1, 1, seed=step)} for step in range(20)]

    def decode(*caches):
        return [[model(**step, past_key_values=cache).logits for cache in caches] for step in steps]

    case = Case("llava_gqa", rule=rule)
    wanted_theirs, wanted_ours = decode(DynamicCache()), decode(case.cache())
    for mixed, theirs, ours in zip(decode(DynamicCache(), case.cache()), wanted_theirs, wanted_ours, strict=True):
        assert torch.equal(mixed[0], theirs[0]) and torch.equal(mixed[1], ours[0])


# Half precision.


def half_precision_reference(family, dtype, inputs, cache):
    """Feeds the prompt; attention weights in float32 from the keys and queries that the model really made."""
    weights = {}

    def recording(module, query, key, value, attention_mask, scaling=None, **options):
        if hasattr(module, "layer_idx") and attention_mask is not None and query.shape[2] > 1:
            groups = query.shape[1] // key.shape[1]
            scores = query.float() @ key.repeat_interleave(groups, dim=1).float().transpose(2, 3) * scaling
            weights[module.layer_idx] = torch.softmax(scores + attention_mask.float(), dim=-1)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, attention_mask, scaling=scaling, **options)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", transformers.masking_utils.eager_mask)
    try:
        model = models.build(family, "recording", dtype)
        logits, _ = feed(model, inputs, models.words(len(inputs["input_ids"]), 20), cache)
    finally:
        AttentionInterface._global_mapping.pop("recording")
        AttentionMaskInterface._global_mapping.pop("recording")
    return logits, weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each_family
def test_half_precision_keeps_what_float32_importance_says(family, dtype):
    case = Case(family, lengths=PADDED)
    inputs = models.batch(family, PADDED)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    cache = case.cache(distance=None)
    logits, weights = half_precision_reference(family, dtype, inputs, cache)
    assert logits.isfinite().all()
    real = Oracle.real(inputs, 3, 61)
    rule = Rule(keep=case.keep, budget=case.budget, queries=case.queries)
    rule.after(real, 61, {layer: weights[layer] for layer in case.layers})
    for layer in case.layers:
        at_prompt = [[position for position in row if position < 61] for row in kept_rows(cache, layer)]
        assert at_prompt == rule.kept[layer], f"layer {layer}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each_backend
@each_family
def test_half_precision_runs(family, attn, dtype):
    case = Case(family, attn, PADDED, distance=5)
    inputs = models.batch(family, PADDED)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    record = Record(case.cache(), case.layers)
    logits, _ = feed(models.build(family, attn, dtype), inputs, models.words(3, 20), record.cache, record)
    assert logits.isfinite().all()
    oracle = Oracle(models.build(family, dtype=dtype), Given(record.kept))
    wanted, _ = feed(oracle.model, inputs, models.words(3, 20), oracle.cache)
    assert (logits.float() - wanted.float()).abs().mean() < {torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]


# Options.


@pytest.mark.parametrize("source", ["profile", "online"])
@pytest.mark.parametrize("sink", [0, 1, 4])
def test_sinks_and_the_last_token_stay(source, sink):
    family = "llava_gqa"
    case = Case(family, source=source, budget=0.2, lengths=PADDED)
    cache = case.cache(sink=sink)
    feed(models.build(family), models.batch(family, PADDED), models.words(3, 1), cache)
    oracle = Oracle(models.build(family), Rule(keep=case.keep, budget=0.2, queries=32, sink=sink))
    feed(oracle.model, models.batch(family, PADDED), models.words(3, 1), oracle.cache)
    for layer in case.layers:
        kept = kept_rows(cache, layer)
        assert kept == oracle.kept.kept[layer]
        for row, length in enumerate(PADDED):
            assert set(range(61 - length, 61 - length + sink)) | {60} <= set(kept[row])


@each_family
def test_for_model_is_the_cache_with_the_model_s_config(family):
    model, tokens = models.build(family, "sdpa"), models.words(1, 20)
    wanted, _ = feed(model, models.batch(family), tokens, PrefixKVCache(budget=0.4, config=model.config))
    actual, _ = feed(model, models.batch(family), tokens, PrefixKVCache.for_model(model, budget=0.4))
    assert torch.equal(actual, wanted)


def test_the_paper_s_rule_for_a_model():
    """`paper` and its arguments are one thing, and both let parts of it be replaced."""
    model, tokens = models.build("llava_gqa", "sdpa"), models.words(1, 30)

    def record(cache):
        watch = Record(cache, list(range(6)))
        feed(model, models.batch("llava_gqa"), tokens, cache, watch)
        return watch.kept

    case = Case("llava_gqa", source="online", budget=0.4, queries="all", distance=25)
    by_rules = expected(case)[1][0]
    wanted = record(PrefixKVCache.paper(budget=0.4))
    assert wanted[0] == by_rules
    assert record(PrefixKVCache.for_model(model, 0.4, **PAPER)) == wanted
    assert record(PrefixKVCache.for_model(model, 0.4)) != wanted
    assert record(PrefixKVCache.paper(budget=0.4, queries=8)) != wanted
    assert record(PrefixKVCache.for_model(model, 0.4, **(PAPER | {"distance": 5}))) != wanted
    with pytest.raises(TypeError):
        PAPER["distance"] = 5


@pytest.mark.parametrize("rule", ["paper", "default"])
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("source", ["profile", "online"])
def test_very_short_prompts(length, source, rule):
    """Down to one token: counts stay between sink + 1 and what there is."""
    family = "llava_mha"
    model, ids = models.build(family, "sdpa"), models.words(1, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    case = Case(family, source=source, budget=0.2, rule=rule)
    record = Record(case.cache(), case.layers)
    logits, _ = feed(model, inputs, models.words(1, 10), record.cache, record)
    assert all(len(record.kept[0][layer][0]) == min(length, 2) for layer in case.layers)
    oracle = Oracle(model, Given(record.kept))
    wanted, _ = feed(oracle.model, inputs, models.words(1, 10), oracle.cache)
    assert difference(logits, wanted) < 1e-4


def test_an_empty_prompt_is_an_error_and_does_no_harm():
    model, cache = models.build("llava_mha"), Case("llava_mha").cache()
    with pytest.raises(Exception):  # noqa: B017  (the model itself refuses it, before the cache is asked)
        model(input_ids=torch.zeros(1, 0, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == 0
    wanted, _ = run(Case("llava_mha", "eager"))
    logits, _ = feed(model, models.batch("llava_mha"), models.words(1, STEPS + 1), cache)
    assert torch.equal(logits, wanted)


# Bad input: one clear error, before any token is generated.


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, math.nan, math.inf, "half", None, True], ids=str)
def test_a_bad_budget_is_refused(budget):
    with pytest.raises((ValueError, TypeError), match="budget"):
        PrefixKVCache(budget=budget)
    with pytest.raises((ValueError, TypeError), match="budget"):
        PrefixKVCache(profile(4), budget=budget)


@pytest.mark.parametrize(
    "option",
    [{"queries": 0}, {"queries": -1}, {"queries": "some"}, {"queries": 1.5}, {"sink": -1}, {"sink": "one"},
     {"distance": "far"}, {"distance": -25}],
    ids=str,
)  # fmt: skip
def test_a_bad_option_is_refused_by_name(option):
    with pytest.raises((ValueError, TypeError), match=next(iter(option))):
        PrefixKVCache(budget=0.5, **option)


def test_a_profile_of_another_depth_is_refused():
    config = models.weights("llava_mha").config  # 4 layers
    for depth in (3, 5):
        with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{depth}\b)(?=.*\b4\b)"):
            PrefixKVCache(profile(depth), budget=0.5, config=config)


def test_a_profile_of_another_depth_is_refused_without_config():
    """Too few layers show at the first forward pass; too many at the latest when a second one begins."""
    model, inputs = models.build("llava_mha"), models.batch("llava_mha")
    with pytest.raises(ValueError, match=r"\b3\b"):
        model.generate(**inputs, past_key_values=PrefixKVCache(profile(3), budget=0.5), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"\b5\b"):
        model.generate(**inputs, past_key_values=PrefixKVCache(profile(5), budget=0.5), max_new_tokens=2)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_a_damaged_profile_is_refused(tmp_path, damage):
    path = tmp_path / "damaged.safetensors"
    profile(4).save(path)
    whole = path.read_bytes()
    flipped = bytes(255 - byte for byte in whole[:16]) + whole[16:]
    path.write_bytes({"empty": b"", "text": b"a profile", "cut": whole[:-9], "flipped": flipped}[damage])
    with pytest.raises(ValueError, match="damaged"):
        PrefixKVCache(path, budget=0.5)


def test_an_unknown_name_lists_the_names_there_are():
    with pytest.raises(ValueError) as error:
        PrefixKVCache("no-such-model", budget=0.5)
    assert "no-such-model" in str(error.value)
    for name in PrefixProfile.available():
        assert name in str(error.value)


@pytest.mark.parametrize("name", ["T5Config", "MambaConfig", "BartConfig"])
def test_a_config_that_cannot_be_pruned_is_refused(name):
    config = getattr(transformers, name)()
    with pytest.raises(ValueError, match=config.model_type):
        PrefixKVCache(budget=0.5, config=config)


def test_linear_layers_are_not_taken_for_attention():
    """Some releases of transformers do not tell them apart; then the model is refused."""
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    assert config.layer_types.count("full_attention") == 1
    with pytest.raises(ValueError, match=r"linear|\b4 layers.* 1 prunable"):
        PrefixKVCache(profile(4), budget=0.5, config=config)


@each_backend
def test_a_model_with_sliding_layers_asks_for_its_config(attn):
    """Without it the cache could not know which layers to leave whole."""
    model = models.build("gemma3", attn)
    with pytest.raises(ValueError, match=r"config=model\.config"):
        model.generate(**models.batch("gemma3"), past_key_values=PrefixKVCache(budget=0.5), max_new_tokens=1)


@pytest.mark.parametrize("source", ["profile", "online"])
def test_a_model_whose_attention_does_not_pass_the_interface_is_refused(source):
    """GIT computes attention in its own code: nothing can be observed, and nothing is silently kept whole."""
    config = transformers.GitConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=100,
        pad_token_id=0, vision_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16),
    )  # fmt: skip
    model = transformers.GitForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    cache = PrefixKVCache(profile(4) if source == "profile" else None, budget=0.5)
    with pytest.raises(Exception, match="GitSelfAttention"):
        model.generate(input_ids=models.words(1, 20), past_key_values=cache, max_new_tokens=2)
    cache.reset()
    with pytest.raises(Exception, match="GitSelfAttention"):  # at the latest here, one token after the prompt
        for start, length in ((0, 20), (20, 1)):
            place = {"attention_mask": torch.ones(1, length), "position_ids": torch.arange(start, start + length)[None]}
            model(input_ids=models.words(1, length), past_key_values=cache, **place)


@pytest.mark.skipif(compat.SEES_EAGER, reason="this transformers shows eager attention")
@pytest.mark.parametrize("max_new_tokens", [1, 5])
@each_family
def test_eager_attention_that_cannot_be_seen_is_refused(family, max_new_tokens):
    """At the first forward, with what to do about it; the cache and the model can be used afterwards."""
    model, inputs = models.build(family, "eager"), models.batch(family)
    cache = Case(family).cache()
    with pytest.raises(RuntimeError, match=r"does not show eager attention.*attn_implementation='sdpa'"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens)
    cache.reset()
    model.set_attn_implementation("sdpa")
    logits, _ = feed(model, inputs, models.words(1, STEPS + 1), cache)
    assert torch.equal(logits, run(Case(family))[0])


# The rest of the cache API: batches, beams, copies, crop.


def after_twelve(case, **changes):
    """A padded batch after its prompt and 12 tokens: model, inputs, ids, cache."""
    model, cache = models.build(case.family, case.attn), case.cache(**changes)
    inputs = models.batch(case.family, case.lengths)
    _, sequences = feed(model, inputs, models.words(len(case.lengths), 12), cache)
    return model, inputs, sequences, cache


def go_on(model, inputs, sequences, cache, rows=None):
    """A next turn and 20 tokens, of these rows; the words follow the row that they belong to."""
    rows = list(range(len(sequences))) if rows is None else rows
    again = {key: value[rows] for key, value in models.next_turn(inputs, sequences, 9).items()}
    return feed(model, again, models.words(len(sequences), 20, seed=11)[rows], cache)[0]


BATCHES = [
    Case("llava_gqa", "sdpa", PADDED, distance=5),
    Case("llava_gqa", "eager", PADDED, source="online"),
    Case("gemma3", "sdpa", PADDED, source="online", distance=5),
    Case("llava_gqa", "sdpa", PADDED, rule="default", budget=0.25),
]


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0]], ids=str)
@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_reorder_cache(case, rows):
    wanted = go_on(*after_twelve(case))
    model, inputs, sequences, cache = after_twelve(case)
    cache.reorder_cache(torch.tensor(rows))
    assert difference(go_on(model, inputs, sequences, cache, rows), wanted[rows]) < 1e-4


@pytest.mark.parametrize("rows", [[0, 2], [1], [1, 2]], ids=str)
@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_batch_select_indices(case, rows):
    wanted = go_on(*after_twelve(case))
    model, inputs, sequences, cache = after_twelve(case)
    cache.batch_select_indices(torch.tensor(rows))
    assert difference(go_on(model, inputs, sequences, cache, rows), wanted[rows]) < 1e-4


@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_batch_repeat_interleave(case):
    wanted = go_on(*after_twelve(case))
    model, inputs, sequences, cache = after_twelve(case)
    cache.batch_repeat_interleave(2)
    rows = [0, 0, 1, 1, 2, 2]
    assert difference(go_on(model, inputs, sequences, cache, rows), wanted[rows]) < 1e-4


@pytest.mark.parametrize("case", [*BATCHES, Case("qwen2_5_vl", "sdpa", PADDED)], ids=str)
def test_a_deep_copy_goes_on_by_itself(case):
    wanted = go_on(*after_twelve(case))
    model, inputs, sequences, cache = after_twelve(case)
    twin = copy.deepcopy(cache)
    assert torch.equal(go_on(model, inputs, sequences, cache), wanted)
    del cache
    gc.collect()
    assert torch.equal(go_on(model, inputs, sequences, twin), wanted)


def test_a_copy_made_before_the_prompt_prunes_too():
    case = Case("llava_gqa")
    twin = copy.deepcopy(case.cache())
    logits, _ = feed(models.build(case.family, case.attn), models.batch(case.family), models.words(1, STEPS + 1), twin)
    assert torch.equal(logits, run(case)[0])


@pytest.mark.parametrize("case", [BATCHES[0], BATCHES[1], Case("llava_mha", lengths=PADDED)], ids=str)
def test_crop_takes_the_last_tokens_back(case):
    """Without eviction it can always be done: as if the last three had never been fed."""
    model, inputs, sequences, cache = after_twelve(case, distance=None)
    cache.crop(-3)
    shorter = case.cache(distance=None)
    feed(model, inputs, models.words(len(case.lengths), 9), shorter)
    assert cache.get_seq_length() == shorter.get_seq_length()
    for layer in case.layers:
        assert kept_rows(cache, layer) == kept_rows(shorter, layer)
    cropped = sequences[:, :-3]
    assert difference(go_on(model, inputs, cropped, cache), go_on(model, inputs, cropped, shorter)) < 1e-5


@pytest.mark.parametrize("case", BATCHES[:2], ids=str)
def test_crop_after_eviction_leaves_true_positions(case):
    """What was evicted cannot come back; what is left is what the cache says, and law 2 goes on to hold."""
    record = Record(case.cache(), case.layers)
    model, inputs = models.build(case.family, case.attn), models.batch(case.family, case.lengths)
    tokens = models.words(len(case.lengths), 25)
    _, sequences = feed(model, inputs, tokens, record.cache, record)
    record.cache.crop(-3)
    del record.kept[-1]
    record()
    assert record.seen[-1] == record.seen[-2] - 3
    again = models.next_turn(inputs, sequences[:, :-3], 9)
    logits, _ = feed(model, again, tokens, record.cache, record)

    oracle = Oracle(models.build(case.family), Given(record.kept))
    feed(oracle.model, inputs, tokens, oracle.cache)
    oracle.cache.crop(-3)
    wanted, _ = feed(oracle.model, again, tokens, oracle.cache)
    assert difference(logits, wanted) < 1e-4


@pytest.mark.parametrize("case", BATCHES[:2], ids=str)
def test_crop_of_nothing_is_nothing(case):
    wanted = go_on(*after_twelve(case))
    model, inputs, sequences, cache = after_twelve(case)
    cache.crop(0)
    assert torch.equal(go_on(model, inputs, sequences, cache), wanted)


def test_crop_of_nothing_leaves_whole_layers_as_they_are():
    model, ids = models.build("gemma3", "sdpa"), models.words(1, 8)  # shorter than the sliding window
    cache = Case("gemma3").cache()
    feed(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, models.words(1, 4), cache)
    before = cache.stored_lengths()
    cache.crop(0)
    assert cache.stored_lengths() == before


def test_beams_with_pruning_are_true_too():
    """Each beam's score is what the oracle's own cache gives for its tokens, masked by the positions that it kept."""
    case = Case("llava_gqa", lengths=PADDED, distance=None)
    model, inputs = models.build(case.family, case.attn), models.batch(case.family, PADDED)
    output = model.generate(
        **inputs, past_key_values=case.cache(), max_new_tokens=12, do_sample=False, num_beams=3, num_return_sequences=3,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    for beam in range(3):
        tokens = output.sequences[beam::3, 61:]
        logits, _ = feed(model, inputs, tokens, case.cache())
        scores = logits.log_softmax(-1).gather(2, tokens[..., None]).sum((1, 2))
        assert difference(scores, output.sequences_scores[beam::3]) < 1e-3
