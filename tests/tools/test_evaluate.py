"""The evaluation: its loop and its figures against plain loops written apart from it; the command as people run it."""

import csv
import json
import math
import multiprocessing
import os
import re
import shlex
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
from prefixkv_cache import PrefixKVCache, PrefixProfile, methods
from prefixkv_cache.cli import main
from prefixkv_cache.profiles.bundled import bundled_dir
from prefixkv_cache.tools.demo import boards, scenes
from prefixkv_cache.tools.evaluate.measure import Batch, first_difference
from prefixkv_cache.tools.evaluate.methods import parse_candidates
from prefixkv_cache.tools.evaluate.report import FIGURES, summary_text, tasks_of
from prefixkv_cache.tools.evaluate.results import Results, Unit
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
        "same": 1, "first_diff": None, "right": 1, "there": None, "stated": None, "hits": None, "pairs": 50.0,
        "pairs_end": 60.0, "kept": 0.5, "kept_end": 0.55, "nbytes": 1,
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
    assert "| method | held | held at the end | kl | ppl | agreement | right |" in fraction
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
    answers = "{asked} {answer}</s>"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": re.findall(r": \w|.", text, flags=re.DOTALL)}

    def apply_chat_template(self, messages, add_generation_prompt=False):
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


# What is kept of an interrupted run


def test_results_survive_and_belong_to_one_run(tmp_path):
    first, second = Results(tmp_path, {"seed": 0}, 0), Results(tmp_path, {"seed": 0}, 1)
    unit, other, third = Unit(0, "a", 0.5), Unit(1, "b", 128, "digest"), Unit(2, "b", 128)
    first.add(unit, [{"nll": 1 / 3}])
    second.add(other, [{"nll": None}])
    with (tmp_path / "results-1.jsonl").open("a") as file:
        file.write('\n{"batch":7,"meth')  # killed in the middle of a line
    again = Results(tmp_path, {"seed": 0}, 1)
    again.read()
    assert again.units == {unit: [{"nll": 1 / 3}], other: [{"nll": None}]}
    again.add(third, [])
    again = Results(tmp_path, {"seed": 0})
    again.read()
    assert set(again.units) == {unit, other, third}
    with pytest.raises(ValueError, match=r"whose seed was 0; this one has 1"):
        Results(tmp_path, {"seed": 1}).read()
    (tmp_path / "results-0.jsonl").write_text("no JSON\n")
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
    answers = ["a red circle .", "a blue square", "there is a green circle in the picture .", "red", "a circle ?",
               "blue ."]  # fmt: skip
    records = [
        {"id": f"r{index}", "image": name, "conversations": [
            {"from": "human", "value": text}, {"from": "gpt", "value": answer}]}
        for index, (name, text, answer) in enumerate(zip(names, said, answers, strict=True))
    ]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(records))
    for record in records[::2]:
        del record["conversations"][1]
    (folder / "half.json").write_text(json.dumps(records))
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


METHODS = ("profile", "snapkv", "h2o")


def command(home, out, *more):
    return ["evaluate", "--model", home / "model", "--data", home / "data.json", "--images", home / "images",
            "--out", out, "--methods", ",".join(METHODS), "--budgets", "0.2,1.0,20", "--batch-size", "2",
            "--max-new-tokens", "8", "--profile", home / "p.safetensors", *more]  # fmt: skip


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    """The folder of one whole run."""
    out = tmp_path_factory.mktemp("made") / "run"
    assert main([str(argument) for argument in command(home, out)]) == 0
    return out


def table(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def same_files(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in ("results.csv", "summary.md"))


def test_the_table_has_a_row_for_each_sample_method_and_budget(made):
    rows = table(made)
    cells = [("full", "1")] + [(method, budget) for method in METHODS for budget in ("0.2", "1", "20")]
    assert [(row["sample"], row["method"], row["budget"]) for row in rows] == [
        (f"r{index}", *cell) for index in range(6) for cell in cells
    ]
    for row in rows:
        prompt, pairs, answer = int(row["prompt_tokens"]), float(row["pairs"]), int(row["answer_tokens"])
        assert row["task"] == "data" and answer > 0 and row["right"] in "01" and not row["there"]
        assert float(row["ppl"]) == pytest.approx(math.exp(float(row["nll"]) / answer), rel=1e-5)
        budget = float(row["budget"])
        assert pairs == pytest.approx(budget if budget > 1 else budget * prompt, abs=1)
        assert float(row["kept"]) == pytest.approx(pairs / prompt, abs=1e-6)
        assert float(row["kept_end"]) == pytest.approx(float(row["pairs_end"]) / (prompt + answer - 1), abs=1e-6)
        if row["method"] == "snapkv":  # nothing leaves
            assert float(row["pairs_end"]) == pytest.approx(pairs + answer - 1)


def test_a_method_that_keeps_all_is_the_full_cache(made):
    rows = table(made)
    full = {row["sample"]: row for row in rows if row["method"] == "full"}
    kept_all = [row for row in rows if row["budget"] == "1" and row["method"] != "full"]
    assert len(kept_all) == 18
    for row in kept_all:
        assert float(row["ppl"]) == pytest.approx(float(full[row["sample"]]["ppl"]), rel=1e-5)
        assert float(row["kl"]) < 1e-6 and (row["same"], row["first_diff"]) == ("1", "")
        assert (row["kept"], row["kept_end"]) == ("1.000000", "1.000000")
    pruned = [row for row in rows if row["budget"] == "0.2"]
    # The first token of an answer still follows from the whole prompt.
    assert all((float(row["kl"]) > 1e-6) == (row["answer_tokens"] != "1") for row in pruned)
    assert any(row["first_diff"] for row in pruned) and "0" not in {row["first_diff"] for row in pruned}
    assert all((row["same"] == "1") == (row["first_diff"] == "") for row in rows)


def test_the_same_command_gives_the_same_bytes(home, run, made, tmp_path):
    status, out, err = run(*command(home, tmp_path / "again"))
    assert status == 0 and same_files(tmp_path / "again", made)
    assert "60 rows in results.csv, summary.md, run.json, 1 drawings" in out
    assert "evaluating 6 samples, 30 units of work, 0 of them done before" in err and "30/30" in err
    names = {"results.csv", "results-0.jsonl", "summary.md", "run.json", "data.png"}
    assert {path.name for path in made.iterdir()} == names
    assert (made / "data.png").stat().st_size > 5000


def test_killed_and_resumed_gives_the_same_bytes(home, run, made, tmp_path, monkeypatch):
    out, add, added = tmp_path / "killed", Results.add, []

    def add_five(self, unit, rows):
        if len(added) == 5:
            raise KeyboardInterrupt
        added.append(unit)
        add(self, unit, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "add", add_five)
        status, _, err = run(*command(home, out))
    assert status == 130 and "5 units are kept; go on with --resume" in err

    status, _, err = run(*command(home, out))
    assert status == 2 and "is not empty; give another folder, or --resume" in err
    for more, message in [
        (["--batch-size", 3], "whose batch_size was 2; this one has 3"),
        (["--samples", 5], "whose data was"),
        (["--dtype", "bfloat16"], "whose config was"),
    ]:
        status, _, err = run(*command(home, out, "--resume", *more))
        assert status == 2 and message in err

    status, _, err = run(*command(home, out, "--resume"))
    assert status == 0 and "5 of them done before" in err and same_files(out, made)


def test_methods_and_budgets_can_be_added_later(home, run, made, tmp_path):
    out = tmp_path / "out"
    assert run(*command(home, out, "--methods", "snapkv", "--budgets", "0.2"))[0] == 0
    status, _, err = run(*command(home, out, "--resume"))
    assert status == 0 and "6 of them done before" in err and same_files(out, made)
    # With another profile under the same name, what it gave before is not taken for its results.
    PrefixProfile([0.2, 1.0], [[0.2] * 3, [1.0] * 3]).save(tmp_path / "p.safetensors")
    status, _, err = run(*command(home, out, "--resume", "--profile", tmp_path / "p.safetensors"))
    assert status == 0 and "21 of them done before" in err


def _one_of_two(rank, port, arguments):
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    torch.set_num_threads(1)
    sys.exit(main([str(argument) for argument in arguments]))


def test_two_processes_give_the_same_bytes(home, made, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    arguments = command(home, tmp_path / "two")
    processes = [fork.Process(target=_one_of_two, args=(rank, port, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    assert same_files(tmp_path / "two", made)


def test_samples_without_answers_have_the_full_caches(home, run, made, tmp_path):
    assert run(*command(home, tmp_path / "out", "--data", home / "half.json"))[0] == 0
    for one, other in zip(table(tmp_path / "out"), table(made), strict=True):
        if int(one["sample"][1:]) % 2:
            assert float(one["kl"]) == pytest.approx(float(other["kl"]), abs=1e-5)
        else:
            assert one["right"] == "" and one["kl"] and one["same"] == other["same"]
    units = [json.loads(line) for line in (tmp_path / "out/results-0.jsonl").read_text().splitlines()[1:]]
    processor = load_model(str(home / "model"), device="cpu")[1]
    full = {row["sample"]: row for unit in units for row in unit["rows"] if row["method"] == "full"}
    own = len(processor.tokenizer(full["r0"]["text"], add_special_tokens=False)["input_ids"])
    assert full["r0"]["answer_tokens"] in (own, own + 1)  # the end-of-text token is one of the text
    assert "| right |" not in (tmp_path / "out/summary.md").read_text()


def test_run_json_holds_command_and_versions(home, made):
    run = json.loads((made / "run.json").read_text())
    assert shlex.split(run["command"]) == ["prefixkv", *map(str, command(home, made))]
    assert {"prefixkv-cache", "torch", "transformers", "python"} <= set(run["versions"])
    assert len(run["model"]["weights"]) == 16


def test_the_summary_says_what_the_table_says(made):
    text, rows = (made / "summary.md").read_text(), table(made)
    part, values = text.split("\n### 0.2")[1].split("\n###")[0], {}
    for method in METHODS:
        of_method = [row for row in rows if (row["method"], row["budget"]) == (method, "0.2")]
        means = {
            name: np.mean([float(row[name]) for row in of_method]) for name in ("pairs", "pairs_end", "kl", "same")
        }
        line = next(line for line in part.splitlines() if line.startswith(f"| `{method}`"))
        held, end, kl, ppl, same, _ = [cell.split()[0] for cell in line.split("|")[2:-1]]
        tokens, nll = (sum(float(row[name]) for row in of_method) for name in ("answer_tokens", "nll"))
        assert (held, end) == (f"{means['pairs']:.1f}", f"{means['pairs_end']:.1f}")
        assert (kl, same) == (f"{means['kl']:.4f}", f"{means['same']:.3f}")
        assert float(ppl) == pytest.approx(math.exp(nll / tokens), rel=1e-3)
        values[method] = means["kl"]
    paired = part.split("minus `profile`:")[1]
    line = next(line for line in paired.splitlines() if line.startswith("| `snapkv`"))
    assert float(line.split("|")[2].split()[0]) == pytest.approx(values["snapkv"] - values["profile"], abs=1e-4)


BAD = [
    (["--methods", "best"], "there is no method 'best'"),
    (["--methods", "full"], "names nothing to compare"),
    (["--budgets", "0"], "budget"),
    (["--budgets", "0.5,1.5"], "budget"),
    (["--budgets", "a"], "budget"),
    (["--reference", "random"], "--reference is 'random', which is not among the methods"),
    (["--profile", "none"], "no bundled profile"),
    (["--data", "none.json"], "there is no data file 'none.json'"),
    (["--images", "none"], "there is no folder 'none' of images"),
    (["--samples", "0"], "--samples"),
    (["--batch-size", "0"], "--batch-size"),
    (["--split", "test"], "--split is for the drawn tasks (scenes, boards)"),
    (["--data", "scenes"], "--images is for data files"),
    (["--colour", "red"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_is_one_line_and_status_2_before_the_model_loads(home, run, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr("prefixkv_cache.tools.loading.load_model", lambda *_, **__: pytest.fail("loaded the model"))
    status, out, err = run(*command(home, tmp_path / "out", *more))
    assert status == 2 and out == "" and message in err
    assert len([line for line in err.splitlines() if "error" in line or line.startswith("prefixkv evaluate:")]) == 1
    assert not list(tmp_path.iterdir())


def test_bad_data_is_one_line_and_status_2(home, run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    records = json.loads((home / "data.json").read_text())
    records[2]["image"] = "none.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    PrefixProfile([0.5], [[0.5] * 2]).save(tmp_path / "two.safetensors")
    for more, messages in [
        (["--out", tmp_path / "file"], ["which is a file; give a folder"]),
        (["--data", tmp_path / "data.json"], ["there is no image", "1 of 6 records"]),
        (["--model", tmp_path], ["cannot load"]),
        (["--profile", tmp_path / "two.safetensors"], ["method 'profile': ", "2 layers", "3"]),
    ]:
        status, _, err = run(*command(home, tmp_path / "out", *more))
        assert status == 2 and all(message in err for message in messages)
    monkeypatch.setattr("prefixkv_cache.tools.evaluate.measure.MAX_REFERENCE_BYTES", 100)
    status, _, err = run(*command(home, tmp_path / "out"))
    assert status == 2 and "take a smaller --batch-size" in err
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_there_are_no_drawings(home, run, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, _ = run(*command(home, tmp_path / "out", "--samples", 1, "--methods", "snapkv"))
    assert status == 0 and "no drawings" in out


def test_the_study_in_small(run, tmp_path):
    """Every method through the whole of it, on the repo's own model."""
    more = ["--samples", 2, "--budgets", "0.2,0.5", "--kinds", "object,colour,size", "--methods"]
    names = ",".join(methods.NAMED)
    out = tmp_path / "study"
    data = ["--model", ROOT / "models/scene-llava", "--data", "scenes", "--out", out]
    assert run("evaluate", *data, *more, names)[0] == 0
    rows = table(out)
    assert {row["method"] for row in rows} == {"full", *methods.NAMED}
    assert {row["task"] for row in rows} == {"descriptions", "questions"}
    kept = [float(row["kept"]) / float(row["budget"]) for row in rows]
    assert min(kept) > 0.9 and max(kept) < 1.1
    described = [row for row in rows if row["task"] == "descriptions"]
    assert all(int(row["hits"]) <= min(int(row["stated"]), int(row["there"])) for row in described)
    assert all(row["right"] == "1" for row in rows if row["method"] == "full")
    assert "| precision | recall |" in (out / "summary.md").read_text()


def test_a_batch_is_its_members(home):
    """Padding, rows of other lengths and answers that end earlier change nothing in a sample's row."""
    model, processor = load_model(str(home / "model"), device="cpu")
    samples = file_samples(str(home / "half.json"), str(home / "images"), None, n=None, seed=0, limit=8)
    together = Batch(model, processor, samples)
    for candidate in parse_candidates("prefixkv:distance=2,elastic,snapkv:queries=4,default"):
        rows = together.candidate(candidate, 0.3)
        for sample, row in zip(samples, rows, strict=True):
            alone = Batch(model, processor, [sample]).candidate(candidate, 0.3)[0]
            for column in ("nll", "kl", "pairs", "pairs_end", "kept_end", "answer_tokens"):
                assert alone[column] == pytest.approx(row[column], abs=1e-4), (candidate.name, column)
            assert alone["text"] == row["text"] and alone["first_diff"] == row["first_diff"]
