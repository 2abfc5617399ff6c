"""`prefixkv bench`: the figures it prints, and bad input."""

import json
from pathlib import Path

import pytest

from prefixkv_cache.cli import main

MODEL = str(Path(__file__).resolve().parent.parent / "models" / "scene-llava")


def test_the_table_and_its_json(capsys):
    arguments = ["--tokens", "90", "--new-tokens", "3", "--turns", "1", "--budgets", "1,0.5", "--batch-size", "2"]
    assert main(["bench", "--model", MODEL, "--json", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    full, whole, half = result["rows"]
    assert [full["budget"], whole["budget"], half["budget"]] == ["full", "1", "0.5"]
    assert (result["batch"], result["tokens"]) == (2, 90)
    assert full["prompt_ratio"] == full["token_ratio"] == full["kv_ratio"] == 1.0
    assert all(row["prompt_ms"] > 0 for row in result["rows"])
    # What is stored, and room for 64 more tokens at most.
    assert 93 <= whole["kv_bytes"] / full["kv_bytes"] * 93 <= 93 + 64
    assert 45 + 3 <= half["kv_bytes"] / full["kv_bytes"] * 93 <= 45 + 64
    assert lines[0].startswith("2 x (90 + 3) tokens")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--tokens", "9", "--budgets", "1.5"],
        ["--tokens", "9", "--queries", "0"],
        ["--tokens", "9", "--profile", "no"],
        ["--tokens", "9", "--turns", "0"],
        ["--tokens", "0"],
        ["--tokens", "-4"],
        ["--tokens", "9", "--prompt", "x"],
        ["--prompt", "x", "--image", "no"],
    ],
    ids=" ".join,
)
def test_bad_input_is_told_in_one_line(arguments, capsys):
    assert main(["bench", "--model", "nowhere", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prefixkv bench: ") and len(error.splitlines()) == 1
