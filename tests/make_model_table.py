"""Measures which model types work with the cache, and writes the table of them.

`measure(model_type)` holds a tiny random model of the type (zoo.py, zoo_inputs.py) over two turns against laws 1 and 2
of the library and sorts it into *pruned*, *partly* (some layers are left whole), *refused* (one clear error) or, which
must not happen, *wrong*. The reference is the same model with transformers' own cache, in which the pruned pairs are
hidden by masks, layer by layer; it has no line in common with the library. What stayed is checked too, against the
attention weights that the model's own eager code returns. `python tests/make_model_table.py --write docs/models.md`
writes the table; test_models.py holds the file against what is measured.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from transformers import DynamicCache, GenerationMixin, LogitsProcessorList
from transformers.modeling_utils import AttentionInterface

import zoo
import zoo_inputs
from oracle import _Forced
from prefixkv_cache import PrefixKVCache, PrefixProfile
from prefixkv_cache.layer import PrunedLayer
from prefixkv_cache.scoring import Ranking
from rules import PLAIN

BACKENDS = ("eager", "sdpa")
LENGTHS = (37, 29)  # of the rows; the shorter is padded on the left
BUDGET, QUERIES = 0.3, 6
STEPS = 7
TURN_WORDS, TURN_STEPS = 5, 3  # of the second turn
LAW_1, LAW_2 = 1e-5, 1e-4

WHY = {
    "sliding_attention": "sliding: hold their window only",
    "chunked_attention": "chunked: hold their chunk only",
    "linear_attention": "linear: a state, no pairs",
    "conv": "convolution: a state, no pairs",
    "cross_attention": "cross-attention: their keys are no tokens of the prompt",
    "shared": "shared: use the keys of an earlier layer, pruned there",
    "moe": "no attention",
    "mlp": "no attention",
    "minimax_m3_sparse": "indexed: look their keys up by position",
}
"""Why a layer is left whole, by its type in the config."""


@dataclass
class Finding:
    """What was measured of one model type."""

    model_type: str
    verdict: str
    whole: str = ""
    remarks: list[str] = field(default_factory=list)

    def row(self):
        """Its line in the table."""
        cells = (f"`{self.model_type}`", self.verdict, self.whole, "; ".join(self.remarks))
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# The reference: transformers' own cache, and masks.


class Masked:
    """While entered, attention calls do not see the columns that `visible` hides; nothing else differs."""

    def __init__(self, cache):
        self.cache = cache
        self.visible = {}  # layer -> bool [batch, keys]
        self.touched = set()
        self.weights = {}  # layer -> attention weights of the prompt, where the backend returns any

    def __enter__(self):
        original = AttentionInterface.get_interface

        def get_interface(interface, attn_implementation, default):
            function = original(interface, attn_implementation, default)

            def attend(module, query, key, value, attention_mask=None, *args, **kwargs):
                layer = getattr(module, "layer_idx", None)
                owner = self.owner(key, layer)
                visible = self.visible.get(owner)
                if visible is not None and visible.shape[1] == key.shape[-2]:
                    attention_mask = hide(attention_mask, visible, query, key, attn_implementation)
                    self.touched.add(owner)
                output = function(module, query, key, value, attention_mask, *args, **kwargs)
                if not self.visible and owner == layer and output[1] is not None:
                    self.weights[layer] = output[1]
                return output

            return attend

        self.patch = patch.object(AttentionInterface, "get_interface", get_interface)
        self.patch.start()
        return self

    def owner(self, key, layer_idx):
        """The layer whose keys these are: by identity, as the full cache hands out what it holds; else the caller's."""
        held = (at for at, layer in enumerate(self.cache.layers) if getattr(layer, "keys", None) is key)
        return next(held, layer_idx)

    def __exit__(self, *_):
        self.patch.stop()


def hide(mask, visible, query, key, backend):
    """The mask that the backend gets, without the columns that are not visible."""
    n, n_keys = query.shape[-2], key.shape[-2]
    if mask is None:
        mask = torch.arange(n_keys)[None, :] <= torch.arange(n_keys - n, n_keys)[:, None]
        mask = mask[None, None]
        if backend == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    if mask.dtype == torch.bool:
        return mask & visible[:, None, None, :]
    mask = mask.expand(len(visible), -1, -1, -1)
    return mask.masked_fill(~visible[:, None, None, :], torch.finfo(mask.dtype).min)


class Follower:
    """Hides, at each forward of the reference, what the log of a pruned run says was gone by then."""

    def __init__(self, masked, log):
        self.masked, self.log = masked, log
        self.step = self.seen = 0
        self.weights, self.missed = {}, []

    def before(self, _, args, kwargs):
        ids = kwargs.get("input_ids")
        fed = (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]
        self.masked.visible, self.masked.touched = {}, set()
        if self.step:
            # A single token's leaving pair is gone before its attention; a prompt still sees all that was kept.
            for layer, positions in self.log[self.step if fed == 1 else self.step - 1].items():
                visible = torch.zeros(len(positions), self.seen + fed, dtype=torch.bool)
                for row, kept in enumerate(positions):
                    visible[row, kept[kept >= 0]] = True
                visible[:, self.seen :] = True
                self.masked.visible[layer] = visible
        self.seen += fed

    def after(self, *_):
        if not self.step:
            self.weights = dict(self.masked.weights)
        self.missed += sorted(set(self.masked.visible) - self.masked.touched)
        self.step += 1


# Two turns along given tokens.


@dataclass
class Case:
    """A model, its prompt, and the tokens to go on with."""

    model: torch.nn.Module
    model_type: str
    inputs: dict

    def __post_init__(self):
        random = torch.Generator().manual_seed(3)
        shape = len(self.inputs["input_ids"]), STEPS + TURN_WORDS + TURN_STEPS
        words = torch.randint(zoo.WORDS.start, zoo.WORDS.stop, shape, generator=random)
        self.first, self.turn, self.second = words.split([STEPS, TURN_WORDS, TURN_STEPS], dim=1)

    def turns(self, cache, watch=lambda: None):
        """Logits of every step of both turns: [batch, steps, vocabulary]."""
        output = self.generate(self.inputs, self.first, cache, watch)
        logits = list(output.logits)
        if self.model_type not in zoo_inputs.ONE_TURN:
            ids = torch.cat([output.sequences, self.turn], dim=1)
            mask = self.inputs["attention_mask"]
            mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
            logits += self.generate({"input_ids": ids, "attention_mask": mask}, self.second, cache, watch).logits
        return torch.stack(logits, dim=1)

    def generate(self, inputs, tokens, cache, watch):
        forced = LogitsProcessorList([_Forced(tokens, watch)])
        return self.greedy(inputs, cache, tokens.shape[1], logits_processor=forced)

    def greedy(self, inputs, cache, steps, **options):
        # Janus drops the logits processors that its own `generate` is given.
        own = partial(GenerationMixin.generate, self.model) if self.model_type == "janus" else self.model.generate
        return own(**inputs, past_key_values=cache, max_new_tokens=steps, do_sample=False, output_logits=True,
                   return_dict_in_generate=True, **options)  # fmt: skip

    def full_cache(self):
        return DynamicCache(config=self.model.config)

    def reference(self, log):
        """Logits of both turns with a full cache and masks, and the prompt's attention weights."""
        decoder = zoo_inputs.decoder(self.model, self.model_type)
        with Masked(self.full_cache()) as masked:
            follower = Follower(masked, log)
            hooks = (decoder.register_forward_pre_hook(follower.before, with_kwargs=True),
                     decoder.register_forward_hook(follower.after))  # fmt: skip
            try:
                logits = self.turns(masked.cache)
            finally:
                for hook in hooks:
                    hook.remove()
        if follower.missed:
            raise LookupError(f"the reference saw no attention call of layers {sorted(set(follower.missed))}")
        return logits, follower.weights


# The laws. Each returns what is wrong, or None.


def law_1(case, make_cache):
    """With budget 1, greedy tokens and logits are those of transformers' own cache."""
    ours = case.greedy(case.inputs, make_cache(1.0), STEPS)
    whole = case.greedy(case.inputs, case.full_cache(), STEPS)
    worst = (torch.stack(whole.logits) - torch.stack(ours.logits)).abs().max().item()
    if not torch.equal(whole.sequences, ours.sequences):
        return f"law 1: other tokens than with the full cache (logits differ by {worst:.1g})"
    return None if worst <= LAW_1 else f"law 1: logits differ by {worst:.1g}"


def law_2(case, make_cache):
    """Pruned, later logits are those of a full cache in which the pruned pairs are masked; and the right ones left."""
    log = []
    cache = make_cache(BUDGET)

    def watch():
        layers = [at for at, layer in enumerate(cache.layers) if isinstance(layer, PrunedLayer)]
        log.append({at: cache.kept_positions(at) for at in layers})

    ours = case.turns(cache, watch)
    reference, weights = case.reference(log)
    off = (ours - reference).abs().amax((0, 2))
    if not off.max() <= LAW_2:
        steps = [at for at, each in enumerate(off.tolist()) if not each <= LAW_2]
        return f"law 2: logits differ by {off.max():.1g} at steps {steps}"
    whole = torch.stack(case.generate(case.inputs, case.first, case.full_cache(), lambda: None).logits, 1)
    if (whole - ours[:, :STEPS]).abs().max() < 1e-3:
        return "law 2 says nothing: pruning moves no logit"
    kept = sum(int((log[0][at] >= 0).sum()) for at in log[0])
    share = kept / (int(case.inputs["attention_mask"].sum()) * len(log[0]))
    if abs(share - BUDGET) > 0.05:
        return f"kept {share:.2f} of the prompt, not {BUDGET}"
    return selection(case.inputs["attention_mask"], log[0], weights) if by_attention(cache) else None


def by_attention(cache):
    """Whether nothing but attention ranks the keys of this cache."""
    return cache.ranking == Ranking(QUERIES)


def selection(mask, kept, weights):
    """No token that left the prompt received more attention than one that stayed (the first and the last aside)."""
    for layer in kept.keys() & weights.keys():
        for row, positions in enumerate(kept[layer]):
            real = mask[row].nonzero().flatten().tolist()
            received = weights[layer][row][:, real[-QUERIES:], : real[-1] + 1].float().mean(0).sum(0)
            stayed = set(positions[positions >= 0].tolist())
            if not stayed <= set(real) or not {real[0], real[-1]} <= stayed:
                return f"selection: layer {layer} keeps padding, or lost the first or the last token"
            lowest = min(received[at].item() for at in stayed - {real[0], real[-1]})
            highest = max(received[at].item() for at in set(real) - stayed)
            if highest > lowest + 1e-5:
                return f"selection: layer {layer} dropped a key that got {highest:.3g}, kept one that got {lowest:.3g}"
    return None


# The verdict.


def measure(model_type):
    """Sort one model type."""
    if not issubclass(zoo.model_class(model_type), GenerationMixin):
        return Finding(model_type, "out of scope", remarks=["does not generate token by token"])
    model = failure = None
    try:
        # The model first: some modelling files bring kinds of cache layers of their own.
        model = zoo.tiny(model_type)
    except Exception as error:  # whatever stops a tiny model from being built
        failure = error
    config = zoo.tiny_config(model_type)
    try:
        layers = PrefixKVCache(budget=BUDGET, config=config).layers
    except (ValueError, TypeError) as error:
        return refused(model, model_type, "at construction", error)
    if model is None:
        return Finding(model_type, "not built", remarks=[one_line(failure)])
    whole = [at for at, layer in enumerate(layers) if not isinstance(layer, PrunedLayer)]
    finding = Finding(model_type, "partly" if whole else "pruned", reasons(config, layers, whole))
    finding.remarks.append("image and text" if model_type in zoo_inputs.IMAGES else "text")
    n_pruned = len(layers) - len(whole)
    uniform = PrefixProfile([BUDGET, 1.0], [[BUDGET] * n_pruned, [1.0] * n_pruned], {})
    attention_alone = {**PLAIN, "queries": QUERIES}
    with_config = partial(PrefixKVCache, config=config, **attention_alone)
    makers = {
        "search": lambda budget: with_config(budget=budget),
        "profile": lambda budget: with_config(uniform, budget=budget),
        "no config": lambda budget: PrefixKVCache(budget=budget, **attention_alone),
        "default": lambda budget: PrefixKVCache(budget=budget, config=config),
    }
    by_case = {
        "eager, batch of 1": ["search", "profile", "no config"],
        "eager, batch of 2": ["search", "default"],
        "sdpa, batch of 1": ["search", "profile", "no config"],
        "sdpa, batch of 2": ["search", "profile"],
    }

    problems, notes, ran = [], [], 0
    for case, where in cases(model, model_type, notes):
        try:
            case.greedy(case.inputs, makers["search"](1.0), 1)
        except (ValueError, RuntimeError) as error:
            if not ran and "cache" in str(error):
                return refused(model, model_type, "at the first forward", error)
            problems.append(f"{one_line(error)} ({where})")
            continue
        for name in by_case[where]:
            try:
                # With budget 1 nothing is ranked, by whatever rule.
                told = (name != "default" and law_1(case, makers[name])) or law_2(case, makers[name])
                ran += 1
            except Exception as error:  # nothing may be raised, but that the config is wanted
                told = one_line(error)
                if name == "no config" and "config=model.config" in str(error):
                    notes.append("needs `config`")
                    continue
            if told:
                problems.append(f"{told} ({where}, {name})")
    finding.remarks += list(dict.fromkeys(notes))
    if problems:
        finding.verdict, finding.remarks = "wrong", problems
    elif not ran:
        finding.verdict = "not built"
    return finding


def cases(model, model_type, notes):
    """The model with each backend, one row and two; what does not run by itself is noted."""
    for backend in BACKENDS:
        try:
            model.set_attn_implementation(backend)
        except ValueError:
            notes.append(f"has no {backend}")
            continue
        for rows in (1, 2):
            case = Case(model, model_type, zoo_inputs.inputs(model_type, LENGTHS[:rows], model))
            where = f"{backend}, batch of {rows}"
            try:
                case.greedy(case.inputs, None, 2)
            except Exception as error:  # the model's own limits
                notes.append(f"{where} does not run by itself: {one_line(error)}")
                continue
            yield case, where


def refused(model, model_type, when, error):
    """Refused, unless a cache that was told nothing lets the model run, and run wrong."""
    for case, where in cases(model, model_type, []) if model is not None else ():
        try:
            told = law_2(case, lambda budget: PrefixKVCache(budget=budget, **{**PLAIN, "queries": QUERIES}))
        except Exception:  # any error will do: nothing goes wrong unseen
            continue
        if told:
            return Finding(model_type, "wrong", remarks=[f"runs without config: {told} ({where})"])
    return Finding(model_type, "refused", remarks=[f"{when}: {one_line(error)}"])


def reasons(config, layers, whole):
    """Which layers are left whole and why: each reason once, with the number of layers in the tiny model."""
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None) or [None] * len(layers)
    sharing = getattr(text, "kv_sharing_modes", None) or [None] * len(layers)
    cross = getattr(text, "cross_attention_layers", None) or []
    found = Counter()
    for at in whole:
        kind = "cross_attention" if at in cross else "shared" if sharing[at] == "reuse" else types[at]
        found[WHY.get(kind, kind or type(layers[at]).__name__)] += 1
    return "; ".join(f"{count} of {len(layers)} {reason}" for reason, count in found.items())


def one_line(error):
    """An error in one line, without paths."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:200].rsplit(" ", 1)[0] + " …"
    return f"{type(error).__name__}: {text}"


# The file.


def page(findings):
    """The whole of docs/models.md."""
    counts = Counter(finding.verdict for finding in findings)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts))
    head = f"""# Models

Made by `python tests/make_model_table.py --write docs/models.md`, do not edit. Measured with
transformers {transformers.__version__}; {len(findings)} model types: {summary}.

A tiny random model of each type ran over two turns, eager and sdpa, one row and a left-padded batch of two, with
lengths searched on the prompt and with a profile, with `config=model.config` and without.

- **pruned**: every layer's cache is pruned. With budget 1.0 the tokens and logits are those of `DynamicCache`; with
  budget {BUDGET} every later logit is that of a full cache in which the pruned pairs are masked out, layer by layer.
- **partly**: the same holds, and some layers are left whole, for the reason given (so many of the tiny model's layers).
- **refused**: one error, at construction or at the first forward, and no wrong answer.
- **out of scope**: transformers' `generate` does not drive it. **not built**: no tiny model could be made here.

Remarks: what the prompt held; *needs `config`*: without `config=model.config` the cache raises an error that asks for
it. Types measured on text alone take the same way through the decoder's attention and its cache with an image.

| model type | verdict | layers left whole, and why | remarks |
| --- | --- | --- | --- |
"""
    return head + "\n".join(finding.row() for finding in findings) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Measure which model types work with the cache.")
    parser.add_argument("types", nargs="*", help="model types; all when none is given")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    findings = []
    with torch.no_grad():
        for model_type in options.types or zoo.ALL_TYPES:
            findings.append(measure(model_type))
            print(findings[-1].row(), file=sys.stderr, flush=True)
    if options.write:
        options.write.write_text(page(findings), encoding="utf-8")


if __name__ == "__main__":
    main()
