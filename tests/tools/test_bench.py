"""`prefixkv bench`: the figures it prints, and bad input."""

import json
from pathlib import Path

import pytest

from prefixkv_cache.cli import main

MODEL = str(Path(__file__).resolve().parents[2] / "models" / "scene-llava")


def test_the_table_and_its_json(capsys):
    arguments = ["--tokens", "90", "--new-tokens", "3", "--turns", "1", "--budgets", "1.0,0.5,30", "--batch-size", "2"]
    assert main(["bench", "--model", MODEL, "--json", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    full, whole, half, thirty = result["rows"]
    assert [row["budget"] for row in result["rows"]] == ["full", "1.0", "0.5", "30"]
    assert (result["batch"], result["tokens"]) == (2, 90)
    assert full["prompt_ratio"] == full["token_ratio"] == full["kv_ratio"] == 1.0
    assert all(row["prompt_ms"] > 0 for row in result["rows"])
    for row, pairs in ((whole, 90), (half, 45), (thirty, 30)):
        # What is stored, and room for 64 more tokens at most.
        assert pairs + 3 <= row["kv_bytes"] / full["kv_bytes"] * 93 <= pairs + 3 + 64
    assert lines[0].startswith("2 x (90 + 3) tokens")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--tokens", "9", "--budgets", "1.5"],
        ["--tokens", "9", "--method", "best"],
        ["--tokens", "9", "--profile", "no"],
        ["--tokens", "9", "--turns", "0"],
        ["--tokens", "0"],
        ["--tokens", "9", "--prompt", "x"],
        ["--prompt", "x", "--image", "no"],
    ],
    ids=" ".join,
)
def test_bad_input_is_told_in_one_line(arguments, capsys):
    try:
        status = main(["bench", "--model", "nowhere", *arguments])
    except SystemExit as ended:  # argparse
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("prefixkv bench: ") and len(error.splitlines()) == 1
