"""The reference of zoo_laws.py: transformers' own cache, in which pairs are hidden by masks, key head by key head.

`Case` runs a tiny model over two turns along given tokens, with whatever cache; `Case.reference(log)` does so with a
full cache and, at each forward, hides what `log` says was gone by then. It has no line in common with the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from unittest.mock import patch

import torch
from transformers import DynamicCache, GenerationMixin, LogitsProcessorList
from transformers.modeling_utils import AttentionInterface

import compat
import zoo
import zoo_inputs
from oracle import _Forced

STEPS = 7
TURN_WORDS, TURN_STEPS = 5, 3  # of the second turn


class Masked:
    """While entered, the forwards of a model with a full cache do not see what `log` says was gone by then.

    log: for each forward pass, layer -> int64 [batch, key heads or 1, kept], -1 where a head keeps fewer.
    """

    def __init__(self, cache, decoder, log):
        self.cache, self.decoder, self.log = cache, decoder, log
        self.step = self.seen = 0
        self.visible = {}  # layer -> bool [batch, key heads or 1, keys]
        self.weights = {}  # layer -> attention weights of the prompt, where the backend returns any
        self.touched = set()  # layers whose pairs were hidden in this forward
        self.missed = set()  # layers whose attention call was not recognised

    def __enter__(self):
        original, masked = getattr(AttentionInterface, compat.LOOK_UP), self

        def get_interface(interface, *names):
            return partial(masked.attend, original(interface, *names))

        self.patch = patch.object(AttentionInterface, compat.LOOK_UP, get_interface)
        self.patch.start()
        self.hook = self.decoder.register_forward_pre_hook(self.before, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.hook.remove()
        self.patch.stop()
        self.missed |= set(self.visible) - self.touched

    def before(self, _, args, kwargs):
        ids = kwargs.get("input_ids")
        fed = (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]
        self.missed |= set(self.visible) - self.touched
        self.visible, self.touched = {}, set()
        if self.step:
            # A single token's leaving pair is gone before its attention; a prompt still sees all that was kept.
            for layer, kept in self.log[self.step if fed == 1 else self.step - 1].items():
                visible = torch.zeros(*kept.shape[:2], self.seen + fed + 1, dtype=torch.bool)
                visible.scatter_(2, kept % visible.shape[2], True)  # -1, nothing kept: one column too many
                visible[:, :, self.seen :] = True
                self.visible[layer] = visible[:, :, :-1]
        self.step += 1
        self.seen += fed

    def attend(self, function, module, query, key, value, attention_mask=None, *args, **kwargs):
        # Keys are known by identity, as the full cache hands out what it holds: others' layers may read them, too.
        layer = getattr(module, "layer_idx", None)
        held = (at for at, layer in enumerate(self.cache.layers) if getattr(layer, "keys", None) is key)
        owner = next(held, layer)
        visible = self.visible.get(owner)
        if visible is not None and visible.shape[2] == key.shape[2]:
            attention_mask = hide(attention_mask, visible, query)
            self.touched.add(owner)
        output = function(module, query, key, value, attention_mask, *args, **kwargs)
        if self.step == 1 and owner == layer and output[1] is not None:
            self.weights[layer] = output[1]
        return output


def hide(mask, visible, query):
    """The mask, as one that is added, without the pairs that the key head of each query head does not see."""
    heads, n, n_keys = query.shape[1], query.shape[2], visible.shape[2]
    visible = visible.repeat_interleave(heads // visible.shape[1], 1)[:, :, None]
    if mask is None:
        mask = torch.arange(n_keys) <= torch.arange(n_keys - n, n_keys)[:, None]
    if mask.dtype == torch.bool:
        visible, mask = visible & mask, torch.zeros((), dtype=query.dtype)
    return torch.where(visible, mask, torch.finfo(mask.dtype).min)


@dataclass
class Case:
    """A model, its prompt, and the tokens to go on with."""

    model: torch.nn.Module
    model_type: str
    inputs: dict
    wide: bool = False  # whether the reference's layers with a window hold what the window has moved past, too

    def __post_init__(self):
        random = torch.Generator().manual_seed(3)
        shape = len(self.inputs["input_ids"]), STEPS + TURN_WORDS + TURN_STEPS
        words = torch.randint(zoo.WORDS.start, zoo.WORDS.stop, shape, generator=random)
        self.first, self.turn, self.second = words.split([STEPS, TURN_WORDS, TURN_STEPS], dim=1)

    def turns(self, cache, watch=lambda: None):
        """Logits of every step of both turns: [batch, steps, vocabulary]."""
        output = self.forced(self.inputs, self.first, cache, watch)
        logits = list(output.logits)
        if self.model_type not in zoo_inputs.ONE_TURN:
            ids = torch.cat([output.sequences, self.turn], dim=1)
            mask = self.inputs["attention_mask"]
            mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
            logits += self.forced({"input_ids": ids, "attention_mask": mask}, self.second, cache, watch).logits
        return torch.stack(logits, dim=1)

    def forced(self, inputs, tokens, cache, watch):
        return self.greedy(
            inputs, cache, tokens.shape[1], logits_processor=LogitsProcessorList([_Forced(tokens, watch)])
        )

    def greedy(self, inputs, cache, steps, **options):
        # Janus drops the logits processors that its own `generate` is given.
        own = partial(GenerationMixin.generate, self.model) if self.model_type == "janus" else self.model.generate
        return own(**inputs, past_key_values=cache, max_new_tokens=steps, do_sample=False, output_logits=True,
                   return_dict_in_generate=True, **options)  # fmt: skip

    def full_cache(self):
        return DynamicCache() if self.wide else DynamicCache(config=self.model.config)

    @cached_property
    def full(self):
        """What transformers' own cache gives, greedily."""
        return self.greedy(self.inputs, self.full_cache(), STEPS)

    @cached_property
    def unpruned(self):
        """Logits of both turns with transformers' own cache."""
        return self.turns(self.full_cache())

    def reference(self, log):
        """Logits of both turns with a full cache and masks, and the prompt's attention weights."""
        decoder = zoo_inputs.decoder(self.model, self.model_type)
        with Masked(self.full_cache(), decoder, log) as masked:
            logits = self.turns(masked.cache)
        if masked.missed:
            raise LookupError(f"the reference saw no attention call of layers {sorted(masked.missed)}")
        return logits, masked.weights
