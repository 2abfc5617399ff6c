"""Data files and folders of pictures in, records out: a prompt, its pictures, the answer if there is one.

Reads LLaVA's conversation JSON, MM-Vet's JSON, lines of either (JSONL), and a folder of pictures with one prompt for
all. Pictures are named here and opened by `loading.py`; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_LAYOUTS = "expected LLaVA's layout (`conversations`, `image`) or MM-Vet's (`question`, `answer`, `image`)"
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")
# The place of the picture is the chat template's business.
_PLACEHOLDER = re.compile(r"\s*<image>\s*")


class DataError(ValueError):
    """A data file that is not what it should be; the message names the file, the record and what was expected."""


@dataclass(frozen=True)
class Record:
    """One question about some pictures.

    Attributes:
        id: as in the file; where there is none, the record's place in it, from 0.
        prompt: what the user says, without image placeholders.
        images: paths of the pictures, in order; they need not exist yet. Empty for a question without a picture.
        answer: the reference answer, or None.
    """

    id: str
    prompt: str
    images: tuple[Path, ...]
    answer: str | None = None


def read_records(
    data: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    prompt: str | None = None,
) -> list[Record]:
    """Read a data file, or a folder of pictures.

    Of a conversation, the first question and the first answer are taken.

    Args:
        data: a `.json` or `.jsonl` file; None: every picture in the folder `images`, by name, with one prompt.
        images: the folder that the file's image names are relative to; None: the one that the file lies in.
        prompt: said to every picture of the folder; with a file, instead of what it says.

    Raises:
        DataError: there is no such file or folder, or it is not of one of these layouts, or it is empty.
    """
    if images is not None and not Path(images).is_dir():
        raise DataError(f"there is no folder {os.fspath(images)!r} of images")
    if data is None:
        records = _read_folder(images, prompt)
    else:
        folder = Path(data).parent if images is None else Path(images)
        records = [_record(Path(data), where, entry, folder, prompt) for where, entry in _read_entries(Path(data))]
    if not records:
        raise DataError(f"{os.fspath(data or images or '')}: holds no records")
    return records


def _read_folder(images: str | os.PathLike[str] | None, prompt: str | None) -> list[Record]:
    if images is None:
        raise DataError("there is nothing to read: give a data file, or a folder of images and a prompt")
    if not prompt:
        raise DataError(f"{os.fspath(images)}: a folder of images needs a prompt; without one, give a data file")
    paths = sorted(path for path in Path(images).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return [Record(path.name, prompt, (path,)) for path in paths]


def _read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a file as they are, each with its name there."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"there is no data file {os.fspath(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the data file {os.fspath(path)!r}: {error}") from None
    if path.suffix.lower() == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.split("\n")) if line.strip()]
        yield from ((str(place), _parse(path, line, number)) for place, (number, line) in enumerate(lines))
        return
    content = _parse(path, text, None)
    if isinstance(content, list):
        yield from ((str(place), entry) for place, entry in enumerate(content))
    elif isinstance(content, Mapping) and all(isinstance(entry, Mapping) for entry in content.values()):
        yield from content.items()  # MM-Vet: by name
    else:
        raise DataError(f"{path}: holds no list of records, nor records by name; {_LAYOUTS}")


def _parse(path: Path, text: str, line: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = "" if line is None else f" line {line + 1}"
        raise DataError(f"{path}:{where} is not JSON ({error})") from None


def _record(path: Path, where: str, entry: Any, folder: Path, prompt: str | None) -> Record:
    if not isinstance(entry, Mapping):
        raise DataError(f"{path}: record {where} is a {type(entry).__name__}; {_LAYOUTS}")
    asked, answer = _conversation(entry) if "conversations" in entry else _question(entry)
    asked = prompt or asked
    if not isinstance(asked, str) or not asked.strip():
        raise DataError(f"{path}: record {where} asks nothing; {_LAYOUTS}")
    if answer is not None and not isinstance(answer, str):
        answer = json.dumps(answer)
    names = entry.get("image", entry.get("imagename"))
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{path}: record {where} has the image {names!r}; expected a file name, or a list of them")
    name = str(entry.get("id", entry.get("question_id", where)))
    return Record(name, _PLACEHOLDER.sub("\n", asked).strip(), tuple(folder / image for image in names), answer)


def _conversation(entry: Mapping[str, Any]) -> tuple[Any, Any]:
    """First question and first answer of LLaVA's layout, None where there is none."""
    turns = entry["conversations"]
    turns = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    said = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]
    asked = next((text for who, text in said if who in _ASKS), None)
    return asked, next((text for who, text in said if who in _ANSWERS), None)


def _question(entry: Mapping[str, Any]) -> tuple[Any, Any]:
    """Question and answer of MM-Vet's layout; LLaVA-Bench calls the question `text`."""
    return entry.get("question", entry.get("text")), entry.get("answer")
