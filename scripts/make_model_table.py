"""Measures which model types work with the cache, and writes docs/models.md, the table of them.

`python scripts/make_model_table.py --write docs/models.md`; with model types as arguments only their lines, to read.
The measuring is in tests/support/zoo_laws.py, and tests/models/test_models.py holds the file against it.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import zoo
from zoo_laws import BUDGET, measure

HEAD = """# Models

Made by `python scripts/make_model_table.py --write docs/models.md`, do not edit. Measured with
transformers {version}; {total} model types: {summary}.

## Ten popular ones

| model | model type | what is pruned | tested with |
| --- | --- | --- | --- |
{popular}
Every one of them takes lengths by key head. Also popular, and *partly* pruned: Gemma 3 (`gemma3`), Llama 4 (`llama4`)
and Llama 3.2 Vision (`mllama`), whose sliding, chunked or cross-attention layers stay whole.

What is tested is the code of a model type, on a tiny random model. The released weights were not run. How much an
answer suffers depends on them: [`prefixkv recommend`](budget.md) measures it.

## How it is tested

A tiny random model of each type runs over two turns in float64, eager and sdpa, one row and a left-padded batch of two:
with the default method, with PrefixKV (lengths searched on the prompt), with a made-up profile in which the key heads
of a layer have lengths of their own, and without `config=model.config`.

- **pruned**: every layer's cache is pruned. With budget 1.0 the tokens are those of `DynamicCache` and, to 1e-9, the
  logits, too. With budget {budget} every later logit is, to 1e-9, that of a full cache in which the pruned pairs are
  masked out, key head by key head.
- **partly**: the same holds, and some layers are left whole, for the reason given (so many of the tiny model's layers).
- **refused**: one error, at construction or at the first forward, and no wrong answer. A footnote has the error.
- **out of scope**: transformers' `generate` does not drive it. **not built**: no tiny model could be made here.

Lengths by *head*: each key head can have a length of its own. By *layer*: attention is latent, the cache holds nothing
of single heads, and there is one length a layer.

Remarks: what the prompt held; *needs `config`*: without `config=model.config` the cache raises an error that asks for
it (`for_model` gives it). Types measured on text alone take the same way through the decoder's attention and its cache
with an image.

## All model types

| model type | verdict | lengths by | layers left whole, and why | remarks |
| --- | --- | --- | --- | --- |
"""

POPULAR = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT (1.6)",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL 2.5, 3 (as in transformers)",
    "smolvlm": "SmolVLM",
    "paligemma": "PaliGemma",
    "mistral3": "Mistral 3 with Pixtral",
}


def page(findings):
    """The whole of docs/models.md."""
    counts = Counter(finding.verdict for finding in findings)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts))
    notes = {}
    rows = "".join(finding.row(notes) + "\n" for finding in findings)
    head = HEAD.format(
        version=transformers.__version__, total=len(findings), summary=summary, budget=BUDGET, popular=popular(findings)
    )
    return head + rows + "".join(f"\n[^{number}]: {text}\n" for text, number in notes.items())


def popular(findings):
    """Lines of the first table, as measured."""
    found = {finding.model_type: finding for finding in findings if finding.model_type in POPULAR}
    return "".join(
        f"| {name} | `{kind}` | {extent(found[kind])} | {'; '.join(found[kind].remarks)} |\n"
        for kind, name in POPULAR.items()
        if kind in found
    )


def extent(finding):
    """What of a model is pruned, in words."""
    return "every layer" if finding.verdict == "pruned" else finding.whole or finding.verdict


def main():
    parser = argparse.ArgumentParser(description="Measure which model types work with the cache.")
    parser.add_argument("types", nargs="*", help="model types; all when none is given")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    findings = []
    with torch.no_grad():
        for model_type in options.types or zoo.ALL_TYPES:
            findings.append(measure(model_type))
            print(findings[-1].row({}), file=sys.stderr, flush=True)
    if options.write:
        options.write.write_text(page(findings), encoding="utf-8")


if __name__ == "__main__":
    main()
