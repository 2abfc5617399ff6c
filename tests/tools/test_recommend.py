"""`prefixkv recommend`: the smallest budget that keeps the answers."""

import json
import re
from pathlib import Path

import pytest

import tiny_vlm
from prefixkv_cache.tools.evaluate.recommend import Cost, chosen, cost_of, counted, say

MODEL = Path(__file__).resolve().parents[2] / "models" / "scene-llava"


def cost(budget, lost, of=100):
    return Cost(budget, lost, of, 1.0, 0.5, 0.6)


def row(**more):
    return {"right": 1, "answer_tokens": 4, "agree": 4, "same": 1, "nbytes": 100, "nbytes_end": 120, **more}


def test_the_smallest_is_chosen_that_no_larger_one_is_worse_than():
    costs = [cost(0.7, 0), cost(0.5, 2), cost(0.3, 1), cost(0.2, 9), cost(0.1, 0)]
    assert chosen(costs, 0.02).budget == 0.3  # that 0.1 loses nothing is luck
    assert chosen(costs, 0.01).budget == 0.7
    assert chosen(costs, 0.1).budget == 0.1
    assert chosen(costs[1:], 0.0) is None


def test_a_loss_is_counted_in_right_answers_where_there_are_some_and_else_in_tokens():
    full = [row(), row(), row(right=0), row()]
    rows = [row(right=0, nbytes=50), row(nbytes=50), row(nbytes=50, agree=3), row(same=0, nbytes=50, nbytes_end=90)]
    assert counted(full) == "answers" and counted([row(right=0)]) == counted([row(right=None)]) == "tokens"
    found = cost_of(0.5, full, rows, "answers")
    assert (found.lost, found.of, found.same) == (1, 3, 0.75)  # one that was wrong before is not lost
    assert (found.prompt_bytes, found.end_bytes) == (0.5, 450 / 480)
    found = cost_of(0.5, full, rows, "tokens")
    assert (found.lost, found.of, found.loss) == (1, 16, 1 / 16)


def test_what_is_said():
    assert say([cost(0.5, 1), cost(0.3, 5)], 0.02, "answers").startswith(
        "recommended: budget=0.5. It loses 1.0% of the"
    )
    assert "cannot be seen" not in say([cost(0.5, 1)], 0.02, "answers")
    assert "a loss below 10.0% cannot be seen" in say([cost(0.5, 0, 10)], 0.02, "answers")
    assert say([cost(512, 9)], 0.02, "tokens").startswith(
        "none of these budgets: even 512 pairs loses 9.0% of the tokens"
    )


def test_on_scenes(run):
    words = ["recommend", "--model", MODEL, "--data", "scenes", "--task", "questions", "--kinds", "object,colour"]
    status, out, err = run(*words, "--samples", 4, "--budgets", "0.05,1.0,0.5", "--max-loss", 0)
    lines = out.splitlines()
    assert status == 0 and re.fullmatch(r"4 samples; method default\S*, a profile", lines[0])
    assert lines[1].split() == ["budget", "answers", "lost", "same", "text", "KV,", "prompt", "KV,", "answer"]
    assert [line.split("%")[0].strip() for line in lines[2:5]] == ["100", "50", "5"]  # falling
    assert re.fullmatch(r" +100 % +0 of \d +100% +100% +\d+%", lines[2])
    assert re.match(r"recommended: budget=(1\.0|0\.5|0\.05)\. It loses 0\.0% of the answers", lines[5])
    assert "16/16" in err and "answer/s" in err


def test_on_a_file_without_answers(run, tmp_path):
    tiny_vlm.save_model(tmp_path / "model")
    (name,) = tiny_vlm.save_pictures(tmp_path, 1)
    (tmp_path / "data.json").write_text(json.dumps([{"question": "what is there ?", "image": name}]))
    words = ["recommend", "--model", tmp_path / "model", "--data", tmp_path / "data.json", "--max-new-tokens", 6]
    status, out, _ = run(*words, "--budgets", "20,0.5", "--method", "snapkv", "--max-loss", 1)
    assert status == 0 and "method snapkv, no profile" in out and "tokens lost" in out
    assert "recommended: budget=20." in out and "give more --samples" not in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-loss", "2"], "'2' is no share"),
        (["--max-loss", "some"], "'some' is no share"),
        (["--budgets", "0"], "'0' is no budget"),
        (["--method", "nope"], "there is no method 'nope'"),
        (["--data", "none.json"], "there is no data file 'none.json'"),
        (["--images", "."], "--images is for data files"),
        ([], "cannot load 'nope'"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(run, more, message):
    status, out, err = run("recommend", "--model", "nope", "--data", "scenes", *more)
    lines = [line for line in err.splitlines() if line != "loading nope"]
    assert (status, out, len(lines)) == (2, "", 1) and message in lines[0]
