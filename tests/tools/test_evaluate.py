"""`prefixkv evaluate` as people run it: its files, interruptions, processes, and bad input."""

import csv
import json
import math
import multiprocessing
import os
import re
import shlex
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_vlm
from prefixkv_cache import PrefixProfile, methods
from prefixkv_cache.cli import main
from prefixkv_cache.tools.evaluate.measure import Batch
from prefixkv_cache.tools.evaluate.methods import parse_candidates
from prefixkv_cache.tools.evaluate.results import Results, Unit
from prefixkv_cache.tools.evaluate.tasks import file_samples
from prefixkv_cache.tools.loading import load_model

ROOT = Path(__file__).resolve().parents[2]


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
    assert "evaluating 6 samples: 60 answers, 0 of them done before" in err and "60/60" in err
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
    assert status == 130 and "10 answers are kept in " in err and "; go on with --resume" in err

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
    assert status == 0 and "10 of them done before" in err and same_files(out, made)


def test_methods_and_budgets_can_be_added_later(home, run, made, tmp_path):
    out = tmp_path / "out"
    assert run(*command(home, out, "--methods", "snapkv", "--budgets", "0.2"))[0] == 0
    status, _, err = run(*command(home, out, "--resume"))
    assert status == 0 and "12 of them done before" in err and same_files(out, made)
    # With another profile under the same name, what it gave before is not taken for its results.
    PrefixProfile([0.2, 1.0], [[0.2] * 3, [1.0] * 3]).save(tmp_path / "p.safetensors")
    status, _, err = run(*command(home, out, "--resume", "--profile", tmp_path / "p.safetensors"))
    assert status == 0 and "42 of them done before" in err


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
        held, end, kl, ppl, agree, same, _ = [cell.split()[0] for cell in line.split("|")[2:-1]]
        names = ("answer_tokens", "nll", "agree")
        tokens, nll, first_choices = (sum(float(row[name]) for row in of_method) for name in names)
        assert (held, end) == (f"{means['pairs']:.1f}", f"{means['pairs_end']:.1f}")
        assert agree == f"{first_choices / tokens:.3f}"
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
    (["--split", "test"], "--split is for the drawn tasks (scenes, boards, pages)"),
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


def test_the_study_in_small(run, tmp_path, monkeypatch):
    """What `make study-smoke` runs, in smaller: every method through the whole of it, on the repo's own model."""
    monkeypatch.chdir(ROOT)
    line = re.search(r"^STUDY_SMOKE := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    out = tmp_path / "study"
    assert run("evaluate", *shlex.split(line), "--samples", 1, "--budgets", "0.3", "--out", out)[0] == 0
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
