"""The evaluation: its loop and its figures against plain loops written apart from it; the command as people run it."""

import argparse
import csv
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import socket
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import models
import tiny_vlm
from prefixkv_cache import PrefixKVCache, PrefixProfile
from prefixkv_cache.bundled import bundled_dir
from prefixkv_cache.cli import COMMANDS, main
from prefixkv_cache.demo import boards, scenes
from prefixkv_cache.evaluate.measure import METRICS, Batch, Plan
from prefixkv_cache.evaluate.methods import DEFAULT, NAMES, parse_methods
from prefixkv_cache.evaluate.metrics import first_difference, rouge_l
from prefixkv_cache.evaluate.plots import draw_all
from prefixkv_cache.evaluate.report import summary_text, tasks_of
from prefixkv_cache.evaluate.results import Results, Unit
from prefixkv_cache.evaluate.statistics import Bootstrap, exponential
from prefixkv_cache.evaluate.tasks import Sample, drawn_samples, file_samples
from prefixkv_cache.evaluate.token_loop import TokenLoop, write
from prefixkv_cache.evaluate.writers import Forced, Greedy, Sampled, divergence
from prefixkv_cache.loading import LoadError, answer_ids, load_model

FAMILIES = ("llava_gqa", "qwen2_5_vl", "gemma3")
LENGTHS = (61, 44, 40)
ROOT = Path(__file__).parent.parent


def caches(model):
    """A full cache, and pruned ones: rows of equal and of unequal length, a head's own keys, merged ones."""
    yield DynamicCache(config=model.config)
    yield PrefixKVCache(budget=0.4, config=model.config, distance=5, slack=0)
    by_head = dict(lengths="uniform", heads="each", evict="least-important")
    yield PrefixKVCache(budget=0.3, config=model.config, slack=0, **by_head)
    yield PrefixKVCache(budget=0.5, config=model.config, merge="kv")


# The loop, and who says what comes next


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", range(4))
def test_greedy_says_what_generate_says(family, which):
    model, inputs = models.build(family, "sdpa"), models.batch(family, LENGTHS)
    first, second = (list(caches(model))[which] for _ in range(2))
    wanted = model.generate(**inputs, past_key_values=first, do_sample=False, max_new_tokens=12)[:, LENGTHS[0] :]
    greedy = Greedy(3, 12, [], 0)
    write(TokenLoop(model, inputs, second), [greedy])
    assert greedy.texts == wanted.tolist()


def test_greedy_stops_where_generate_stops():
    model, inputs = models.build("llava_gqa", "sdpa"), models.batch("llava_gqa", LENGTHS)
    free = model.generate(**inputs, do_sample=False, max_new_tokens=12)[:, LENGTHS[0] :]
    eos = [int(free[0, 4]), int(free[1, 7])]
    model.generation_config.eos_token_id = eos
    wanted = model.generate(**inputs, do_sample=False, max_new_tokens=12)[:, LENGTHS[0] :]
    greedy = Greedy(3, 12, eos, 0)
    write(TokenLoop(model, inputs, DynamicCache(config=model.config)), [greedy])
    assert min(map(len, greedy.texts)) < 12
    width = wanted.shape[1]
    assert [text + [0] * (width - len(text)) for text in greedy.texts] == wanted.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", range(4))
def test_writers_side_by_side_say_what_they_say_alone(family, which):
    model, inputs = models.build(family, "sdpa"), models.batch(family, LENGTHS)
    answers = [models.words(1, n, seed=n)[0].tolist() for n in (9, 4, 7)]

    def writers():
        return [Forced(answers, 0, keep=True), Greedy(3, 10, [], 0), Sampled(3, 3, 6, [], 0, "cpu")]

    together = writers()
    write(TokenLoop(model, inputs, list(caches(model))[which]), together)
    for index, alone in enumerate(writers()):
        write(TokenLoop(model, inputs, list(caches(model))[which]), [alone])
        if index:
            assert alone.texts == together[index].texts
        else:
            torch.testing.assert_close(alone.nll, together[0].nll, atol=1e-4, rtol=0)


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
    model, inputs = models.build(family, "sdpa"), models.batch(family, LENGTHS)
    answers = [models.words(1, n, seed=n)[0].tolist() for n in (6, 3, 8)]
    full = Forced(answers, 0, keep=True)
    write(TokenLoop(model, inputs, DynamicCache(config=model.config)), [full])
    pruned = Forced(answers, 0, reference=full.log_probs)
    write(TokenLoop(model, inputs, PrefixKVCache(budget=0.4, config=model.config)), [pruned])
    for row, answer in enumerate(answers):
        own = plain_log_probs(model, models.alone(family, LENGTHS, row), answer)
        assert full.nll[row].item() == pytest.approx(-sum(own[n, t].item() for n, t in enumerate(answer)), abs=1e-4)
        cache = PrefixKVCache(budget=0.4, config=model.config)
        other = stepwise_log_probs(model, models.alone(family, LENGTHS, row), answer, cache)
        assert pruned.nll[row].item() == pytest.approx(-sum(other[n, t].item() for n, t in enumerate(answer)), abs=1e-3)
        kl = sum((own[n].exp() * (own[n] - other[n])).sum().item() for n in range(len(answer)))
        assert kl > 0.01
        assert pruned.kl[row].item() == pytest.approx(kl, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_pruned_nothing_changed(family):
    model, inputs = models.build(family, "sdpa"), models.batch(family, LENGTHS)
    answers = [models.words(1, n, seed=n)[0].tolist() for n in (6, 3, 8)]
    full, greedy = Forced(answers, 0, keep=True), Greedy(3, 8, [], 0)
    write(TokenLoop(model, inputs, DynamicCache(config=model.config)), [full, greedy])
    for shift in (False, True):
        forced, free = Forced(answers, 0, reference=full.log_probs), Greedy(3, 8, [], 0)
        cache = PrefixKVCache(budget=1.0, config=model.config)
        write(TokenLoop(model, inputs, cache, shift_positions=shift), [forced, free])
        torch.testing.assert_close(forced.nll, full.nll, atol=1e-5, rtol=0)
        assert forced.kl.max() < 1e-8
        assert free.texts == greedy.texts


@pytest.mark.parametrize("family", ["llava_gqa", "qwen2_5_vl"])
def test_shifted_positions_lag_by_what_layer_0_lost(family):
    model, inputs = models.build(family, "sdpa"), models.batch(family, LENGTHS)
    fed = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["position_ids"].clone()), with_kwargs=True
    )
    seen, texts = {}, {}
    for shift in (False, True):
        fed.clear()
        cache = PrefixKVCache(budget=0.4, config=model.config)
        loop, greedy = TokenLoop(model, inputs, cache, shift_positions=shift), Greedy(3, 6, [], 0)
        lost = []

        def after_prompt(cache=cache, lost=lost):
            stored = (cache.kept_positions(0) >= 0).sum(1).tolist()
            lost += [length - held for length, held in zip(LENGTHS, stored, strict=True)]

        write(loop, [greedy], after_prompt=after_prompt)
        seen[shift], texts[shift] = list(fed), greedy.texts
    assert min(lost) > 10
    assert torch.equal(seen[False][0], seen[True][0])  # the prompt's own positions are true in either case
    for true, shifted in zip(seen[False][1:], seen[True][1:], strict=True):
        by = (true - shifted)[..., 0]
        assert torch.equal(by, torch.tensor(lost).expand_as(by))
    if family == "llava_gqa":
        assert [p[:, 0].tolist() for p in seen[False][1:3]] == [[61, 44, 40], [62, 45, 41]]
    assert texts[False] != texts[True]


def test_pairs_are_counted_for_each_row_and_padding_is_none():
    model, inputs = models.build("gemma3", "sdpa"), models.batch("gemma3", LENGTHS)
    for cache, share in [
        (DynamicCache(config=model.config), 1.0),
        (PrefixKVCache(budget=0.5, config=model.config), 0.5),
    ]:
        loop = TokenLoop(model, inputs, cache)
        loop.read_prompt()
        layers = len(models.prunable_layers(model))
        assert layers == 4
        wanted = [round(share * layers * length) for length in LENGTHS]
        assert loop.stored_pairs().tolist() == wanted
        assert loop.kept().tolist() == [held / layers / length for held, length in zip(wanted, LENGTHS, strict=True)]


def test_divergence():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert divergence(p, q).item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert divergence(p, p).item() == 0
    excluded = torch.tensor([[1.0, 0.0]]).log()
    assert divergence(excluded, torch.tensor([[0.5, 0.5]]).log()).item() == pytest.approx(math.log(2))
    assert divergence(excluded, excluded).item() == 0


# Figures


def test_rouge_is_the_longest_common_subsequence_of_words():
    text, reference = "the cat sat on a mat", "A cat sat quietly on the mat!"
    common = 4  # cat sat on mat
    precision, recall = common / 6, common / 7
    assert rouge_l(text, reference) == pytest.approx(2 * precision * recall / (precision + recall))
    assert rouge_l("", "") == rouge_l("猫", "猫") == 1.0
    assert rouge_l("", "a") == rouge_l("猫", "犬") == 0.0


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 5, 3], [1, 2, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([], []) is None


def test_bootstrap_intervals_are_those_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = Bootstrap(400).mean(values)
    error = values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert Bootstrap(400).mean(values) == found != Bootstrap(400, seed=1).mean(values)


def test_a_ratio_weighs_samples_by_their_tokens():
    found = exponential(Bootstrap(3).ratio([1.0, 2.0, 3.0], [1, 4, 1]))
    assert found.value == pytest.approx(math.exp(1.0))
    assert exponential(Bootstrap(1).mean([800.0])).value == math.inf


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
    answers = "{asked} {answer}</s>"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": re.findall(r": \w|.", text, flags=re.DOTALL)}

    def apply_chat_template(self, messages, add_generation_prompt=False):
        asked = f"USER: {messages[0]['content'][-1]['text']} ASSISTANT:"
        return (
            asked
            if add_generation_prompt
            else self.answers.format(asked=asked, answer=messages[1]["content"][0]["text"])
        )


def test_what_stands_between_prompt_and_answer_is_the_templates_business():
    processor = Characters()
    assert answer_ids(processor, "why?", "no") == ["n", "o"]  # a token would reach back into the prompt
    processor.answers = "{asked}\n\n{answer}"
    assert answer_ids(processor, "why?", "no") == ["\n", "\n", "n", "o"]
    processor.answers = "{asked}<thinking>{answer}"
    assert answer_ids(processor, "why?", "no") == ["n", "o"]


@pytest.mark.parametrize("source", [scenes, boards])
def test_drawn_samples_come_from_the_split_and_are_marked_by_the_truth(source):
    name = source.__name__.rpartition(".")[2]
    samples = drawn_samples(name, split="test", n=6, limit=50)
    assert [sample.task for sample in samples] == ["descriptions"] * 6 + ["questions"] * 6
    draw = getattr(source, f"draw_{name[:-1]}")
    for sample, seed in zip(samples, list(source.TEST_SEEDS[:6]) * 2, strict=True):
        assert sample.id == f"{name}-{seed}-{sample.task}"
        assert sample.pictures()[0].tobytes() == draw(seed).image.tobytes()
        assert sample.accuracy(sample.answer) == 1.0
        assert sample.accuracy("nothing of the kind") == 0.0
    assert samples[0].answer == source.describe(draw(source.TEST_SEEDS[0]))
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
    assert [first.accuracy(text) for text in ("two cats, a dog", " 3. ", "two", "")] == [1, 1, 0, 0]
    assert second.answer is None and second.accuracy("") == 0


def test_same_ids_become_different_ones(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]))
    samples = file_samples(str(tmp_path / "d.json"), None, None, n=None, seed=0, limit=9)
    assert [sample.id for sample in samples] == ["0-a", "1-a"]


# Methods


def test_every_method_makes_its_cache():
    model = models.build("llava_gqa", "sdpa")
    for name in NAMES:
        (method,) = parse_methods(name)
        if name == "prefixkv":
            with pytest.raises(ValueError, match=r"'prefixkv' needs a profile.*by --profile"):
                method.make(model, 0.5)
            continue
        cache = method.make(model, 0.5)
        assert isinstance(cache, DynamicCache if name == "full" else PrefixKVCache)
    told = next(action for action in _parser_of_evaluate()._actions if action.dest == "methods")
    assert tuple(told.default.split(",")) == DEFAULT and set(DEFAULT) <= set(NAMES)


def _parser_of_evaluate():
    parser = argparse.ArgumentParser()
    COMMANDS["evaluate"][0](parser)
    return parser


def rule_of(cache):
    ranking = cache.ranking
    return ranking.queries, ranking.novelty, ranking.diversity, cache.distance, cache.slack, cache.lengths, cache.merge


def test_the_default_and_the_paper_by_name(tmp_path):
    model, made = models.build("llava_gqa", "sdpa"), tmp_path / "made.safetensors"
    PrefixProfile([0.5], [[0.5] * 6]).save(made)
    default, paper = (32, 8.0, 0.5, 1, 64, "search", None), ("all", 0.0, 0.0, 25, 0, "search", None)
    spelled = (
        f"online,prefixkv,paper,paper:profile={made},paper:queries=32,online:novelty=0;diversity=0;distance=25;slack=0"
    )
    methods = parse_methods(spelled, profile=str(made))
    caches = [method.make(model, 0.5) for method in methods]
    assert [rule_of(cache) for cache in caches] == [
        default, default, paper, paper, (32, *paper[1:]), (32, *paper[1:]),
    ]  # fmt: skip
    # --profile is for `prefixkv`; the paper's rule takes one by its own option only.
    assert [cache.profile is not None for cache in caches] == [False, True, False, True, False, False]


def test_options_are_read_and_checked():
    text = "online:queries=all;distance=none;temperature=0.5, elastic:merge=value"
    one, other = parse_methods(text, as_published=True)
    assert one.options == {"queries": "all", "distance": None, "temperature": 0.5}
    assert other.options == {"merge": "value", "as_published": True}
    assert [one.name, other.name] == ["online:queries=all;distance=none;temperature=0.5", "elastic:merge=value"]
    (snap,) = parse_methods("snapkv:window=8;value_norm=true", as_published=True)
    assert snap.options == {"window": 8, "value_norm": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("online,best", "no method 'best'; there are full, prefixkv, online"),
        ("", "names none"),
        ("online,online", "named twice"),
        ("online:window=3", "'online:window=3' has no option 'window'; there are queries"),
        ("elastic:colour=red", "has no option 'colour'; there are merge, as_published, queries"),
        ("full:sink=2", "it takes none"),
        ("online:sink", "'sink' is no option; write name=value"),
        ("online:sink=-1", "'online:sink=-1': sink must be at least 0"),
        ("snapkv:pooling=4", "'snapkv:pooling=4': "),
        ("prefixkv:profile=none-such", "no bundled profile is named 'none-such'"),
        (
            "prefixkv:lengths=uniform",
            "'prefixkv:lengths=uniform' goes by a profile, and lengths='uniform' contradicts it",
        ),
        ("prefixkv:sink=2;lengths=pyramid", "without a profile, write 'online:lengths=pyramid'"),
        ("paper:profile=llava-1.5-7b;lengths=uniform", "without a profile, write 'paper:lengths=uniform'"),
    ],
)
def test_wrong_methods_are_refused_by_name(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_methods(text)


def test_methods_that_ask_for_images_are_told_where_they_are():
    model, inputs = models.build("llava_gqa", "sdpa"), models.batch("llava_gqa", LENGTHS)
    asking, other = parse_methods("online:queries=text;text_floor=0.5,online")
    assert asking.make(model, 0.5, inputs).image_mask.sum(1).tolist() == [16, 16, 16]
    assert other.make(model, 0.5, inputs).image_mask is None


# What is kept of an interrupted run


def test_results_survive_and_belong_to_one_run(tmp_path):
    first, second = Results(tmp_path, {"seed": 0}, 0), Results(tmp_path, {"seed": 0}, 1)
    unit, other = Unit(0, "a", 0.5), Unit(1, "b", 0.1, "digest")
    first.add(unit, [{"nll": 1 / 3}])
    second.add(other, [{"nll": None}])
    with (tmp_path / "results-1.jsonl").open("a") as file:
        file.write('{"batch":7,"meth')  # killed in the middle of a line
    again = Results(tmp_path, {"seed": 0})
    again.read()
    assert again.units == {unit: [{"nll": 1 / 3}], other: [{"nll": None}]}
    again.settle()
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    again = Results(tmp_path, {"seed": 0})
    again.read()
    assert unit in again and len(again) == 2
    with pytest.raises(ValueError, match=r"another evaluation, whose seed was 0; this one has 1\. Take another --out"):
        Results(tmp_path, {"seed": 1}).read()
    (tmp_path / "results.jsonl").write_text("no JSON\n")
    with pytest.raises(ValueError, match="is no file of results"):
        again.read()


# The command


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, a profile of it, six pictures, and a data file of six questions with answers."""
    folder = tmp_path_factory.mktemp("home")
    tiny_vlm.save_model(folder / "model")
    names = tiny_vlm.save_pictures(folder / "images", 6)
    said = [f"<image>\nwhat is there in the picture{' red' * index}" for index in range(6)]
    answers = [
        "a red circle .",
        "a blue square",
        "there is a green circle in the picture .",
        "red",
        "a circle ?",
        "blue .",
    ]
    records = [
        {"id": f"r{index}", "image": name, "conversations": [
            {"from": "human", "value": text}, {"from": "gpt", "value": answer}]}
        for index, (name, text, answer) in enumerate(zip(names, said, answers, strict=True))
    ]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(records))
    PrefixProfile([0.2, 0.5, 1.0], [[0.4, 0.1, 0.1], [0.7, 0.5, 0.3], [1.0] * 3]).save(folder / "p.safetensors")
    return folder


@pytest.fixture
def run(capsys):
    """Run a command in this process; returns exit status, standard output and standard error."""

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse
            status = ended.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


def evaluate_arguments(home, out, *more):
    return ["evaluate", "--model", home / "model", "--data", home / "data.json", "--images", home / "images",
            "--out", out, "--methods", "prefixkv,online,h2o", "--budgets", "0.2,1", "--batch-size", "2",
            "--max-new-tokens", "8", "--profile", home / "p.safetensors", *more]  # fmt: skip


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    """The folder of one whole run."""
    out = tmp_path_factory.mktemp("made") / "run"
    assert main([str(argument) for argument in evaluate_arguments(home, out)]) == 0
    return out


def table(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_row_for_each_sample_method_and_budget(made):
    rows = table(made)
    cells = [("full", "1"), ("noise", "1")] + [(m, b) for m in ("prefixkv", "online", "h2o") for b in ("0.2", "1")]
    assert [(row["sample"], row["method"], row["budget"]) for row in rows] == [
        (f"r{index}", *cell) for index in range(6) for cell in cells
    ]
    for row in rows:
        if row["method"] == "noise":
            assert row["rouge_l"] and not row["nll"]
            continue
        assert row["task"] == "data" and int(row["answer_tokens"]) > 0
        assert float(row["ppl"]) == pytest.approx(math.exp(float(row["nll"]) / int(row["answer_tokens"])), rel=1e-5)
        assert 0 <= float(row["rouge_l"]) <= 1 and float(row["accuracy"]) in (0, 1)
        # By profile a layer's count is rounded, one for each of three layers; a prompt has 73 tokens or more.
        assert float(row["kept"]) == pytest.approx(float(row["budget"]), abs=0.5 / 73)
        if row["method"] == "h2o":
            assert float(row["kept"]) - 1 / 73 <= float(row["kept_end"]) <= float(row["kept"]) + 3 / 73
        else:  # of these short answers, the slack holds every token
            prompt, fed = int(row["prompt_tokens"]), int(row["answer_tokens"]) - 1
            kept_end = (float(row["kept"]) * prompt + fed) / (prompt + fed)
            assert float(row["kept_end"]) == pytest.approx(kept_end, abs=1e-5)


def test_a_method_that_keeps_all_is_the_full_cache(made):
    rows = table(made)
    full = {row["sample"]: row for row in rows if row["method"] == "full"}
    kept_all = [row for row in rows if row["budget"] == "1" and row["method"] not in ("full", "noise")]
    assert len(kept_all) == 18
    for row in kept_all:
        assert float(row["ppl"]) == pytest.approx(float(full[row["sample"]]["ppl"]), rel=1e-6)
        assert (row["rouge_l"], row["kl"], row["first_diff"]) == ("1.000000", "0.000000", "")
        assert (row["kept"], row["kept_end"]) == ("1.000000", "1.000000")
    pruned = [row for row in rows if row["budget"] == "0.2"]
    # The first token of an answer still follows from the whole prompt.
    assert all((float(row["kl"]) > 0) == (row["answer_tokens"] != "1") for row in pruned)
    assert any(row["first_diff"] for row in pruned) and "0" not in {row["first_diff"] for row in pruned}


def test_the_same_command_gives_the_same_bytes(home, run, made, tmp_path):
    status, out, err = run(*evaluate_arguments(home, tmp_path / "again"))
    assert status == 0
    assert "48 rows in results.csv, summary.md, run.json, 5 drawings" in out
    assert "evaluating 6 samples, 21 units of work, 0 of them done before" in err and "42/42" in err
    for name in ("results.csv", "summary.md", "results.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes()
    assert {path.name for path in made.iterdir()} == {"results.csv", "results.jsonl", "summary.md", "run.json"} | {
        f"data-{figure}.png" for figure in ("ppl", "kl", "rouge", "accuracy", "same")
    }


def test_the_batch_size_changes_nothing_that_can_be_seen(home, run, made, tmp_path):
    assert run(*evaluate_arguments(home, tmp_path / "one", "--batch-size", 1))[0] == 0
    for one, other in zip(table(tmp_path / "one"), table(made), strict=True):
        for column in ("nll", "kl", "rouge_l", "accuracy", "kept", "kept_end", "first_diff"):
            if one["method"] != "noise" and column != "nbytes" and (one[column] or other[column]):
                assert float(one[column]) == pytest.approx(float(other[column]), abs=2e-5), column


def test_killed_and_resumed_gives_the_same_bytes(home, run, made, tmp_path, monkeypatch):
    out, add, added = tmp_path / "killed", Results.add, []

    def add_five(self, unit, rows):
        if len(added) == 5:
            raise KeyboardInterrupt
        added.append(unit)
        add(self, unit, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "add", add_five)
        status, _, err = run(*evaluate_arguments(home, out))
    assert status == 130 and "5 units are kept; go on with --resume" in err
    assert [path.name for path in out.iterdir()] == ["results-0.jsonl"]

    status, _, err = run(*evaluate_arguments(home, out))
    assert status == 2 and "is not empty; give another folder, or --resume" in err
    for more, message in [
        (["--batch-size", 3], "whose batch_size was 2; this one has 3"),
        (["--metrics", "ppl"], "whose metrics was"),
        (["--seed", 1], "whose seed was 0"),
        (["--samples", 5], "whose data was"),
        (["--as-published"], "whose as_published was False"),
        (["--dtype", "bfloat16"], "whose config was"),
    ]:
        status, _, err = run(*evaluate_arguments(home, out, "--resume", *more))
        assert status == 2 and message in err and "Take another --out" in err

    status, _, err = run(*evaluate_arguments(home, out, "--resume"))
    assert status == 0 and "5 of them done before" in err
    for name in ("results.csv", "summary.md", "results.jsonl"):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    status, _, err = run(*evaluate_arguments(home, out, "--resume"))
    assert status == 0 and "21 of them done before" in err
    assert (out / "results.csv").read_bytes() == (made / "results.csv").read_bytes()


def test_methods_and_budgets_can_be_added_later(home, run, made, tmp_path):
    out = tmp_path / "out"
    few = ["--methods", "online", "--budgets", "0.2"]
    assert run(*evaluate_arguments(home, out, *few))[0] == 0
    status, _, err = run(*evaluate_arguments(home, out, "--resume"))
    assert status == 0 and "6 of them done before" in err
    assert (out / "results.csv").read_bytes() == (made / "results.csv").read_bytes()
    # With another profile under the same name, what prefixkv gave before is not taken for its results.
    shutil.copy(home / "p.safetensors", tmp_path / "p.safetensors")
    PrefixProfile([0.2, 1.0], [[0.2] * 3, [1.0] * 3]).save(tmp_path / "p.safetensors")
    status, _, err = run(*evaluate_arguments(home, out, "--resume", "--profile", tmp_path / "p.safetensors"))
    assert status == 0 and "15 of them done before" in err


def _one_of_two(rank, port, arguments):
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    torch.set_num_threads(1)
    sys.exit(main([str(argument) for argument in arguments]))


def test_two_processes_give_the_same_bytes(home, made, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    arguments = evaluate_arguments(home, tmp_path / "two")
    processes = [fork.Process(target=_one_of_two, args=(rank, port, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    for name in ("results.csv", "summary.md", "results.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (made / name).read_bytes()


def test_only_what_is_asked_for_is_measured(home, run, tmp_path):
    status, *_ = run(*evaluate_arguments(home, tmp_path / "ppl", "--metrics", "ppl", "--samples", 2))
    assert status == 0
    rows = table(tmp_path / "ppl")
    assert {row["method"] for row in rows} == {"full", "prefixkv", "online", "h2o"}
    assert all(row["ppl"] and not row["kl"] + row["rouge_l"] + row["accuracy"] + row["first_diff"] for row in rows)
    status, *_ = run(*evaluate_arguments(home, tmp_path / "accuracy", "--metrics", "accuracy", "--samples", 2))
    assert status == 0
    assert all(row["accuracy"] and not row["ppl"] + row["kl"] + row["rouge_l"] for row in table(tmp_path / "accuracy"))
    names = {path.name for path in (tmp_path / "accuracy").iterdir() if path.suffix == ".png"}
    assert names == {"data-accuracy.png", "data-same.png"}


def test_as_published_changes_positions_and_the_baselines_that_know_it(home, run, made, tmp_path):
    more = ["--as-published", "--methods", "online,elastic,h2o"]
    assert run(*evaluate_arguments(home, tmp_path / "out", *more))[0] == 0
    before = {(row["sample"], row["method"], row["budget"]): row for row in table(made)}
    rows = [row for row in table(tmp_path / "out") if row["method"] == "online"]
    assert [row["nll"] == before[row["sample"], "online", row["budget"]]["nll"] for row in rows if row["budget"] == "1"]
    longer = [row for row in rows if row["budget"] == "0.2" and int(row["answer_tokens"]) > 1]
    assert all(row["nll"] != before[row["sample"], "online", "0.2"]["nll"] for row in longer)
    assert "As published" in (tmp_path / "out/summary.md").read_text()


def test_run_json_holds_command_and_versions(home, made):
    run = json.loads((made / "run.json").read_text())
    words = shlex.split(run["command"])
    assert words == ["prefixkv", *map(str, evaluate_arguments(home, made))]
    assert {"prefixkv-cache", "torch", "transformers", "python"} <= set(run["versions"])
    assert run["seed"] == 0 and len(run["model"]["weights"]) == 16


def test_the_summary_says_what_the_table_says(made):
    text = (made / "summary.md").read_text()
    rows = table(made)

    def mean(method, budget, column):
        return np.mean([float(r[column]) for r in rows if (r["method"], r["budget"]) == (method, budget)])

    for title, column, digits in [("ROUGE-L against", "rouge_l", 3), ("Accuracy", "accuracy", 3), ("KL div", "kl", 4)]:
        part = text.split(f"### {title}")[1].split("###")[0]
        for method in ("prefixkv", "online", "h2o"):
            line = next(line for line in part.splitlines() if line.startswith(f"| `{method}`"))
            cell = line.split("|")[2].split()[0]
            assert cell == f"{mean(method, '0.2', column) + 0.0:.{digits}f}"
    nll = sum(float(row["nll"]) for row in rows if row["method"] == "full")
    tokens = sum(int(row["answer_tokens"]) for row in rows if row["method"] == "full")
    assert f"full cache: {math.exp(nll / tokens):.3f} [" in text
    difference = mean("online", "0.2", "kl") - mean("prefixkv", "0.2", "kl")
    part = text.split("Paired difference of KL")[1]
    assert next(line for line in part.splitlines() if line.startswith("| `online`")).split("|")[2].split()[0] == (
        f"{difference:.4f}"
    )
    assert "noise (two sampled runs of the full cache" in text


def test_differences_and_unequal_memory_are_marked():
    rows = []
    for index in range(40):
        blank = {
            "sample": str(index), "task": "t", "kind": "", "answer_tokens": 1, "prompt_tokens": 9, "nll": None,
            "kl": None, "first_diff": None, "rouge_l": None, "kept": 0.5, "kept_end": 0.5, "nbytes": 1,
        }  # fmt: skip
        for method, budget, accuracy in [("full", 1.0, 1.0), ("a", 0.5, 0.5), ("b", 0.5, 0.9), ("c", 0.5, index % 2)]:
            kept = 0.504 if method == "b" else budget
            rows.append({**blank, "method": method, "budget": budget, "accuracy": float(accuracy), "kept": kept})
    tasks = tasks_of(rows, ["a", "b", "c"], [0.5], 0)
    text = summary_text(tasks, "a", title="x", as_published=False)
    assert "| `a` | 0.5000 (+0.0%) |" in text and "| `b` | 0.5040 (+0.8%) ! |" in text
    assert "Off by more than 0.5%: `b` at 0.5 (+0.8%). A prompt has 9 tokens on average" in text
    assert "| `b` | 0.400 [0.400, 0.400] * |" in text
    assert re.search(r"\| `c` \| 0.000 \[-0.1\d+, 0.1\d+\] \|", text)


BAD = [
    (["--methods", "best"], "there is no method 'best'"),
    (["--methods", "online:colour=red"], "'online:colour=red' has no option 'colour'"),
    (["--methods", "full"], "names the full cache only"),
    (["--budgets", "0"], "budget is 0.0"),
    (["--budgets", "0.5,1.5"], "budget is 1.5"),
    (["--budgets", "a"], "invalid budgets"),
    (["--metrics", "bleu"], "there is no metric 'bleu'; there are ppl, rouge, accuracy, kl"),
    (["--metrics", ","], "names none"),
    (["--reference", "snapkv"], "--reference is 'snapkv', which is not among the methods"),
    (["--profile", "none"], "no bundled profile"),
    (["--data", "none.json"], "there is no data file 'none.json'"),
    (["--images", "none"], "there is no folder 'none' of images"),
    (["--samples", "0"], "--samples is 0"),
    (["--samples", "some"], "invalid count"),
    (["--batch-size", "0"], "--batch-size and --max-new-tokens must be at least 1"),
    (["--max-new-tokens", "0"], "--batch-size and --max-new-tokens must be at least 1"),
    (["--split", "test"], "--split is for the drawn tasks (scenes, boards)"),
    (["--kinds", "size"], "--kinds is for the drawn tasks"),
    (["--task", "questions"], "--task is for the drawn tasks"),
    (["--data", "scenes"], "--images is for data files"),
    (["--colour", "red"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_is_one_line_and_status_2_before_the_model_loads(home, run, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr("prefixkv_cache.loading.load_model", lambda *_, **__: pytest.fail("loaded the model"))
    status, out, err = run(*evaluate_arguments(home, tmp_path / "out", *more))
    assert status == 2 and out == ""
    assert message in err
    assert len([line for line in err.splitlines() if "error" in line or line.startswith("prefixkv evaluate:")]) == 1
    assert not list(tmp_path.iterdir())


def test_bad_data_is_one_line_and_status_2(home, run, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = run(*evaluate_arguments(home, tmp_path / "file"))
    assert status == 2 and "which is a file; give a folder" in err
    records = json.loads((home / "data.json").read_text())
    del records[3]["conversations"][1]
    (tmp_path / "data.json").write_text(json.dumps(records))
    more = ["--data", tmp_path / "data.json"]
    status, _, err = run(*evaluate_arguments(home, tmp_path / "out", *more))
    assert status == 2 and "1 of 6 samples, such as 'r3', have no reference answer, which ppl, accuracy, kl need" in err
    records[2]["image"] = "none.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    status, _, err = run(*evaluate_arguments(home, tmp_path / "out", *more, "--metrics", "rouge"))
    assert status == 2 and "there is no image" in err and "1 of 6 records" in err
    status, _, err = run(*evaluate_arguments(home, tmp_path / "out", "--model", tmp_path))
    assert status == 2 and "cannot load" in err
    PrefixProfile([0.5], [[0.5] * 2]).save(tmp_path / "two.safetensors")
    status, _, err = run(*evaluate_arguments(home, tmp_path / "out", "--profile", tmp_path / "two.safetensors"))
    assert status == 2 and "method 'prefixkv': the profile of" in err and "has 2 layers, but the model has 3" in err
    arguments = [
        a for a in evaluate_arguments(home, tmp_path / "out") if a not in ("--profile", home / "p.safetensors")
    ]
    status, _, err = run(*arguments)
    assert status == 2 and "'prefixkv' needs a profile, and none is bundled for this model" in err
    assert not (tmp_path / "out").exists()


def test_samples_without_answers_can_be_compared_with_the_full_cache(home, run, tmp_path):
    records = json.loads((home / "data.json").read_text())
    for record in records:
        del record["conversations"][1]
    (tmp_path / "data.json").write_text(json.dumps(records))
    more = ["--data", tmp_path / "data.json", "--metrics", "rouge", "--samples", 3]
    assert run(*evaluate_arguments(home, tmp_path / "out", *more))[0] == 0
    assert all(row["rouge_l"] and not row["accuracy"] for row in table(tmp_path / "out"))


@pytest.mark.parametrize(("module", "message"), [("rouge_score", "prefixkv-cache[evaluate]"), ("matplotlib", "")])
def test_without_the_extras(home, run, tmp_path, monkeypatch, module, message):
    from prefixkv_cache.evaluate import metrics

    metrics._scorer.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    status, out, err = run(*evaluate_arguments(home, tmp_path / "out", "--samples", 1, "--methods", "online"))
    if message:
        assert status == 2 and message in err and not list(tmp_path.iterdir())
    else:
        assert status == 0 and "no drawings, which need matplotlib" in out


def test_distributions_that_would_not_fit_are_refused(home, run, tmp_path, monkeypatch):
    monkeypatch.setattr("prefixkv_cache.evaluate.measure.MAX_REFERENCE_BYTES", 100)
    status, _, err = run(*evaluate_arguments(home, tmp_path / "out"))
    assert status == 2 and "take a smaller --batch-size, or leave kl out of --metrics" in err


def test_help(run):
    status, out, _ = run("evaluate", "--help")
    assert status == 0 and out.startswith("usage: prefixkv evaluate")


def test_the_study_in_small(run, tmp_path, monkeypatch):
    """What `make study-smoke` runs: every method through the whole of it, on the repo's own model."""
    monkeypatch.chdir(ROOT)
    line = re.search(r"^STUDY_SMOKE := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    status, *_ = run("evaluate", *shlex.split(line), "--out", tmp_path / "study")
    assert status == 0
    rows = table(tmp_path / "study")
    methods = {row["method"].partition(":")[0] for row in rows}
    assert methods == {*NAMES, "noise"}
    assert {row["task"] for row in rows} == {"descriptions", "questions"}
    kept = [float(row["kept"]) / float(row["budget"]) for row in rows if row["kept"]]
    assert min(kept) > 0.9 and max(kept) < 1.1
    full = [float(row["accuracy"]) for row in rows if row["method"] == "full"]
    assert np.mean(full) > 0.9


def test_drawings_show_something(made, tmp_path):
    rows = [json.loads(line) for line in (made / "results.jsonl").read_text().splitlines()[1:]]
    tasks = tasks_of([row for unit in rows for row in unit["rows"]], ["online"], [0.2, 1.0], 0)
    paths = draw_all(tasks, tmp_path)
    assert len(paths) == 5 and all(path.stat().st_size > 5000 for path in paths)


def test_a_batch_is_its_members(home):
    """Padding, rows of other lengths and answers that end earlier change nothing in a sample's row."""
    model, processor = load_model(str(home / "model"), device="cpu")
    samples = file_samples(str(home / "data.json"), str(home / "images"), None, n=None, seed=0, limit=8)
    methods = parse_methods("online:distance=2,elastic,snapkv:window=4", as_published=True)
    together = Batch(model, processor, samples, Plan(METRICS, shift_positions=True))
    for method in methods:
        rows = together.method(method, 0.3)
        for sample, row in zip(samples, rows, strict=True):
            alone = Batch(model, processor, [sample], Plan(METRICS, shift_positions=True)).method(method, 0.3)[0]
            for column in ("nll", "kl", "kept", "kept_end", "rouge_l", "accuracy"):
                assert alone[column] == pytest.approx(row[column], abs=1e-4), (method.name, column)
            assert alone["text"] == row["text"] and alone["first_diff"] == row["first_diff"]


def test_a_sample_knows_no_model():
    sample = Sample("a", "t", "", "what?", lambda: [], 0, "x", lambda text: 0.5, 3)
    assert sample.accuracy("anything") == 0.5
