"""What an interrupted calibration leaves behind: a JSON file of the lengths measured so far, sample by sample.

The file is replaced in one step, every few seconds and when the calibration ends early, so that whoever reads it finds
a whole one. It carries a fingerprint of model and settings: going on with another model is refused, by the name of the
field that differs. Knows nothing of how lengths are measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FORMAT = "prefixkv-calibration-state"
_SECONDS_BETWEEN_SAVES = 5.0


@dataclass(frozen=True)
class Measurement:
    """One prompt, measured.

    Attributes:
        n_tokens: its real tokens.
        counts: [n_budgets][n_layers], how many pairs each prunable layer keeps.
    """

    n_tokens: int
    counts: list[list[int]]


class CalibrationState:
    """The measurements of each sample, by its index, and the file that they are kept in.

    Args:
        path: of the file that is written; None: nothing is.
        fingerprint: what must be the same for measurements to belong together; JSON values.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: dict[str, Any]):
        self.path = None if path is None else Path(path)
        if self.path is not None and not self.path.parent.is_dir():
            raise FileNotFoundError(f"cannot keep a state in {self.path}: the folder {self.path.parent} does not exist")
        self.fingerprint = fingerprint
        self._samples: dict[int, list[Measurement]] = {}
        self._saved_at, self._changed = time.monotonic(), False

    def __contains__(self, index: int) -> bool:
        return index in self._samples

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def samples(self) -> dict[int, list[Measurement]]:
        """The measurements of each sample: one for each of its rows."""
        return dict(self._samples)

    def measurements(self) -> list[Measurement]:
        """All of them, by the index of the sample."""
        return [each for index in sorted(self._samples) for each in self._samples[index]]

    def add(self, index: int, measurements: list[Measurement]) -> None:
        """Take in a sample; now and then write the file."""
        self._samples[index] = measurements
        self._changed = True
        if time.monotonic() - self._saved_at > _SECONDS_BETWEEN_SAVES:
            self.save()

    def merge(self, samples: dict[int, list[Measurement]]) -> None:
        """Take in what another process has measured."""
        self._samples.update(samples)

    def save(self) -> None:
        """Write the file, if there is anything new for it.

        Raises:
            OSError: it cannot be written. An older one is then as it was.
        """
        if self.path is None or not self._changed:
            return
        samples = {str(index): [vars(each) for each in self._samples[index]] for index in sorted(self._samples)}
        content = {"format": _FORMAT, "format_version": 1, "fingerprint": self.fingerprint, "samples": samples}
        temporary = self.path.parent / f".prefixkv-{uuid.uuid4().hex}.tmp"
        try:
            temporary.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
            os.replace(temporary, self.path)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
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
            if content["format"] != _FORMAT or content["format_version"] != 1:
                raise ValueError(f"its format is {content['format']!r}, version {content['format_version']!r}")
            found = content["fingerprint"]
            samples = {int(index): [_measurement(**row) for row in rows] for index, rows in content["samples"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: is no state of a calibration ({error!r}); delete it to start over") from None
        self._check(path, found)
        self.merge(samples)

    def _check(self, path: Path, found: dict[str, Any]) -> None:
        own = json.loads(json.dumps(self.fingerprint))
        for field in sorted({*own, *found}):
            if own.get(field) != found.get(field):
                raise ValueError(
                    f"{path}: is the state of another calibration, whose {field} was {found.get(field)!r}; this one "
                    f"has {own.get(field)!r}. Delete the file to start over"
                )

    def delete(self) -> None:
        """Remove the file: the calibration is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _measurement(n_tokens: Any, counts: Any) -> Measurement:
    numbers = [n_tokens, *(count for row in counts for count in row)]
    if n_tokens < 1 or not all(type(number) is int and 0 <= number <= n_tokens for number in numbers):
        raise ValueError("a count that is no number from 0 to n_tokens")
    return Measurement(n_tokens, [list(row) for row in counts])


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
