"""Laws 1 and 2 on the tiny model of one type (zoo.py, zoo_inputs.py), in float64, and what they make of the type.

`measure(model_type)` runs the model over two turns and sorts the type into *pruned*, *partly* (some layers are left
whole), *refused* (one clear error) or, which must not happen, *wrong*. Three caches are held against the reference of
zoo_reference.py: the default, PrefixKV with lengths searched on the prompt, and a made-up profile with lengths by key
head (by layer where attention is latent). Where attention alone ranks the keys, what stayed is checked too, against the
attention weights that the model's own eager code returns.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import GenerationMixin

import compat
import zoo
import zoo_inputs
from double import float64
from prefixkv_cache import PrefixKVCache, PrefixProfile
from prefixkv_cache.cache.layer import PrunedLayer
from prefixkv_cache.methods import PREFIXKV
from zoo_reference import STEPS, Case

BACKENDS = ("eager", "sdpa") if compat.SEES_EAGER else ("sdpa",)
LENGTHS = (37, 29)  # of the rows; the shorter is padded on the left
BUDGET, QUERIES = 0.3, 6
TOLERANCE = 1e-9

SEARCH = PREFIXKV.replace(queries=QUERIES, distance=5)
EACH = SEARCH.replace(heads="each")  # with lengths by key head from a profile

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
    """What was measured of one model type; `lengths`: by "head" or by "layer"."""

    model_type: str
    verdict: str
    lengths: str = ""
    whole: str = ""
    remarks: list[str] = field(default_factory=list)

    def row(self, notes):
        """Its line in the table; what a refusal says goes into `notes`, footnotes by their text, under a number."""
        remarks = "; ".join(noted(shortened(remark), notes) for remark in dict.fromkeys(self.remarks))
        cells = (f"`{self.model_type}`", self.verdict, self.lengths, self.whole, remarks)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# The laws. Each returns what is wrong, or None.


def law_1(case, make_cache):
    """With budget 1, greedy tokens and logits are those of transformers' own cache."""
    ours = case.greedy(case.inputs, make_cache(budget=1.0), STEPS)
    worst = (torch.stack(case.full.logits) - torch.stack(ours.logits)).abs().max().item()
    if not torch.equal(case.full.sequences, ours.sequences):
        return f"law 1: other tokens than with the full cache (logits differ by {worst:.1g})"
    return None if worst <= TOLERANCE else f"law 1: logits differ by {worst:.1g}"


def law_2(case, make_cache):
    """Pruned, later logits are those of a full cache in which the pruned pairs are masked; and the right ones left."""
    log = []
    cache = make_cache(budget=BUDGET)

    def watch():
        kept = {at: cache.kept_positions(at) for at, layer in enumerate(cache.layers) if isinstance(layer, PrunedLayer)}
        log.append({at: each if each.ndim == 3 else each[:, None] for at, each in kept.items()})

    ours = case.turns(cache, watch)
    reference, weights = case.reference(log)
    off = (ours - reference).abs().amax((0, 2))
    if not off.max() <= TOLERANCE:
        steps = [at for at, each in enumerate(off.tolist()) if not each <= TOLERANCE]
        return f"law 2: logits differ by {off.max():.1g} at steps {steps}"
    if (case.unpruned - ours).abs().max() < 1e-3:
        return "law 2 says nothing: pruning moves no logit"
    lengths = [(each >= 0).sum(2) for each in log[0].values()]  # [batch, heads] of each layer
    if cache.method == EACH and any((each.amin(1) == each.amax(1)).any() for each in lengths):
        return "the key heads of a layer keep equally many, and not what the profile says"
    whole = case.inputs["attention_mask"].shape[1]
    reach = zoo.WINDOW - 1 if case.wide else whole  # a layer with a window keeps of what a later token may see
    valid = case.inputs["attention_mask"].sum(1).clamp_max(reach)
    share = torch.stack([each.double().mean(1) for each in lengths]).mean(0) / valid
    if (share - BUDGET).abs().max() > 0.05:
        return f"kept {share.tolist()} of the rows of the prompt, not {BUDGET}"
    alone = cache.method in (SEARCH, EACH)
    return selection(case.inputs["attention_mask"], log[0], weights, reach) if alone else None


def selection(mask, kept, weights, reach):
    """No token that left the prompt received more attention than one that stayed (the first and the last aside).

    reach: so many of the last tokens could stay at all; the first is protected where it is one of them.
    """
    for layer in kept.keys() & weights.keys():
        for row, heads in enumerate(kept[layer].tolist()):
            real = mask[row].nonzero().flatten().tolist()
            first = {real[0]} if len(real) <= reach else set()
            real = real[-reach:]
            received = weights[layer][row, :, real[-QUERIES:]].sum(1).unflatten(0, (len(heads), -1)).mean(1).tolist()
            for positions, attention in zip(heads, received, strict=True):
                stayed = {at for at in positions if at >= 0}
                if not stayed <= set(real) or not first | {real[-1]} <= stayed:
                    return f"selection: layer {layer} keeps padding, or lost the first or the last token"
                lowest = min(attention[at] for at in stayed - first - {real[-1]})
                highest = max(attention[at] for at in set(real) - stayed)
                if highest > lowest + 1e-6:
                    return f"selection: layer {layer} dropped a key that got {highest:.3g}, not one with {lowest:.3g}"
    return None


# The verdict.


def measure(model_type):
    """Sort one model type."""
    with float64():
        return sort(model_type)


def sort(model_type):
    if not issubclass(zoo.model_class(model_type), GenerationMixin):
        return Finding(model_type, "out of scope", remarks=["does not generate token by token"])
    model = config = failure = None
    try:
        # The model before the cache: some modelling files bring kinds of cache layers of their own.
        config = zoo.tiny_config(model_type)
        model = zoo.tiny(model_type)
    except Exception as error:  # whatever stops a tiny model from being built
        failure = error
    if config is None:
        return Finding(model_type, "not built", remarks=[one_line(failure)])
    try:
        layers = PrefixKVCache(budget=BUDGET, config=config).layers
    except (ValueError, TypeError) as error:
        return refused(model, model_type, "at construction", error)
    if model is None:
        return Finding(model_type, "not built", remarks=[one_line(failure)])
    whole = [at for at, layer in enumerate(layers) if not isinstance(layer, PrunedLayer)]
    finding = Finding(model_type, "partly" if whole else "pruned", whole=reasons(config, layers, whole))
    finding.remarks.append("image and text" if model_type in zoo_inputs.IMAGES else "text")
    problems, ran = [], 0
    wide = any(getattr(layer, "window", None) for layer in layers)
    for case, where in cases(model, model_type, finding.remarks, wide):
        try:
            case.greedy(case.inputs, PrefixKVCache(budget=1.0, config=config), 1)
        except (ValueError, RuntimeError) as error:
            if not ran and any(word in str(error) for word in ("cache", "cannot be observed")):
                return refused(model, model_type, "at the first forward", error)
            problems.append(f"{one_line(error)} ({where})")
            continue
        profile = made_up_profile(case, [at for at in range(len(layers)) if at not in whole])
        finding.lengths = "head" if profile.n_heads > 1 else "layer"
        for name, make in caches(profile, config, where).items():
            told = both_laws(case, make)
            ran += 1
            if name == "no config" and told and "config=model.config" in told:
                finding.remarks.append("needs `config`")
            elif told:
                problems.append(f"{told} ({where}, {name})")
    if problems:
        finding.verdict, finding.remarks = "wrong", problems
    elif not ran:
        finding.verdict = "not built"
    return finding


def caches(profile, config, where):
    """The caches to hold against the laws, each made with a budget."""
    made = {
        "default": partial(PrefixKVCache, config=config),
        "search": partial(PrefixKVCache, method=SEARCH, config=config),
        "profile": partial(PrefixKVCache, profile, config=config),
    }
    return made | ({"no config": partial(PrefixKVCache, method=SEARCH)} if where == "eager, batch of 1" else {})


def both_laws(case, make_cache):
    try:
        return law_1(case, make_cache) or law_2(case, make_cache)
    except Exception as error:  # nothing may be raised
        return one_line(error)


def made_up_profile(case, prunable):
    """Key heads of one layer at ratios from 0.1 to 0.5, in another order in each layer; latent attention: by layer."""
    cache = case.full_cache()
    case.greedy(case.inputs, cache, 1)
    latent = getattr(case.model.config.get_text_config(decoder=True), "kv_lora_rank", None) is not None
    n_heads = 1 if latent else max(cache.layers[at].keys.shape[1] for at in prunable)
    spread = torch.linspace(BUDGET - 0.2, BUDGET + 0.2, n_heads) if n_heads > 1 else torch.tensor([BUDGET])
    keep = torch.stack([spread.roll(place) for place in range(len(prunable))])
    method = EACH if n_heads > 1 else SEARCH
    return PrefixProfile([BUDGET, 1.0], torch.stack([keep, torch.ones_like(keep)]), {"method": method.spell(full=True)})


def cases(model, model_type, remarks, wide=False):
    """The model with each backend, one row and two; what does not run by itself is noted."""
    for backend in BACKENDS:
        try:
            model.set_attn_implementation(backend)
        except ValueError:
            remarks.append(f"has no {backend}")
            continue
        for rows in (1, 2):
            where = f"{backend}, batch of {rows}"
            try:
                case = Case(model, model_type, zoo_inputs.inputs(model_type, LENGTHS[:rows], model), wide)
                case.greedy(case.inputs, None, 2)
            except Exception as error:  # the model's own limits
                remarks.append(f"{where} does not run by itself: {one_line(error)}")
                continue
            yield case, where


def refused(model, model_type, when, error):
    """Refused, unless a cache that was told nothing lets the model run, and run wrong."""
    for case, where in cases(model, model_type, []) if model is not None else ():
        try:
            told = law_2(case, partial(PrefixKVCache, method=SEARCH))
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
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def noted(remark, notes):
    """The remark, or where it is an error, the mark of its footnote: one for all models that say the same."""
    found = re.match(r"at (construction|the first forward): \w+: (\S+) (.*)", remark)
    if found is None:
        return remark
    said = found[3].rstrip(".").replace("<", "&lt;")
    text = f"At {found[1]}: \u201cthe model {said}.\u201d"
    return f"[^{notes.setdefault(text, len(notes) + 1)}]"


def shortened(text):
    return text if len(text) <= 230 else text[:230].rsplit(" ", 1)[0] + " …"
