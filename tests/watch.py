"""Running a cache beside the slow rules of `rules.py`, and comparing all that there is to compare.

`follow(...)` feeds the same prompts and the same tokens to a model with the cache under test and to an `Oracle` with
`Rules`, and holds against each other, after every forward pass and for every row and key head: the positions that are
kept, and the logits; and after every prompt the keys and values that are stored.
"""

import functools

import torch

import compat
import models
from oracle import Given, Oracle, feed

CLOSE = 1e-4  # of logits, by law 2


@functools.cache
def build(family, attn=compat.PLAIN):
    """One model for all tests, which change nothing about it."""
    return models.build(family, attn)


def kept_by_head(cache, layer, heads):
    """row -> key head -> positions, rising; heads that share one set all have it."""
    positions = cache.kept_positions(layer)
    if positions.ndim == 2:
        positions = positions[:, None].expand(-1, heads, -1)
    return [[sorted(each for each in head if each >= 0) for head in row] for row in positions.tolist()]


class Watch:
    """Called after each forward pass; writes down what the cache keeps, and what it stores after a prompt."""

    def __init__(self, cache, family):
        config = models.weights(family).config
        self.cache, self.layers = cache, models.prunable_layers(models.weights(family))
        self.heads = config.get_text_config().num_key_value_heads
        self.kept = []  # forward pass -> layer -> row -> head -> positions
        self.pairs = []  # prompt -> layer -> (positions, keys, values), all [rows, heads, stored, ...]
        self.seen = 0

    def __call__(self):
        self.kept.append({layer: kept_by_head(self.cache, layer, self.heads) for layer in self.layers})
        if self.cache.get_seq_length() > self.seen + 1:
            self.pairs.append({layer: self._pairs(layer) for layer in self.layers})
        self.seen = self.cache.get_seq_length()

    def _pairs(self, layer):
        positions, of_layer = self.cache.kept_positions(layer), self.cache.layers[layer]
        if positions.ndim == 2:
            positions = positions[:, None].expand(-1, self.heads, -1)
        return positions, of_layer.keys.clone(), of_layer.values.clone()

    def counts(self):
        """forward pass -> layer -> row -> number of pairs, which is the same in all heads."""
        counts = []
        for step in self.kept:
            counts.append({layer: [{len(head) for head in row} for row in rows] for layer, rows in step.items()})
        assert all(len(of_row) == 1 for step in counts for rows in step.values() for of_row in rows)
        return [{layer: [of_row.pop() for of_row in rows] for layer, rows in step.items()} for step in counts]


def prompt(family, lengths, index=None):
    """Inputs of `models.batch`, or row `index` of them by itself; without an image where there is no room for one."""
    if min(lengths) > 20:
        return models.batch(family, lengths) if index is None else models.alone(family, lengths, index)
    rows = [models.words(1, length, seed=length)[0].tolist() for length in lengths]
    rows = rows if index is None else rows[index : index + 1]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def talk(model, family, lengths, cache, steps, turns=1, watch=lambda: None, index=None):
    """Prompt and forced tokens, turn after turn: logits [rows, turns * steps, vocabulary], ids."""
    inputs = prompt(family, lengths, index)
    rows = slice(None) if index is None else slice(index, index + 1)
    logits, sequences = [], None
    for turn in range(turns):
        tokens = models.words(len(lengths), steps, seed=3 + turn)[rows]
        of_turn, sequences = feed(model, inputs, tokens, cache, watch)
        logits.append(of_turn)
        ids = torch.cat([sequences, models.words(len(lengths), 9 + 4 * turn, seed=30 + turn)[rows]], dim=1)
        mask = torch.ones_like(ids)
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        inputs = {"input_ids": ids, "attention_mask": mask}
    return torch.cat(logits, dim=1), sequences


def greedy(model, inputs, cache, new=12, **options):
    """The ids that the model goes on with by itself, and the logits."""
    output = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=new, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits, dim=1)


def the_same_pairs_are_stored(pairs, full):
    for layer, (positions, keys, values) in pairs.items():
        for held, of_oracle in zip((keys, values), full[layer], strict=True):
            at = positions.clamp_min(0)[..., None].expand(-1, -1, -1, of_oracle.shape[-1])
            differences = (held - of_oracle.gather(2, at)).abs().amax(-1).masked_fill(positions < 0, 0.0)
            assert differences.max() < CLOSE, f"layer {layer}: other pairs are stored"


def run(family, attn, lengths, cache, steps, turns=1):
    """Logits and `Watch` of the cache under test."""
    watch = Watch(cache, family)
    logits, _ = talk(build(family, attn), family, lengths, cache, steps, turns, watch)
    watch.cache = None  # what tests hold on to must not keep the door open
    return logits, watch


def follow(family, attn, lengths, cache, rules, steps, turns=1):
    """Asserts that the cache does what the rules say; returns its logits and `Watch`."""
    logits, watch = run(family, attn, lengths, cache, steps, turns)
    if rules.at_prompt == "as the cache did":
        rules.at_prompt = watch.kept[0]
    oracle = rules.oracle = Oracle(build(family), rules)
    prompts, seen = [], [0]

    def look():
        if oracle.cache.get_seq_length() > seen[-1] + 1:
            pairs = {layer: oracle.cache.layers[layer] for layer in watch.layers}
            prompts.append({layer: (of.keys.clone(), of.values.clone()) for layer, of in pairs.items()})
        seen.append(oracle.cache.get_seq_length())

    wanted, _ = talk(oracle.model, family, lengths, oracle.cache, steps, turns, look)
    for step, (kept, by_rule) in enumerate(zip(watch.kept, rules.log, strict=True)):
        for layer in watch.layers:
            assert kept[layer] == by_rule[layer], f"after forward pass {step}, layer {layer}"
    assert (logits - wanted).abs().max() < CLOSE
    for pairs, full in zip(watch.pairs, prompts, strict=True):
        the_same_pairs_are_stored(pairs, full)
    return logits, watch


def beams_are_true(family, new_cache, n_beams, new):
    """Each beam's score is what the cache gives for its tokens by themselves, evictions and all."""
    model, inputs = build(family, "sdpa"), prompt(family, models.PADDED)
    output = model.generate(
        **inputs, past_key_values=new_cache(), max_new_tokens=new, do_sample=False, num_beams=n_beams,
        num_return_sequences=n_beams, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    for beam in range(n_beams):
        tokens = output.sequences[beam::n_beams, inputs["input_ids"].shape[1] :]
        logits, _ = feed(model, inputs, tokens, new_cache())
        scores = logits.log_softmax(-1).gather(2, tokens[..., None]).sum((1, 2))
        assert (scores - output.sequences_scores[beam::n_beams]).abs().max() < 1e-3


def masked(family, lengths, watch, steps, turns=1):
    """Logits of a full cache that is masked, head by head, by what a cache says that it kept."""
    oracle = Oracle(build(family), Given(watch.kept))
    return talk(oracle.model, family, lengths, oracle.cache, steps, turns)[0]


def rows_alone_are(family, attn, lengths, new_cache, logits, watch, steps, turns=1):
    """Law 3: each row of a left-padded batch keeps and gives what it keeps and gives alone."""
    for row, length in enumerate(lengths):
        alone = Watch(new_cache(row), family)
        model = build(family, attn)
        wanted, _ = talk(model, family, lengths, alone.cache, steps, turns, alone, index=row)
        padding = max(lengths) - length
        for step, (kept, single) in enumerate(zip(watch.kept, alone.kept, strict=True)):
            for layer in watch.layers:
                shifted = [[position - padding for position in head] for head in kept[layer][row]]
                assert shifted == single[layer][0], f"row {row}, layer {layer}, after forward pass {step}"
        differences = (logits[row] - wanted[0]).abs().amax(-1)
        assert differences.max() < CLOSE, f"row {row}: {differences.tolist()}"
        assert (logits[row].argmax(-1) == wanted[0].argmax(-1)).all()
