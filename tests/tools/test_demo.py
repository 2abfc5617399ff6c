"""`prefixkv demo`: what its table says of answers and bytes, and its picture."""

import re
from itertools import pairwise

import pytest
from PIL import Image

from prefixkv_cache.cli import main

ROW = re.compile(r"(?P<cache>\S.*?) +(?P<keeps>\d+)% +(?P<prompt>\d+) +(?P<answer>\d+)   (?P<verdict>.+)")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The picture's path, and the rows of each of the three tables with the line behind each."""
    out = tmp_path_factory.mktemp("demo") / "new" / "demo.png"
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda text="", **options: said.append(str(text)))
        assert main(["demo", "--out", str(out), "--method", "snapkv:headroom=3"]) == 0
    lines = "\n".join(said).splitlines()
    tables = []
    for line, behind in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("> "):
            tables.append([])
        elif found := ROW.fullmatch(line):
            tables[-1].append(found.groupdict() | {"text": behind.strip() if behind.startswith("    ") else None})
    return out, tables


def test_rows_are_the_full_cache_the_default_the_paper_and_what_was_asked_for(demo):
    _, tables = demo
    budgets = {"full cache": [100], "default": [50, 20, 10], "the paper": [50, 20], "snapkv:headroom=3": [50, 20, 10]}
    for rows in tables:
        caches = [(row["cache"].removesuffix(", profile"), int(row["keeps"])) for row in rows]
        assert caches == [(name, keeps) for name, of_name in budgets.items() for keeps in of_name]
    assert len(tables) == 3


def test_a_smaller_budget_never_shows_more_bytes(demo):
    for rows in demo[1]:
        for end in ("prompt", "answer"):
            full, *others = [int(row[end]) for row in rows]
            assert all(full >= other for other in others)
            for row, below in pairwise(rows):
                assert row["cache"] != below["cache"] or int(row[end]) >= int(below[end])
        assert all(int(row["prompt"]) <= int(row["answer"]) for row in rows)


def test_answers_are_held_against_the_full_cache_and_the_truth(demo):
    described, *asked = demo[1]
    assert described[0]["verdict"] == "100% of the objects right, nothing invented"
    for rows in demo[1]:
        for row in rows[1:]:
            assert row["verdict"].startswith("the same answer" if row["text"] is None else "another answer")
            assert row["text"] is None or row["text"] != rows[0]["text"]
    for row in described:
        for thing in re.findall(r"(?:invented: |; )([^;]+) at the ([^;]+)", row["verdict"]):
            assert f"at the {thing[1]} there is a {thing[0]}" in row["text"]
    assert all(re.search("(right|wrong)$", row["verdict"]) for rows in asked for row in rows)


def test_the_picture_has_a_row_for_each_pruned_cache(demo):
    with Image.open(demo[0]) as picture:
        assert picture.height > 8 * 108 and picture.width > 9 * 108
    assert [path.name for path in demo[0].parent.iterdir()] == ["demo.png"]
