"""Law 1 in the words of transformers' own generation tests: at budget 1 all is as with `DynamicCache`.

Compared are the sequences, and of all that `generate` returns beside them shapes and values: scores, logits, attention
weights, hidden states. Contrastive search, DoLa, and group and constrained beams have left transformers for the hub.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

import compat
import zoo
import zoo_inputs
from double import float64
from prefixkv_cache import PrefixKVCache

TYPES = zoo.names("""
    llava llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl internvl idefics3 smolvlm paligemma gemma3 mistral3
    llama qwen3
""")  # fmt: skip
SLIDING = ["idefics3 (sliding)", "smolvlm (sliding)", "idefics2 (sliding)", "mistral (sliding)"]
LENGTHS, NEW = (37, 29), 5
MODES = {
    "greedy": {},
    "sample": {"do_sample": True},
    "beam": {"num_beams": 3, "length_penalty": 2.0},
    "beam-sample": {"num_beams": 2, "do_sample": True},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt look-up": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    "assisted": {"assistant_model": "itself"},
}
ALONE = ("prompt look-up", "assisted")  # one row only
RETURNED = ("scores", "logits", "attentions", "hidden_states")


@pytest.fixture(scope="module", params=[*TYPES, *SLIDING])
def subject(request):
    """A model that shows its attention weights, and a padded batch for it."""
    with float64():
        try:
            model = zoo.tiny(request.param, compat.PLAIN)
        except KeyError:
            pytest.skip("this transformers does not know the type")
        model.generation_config.eos_token_id = 10**6  # never comes
        model.generation_config.pad_token_id = 0
        yield request.param, model


def caches(model):
    """Transformers' own, and ours at budget 1 with and without the config."""
    yield DynamicCache(config=model.config)
    yield PrefixKVCache(budget=1.0, config=model.config)
    yield PrefixKVCache.for_model(model, 1.0, method="h2o")


def generate(model, inputs, cache, **options):
    torch.manual_seed(0)
    returned = {f"output_{name}": True for name in RETURNED}
    if not compat.SEES_EAGER:
        del returned["output_attentions"]
    return model.generate(
        **inputs, past_key_values=cache, max_new_tokens=NEW, min_new_tokens=NEW, return_dict_in_generate=True,
        **{"do_sample": False, **returned, **options},
    )  # fmt: skip


def flat(value):
    """All tensors of nested tuples."""
    return [value] if isinstance(value, torch.Tensor) else [each for part in value or () for each in flat(part)]


def assert_same(out, wanted, returned=RETURNED):
    assert torch.equal(out.sequences, wanted.sequences)
    for name in returned:
        ours, theirs = flat(out.get(name)), flat(wanted.get(name))
        assert [each.shape for each in ours] == [each.shape for each in theirs], name
        for one, other in zip(ours, theirs, strict=True):
            far = (one - other).abs() > 1e-6  # scores are float32
            assert not (far & torch.isfinite(other)).any(), name


@pytest.mark.parametrize("mode", MODES)
def test_generation(subject, mode):
    model_type, model = subject
    options = {name: copy.deepcopy(model) if each == "itself" else each for name, each in MODES[mode].items()}
    lengths = LENGTHS[:1] if mode in ALONE else LENGTHS
    wanted = None
    for cache in caches(model):
        inputs = zoo_inputs.inputs(model_type, lengths, model)
        try:
            out = generate(model, inputs, cache, **options)
        except Exception as error:
            if wanted is None:
                pytest.skip(f"not with DynamicCache either: {error}")
            raise
        wanted = out if wanted is None else wanted
        # With `DynamicCache`, prompts that are seen both ways see the candidates behind them; with ours they do not.
        both_ways = model_type == "paligemma" and mode in ALONE
        assert_same(out, wanted, () if both_ways else RETURNED)


def test_generation_continues_from_its_cache(subject):
    model_type, model = subject
    wanted = []
    for cache in caches(model):
        inputs = zoo_inputs.inputs(model_type, LENGTHS, model)
        first = generate(model, inputs, cache)
        mask = inputs["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(len(mask), first.sequences.shape[1] - mask.shape[1])], dim=1)
        second = generate(model, {"input_ids": first.sequences, "attention_mask": mask}, cache)
        for out, other in zip((first, second), wanted or (first, second), strict=True):
            assert_same(out, other)
        wanted = wanted or [first, second]


def test_generation_from_embeddings(subject):
    """Of text alone: images are put into embeddings by their token ids."""
    _, model = subject
    ids = torch.randint(zoo.WORDS.start, zoo.WORDS.stop, (2, 20), generator=torch.Generator().manual_seed(5))
    wanted = None
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        for cache in caches(model):
            try:
                out = generate(model, inputs, cache)
            except ValueError as error:
                if "doesn't have its forwarding implemented" in str(error):
                    pytest.skip(f"with no cache: {error}")
                raise
            wanted = out if wanted is None else wanted
            assert_same(out, wanted)
