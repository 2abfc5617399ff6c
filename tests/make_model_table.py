"""Measures which model types work with the cache, and writes the table of them.

`measure(model_type)` runs a tiny random model of the type against laws 1 and 2 and sorts it into *pruned*, *partly*
(some layers are left whole), *refused* (one clear error) or, which must not happen, *wrong*. The reference is the same
model with a full cache, in which the pruned pairs are hidden by masks, layer by layer; it has no line in common with
the library. Selection is checked too, against the attention weights that the model's own eager code returns.
`python tests/make_model_table.py --write docs/models.md` writes the table.
"""

from __future__ import annotations

import argparse
import traceback
import warnings
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
import transformers
from transformers import DynamicCache
from transformers.modeling_utils import AttentionInterface

import zoo
from oracle import feed
from prefixkv_cache import PrefixKVCache, PrefixProfile
from prefixkv_cache.layer import PrunedLayer

LENGTHS = (37, 29)
BUDGET = 0.3
QUERIES = 6
STEPS = 7
TURN = (5, 3)  # words and steps of the second turn
LAW_1, LAW_2 = 1e-5, 1e-4


@dataclass
class Finding:
    model_type: str
    verdict: str
    whole: str = ""
    remarks: list[str] = field(default_factory=list)


class Masked:
    """While entered, every attention call of the layers in `hidden` has those columns masked out; nothing else differs.

    A call belongs to a layer by its module's `layer_idx`, or to the layer whose keys it shares.
    """

    def __init__(self, cache=None):
        self.cache = cache
        self.visible = {}  # layer -> bool [batch, keys]
        self.touched = set()
        self.weights = {}  # layer -> attention weights of the last forward, where the backend returns any

    def __enter__(self):
        original = AttentionInterface.get_interface

        def get_interface(interface, attn_implementation, default):
            function = original(interface, attn_implementation, default)

            def attend(module, query, key, value, attention_mask=None, *args, **kwargs):
                layer = getattr(module, "layer_idx", None)
                source = self.owner(key, layer)
                visible = self.visible.get(source)
                if visible is not None and visible.shape[1] == key.shape[-2]:
                    attention_mask = hide(attention_mask, visible, query, key, attn_implementation)
                    self.touched.add(source)
                output = function(module, query, key, value, attention_mask, *args, **kwargs)
                if output[1] is not None and source == layer and key.shape[-2] == query.shape[-2]:
                    self.weights[layer] = output[1]
                return output

            return attend

        self.patch = patch.object(AttentionInterface, "get_interface", get_interface)
        self.patch.start()
        return self

    def owner(self, key, layer_idx):
        """The layer whose keys these are: by identity, as the full cache hands out what it holds; else the caller's."""
        layers = [] if self.cache is None else self.cache.layers
        return next((at for at, layer in enumerate(layers) if getattr(layer, "keys", None) is key), layer_idx)

    def __exit__(self, *_):
        self.patch.stop()


def hide(mask, visible, query, key, backend):
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


def pruned_layers(cache):
    return [index for index, layer in enumerate(cache.layers) if isinstance(layer, PrunedLayer)]


def run(model, inputs, tokens, cache, log):
    """Two turns along given tokens; returns the logits of both. `log` gets what each layer holds after each step."""

    def watch():
        log.append({at: cache.kept_positions(at).clone() for at in pruned_layers(cache)})

    first, second = tokens
    logits, ids = feed(model, inputs, first, cache, watch)
    inputs = next_turn(inputs, ids, second[0])
    more, _ = feed(model, inputs, second[1], cache, watch)
    return torch.cat([logits, more], dim=1)


def next_turn(inputs, ids, words):
    ids = torch.cat([ids, words], dim=1)
    mask = inputs["attention_mask"]
    grown = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, grown], dim=1)}


def run_masked(model, inputs, tokens, log):
    """The same two turns with the model's own full cache, hiding what `log` says is gone."""
    state = {"step": 0, "seen": 0}
    wrong = []

    def before(_, args, kwargs):
        ids = kwargs.get("input_ids")
        fed = ids.shape[1]
        step = state["step"]
        masked.visible, masked.touched = {}, set()
        if step > 0:
            held = log[step if fed == 1 else step - 1]
            for layer, positions in held.items():
                visible = torch.zeros(len(ids), state["seen"] + fed, dtype=torch.bool)
                for row, kept in enumerate(positions):
                    visible[row, kept[kept >= 0]] = True
                visible[:, state["seen"] :] = True
                masked.visible[layer] = visible
        state["seen"] += fed

    def after(*_):
        if state["step"] == 0:
            state["weights"] = dict(masked.weights)
        missed = set(masked.visible) - masked.touched
        if missed:
            wrong.append(f"reference saw no attention call of layers {sorted(missed)} at step {state['step']}")
        state["step"] += 1

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        with Masked(DynamicCache(config=model.config)) as masked:
            first, second = tokens
            output = generate(model, inputs, first, masked.cache)
            more = generate(model, next_turn(inputs, output.sequences, second[0]), second[1], masked.cache)
    finally:
        for hook in hooks:
            hook.remove()
    if wrong:
        raise LookupError(wrong[0])
    return torch.cat([torch.stack(each.logits, 1) for each in (output, more)], 1), state["weights"]


def generate(model, inputs, tokens, cache):
    from transformers import LogitsProcessorList

    from oracle import _Forced

    return model.generate(
        **inputs, past_key_values=cache, max_new_tokens=tokens.shape[1], do_sample=False, output_logits=True,
        return_dict_in_generate=True, logits_processor=LogitsProcessorList([_Forced(tokens, lambda: None)]),
    )  # fmt: skip


def law_1(model, inputs, make_cache):
    """Budget 1: greedy ids and logits are those of the model's own cache."""
    options = dict(max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with Masked() as masked:
        whole = model.generate(**inputs, **options, past_key_values=DynamicCache(config=model.config))
    ours = model.generate(**inputs, **options, past_key_values=make_cache(1.0))
    worst = (torch.stack(whole.logits, 1) - torch.stack(ours.logits, 1)).abs().max().item()
    if not torch.equal(whole.sequences, ours.sequences):
        return f"law 1: other tokens than the full cache (logits differ by {worst:.1g})"
    return f"law 1: logits differ by {worst:.1g}" if not worst <= LAW_1 else None


def law_2(model, inputs, make_cache, eager):
    rows = len(inputs["input_ids"])
    words = torch.randint(zoo.WORDS.start, zoo.WORDS.stop, (rows, 40), generator=torch.Generator().manual_seed(3))
    tokens = words[:, :STEPS], (words[:, 20 : 20 + TURN[0]], words[:, 30 : 30 + TURN[1]])
    log = []
    cache = make_cache(BUDGET)
    ours = run(model, inputs, tokens, cache, log)
    layers = pruned_layers(cache)
    ratios = {at: cache.layers[at].keep_ratios for at in layers}
    del cache
    whole = generate(model, inputs, tokens[0], DynamicCache(config=model.config))
    reference, weights = run_masked(model, inputs, tokens, log)
    worst = (ours - reference).abs().max().item()
    if not worst <= LAW_2:
        at = (ours - reference).abs().amax((0, 2))
        return f"law 2: logits differ by {worst:.1g} at steps {[i for i, d in enumerate(at) if not d <= LAW_2]}"
    effect = (torch.stack(whole.logits, 1) - ours[:, :STEPS]).abs().max().item()
    if effect < 1e-3:
        return f"pruning has no effect (logits move by {effect:.1g})"
    stored = sum((log[0][at] >= 0).sum().item() for at in layers)
    share = stored / (inputs["attention_mask"].sum().item() * len(layers))
    if abs(share - BUDGET) > 0.05:
        return f"kept {share:.2f} of the prompt instead of {BUDGET}"
    return selection(inputs, log[0], weights) if eager else None


def selection(inputs, kept, weights):
    """No token that left the prompt received more attention than one that stayed (first and last aside)."""
    for layer, positions in kept.items():
        if layer not in weights:
            return f"selection: the model returns no attention weights in layer {layer}"
        for row, of_row in enumerate(positions):
            real = inputs["attention_mask"][row].nonzero().flatten().tolist()
            received = weights[layer][row][:, real[-QUERIES:], : real[-1] + 1].float().mean(0).sum(0)
            stayed = set(of_row[of_row >= 0].tolist())
            if not stayed <= set(real):
                return f"selection: layer {layer} keeps padding"
            if real[0] not in stayed or real[-1] not in stayed:
                return f"selection: layer {layer} lost the first or the last token"
            left = [at for at in real if at not in stayed]
            lowest = min((received[at].item() for at in stayed - {real[0], real[-1]}), default=9)
            highest = max((received[at].item() for at in left), default=0)
            if highest > lowest + 1e-5:
                return f"selection: layer {layer} dropped {highest:.3g} and kept {lowest:.3g}"
    return None


def measure(model_type, verbose=False):
    try:
        config = zoo.tiny_config(model_type)
    except Exception as error:
        return Finding(model_type, "not built", remarks=[brief(error)])
    try:
        cache = PrefixKVCache(budget=BUDGET, config=config)
    except Exception as error:
        return Finding(model_type, "refused", remarks=[brief(error)])
    try:
        model = zoo.tiny(model_type)
    except Exception as error:
        return Finding(model_type, "not built", remarks=[brief(error)])
    finding = Finding(model_type, "?")
    try:
        cache = PrefixKVCache(budget=BUDGET, config=model.config)
    except Exception as error:
        return Finding(model_type, "refused", remarks=[brief(error)])
    whole = [(at, type(layer).__name__) for at, layer in enumerate(cache.layers) if not isinstance(layer, PrunedLayer)]
    n_pruned = len(cache.layers) - len(whole)
    uniform = PrefixProfile([0.3, 1.0], [[0.3] * n_pruned, [1.0] * n_pruned], {})
    del cache

    def with_config(budget):
        return PrefixKVCache(budget=budget, config=model.config, queries=QUERIES)

    def without_config(budget):
        return PrefixKVCache(budget=budget, queries=QUERIES)

    def with_profile(budget):
        return PrefixKVCache(uniform, budget=budget, config=model.config, queries=QUERIES)

    problems = []
    for attn in ("eager", "sdpa"):
        try:
            model.set_attn_implementation(attn)
        except Exception as error:
            finding.remarks.append(f"no {attn}: {brief(error)[:60]}")
            continue
        for rows in (1, 2):
            inputs = zoo.inputs(model_type, LENGTHS[:rows], model)
            try:
                model.generate(**inputs, max_new_tokens=2, do_sample=False)
            except Exception as error:
                finding.remarks.append(f"{attn} batch {rows}: does not run by itself: {brief(error)}")
                continue
            kinds = {"config": with_config}
            if (attn, rows) != ("eager", 2):
                kinds["profile"] = with_profile
            if (attn, rows) != ("sdpa", 2):
                kinds["no config"] = without_config
            for name, make_cache in kinds.items():
                for law in ("1", "2"):
                    try:
                        told = (law_1(model, inputs, make_cache) if law == "1"
                                else law_2(model, inputs, make_cache, attn == "eager"))  # fmt: skip
                    except Exception as error:
                        told = f"law {law} raised " + brief(error)
                        if verbose:
                            traceback.print_exc()
                    if told and name == "no config" and "config=model.config" in told:
                        finding.remarks.append("needs config") if "needs config" not in finding.remarks else None
                        break
                    if told:
                        problems.append(f"{attn} b{rows} {name}: {told}")
                    if told and "raised" in told:
                        break
    problems = dedupe(problems)
    finding.whole = ", ".join(f"{at}:{kind}" for at, kind in whole)
    finding.verdict = "ok" if not problems else "wrong"
    finding.remarks += problems
    return finding


def dedupe(problems):
    """One line for each text, with where it happened."""
    where = {}
    for problem in problems:
        at, text = problem.split(": ", 1)
        where.setdefault(text, []).append(at)
    return [f"{text} [{'; '.join(places)}]" for text, places in where.items()]


def brief(error):
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:230]} @{frames[-1].filename.split('/')[-1]}:{frames[-1].lineno}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("-v", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    import time
    with torch.no_grad():
        for model_type in options.types or zoo.ALL_TYPES:
            start = time.time()
            finding = measure(model_type, options.v)
            print(f"{model_type:24s} {finding.verdict:9s} {time.time() - start:.1f}s [{finding.whole}]", flush=True)
            for remark in finding.remarks:
                print("      ", remark, flush=True)


if __name__ == "__main__":
    main()
