"""What has been measured so far, kept in a folder: one line of JSON for each finished unit of work.

A unit is one batch of samples with one method at one budget. Each process appends to a file of its own, so that a run
that is killed leaves all that it finished; a line that was cut short counts as none. The first line of each file says
what the results belong to: going on with another model, data or setting is refused by the name of what differs.
Methods and budgets are no part of it, as a unit stands for itself: a later run may ask for more of them.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path
from typing import Any, NamedTuple

_FORMAT = "prefixkv-evaluation"
_MERGED = "results.jsonl"


class Unit(NamedTuple):
    """A batch by its number, a method by its name, a budget, a digest of the profile (empty where there is none)."""

    batch: int
    method: str
    budget: float
    profile: str = ""


class Results:
    """The rows of each finished unit, and the files that they are kept in.

    Args:
        folder: where they lie; it exists.
        fingerprint: what must be the same for results to belong together; JSON values.
        rank: of this process, for the name of its file.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], rank: int = 0):
        self._folder, self._fingerprint = folder, json.loads(json.dumps(fingerprint))
        self._own = folder / f"results-{rank}.jsonl"
        self._units: dict[Unit, list[dict[str, Any]]] = {}

    def __contains__(self, unit: Unit) -> bool:
        return unit in self._units

    def __len__(self) -> int:
        return len(self._units)

    @property
    def units(self) -> dict[Unit, list[dict[str, Any]]]:
        """The rows of each unit."""
        return dict(self._units)

    def add(self, unit: Unit, rows: list[dict[str, Any]]) -> None:
        """Take in a unit, and append it to the file of this process."""
        self._units[unit] = rows
        new = not self._own.exists()
        with self._own.open("a", encoding="utf-8") as file:
            file.write((self._head() if new else "") + _line({**unit._asdict(), "rows": rows}))

    def merge(self, units: dict[Unit, list[dict[str, Any]]]) -> None:
        """Take in what another process has measured."""
        self._units.update(units)

    def read(self) -> None:
        """Take in what all files of the folder hold.

        Raises:
            ValueError: a file is damaged, or belongs to something else.
        """
        for path in self._files():
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what comes after the last "\n" was cut short
            if not lines:
                continue
            try:
                head, *rest = map(json.loads, lines)
                if head["format"] != _FORMAT or head["format_version"] != 1:
                    raise ValueError(f"its format is {head['format']!r}, version {head['format_version']!r}")
                found = head["fingerprint"]
                units = {Unit(*(each[name] for name in Unit._fields)): each["rows"] for each in rest}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: is no file of results ({error!r}); delete it to start over") from None
            self._check(path, found)
            self.merge(units)

    def settle(self) -> None:
        """Put all units into one file, in order, and remove the files of the single processes."""
        lines = [_line({**unit._asdict(), "rows": self._units[unit]}) for unit in sorted(self._units)]
        temporary = self._folder / f".prefixkv-{uuid.uuid4().hex}.tmp"
        temporary.write_text(self._head() + "".join(lines), encoding="utf-8")
        os.replace(temporary, self._folder / _MERGED)
        for path in self._files():
            if path.name != _MERGED:
                path.unlink()

    def _head(self) -> str:
        return _line({"format": _FORMAT, "format_version": 1, "fingerprint": self._fingerprint})

    def _files(self) -> list[Path]:
        return [path for path in sorted(self._folder.iterdir()) if re.fullmatch(r"results(-\d+)?\.jsonl", path.name)]

    def _check(self, path: Path, found: dict[str, Any]) -> None:
        for name in sorted({*self._fingerprint, *found}):
            if self._fingerprint.get(name) != found.get(name):
                raise ValueError(
                    f"{path}: holds the results of another evaluation, whose {name} was {found.get(name)!r}; this one "
                    f"has {self._fingerprint.get(name)!r}. Take another --out"
                )


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"
