"""The text tasks: prose, two splits that share nothing, and cases that say what they ask."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import smollm
from prefixkv_cache import PrefixKVCache, methods
from prefixkv_cache.profiles.profile import PrefixProfile
from prefixkv_cache.tools.tasks.passages import SPLITS, digest, paragraphs, passages
from prefixkv_cache.tools.tasks.tasks import TASKS, cases


class Words:
    """A tokenizer of characters, with a chat template that can be read."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(char) for char in text]}

    def apply_chat_template(self, turns, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"


def texts(case):
    return ["".join(map(chr, part)) for part in case.tokens(Words())]


def test_there_are_enough_passages_and_the_splits_share_no_paragraph():
    choose, report = map(passages, SPLITS)
    assert min(len(choose), len(report)) >= 30 and abs(len(choose) - len(report)) <= 1
    found = list(paragraphs())
    assert len(set(found)) == len(found)
    assert not set(choose) & set(report)


def test_passages_are_sentences():
    for split in SPLITS:
        for passage in passages(split):
            assert passage.endswith(".") and "  " not in passage and "::=" not in passage


def test_nothing_is_random():
    assert cases("lookup", "report", 3) == cases("lookup", "report", 3)
    assert len(digest()) == 8


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", (1700, 8000))
def test_cases(task, length):
    found = cases(task, "choose", 4, length)
    assert len(set(found)) == 4 and all(len(case.prompt) >= length / 3 for case in found)


def test_a_lookup_asks_for_a_code_that_is_in_its_prompt():
    for case in cases("lookup", "choose", 20):
        prompt, behind, answer = texts(case)
        assert prompt.startswith("<user>") and prompt.endswith("?<assistant>")
        city = prompt.rpartition("code of ")[2].partition("?")[0]
        assert behind == f"The secret code of {city} is " and f"{behind}{answer}" in prompt
        assert len(answer) == 5 and prompt.count("The secret code of") == 3


def test_the_second_turn_comes_behind_what_is_pruned():
    case = cases("turn2", "report", 1)[0]
    prompt, behind, answer = texts(case)
    assert "What is the secret code" not in prompt and prompt.endswith("<assistant>")
    assert behind.startswith("I have read it.<user>What is the secret code of ") and answer in prompt


def test_all_codes_are_asked_for_and_are_in_the_prompt():
    for case in cases("extract", "choose", 5):
        prompt, behind, answer = texts(case)
        said = dict(line.split(": ") for line in (behind + answer).split("\n"))
        assert len(said) == 3 and all(f"The secret code of {city} is {code}" in prompt for city, code in said.items())
        assert f"List the secret codes of {', '.join(list(said)[:2])} and {list(said)[2]}." in prompt


def test_pairs_are_lines_of_words_and_numbers():
    for case in cases("pairs", "choose", 5):
        prompt, behind, answer = texts(case)
        lines = dict(line.split(": ") for line in prompt.removeprefix("<user>").partition("\n\n")[0].split("\n"))
        assert len(lines) > 20 and lines[behind.split()[3]] == answer


def test_a_summary_has_its_instruction_first_and_the_model_answers():
    prompt, behind, answer = texts(cases("summary", "report", 1)[0])
    assert prompt.startswith("<user>Summarize") and not behind and not answer


def test_a_continuation_is_the_passage():
    prompt, behind, answer = texts(cases("continuation", "report", 1)[0])
    assert prompt + answer == passages("report")[0] and not behind


@pytest.mark.parametrize(
    ("task", "split", "number"), [("poem", "choose", 1), ("lookup", "test", 1), ("lookup", "report", 999)]
)
def test_what_is_not_there_is_refused(task, split, number):
    with pytest.raises(ValueError, match=f"{task if task == 'poem' else split}"):
        cases(task, split, number)


# The study, which measures on these tasks.


@pytest.fixture(scope="module")
def study():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "study.py"
    spec = importlib.util.spec_from_file_location("study", path)
    module = sys.modules["study"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["default", "snapkv", "h2o", "prefixkv", "keydiff", "pyramidkv", "streaming"])
def test_the_study_measures_what_a_cache_costs(study, name):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompt, given = torch.randint(0, 60, (1, 90)), (torch.tensor([[3, 4]]), torch.tensor([[5, 6, 7, 8]]))
    case = study.answered(model, {"input_ids": prompt}, given, [methods.NAMED[name]])
    for budget, cost in zip(study.BUDGETS, study.costs(case, {name: (methods.NAMED[name], None)})[name], strict=True):
        method = methods.NAMED[name].replace(evict="fixed-point", distance=None)  # what leaves later is not measured
        cache, fed = PrefixKVCache(None, budget, method=method, config=config), torch.tensor([[3, 4, 5, 6, 7]])
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            pruned = model(fed, past_key_values=cache).logits[0, 1:].log_softmax(-1)
            full = model(torch.cat([prompt, fed], 1)).logits[0, -4:].log_softmax(-1)
        divergence = (full.exp() * (full - pruned)).sum(-1).mean().item()
        assert cost["kl"] == pytest.approx(divergence, abs=1e-5) and cost["kl"] > 0
        assert cost["held"] == pytest.approx(budget, abs=0.03)


@pytest.mark.slow
@smollm.needs_smollm
def test_the_bundled_profile_of_smollm_answers_a_lookup_at_a_fifth(study):
    model, tokenizer = smollm.load()
    profile = PrefixProfile.load("smollm2-135m-instruct")
    prompt, *given = (torch.tensor([part]) for part in cases("lookup", "report", 1)[0].tokens(tokenizer))
    case = study.answered(model, {"input_ids": prompt}, tuple(given), [profile.method])
    found = study.costs(case, {"own": (profile.method, profile), "uniform": (profile.method, None)})
    own, uniform = found["own"][1], found["uniform"][1]
    assert own["full_exact"] == 1.0 and own["kl"] < 0.5 * uniform["kl"]
