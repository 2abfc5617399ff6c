"""Assisted decoding: the tokens, the logits and the cache are those of plain decoding, whatever was proposed.

The candidates come from a script that knows the answer and errs where it is told to, so that some are confirmed and
some taken back in every way: none, some, all, and behind the prompt. What plain decoding does is held against the
oracle elsewhere.
"""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationMixin

import compat
import models
import zoo
import zoo_inputs
from double import float64
from prefixkv_cache import PrefixKVCache
from watch import CLOSE, Case, greedy, kept_by_head

NEW = 20
ROUNDED = 1e-6  # `generate` hands logits out in float32
ONE = {"lengths": (61,), "attn": "sdpa"}


class Script:
    """Proposes what comes next, `n` tokens at a time, with the tokens at some places wrong."""

    requires_model_outputs = False

    def __init__(self, answer, n, wrong):
        self.answer, self.n, self.wrong = answer, n, wrong
        self.confirmed = self.proposed = 0

    def get_candidates(self, input_ids, **_):
        at, end = input_ids.shape[1], min(input_ids.shape[1] + self.n, self.answer.shape[1] - 1)
        places = torch.arange(at, max(at, end))
        candidates = torch.where(places % self.wrong == 0, self.answer[:, places] % 80 + 6, self.answer[:, places])
        self.proposed += candidates.shape[1]
        return torch.cat([input_ids, candidates], dim=1), None

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        self.confirmed += int(num_matches)


@pytest.fixture
def assist(monkeypatch):
    """`assist(model, inputs, cache, answer, n, wrong)`: ids and logits, as `greedy` gives them, and the script."""

    def run(model, inputs, cache, answer, n=4, wrong=5, **options):
        script = Script(answer, n, wrong)
        monkeypatch.setattr(GenerationMixin, "_get_candidate_generator", lambda *_, **__: script)
        new = answer.shape[1] - inputs["input_ids"].shape[1]
        options = {"do_sample": False, "prompt_lookup_num_tokens": n, "return_dict_in_generate": True, **options}
        with compat.ends_nowhere(model):
            out = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, output_logits=True, **options)
        monkeypatch.undo()
        return out.sequences, torch.stack(out.logits, dim=1), script

    return run


def assert_alike(cache, other, case):
    """Both hold the same pairs, at the same positions, in as many bytes a pair, and go on alike."""
    assert cache.get_seq_length() == other.get_seq_length()
    assert cache.stored_lengths(heads=True) == other.stored_lengths(heads=True)
    for layer in case.layers:
        assert kept_by_head(cache, layer, case.heads) == kept_by_head(other, layer, case.heads)


METHODS = [
    "default:headroom=2", "prefixkv:distance=5", "prefixkv:lengths=pool;heads=each;distance=1", "h2o", "h2o:heads=mean",
    "streaming", "snapkv:queries=8;recent=4", "elastic:distance=1", "random:headroom=3",
]  # fmt: skip
CASES = [Case(method, **ONE) for method in METHODS]
CASES += [Case(method, profile="head", **ONE) for method in ("default:headroom=2", "h2o", "prefixkv:distance=5")]
CASES += [Case("default:headroom=2", "qwen2_5_vl", **ONE), Case("prefixkv", "llava_gqa", budget=1.0, **ONE)]
CASES += [Case("default:headroom=2", image=True, **ONE), Case("h2o", lengths=(61,), attn="eager")]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("n", "wrong"), [(4, 5), (9, 7), (3, 1), (6, 10**6)], ids=["some", "long", "none", "all"])
def test_same_as_without_assistance(assist, case, n, wrong):
    """The next turn is a plain one, and a prompt of several tokens: what was announced for the first is over."""
    plain, assisted = case.cache(), case.cache()
    words = {"suppress_tokens": [models.IMAGE, models.VIDEO]}  # transformers would look for their pictures
    answer, logits = greedy(case.model, case.prompt(), plain, new=NEW, **words)
    ids, our_logits, script = assist(case.model, case.prompt(), assisted, answer, n, wrong, **words)
    assert script.proposed >= script.confirmed and bool(script.confirmed) == (wrong != 1)
    assert torch.equal(ids, answer)
    assert (our_logits - logits).abs().max() < ROUNDED
    assert_alike(assisted, plain, case)
    again = models.next_turn(case.prompt(), answer, 7)
    results = [greedy(case.model, again, cache, new=4) for cache in (plain, assisted)]
    assert torch.equal(results[0][0], results[1][0])
    assert (results[0][1] - results[1][1]).abs().max() < CLOSE
    assert_alike(assisted, plain, case)


@pytest.mark.parametrize("method", ["default:headroom=2", "prefixkv:distance=5", "h2o"])
def test_a_second_turn_with_assistance(assist, method):
    """Where transformers feeds a second turn right; where it feeds everything again, that is said at once."""
    case = Case(method, **ONE)
    plain, assisted = case.cache(), case.cache()
    first, _ = greedy(case.model, case.prompt(), plain, new=6)
    greedy(case.model, case.prompt(), assisted, new=6)
    again = models.next_turn(case.prompt(), first, 7)
    answer, logits = greedy(case.model, again, plain, new=NEW)
    if compat.FEEDS_SECOND_TURNS_AGAIN:
        with pytest.raises(ValueError, match=r"whole conversation again.*reset"):
            assist(case.model, again, assisted, answer)
        assert assisted.get_seq_length() == 66
        return
    ids, our_logits, _ = assist(case.model, again, assisted, answer)
    assert torch.equal(ids, answer) and (our_logits - logits).abs().max() < ROUNDED
    assert_alike(assisted, plain, case)


@pytest.mark.skipif(not compat.ANNOUNCES_ASSISTED_DECODING, reason="whole layers cannot be cropped past their window")
def test_beside_layers_that_slide(assist):
    case = Case("default:headroom=2", "gemma3", **ONE)
    plain, assisted = case.cache(), case.cache()
    answer, logits = greedy(case.model, case.prompt(), plain, new=NEW)
    ids, our_logits, _ = assist(case.model, case.prompt(), assisted, answer)
    assert torch.equal(ids, answer) and (our_logits - logits).abs().max() < ROUNDED
    assert_alike(assisted, plain, case)


@pytest.mark.skipif(not compat.ANNOUNCES_ASSISTED_DECODING, reason="whole layers cannot be cropped past their window")
@pytest.mark.parametrize(("n", "wrong"), [(4, 5), (9, 7)], ids=["some", "long"])
@pytest.mark.parametrize("model_type", ["mistral (sliding)", "gemma3"])
def test_layers_that_slide_and_are_pruned(assist, model_type, n, wrong):
    """The window moves on while candidates wait, and the oldest pair leaves for each that is confirmed."""
    with float64():
        model, length = zoo.tiny(model_type, "sdpa"), 2 * zoo.WINDOW
        inputs, given = zoo_inputs.inputs(model_type, (length,), model), {"prune_sliding": "sliding" not in model_type}
        plain, assisted = (
            PrefixKVCache(budget=0.4, method="default:headroom=2", config=model.config, **given) for _ in range(2)
        )
        answer, logits = greedy(model, inputs, plain, new=NEW)
        ids, our_logits, script = assist(model, inputs, assisted, answer, n, wrong)
        assert torch.equal(ids, answer) and (our_logits - logits).abs().max() < ROUNDED
        assert any(layer.window == zoo.WINDOW for layer in assisted.layers) and 0 < script.confirmed < script.proposed
        for layer in range(len(plain.layers)):
            own, wanted = (cache.kept_positions(layer).sort(-1)[0] for cache in (assisted, plain))
            assert own.equal(wanted)


@pytest.mark.parametrize("budget", [0.4, 1.0])
@pytest.mark.parametrize("how", ["prompt look-up", "assistant"])
def test_what_transformers_itself_proposes(how, budget):
    case = Case("default:headroom=2", budget=budget, **ONE)
    model = copy.deepcopy(case.model)
    model.generation_config.eos_token_id = 10**6  # never comes; older releases cannot do without one
    for parameter in (helper := copy.deepcopy(model)).parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    options = {"prompt look-up": {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1},
               "assistant": {"assistant_model": helper}}[how]  # fmt: skip
    answer, _ = greedy(model, case.prompt(), case.cache(), new=NEW)
    ids = model.generate(**case.prompt(), past_key_values=case.cache(), max_new_tokens=NEW, do_sample=False, **options)
    assert torch.equal(ids, answer)


@pytest.mark.parametrize("method", ["default:headroom=2", "prefixkv:distance=5", "h2o", "streaming"])
@pytest.mark.parametrize("profile", [None, "head"])
@pytest.mark.skipif(not compat.ANNOUNCES_ASSISTED_DECODING, reason="a loop of one's own cannot announce candidates")
def test_a_loop_of_ones_own(method, profile):
    """A padded batch; each row's cache after rejections is that of the confirmed tokens alone (law 2 by `follow`)."""
    case = Case(method, profile=profile)
    caches, logits = [case.cache(), case.cache()], []
    words, wrong = models.words(3, 12), models.words(3, 12, seed=99)
    steps = [(0, 3, 2), (2, 4, 4), (6, 3, 0), (6, 1, 1), (7, 5, 5)]  # from, proposed, confirmed
    for cache, proposes in zip(caches, (False, True), strict=True):
        mask = case.prompt()["attention_mask"]
        if proposes:
            cache.activate_past_recording()
        got = [case.model(**case.prompt(), past_key_values=cache, use_cache=True).logits[:, -1:]]
        for begin, proposed, confirmed in steps:
            fed = torch.cat([words[:, begin : begin + confirmed], wrong[:, : proposed - confirmed]], dim=1)
            for part in [fed] if proposes else fed[:, :confirmed].T[..., None]:
                grown = torch.cat([mask, torch.ones(3, begin + proposed, dtype=mask.dtype)], dim=1)
                grown = grown[:, : cache.get_seq_length() + part.shape[1]]
                out = case.model(input_ids=part, attention_mask=grown, past_key_values=cache, use_cache=True)
                got.append(out.logits[:, :confirmed])
            if proposes:
                assert cache.kept_positions(case.layers[0]).max() == cache.get_seq_length() - 1
                cache.crop(confirmed - proposed)
        logits.append(torch.cat(got, dim=1))
    assert (logits[0] - logits[1]).abs().max() < CLOSE
    assert_alike(*caches, case)
    for layer, of_layer in zip(caches[0].layers, caches[1].layers, strict=True):
        for ours, other in zip(layer.segments, of_layer.segments, strict=True):
            if ours.counts_received:
                sums = [each.stored.received[..., : each.width] for each in (ours, other)]
                assert (sums[0] - sums[1]).abs().max() < 1e-5


@pytest.mark.skipif(not compat.ANNOUNCES_ASSISTED_DECODING, reason="a loop of one's own cannot announce candidates")
def test_candidates_that_nobody_takes_back_are_confirmed():
    case = Case("default:headroom=2")
    one, other = case.cache(), case.cache()
    one.activate_past_recording()
    for cache, parts in ((one, (3, 2)), (other, (1,) * 5)):
        case.model(**case.prompt(), past_key_values=cache, use_cache=True)
        for part in models.words(3, 5).split(list(parts), dim=1):
            case.model(input_ids=part, past_key_values=cache, use_cache=True)
    twin = one.copy()
    for cache in (one, twin):
        assert_alike(cache, other, case)
    one.reset()
    assert not any(one.is_recording_past(at) for at in range(len(one.layers)))


def test_crop_reaches_behind_the_candidates():
    case = Case("default")
    one, other = case.cache(), case.cache()
    for cache, tokens in ((one, 4), (other, 2)):
        case.model(**case.prompt(), past_key_values=cache, use_cache=True)
        for part in models.words(3, tokens).split(1, dim=1):
            case.model(input_ids=part, past_key_values=cache, use_cache=True)
    for layer in one.layers:
        layer.record_past = True
    case.model(input_ids=models.words(3, 3, seed=5), past_key_values=one, use_cache=True)
    one.crop(-5)
    assert_alike(one, other, case)


def test_planned_steps_refuse_in_one_line():
    case = Case("default", **ONE)
    cache = case.cache(max_new_tokens=8)
    with pytest.raises(ValueError, match=r"max_new_tokens|Static"):
        case.model.generate(**case.prompt(), past_key_values=cache, max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert cache.get_seq_length() == 0


@compat.needs_eager
def test_what_the_model_returns_beside(monkeypatch):
    """At budget 1, attention weights and hidden states have the shapes and values of those with `DynamicCache`."""
    case, runs = Case("default", lengths=(61,), attn="eager"), []
    answer, _ = greedy(case.model, case.prompt(), case.cache(budget=1.0), new=8)
    for cache in (DynamicCache(config=case.model.config), case.cache(budget=1.0)):
        monkeypatch.setattr(GenerationMixin, "_get_candidate_generator", lambda *_, **__: Script(answer, 3, 5))
        with compat.ends_nowhere(case.model):
            out = case.model.generate(
                **case.prompt(), past_key_values=cache, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3,
                return_dict_in_generate=True, output_attentions=True, output_hidden_states=True,
            )  # fmt: skip
        runs.append([each for of_step in (*out.attentions, *out.hidden_states) for each in of_step])
    assert [each.shape for each in runs[0]] == [each.shape for each in runs[1]]
    assert max((one - other).abs().max() for one, other in zip(*runs, strict=True)) < CLOSE
