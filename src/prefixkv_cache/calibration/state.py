"""State file of an interrupted calibration: JSON of what was found so far, sample by sample.

The file is replaced in one step, every few seconds and when the calibration ends early. It carries a fingerprint of
model and settings: going on with another one is refused, by the name of the field that differs. What is found in a
sample is any JSON value; only the calibrator knows its meaning.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..profiles.files import write_atomically

_FORMAT, _VERSION = "prefixkv-calibration-state", 2
_SECONDS_BETWEEN_SAVES = 5.0


class CalibrationState:
    """What was found in each sample, by a key for stage and index, and the file that it is kept in.

    Args:
        path: of the file that is written; None: nothing is.
        fingerprint: what must be the same for findings to belong together; JSON values.

    Attributes:
        samples: the findings.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: Mapping[str, Any]):
        self.path = None if path is None else Path(path)
        if self.path is not None and not self.path.parent.is_dir():
            raise FileNotFoundError(f"cannot keep a state in {self.path}: the folder {self.path.parent} does not exist")
        self.fingerprint = fingerprint
        self.samples: dict[str, Any] = {}
        self._saved_at, self._changed = time.monotonic(), False

    def __contains__(self, key: str) -> bool:
        return key in self.samples

    def of(self, stage: str) -> list[tuple[str, Any]]:
        """(key, findings) of one stage, in the order of the samples: those under `stage/0`, `stage/1`, ..."""
        keys = [key for key in self.samples if key.rpartition("/")[0] == stage]
        return [(key, self.samples[key]) for key in sorted(keys, key=lambda key: int(key.rpartition("/")[2]))]

    def add(self, key: str, finding: Any) -> None:
        """Take in a sample; now and then write the file."""
        self.samples[key] = finding
        self._changed = True
        if time.monotonic() - self._saved_at > _SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Write the file, if there is anything new for it.

        Raises:
            OSError: it cannot be written. An older one is then as it was.
        """
        if self.path is None or not self._changed:
            return
        content = {"format": _FORMAT, "format_version": _VERSION, "fingerprint": self.fingerprint}
        write_atomically(self.path, json.dumps({**content, "samples": self.samples}, separators=(",", ":")))
        self._saved_at, self._changed = time.monotonic(), False

    def read(self, path: str | os.PathLike[str] | None = None) -> None:
        """Take in what a file holds: this state's own, or another process's. A file that is not there holds nothing.

        Raises:
            ValueError: the file is damaged, or that of another calibration.
            OSError: it cannot be read.
        """
        path = self.path if path is None else Path(path)
        if path is None or not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if (content["format"], content["format_version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"its format is {content['format']!r}, version {content['format_version']!r}")
            found, samples = content["fingerprint"], content["samples"]
            _check_samples(samples)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: is no state of a calibration ({error!r}); delete it to start over") from None
        check_fingerprint(path, found, self.fingerprint)
        self.samples.update(samples)

    def delete(self) -> None:
        """Remove the file: the calibration is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _check_samples(samples: Any) -> None:
    for key, rows in samples.items():
        int(key.rpartition("/")[2])
        if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
            raise ValueError(f"sample {key!r} is no list of rows with tables of numbers")


def _is_row(row: Any) -> bool:
    """Whether this is `{"n_tokens": 61, "tables": {name: nested lists of numbers}}`."""
    return type(row["n_tokens"]) is int and row["n_tokens"] > 0 and all(map(_is_table, row["tables"].values()))


def _is_table(table: Any) -> bool:
    if isinstance(table, list):
        return all(map(_is_table, table))
    return type(table) in (int, float) and 0 <= table < float("inf")


def check_fingerprint(path: str | os.PathLike[str], found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse to go on from the state of something else.

    Args:
        path: of the file, for the message.
        found: the fingerprint in the file.
        own: that of what is to go on.

    Raises:
        ValueError: they differ; names the first field that does.
    """
    own = json.loads(json.dumps(own))
    for field in sorted({*own, *found}):
        if own.get(field) != found.get(field):
            raise ValueError(
                f"{path}: is the state of another run, whose {field} was {found.get(field)!r}; this one has "
                f"{own.get(field)!r}. Delete the file to start over"
            )


def fingerprint_model(model: Any) -> dict[str, str]:
    """Class, dtype, configuration and a little of every weight: enough to tell two checkpoints of one model apart."""
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(f"{name} {tuple(parameter.shape)} ".encode())
        if parameter.device.type != "meta" and parameter.numel():  # meta: offloaded, not at hand
            weights.update(str(parameter.detach().flatten()[:4].tolist()).encode())
    configuration = model.config.to_dict()
    configuration.pop("_name_or_path", None)
    return {
        "model": type(model).__name__,
        "dtype": str(model.dtype),
        "config": hashlib.sha256(json.dumps(configuration, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
    }
