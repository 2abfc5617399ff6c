"""What has been measured so far, kept in a folder: one line of JSON for each finished unit of work.

A unit is one batch of samples with one method at one budget. Each process appends to a file of its own, so that a run
that is killed leaves all that it finished; a line that was cut short counts as none. The first line of each file says
what the results belong to: going on with another model, data or setting is refused by the name of what differs.
Methods and budgets are no part of it, as a unit stands for itself: a later run may ask for more of them.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from ...calibration.state import check_fingerprint

_HEAD = {"format": "prefixkv-evaluation", "format_version": 3}


class Unit(NamedTuple):
    """A batch by its number, a method by its name, a budget, and a digest of what the method and its profile are."""

    batch: int
    method: str
    budget: float
    identity: str = ""


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
        self.units: dict[Unit, list[dict[str, Any]]] = {}

    def add(self, unit: Unit, rows: list[dict[str, Any]]) -> None:
        """Take in a unit, and append it to the file of this process."""
        self.units[unit] = rows
        head = "" if self._own.exists() else json.dumps({**_HEAD, "fingerprint": self._fingerprint})
        try:
            with self._own.open("a", encoding="utf-8") as file:  # the line's end comes first: one cut short stays alone
                file.write(head + "\n" + json.dumps({**unit._asdict(), "rows": rows}))
        except OSError as error:
            raise OSError(error.errno, f"cannot write: {error.strerror or error}", str(self._own)) from error

    def read(self) -> None:
        """Take in what all files of the folder hold.

        Raises:
            ValueError: a file is damaged, or belongs to something else.
        """
        for path in sorted(self._folder.glob("results-*.jsonl")):
            first, *lines = path.read_text(encoding="utf-8").split("\n")
            try:
                head = json.loads(first)
                found = head.pop("fingerprint")
                if head != _HEAD:
                    raise ValueError(f"expected {_HEAD}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: is no file of results ({error!r}); delete it to start over") from None
            check_fingerprint(path, found, self._fingerprint)
            for line in lines:
                with contextlib.suppress(ValueError):
                    unit = json.loads(line)
                    self.units[Unit(*(unit[name] for name in Unit._fields))] = unit["rows"]
