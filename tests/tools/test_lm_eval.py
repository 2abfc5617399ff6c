"""EleutherAI's harness with our cache, on SmolLM2 and a task file of ours; skipped where the two are not installed."""

import json
import subprocess
import sys

import pytest
import torch

import smollm
from prefixkv_cache import PrefixKVCache

pytest.importorskip("lm_eval", reason="needs the harness: pip install '.[lm-eval]'")
pytestmark = [smollm.needs_smollm, pytest.mark.slow]

FACTS = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid. "
SOUNDS = "A cat says meow. A dog says woof. A cow says moo. "
ASKED = [
    (FACTS * 4 + "Question: What is the capital of Italy? Answer:", [" Rome", " Paris", " Madrid is the one"]),
    (SOUNDS * 3 + "Question: What does a dog say? Answer:", [" woof", " meow", " a long moo"]),
    ("Two and two are", [" four"]),
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: {target}
target_delimiter: ""
{more}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def make():
    """Our model of the harness, or another of its classes, on one SmolLM2."""
    from lm_eval.models.huggingface import HFLM

    from prefixkv_cache.tools.lm_eval import PrefixKVLM

    model, tokenizer = smollm.load()
    given = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 2}
    return lambda plain=False, **options: HFLM(**given) if plain else PrefixKVLM(**given, **options)


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def scored(lm):
    pairs = [(context, choice) for context, choices in ASKED for choice in choices]
    return lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)


@torch.no_grad()
def slowly(budget, hold_back, **options):
    """Each request alone: its context is fed and pruned, then token after token of what follows."""
    model, tokenizer = smollm.load()
    found = []
    for context, choices in ASKED:
        for choice in choices:
            ids, whole = (tokenizer(text)["input_ids"] for text in (context, context + choice))
            assert whole[: len(ids)] == ids
            prompt, rest = whole[: len(ids) - hold_back], whole[len(ids) - hold_back :]
            cache = PrefixKVCache(None, budget, config=model.config, **options)
            logits = model(torch.tensor([prompt]), past_key_values=cache).logits[:, -1]
            total, greedy = 0.0, True
            for step, token in enumerate(rest):
                if step >= hold_back:
                    total += logits.log_softmax(-1)[0, token].item()
                    greedy &= logits.argmax().item() == token
                logits = model(torch.tensor([[token]]), past_key_values=cache).logits[:, -1]
            found.append((total, greedy))
    return found


def assert_equal(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=2e-3)


def test_with_everything_kept_the_scores_are_the_harness_s_own(make):
    assert_equal(scored(make(budget=1.0)), scored(make(plain=True)))


@pytest.mark.parametrize("hold_back", [1, 0, 3])
@pytest.mark.parametrize("method", ["default", "prefixkv"])
def test_continuations_are_scored_behind_the_pruned_context(make, hold_back, method):
    found = scored(make(budget=0.3, hold_back=hold_back, method=method, profile=None))
    assert_equal(found, slowly(0.3, hold_back, method=method))
    full = scored(make(plain=True))
    differs = [abs(one - other) > 1e-2 for (one, _), (other, _) in zip(found, full, strict=True)]
    assert differs[2] and differs[5]
    assert differs[0] == bool(hold_back)  # a first token comes from the whole prompt, if nothing is held back


def test_texts_are_those_of_generate(make):
    model, tokenizer = smollm.load()
    context = ASKED[0][0]
    arguments = [(context, {"until": ["."], "max_gen_toks": 8})]
    for budget in (1.0, 0.2):
        inputs = tokenizer(context, return_tensors="pt")
        cache = PrefixKVCache.for_model(model, budget)
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)
        expected = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]).partition(".")[0]
        found = make(budget=budget).generate_until(requests("generate_until", arguments), disable_tqdm=True)
        assert found == [expected]


def test_what_cannot_be_is_refused(make):
    with pytest.raises(NotImplementedError, match="no prompt to prune"):
        make().loglikelihood_rolling(requests("loglikelihood_rolling", [("a text",)]))
    with pytest.raises(ValueError, match=r"budget is 2\.5"):
        make(budget=2.5)
    with pytest.raises(ValueError, match="there is no method 'nope'"):
        make(method="nope")
    with pytest.raises(ValueError, match="hold_back"):
        make(hold_back=-1)


def test_the_command_runs_tasks_of_a_folder(tmp_path):
    docs = [{"context": context, "choices": choices, "answer": 0} for context, choices in ASKED[:2]]
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    kinds = {
        "choose": {"kind": "multiple_choice", "target": "answer", "metric": "acc", "more": ""},
        "write": {
            "kind": "generate_until", "target": '"{{choices[answer]}}"', "metric": "exact_match",
            "more": 'generation_kwargs: {until: ["."], max_gen_toks: 8}',
        },
    }  # fmt: skip
    for name, fields in kinds.items():
        text = TASK.format(name=name, data=data, **fields)
        text = text.replace('doc_to_choice: "{{choices}}"\n', "") if name == "write" else text
        (tmp_path / f"{name}.yaml").write_text(text)
    model = f"pretrained={smollm.folder()},gguf_file={smollm.FILE},dtype=float32,budget=0.2,method=snapkv:queries=16"
    done = subprocess.run(
        [
            sys.executable, "-m", "prefixkv_cache.tools.lm_eval", "run", "--model", "prefixkv", "--model_args", model,
            "--tasks", "choose,write", "--include_path", tmp_path, "--device", "cpu", "--batch_size", "2",
        ],
        capture_output=True, text=True, timeout=900, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "prefixkv (" in done.stdout and "snapkv:queries=16" in done.stdout
    assert "|choose|" in done.stdout and "exact_match" in done.stdout
