"""What is asked, and what the right answer is: samples from data files or from the drawn tasks of the demo.

A sample knows its prompt, its pictures, the reference answer where there is one, and how a text is marked. Drawn tasks
are made from seeds, so their held-out splits need no file. Knows no model.
"""

from __future__ import annotations

import argparse
import importlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..data import DataError, Record, read_records
from ..loading import open_image
from .drawn import DRAWN, SPLITS, TASKS

DEFAULT_DRAWN = 100

# A description of the largest scene has about 90 words, an answer about 4: enough for each, and for some rambling.
_LIMITS = {"descriptions": 112, "questions": 12}


class Marks(NamedTuple):
    """How a text compares with the truth; None where that is not known.

    Attributes:
        right: 1 if the whole answer is right, and nothing in it is wrong.
        there: objects that a description should state.
        stated: objects that it states, all different.
        hits: those of them that are there; the others are invented.
    """

    right: int | None = None
    there: int | None = None
    stated: int | None = None
    hits: int | None = None


@dataclass(frozen=True)
class Sample:
    """One prompt and how an answer to it is marked.

    Attributes:
        id: unique in a run.
        task: samples of one task are summed up together.
        kind: a finer division of the task; may be empty.
        prompt: what the user says.
        pictures: makes the pictures, when their turn comes.
        n_pictures: how many that will be.
        answer: the reference answer, or None.
        mark: compares a text with the truth.
        limit: a generated text ends after so many tokens.
    """

    id: str
    task: str
    kind: str
    prompt: str
    pictures: Callable[[], Sequence[Image.Image]]
    n_pictures: int
    answer: str | None
    mark: Callable[[str], Marks]
    limit: int


def read_samples(arguments: argparse.Namespace) -> list[Sample]:
    """What `--data` and the options beside it ask for.

    Raises:
        ValueError, DataError: they do not go together, or there is no such data.
    """
    drawn = arguments.data in DRAWN
    refused = ("images", "prompt") if drawn else ("task", "split", "kinds")
    for option in refused:
        if getattr(arguments, option) is not None:
            where = "data files" if drawn else f"the drawn tasks ({', '.join(DRAWN)})"
            raise ValueError(f"--{option} is for {where}, not for --data {arguments.data}")
    if not drawn:
        return file_samples(
            arguments.data, arguments.images, arguments.prompt, n=arguments.samples, seed=arguments.seed,
            limit=arguments.max_new_tokens,
        )  # fmt: skip
    return drawn_samples(
        arguments.data,
        split=arguments.split or SPLITS[0],
        n=arguments.samples or DEFAULT_DRAWN,
        tasks=TASKS if arguments.task is None else (arguments.task,),
        kinds=None if arguments.kinds is None else [kind.strip() for kind in arguments.kinds.split(",")],
        limit=arguments.max_new_tokens,
    )


def drawn_samples(
    name: str, *, split: str, n: int, tasks: Sequence[str] = TASKS, kinds: Sequence[str] | None = None, limit: int
) -> list[Sample]:
    """Samples from the first seeds of a split; one description and one question for each seed.

    The kinds of questions take turns; where a picture gives no question of the kind whose turn it is, the next is
    taken. All samples of a task come together.

    Args:
        name: a key of `DRAWN`.
        split: one of `SPLITS`.
        n: pictures.
        tasks: any of `TASKS`.
        kinds: kinds of questions, as the drawn task calls them; None: all.
        limit: a generated text ends after so many tokens, if not before by its task.

    Raises:
        ValueError: there is no such kind, or fewer pictures.
    """
    source: Any = importlib.import_module(f"..demo.{name}", __package__)
    there_are = tuple(source.QUESTION_KINDS)
    kinds = there_are if kinds is None else tuple(kinds)
    if unknown := [kind for kind in kinds if kind not in there_are]:
        raise ValueError(f"{name} have no questions of kind {unknown[0]!r}; there are {', '.join(there_are)}")
    seeds = source.VALIDATION_SEEDS if split == "validation" else source.TEST_SEEDS
    if not 1 <= n <= len(seeds):
        raise ValueError(f"--samples is {n}; {name} have 1 to {len(seeds)} pictures to test on")
    drawn = [getattr(source, DRAWN[name])(seed) for seed in seeds[:n]]
    samples = []
    for task in tasks:
        for index, picture in enumerate(drawn):
            asked = _describe(source, picture, index) if task == TASKS[0] else _ask(source, picture, index, kinds)
            if asked is not None:
                kind, prompt, answer, mark = asked
                samples.append(
                    Sample(
                        f"{name}-{picture.seed}-{task}", task, kind, prompt, lambda picture=picture: [picture.image], 1,
                        answer, mark, min(limit, _LIMITS[task]),
                    )
                )  # fmt: skip
    return samples


_Asked = tuple[str, str, str, Callable[[str], Marks]]


def _describe(source: Any, picture: Any, index: int) -> _Asked:
    truth = {thing.words for thing in picture.objects}

    def mark(text: str) -> Marks:
        stated = source.parse_description(text)
        return Marks(int(stated == truth), len(truth), len(stated), len(stated & truth))

    return "", source.DESCRIBE_PROMPTS[index % len(source.DESCRIBE_PROMPTS)], source.describe(picture), mark


def _ask(source: Any, picture: Any, index: int, kinds: Sequence[str]) -> _Asked | None:
    asked = {question.kind: question for question in source.questions(picture, 1)}
    turns = [kinds[(index + step) % len(kinds)] for step in range(len(kinds))]
    question = next((asked[kind] for kind in turns if kind in asked), None)
    if question is None:
        return None
    return question.kind, question.text, question.answer, lambda text: Marks(int(source.answer_matches(text, question)))


def file_samples(
    data: str, images: str | None, prompt: str | None, *, n: int | None, seed: int, limit: int
) -> list[Sample]:
    """Samples from a data file, see data.py; the file's name is the task.

    Args:
        data: LLaVA's or MM-Vet's layout, JSON or JSONL.
        images: folder of the pictures; None: the file's.
        prompt: instead of what the file says; None: as it says.
        n: so many at random, in their old order; None: all.
        seed: which.
        limit: a generated text ends after so many tokens.

    Raises:
        DataError: the file is not what it should be, or a picture is not there.
    """
    records = read_records(data, images, prompt)
    if n is not None and n < len(records):
        records = [records[index] for index in sorted(random.Random(seed).sample(range(len(records)), n))]
    if missing := [path for record in records for path in record.images if not path.is_file()]:
        raise DataError(f"there is no image {str(missing[0])!r} ({len(missing)} of {len(records)} records lack theirs)")
    names = [record.id for record in records]
    ids = names if len(set(names)) == len(names) else [f"{index}-{name}" for index, name in enumerate(names)]
    return [_file_sample(id, Path(data).stem, record, limit) for id, record in zip(ids, records, strict=True)]


def _file_sample(id: str, task: str, record: Record, limit: int) -> Sample:
    """Of MM-Vet's answers, `<AND>` joins the parts of one, and `<OR>` those of equal worth."""
    parts = [] if record.answer is None else record.answer.split("<OR>")
    answers = [answer for part in parts if (answer := re.sub(r"\s*<AND>\s*", ", ", part).strip())]

    def mark(text: str) -> Marks:
        return Marks(int(_normal(text) in map(_normal, answers)) if answers else None)

    return Sample(
        id, task, "", record.prompt, lambda: [open_image(path) for path in record.images], len(record.images),
        answers[0] if answers else None, mark, limit,
    )  # fmt: skip


def _normal(text: str) -> str:
    """For exact match: case, spaces and a full stop at the end do not count."""
    return " ".join(text.lower().split()).rstrip(" .")
