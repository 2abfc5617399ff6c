"""The evaluation: its loop and its figures against plain loops written apart from it; samples, methods, tables."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import models
from prefixkv_cache import PrefixKVCache, PrefixProfile, methods
from prefixkv_cache.profiles.bundled import bundled_dir
from prefixkv_cache.tools.demo import boards, scenes
from prefixkv_cache.tools.evaluate.measure import first_difference
from prefixkv_cache.tools.evaluate.methods import parse_candidates
from prefixkv_cache.tools.evaluate.report import FIGURES, summary_text, tasks_of
from prefixkv_cache.tools.evaluate.statistics import Bootstrap, estimate
from prefixkv_cache.tools.evaluate.tasks import Marks, drawn_samples, file_samples
from prefixkv_cache.tools.evaluate.token_loop import TokenLoop, write
from prefixkv_cache.tools.evaluate.token_sources import Forced, Greedy, divergence
from prefixkv_cache.tools.loading import LoadError, answer_ids, load_model

FAMILIES = ("llava_gqa", "qwen2_5_vl", "gemma3")
LENGTHS = (61, 44, 40)
ROOT = Path(__file__).resolve().parents[2]


def cache_of(model, method, budget=0.4):
    return DynamicCache(config=model.config) if method == "full" else PrefixKVCache(
        budget=budget, method=method, config=model.config
    )  # fmt: skip


# The full cache, and pruned ones: rows of unequal length, a head's own keys, merged ones.
CACHES = ("full", "prefixkv:queries=8;distance=5", "h2o", "elastic")


def free(limit=12, eos=()):
    return Greedy(torch.full((3,), limit), eos, 0)


def words(*lengths):
    return [models.words(1, n, seed=n)[0].tolist() for n in lengths]


# The loop, and who says what comes next


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CACHES)
def test_greedy_names_what_generate_does_alone_and_beside_forced(family, method):
    model, inputs = models.build(family, "sdpa"), models.batch(family, LENGTHS)
    wanted = model.generate(
        **inputs, past_key_values=cache_of(model, method), do_sample=False, max_new_tokens=12
    )[:, LENGTHS[0] :]  # fmt: skip
    for others in ([], [Forced(words(9, 4, 7), 0)]):
        greedy = free()
        write(TokenLoop(model, inputs, cache_of(model, method)), [*others, greedy])
        assert greedy.texts == wanted.tolist()
    alone = Forced(words(9, 4, 7), 0)
    write(TokenLoop(model, inputs, cache_of(model, method)), [alone])
    torch.testing.assert_close(alone.nll, others[0].nll, atol=1e-4, rtol=0)


def test_greedy_stops_where_generate_stops():
    model, inputs = models.build("llava_gqa", "sdpa"), models.batch("llava_gqa", LENGTHS)
    text = model.generate(**inputs, do_sample=False, max_new_tokens=12)[:, LENGTHS[0] :]
    eos = [int(text[0, 4]), int(text[1, 7])]
    model.generation_config.eos_token_id = eos
    wanted = model.generate(**inputs, do_sample=False, max_new_tokens=12)[:, LENGTHS[0] :]
    greedy = free(eos=eos)
    write(TokenLoop(model, inputs, DynamicCache(config=model.config)), [greedy])
    assert min(map(len, greedy.texts)) < 12
    assert [text + [0] * (wanted.shape[1] - len(text)) for text in greedy.texts] == wanted.tolist()
    short = Greedy(torch.tensor([2, 3, 9]), eos, 0)
    write(TokenLoop(model, inputs, DynamicCache(config=model.config)), [short])
    assert short.texts == [text[:n] for text, n in zip(greedy.texts, (2, 3, 9), strict=True)]


def plain_log_probs(model, inputs, answer):
    """The log-probabilities before each token of an answer: a forward without a cache for every one of them."""
    ids, found = inputs["input_ids"], []
    extra = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_grid_thw")}
    for n in range(len(answer)):
        whole = torch.cat([ids, torch.tensor([answer[:n]], dtype=torch.int64)], dim=1)
        types = {
            name: torch.cat([inputs[name], torch.zeros(1, n, dtype=torch.int64)], dim=1)
            for name in ("token_type_ids", "mm_token_type_ids")
            if name in inputs
        }
        found.append(model(input_ids=whole, use_cache=False, **extra, **types).logits[0, -1].log_softmax(-1))
    return torch.stack(found)


def stepwise_log_probs(model, inputs, answer, cache):
    """The same through a cache, token by token, with nothing told of positions."""
    del inputs["attention_mask"]
    found = [model(**inputs, past_key_values=cache, use_cache=True).logits[0, -1].log_softmax(-1)]
    for token in answer[:-1]:
        logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
        found.append(logits[0, -1].log_softmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_and_divergence_by_a_plain_loop(family):
    model, inputs, answers = models.build(family, "sdpa"), models.batch(family, LENGTHS), words(6, 3, 8)
    full = Forced(answers, 0)
    write(TokenLoop(model, inputs, DynamicCache(config=model.config)), [full])
    pruned = Forced(answers, 0, full.log_probs)
    write(TokenLoop(model, inputs, cache_of(model, "default")), [pruned])
    for row, answer in enumerate(answers):
        own = plain_log_probs(model, models.alone(family, LENGTHS, row), answer)
        assert full.nll[row].item() == pytest.approx(-sum(own[n, t].item() for n, t in enumerate(answer)), abs=1e-3)
        other = stepwise_log_probs(model, models.alone(family, LENGTHS, row), answer, cache_of(model, "default"))
        assert pruned.nll[row].item() == pytest.approx(-sum(other[n, t].item() for n, t in enumerate(answer)), abs=1e-3)
        kl = sum((own[n].exp() * (own[n] - other[n])).sum().item() for n in range(len(answer)))
        assert kl > 0.01
        assert pruned.kl[row].item() == pytest.approx(kl, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_pruned_nothing_changed(family):
    model, inputs, answers = models.build(family, "sdpa"), models.batch(family, LENGTHS), words(6, 3, 8)
    full, greedy = Forced(answers, 0), free(8)
    write(TokenLoop(model, inputs, DynamicCache(config=model.config)), [full, greedy])
    forced, text = Forced(answers, 0, full.log_probs), free(8)
    write(TokenLoop(model, inputs, cache_of(model, "default", 1.0)), [forced, text])
    assert forced.nll.tolist() == pytest.approx(full.nll.tolist(), abs=1e-4)
    assert forced.kl.max() < 1e-6 and text.texts == greedy.texts


@pytest.mark.parametrize(("method", "share"), [("full", 1.0), ("uniform", 0.5), ("h2o", 0.5)])
def test_pairs_are_counted_for_each_row_and_padding_is_none(method, share):
    model, inputs = models.build("gemma3", "sdpa"), models.batch("gemma3", LENGTHS)
    held = write(TokenLoop(model, inputs, cache_of(model, method, 0.5)), [Forced(words(6, 3, 8), 0)])
    assert held.pairs.tolist() == pytest.approx([round(share * length) for length in LENGTHS], abs=0.5)
    assert held.seen_end.tolist() == [length + n - 1 for length, n in zip(LENGTHS, (6, 3, 8), strict=True)]
    if method == "full":
        assert held.pairs_end.tolist() == held.seen_end.tolist()


def test_pairs_of_heads_of_unequal_lengths_are_their_mean():
    model, inputs = models.build("llava_gqa", "sdpa"), models.batch("llava_gqa", LENGTHS)
    keep = torch.tensor([0.2, 0.6], dtype=torch.float64).expand(1, model.config.get_text_config().num_hidden_layers, 2)
    cache = PrefixKVCache(PrefixProfile([0.4], keep), 0.4, config=model.config)
    held = write(TokenLoop(model, inputs, cache), [Forced(words(6, 3, 8), 0)])
    assert held.pairs.tolist() == pytest.approx([0.4 * length for length in LENGTHS], abs=0.5)


def test_divergence():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert divergence(p, q).item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert divergence(p, p).item() == 0
    excluded = torch.tensor([[1.0, 0.0]]).log()
    assert divergence(excluded, torch.tensor([[0.5, 0.5]]).log()).item() == pytest.approx(math.log(2))
    assert divergence(excluded, excluded).item() == 0


# Figures


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 5, 3], [1, 2, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([], []) is None


def test_bootstrap_intervals_are_those_of_the_normal_distribution():
    values, ones = np.random.default_rng(1).normal(3.0, 2.0, 400), np.ones(400)
    found, error = estimate(Bootstrap(400).ratio(values, ones)), values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert estimate(Bootstrap(400).ratio(values, ones)) == found
    assert estimate(Bootstrap(400, seed=1).ratio(values, ones)) != found


def row(method="a", budget=0.5, **more):
    blank = {
        "sample": "s", "task": "t", "kind": "", "prompt_tokens": 100, "answer_tokens": 1, "nll": 1.0, "kl": 0.0,
        "agree": 1, "same": 1, "first_diff": None, "right": 1, "there": None, "stated": None, "hits": None,
        "pairs": 50.0, "pairs_end": 60.0, "kept": 0.5, "kept_end": 0.55, "nbytes": 1, "nbytes_end": 2,
    }  # fmt: skip
    return {**blank, "method": method, "budget": budget, **more}


def test_ratios_weigh_samples_and_nothing_stated_has_no_precision():
    figures = {figure.key: figure for figure in FIGURES}
    rows = [row(nll=n, answer_tokens=t) for n, t in ((1.0, 1), (2.0, 4), (3.0, 1))]
    assert figures["ppl"].estimate(rows, Bootstrap(3)).value == pytest.approx(math.e)
    assert figures["ppl"].estimate([row(nll=800.0)], Bootstrap(1)).value > 1e307
    said = [row(there=4, stated=4, hits=4), row(there=6, stated=2, hits=1), row(there=2, stated=0, hits=0)]
    assert figures["precision"].estimate(said, Bootstrap(3)).value == pytest.approx(5 / 6)
    assert figures["recall"].estimate(said, Bootstrap(3)).value == pytest.approx(5 / 12)
    assert math.isnan(figures["precision"].estimate(said[2:], Bootstrap(1)).value)


def test_the_summary_marks_differences_and_unequal_memory():
    rows = []
    for index in range(40):
        rows.append(row("full", 1.0, kept=1.0, pairs=100.0))
        for method, right in (("a", 0.5), ("b", 0.9), ("c", index % 2)):
            rows.append(row(method, right=right, kept=0.504 if method == "b" else 0.5))
            rows.append(row(method, 50, right=right))
            rows.append(row(method, 500, right=right, kept=1.0, pairs=100.0))
    text = summary_text(tasks_of(rows, ["a", "b", "c"], [0.5, 50, 500], 0), "a", "title")
    fraction, pairs, all_of_them = text.split("\n### ")[1:]
    assert pairs.startswith("50 pairs") and "!" not in pairs + all_of_them
    assert "| method | held | held at the end | kl | ppl | tokens | agreement | right |" in fraction
    assert "| `a` | 50.0 (50.0%) | 60.0 (55.0%) |" in fraction and "| `b` | 50.0 (50.4%) ! | 60.0 (55.0%) |" in fraction
    assert re.search(r"`b` \|.*\| 0.400 \[0.400, 0.400\] \* \|", fraction)
    assert re.search(r"`c` \|.*\| 0.000 \[-0.1\d+, 0.1\d+\] \|", fraction)


# Answers and samples


def test_answers_are_tokenised_as_the_template_would_say_them():
    _, processor = load_model(str(bundled_dir("models") / "scene-llava"), device="cpu")
    ids = answer_ids(processor, "what is at the top left?", "a small red ring.")
    assert processor.tokenizer.decode(ids) == "a small red ring."
    with pytest.raises(LoadError, match="has no tokens"):
        answer_ids(processor, "what?", " ")


class Characters:
    """A processor whose tokens are characters, but `: ` and the letter behind it are one token."""

    chat_template = "yes"
    tokenizer = property(lambda self: self)
    answers = "{asked} {answer}</s>"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": re.findall(r": \w|.", text, flags=re.DOTALL)}

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=False):
        asked = f"USER: {messages[0]['content'][-1]['text']} ASSISTANT:"
        if add_generation_prompt:
            return asked
        return self.answers.format(asked=asked, answer=messages[1]["content"][0]["text"])


def test_what_stands_between_prompt_and_answer_is_the_templates_business():
    processor = Characters()
    assert answer_ids(processor, "why?", "no") == ["n", "o"]  # a token would reach back into the prompt
    processor.answers = "{asked}\n\n{answer}"
    assert answer_ids(processor, "why?", "no") == ["\n", "\n", "n", "o"]
    processor.answers = "{asked}<thinking>{answer}"
    assert answer_ids(processor, "why?", "no") == ["n", "o"]


@pytest.mark.parametrize("source", [scenes, boards])
def test_drawn_samples_come_from_the_split_and_invented_objects_are_counted(source):
    name = source.__name__.rpartition(".")[2]
    samples = drawn_samples(name, split="test", n=6, limit=50)
    assert [sample.task for sample in samples] == ["descriptions"] * 6 + ["questions"] * 6
    draw = getattr(source, f"draw_{name[:-1]}")
    for sample, seed in zip(samples, list(source.TEST_SEEDS[:6]) * 2, strict=True):
        assert sample.id == f"{name}-{seed}-{sample.task}"
        assert sample.pictures()[0].tobytes() == draw(seed).image.tobytes()
        assert sample.mark(sample.answer).right == 1 and sample.mark("nothing of the kind").right == 0
    first, second = (draw(seed) for seed in source.TEST_SEEDS[:2])
    n, m = len(first.objects), len(second.objects)
    assert samples[0].answer == source.describe(first)
    both = f"{source.describe(first)} {source.describe(second)}"
    assert samples[0].mark(source.describe(first)) == Marks(1, n, n, n)
    common = len({each.words for each in first.objects} & {each.words for each in second.objects})
    assert samples[0].mark(both) == Marks(0, n, n + m - common, n)
    assert samples[0].mark("") == Marks(0, n, 0, 0)
    assert len({sample.prompt for sample in samples[:6]}) == 3
    assert max(sample.limit for sample in samples) == 50


def test_kinds_of_questions_take_turns():
    kinds = ("object", "colour")
    samples = drawn_samples("scenes", split="validation", n=10, tasks=["questions"], kinds=kinds, limit=50)
    assert Counter(sample.kind for sample in samples) == {"object": 5, "colour": 5}
    assert not {each.id for each in samples} & {
        each.id for each in drawn_samples("scenes", split="test", n=10, limit=9)
    }
    with pytest.raises(ValueError, match="no questions of kind 'taste'"):
        drawn_samples("scenes", split="test", n=1, kinds=["taste"], limit=9)
    with pytest.raises(ValueError, match="--samples is 0"):
        drawn_samples("scenes", split="test", n=0, limit=9)


def test_file_samples_and_exact_match(tmp_path):
    content = {"v1_0": {"question": "what?", "answer": "Two  cats<AND>a dog.<OR>3", "imagename": "a.png"},
               "v1_1": {"question": "who?", "imagename": "a.png"}}  # fmt: skip
    (tmp_path / "mm-vet.json").write_text(json.dumps(content))
    (tmp_path / "a.png").touch()
    first, second = file_samples(str(tmp_path / "mm-vet.json"), None, None, n=None, seed=0, limit=9)
    assert (first.id, first.task, first.answer) == ("v1_0", "mm-vet", "Two  cats, a dog.")
    assert [first.mark(text).right for text in ("two cats, a dog", " 3. ", "two", "")] == [1, 1, 0, 0]
    assert second.answer is None and second.mark("") == Marks()
    (tmp_path / "d.json").write_text(json.dumps([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]))
    samples = file_samples(str(tmp_path / "d.json"), None, None, n=None, seed=0, limit=9)
    assert [sample.id for sample in samples] == ["0-a", "1-a"]


# Methods


def test_methods_are_read_as_the_cache_reads_them(tmp_path):
    model, made = models.build("llava_gqa", "sdpa"), str(tmp_path / "made.safetensors")
    PrefixProfile([0.5], [[0.5] * 6], {"method": "snapkv:queries=8"}).save(made)
    spelled = f"full,{','.join(methods.NAMED)},snapkv:queries=64;pooling=5,profile,snapkv:profile={made};queries=8"
    candidates = {each.name: each for each in parse_candidates(spelled, made)}
    assert list(candidates) == spelled.split(",")
    caches = {name: candidate.make(model, 0.5) for name, candidate in candidates.items()}
    assert type(caches["full"]) is DynamicCache
    for name, method in methods.NAMED.items():
        assert caches[name].method == method and caches[name].profile is None
    assert caches["snapkv:queries=64;pooling=5"].method == methods.SNAPKV.replace(queries=64, pooling=5)
    for name in list(candidates)[-2:]:
        assert caches[name].method == methods.SNAPKV.replace(queries=8)
        assert caches[name].profile == PrefixProfile.load(made)
    assert len({each.identity for each in candidates.values()}) == len(candidates) - 1  # the last two are one method
    assert candidates["snapkv"].make(model, 40).budget == 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("default,best", "no method 'best'; there are default, prefixkv"),
        ("", "names nothing to compare with the full cache"),
        ("full", "names nothing to compare with the full cache"),
        ("default,default", "named twice"),
        ("full:sink=2", "no method 'full'"),
        ("default:colour=red", "'colour=red'"),
        ("default:sink", "'sink'"),
        ("default:sink=-1", "sink must be at least 0"),
        ("default:profile=none-such", "none-such"),
        ("profile", "method 'profile' is the one that --profile P names"),
    ],
)
def test_wrong_methods_are_refused_by_name(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_candidates(text)


def test_caches_are_told_where_the_images_are():
    model, inputs = models.build("llava_gqa", "sdpa"), models.batch("llava_gqa", LENGTHS)
    (candidate,) = parse_candidates("default")
    assert candidate.make(model, 0.5, inputs).image_mask.sum(1).tolist() == [16, 16, 16]
    assert candidate.make(model, 0.5).image_mask is None
