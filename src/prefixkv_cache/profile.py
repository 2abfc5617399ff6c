"""Profiles: how much of the prompt's KV cache each layer keeps, for each of a grid of budgets.

A calibrator makes a profile once for a model; the cache asks it for the keep ratios at its budget, and asks
`prompt_counts` how many pairs that is for a prompt of N tokens. The unit is everywhere the fraction *kept*.
Files are safetensors, format version 1: pure data, checked in full when they are read, so that a damaged or hostile
file ends in a `ProfileError` and nothing else. This module searches no threshold and sees no model, key or query.

PrefixKV, arXiv 2412.03409 (there "global prefix configuration"); its published figures are *forget* ratios, 1 - keep.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import numbers
import os
import re
import stat
import struct
import uuid
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize

from .bundled import bundled_dir
from .calibrated_for import calibrated_ranking
from .scoring import to_float

FORMAT = "prefixkv-profile"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"

# Far above any real model, and small enough that the worst file costs some 9 MiB and well under a second.
MAX_LAYERS = 1024
MAX_BUDGETS = 1024
MAX_HEADER_BYTES = 2**20
MAX_FILE_BYTES = 8 + MAX_HEADER_BYTES + 8 * MAX_BUDGETS * (MAX_LAYERS + 1)

MAX_FALL = 0.001  # by how much a keep ratio may fall from one budget to the next
MAX_MEAN_ERROR = 0.005  # by how much the mean over the layers may differ from the budget
_ROUNDING = 1e-9  # so that a value that lies on one of the two limits is not refused for its last bit

_DESCRIPTIVE = ("model", "method", "queries", "source", "samples", "created")
_REQUIRED = ("format", "format_version", "n_layers", "library_version", *_DESCRIPTIVE)
_UNKNOWN = "unknown"
_NATURAL = re.compile(r"[1-9][0-9]{0,8}")


class ProfileError(ValueError):
    """A profile, or the file of one, breaks a rule of the format; the message names file, field and rule."""


def check_budget(budget: Any) -> float:
    """Return `budget` as a float, or refuse it.

    Args:
        budget: the fraction of the prompt's KV pairs to keep, in (0, 1].

    Raises:
        TypeError: not a real number (a bool is not one here).
        ValueError: nan, or outside (0, 1].
    """
    cure = "give a fraction of the prompt's KV pairs to keep, in (0, 1], such as 0.5"
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f"budget is {budget!r}, of type {type(budget).__name__}; {cure}")
    # Compared before the conversion, which may round to 1; and after it, which may round to 0.
    fraction = to_float(budget) if budget <= 1 else math.inf
    if not 0 < fraction <= 1:  # nan fails every comparison
        raise ValueError(f"budget is {budget!r}; {cure}")
    return fraction


def prompt_counts(keep: torch.Tensor, n_tokens: int | torch.Tensor, sink: int = 1) -> torch.Tensor:
    """Return how many pairs each layer keeps of a prompt: `N - round_half_even(N * (1 - keep))`.

    Never under `sink + 1` (the sink and the prompt's last token stay) nor over N. In float64, so that the published
    figures give, entry for entry, what the reference keeps.

    Args:
        keep: float64 [n_layers], keep ratios in [0, 1].
        n_tokens: N, the prompt's real (not padding) tokens: an int, or an integer tensor [batch].
        sink: the first tokens, which are never pruned.

    Returns:
        int64 [n_layers] for an int, [n_layers, batch] for a tensor, on the device of `keep`.

    Raises:
        TypeError: `n_tokens` is not an integer or a tensor of integers, or `keep` is not float64.
        ValueError: `n_tokens` or `sink` is negative, or a keep ratio lies outside [0, 1].
    """
    if keep.dtype != torch.float64:
        raise TypeError(f"keep has dtype {keep.dtype}; expected torch.float64 (`.double()`)")
    if not bool(((keep >= 0) & (keep <= 1)).all()):
        raise ValueError(f"keep has values outside [0, 1]: {keep.tolist()}")
    n = _token_counts(n_tokens).to(keep.device)
    if sink < 0 or bool((n < 0).any()):
        raise ValueError(f"n_tokens is {n_tokens!r} and sink is {sink!r}; neither may be negative")
    ratios = keep.reshape(keep.shape + (1,) * n.ndim)
    kept = n - torch.round(n * (1 - ratios)).to(torch.int64)
    return torch.minimum(kept.clamp(min=sink + 1), n)


def _token_counts(n_tokens: Any) -> torch.Tensor:
    """Return `n_tokens` as an int64 tensor, 0-dim for an int."""
    if isinstance(n_tokens, torch.Tensor):
        is_integer = not (n_tokens.is_floating_point() or n_tokens.is_complex() or n_tokens.dtype == torch.bool)
    else:
        is_integer = isinstance(n_tokens, numbers.Integral) and not isinstance(n_tokens, bool)
    if not is_integer:
        raise TypeError(f"n_tokens is {n_tokens!r}; expected an int or a tensor of ints")
    return torch.as_tensor(n_tokens, dtype=torch.int64)


class PrefixProfile:
    """The keep ratio of each layer at each of a grid of budgets, with a description of where the figures come from.

    Immutable: tensors are copied in, and every property hands out a copy. Two profiles are equal when their files
    would be equal byte for byte.

    Args:
        budgets: float64 [n_budgets], rising, each in (0, 1]; a list of floats will do.
        keep: float64 [n_budgets, n_layers], each in [0, 1], not falling by more than 0.001 from one budget to the next,
            with row means within 0.005 of the budgets; nested lists will do.
        metadata: string to string. What the class knows itself (`format`, `format_version`, `n_layers`,
            `library_version`) is filled in where it is absent; of `model`, `method`, `queries`, `source`, `samples`
            and `created`, what is absent becomes `"unknown"`. `ranking`, where it is there, is what
            `calibrated_for.write_ranking` writes; where it is not, the plain ranking is meant. Further keys are kept.

    Raises:
        ProfileError: one of the rules above is broken; the message names the field and the rule.
    """

    __slots__ = ("_budgets", "_keep", "_metadata")

    def __init__(self, budgets: Any, keep: Any, metadata: Mapping[str, str] | None = None) -> None:
        budgets, keep = _as_table("budgets", budgets), _as_table("keep", keep)
        _check_shapes(budgets.shape, keep.shape)
        _check_budgets(budgets)
        _check_keep(budgets, keep)
        self._budgets, self._keep = budgets, keep
        self._metadata = _complete_metadata({} if metadata is None else metadata, self.n_layers)

    @property
    def budgets(self) -> torch.Tensor:
        """The grid: float64 [n_budgets], rising, fractions kept."""
        return self._budgets.clone()

    @property
    def keep(self) -> torch.Tensor:
        """The keep ratios: float64 [n_budgets, n_layers], fractions kept."""
        return self._keep.clone()

    @property
    def metadata(self) -> dict[str, str]:
        """The description: string to string."""
        return dict(self._metadata)

    @property
    def n_layers(self) -> int:
        """For how many layers the profile holds keep ratios."""
        return self._keep.shape[1]

    def keep_ratios(self, budget: float) -> torch.Tensor:
        """Return the keep ratio of each layer at a budget: float64 [n_layers], fractions kept.

        Linear between the budgets of the grid, so the mean is that of the two rows, interpolated; below the grid scaled
        toward 0, above it toward 1. A budget of the grid gives its row as it is; 1.0 gives exactly one for every layer.

        Raises:
            TypeError, ValueError: `budget` is not a number in (0, 1]; see `check_budget`.
        """
        budget = check_budget(budget)
        # Nothing is kept at budget 0 and everything at 1: with these two anchors, scaling outside the grid
        # is interpolation too, and a last row that is not quite one cannot prune anything at budget 1.
        grid = [b for b in self._budgets.tolist() if b < 1]
        anchors = [0.0, *grid, 1.0]
        right = bisect_left(anchors, budget)
        high = self._anchor_row(right, len(grid))
        if anchors[right] == budget:
            return high
        low = self._anchor_row(right - 1, len(grid))
        weight = (budget - anchors[right - 1]) / (anchors[right] - anchors[right - 1])
        between = low + (high - low) * weight
        return between.clamp(min=torch.minimum(low, high), max=torch.maximum(low, high))  # rounding oversteps no row

    def _anchor_row(self, index: int, n_inner: int) -> torch.Tensor:
        """Return row `index` of: zeros, the grid's `n_inner` rows below budget 1, ones."""
        if 1 <= index <= n_inner:
            return self._keep[index - 1].clone()
        return torch.full((self.n_layers,), float(index > n_inner), dtype=torch.float64)

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> PrefixProfile:
        """Read a profile from a file, or a bundled one by its name. Runs no code from the file.

        Args:
            source: a string without a path separator and without the suffix `.safetensors` is the name of a bundled
                profile or, failing that, of a file in the current folder; anything else is a path.

        Raises:
            ProfileError: there is no such file or name (the message lists the names there are), or the file breaks the
                format (the message names the file, the field and what was expected).
            TypeError: `source` is neither a string nor a path.
        """
        path = _resolve(source)
        try:
            return cls(*_parse(_read_bounded(path)))
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a file, in one step: whoever reads it sees the old file or the new one, whole.

        The same content gives the same bytes.

        Args:
            path: where to; an existing file is replaced, the folder must exist.

        Raises:
            OSError: the file cannot be written. The old file, if any, is then as it was.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"cannot save a profile to {target}: the folder {target.parent} does not exist")
        # In the same folder, as only a rename within one file system is atomic; not by `tempfile`,
        # which would leave the profile readable by its owner alone.
        temporary = target.parent / f".prefixkv-{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "xb") as file:
                file.write(self._to_bytes())
            os.replace(temporary, target)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, filename: str = "prefixkv-profile.safetensors", **kwargs: Any
    ) -> PrefixProfile:
        """Read the profile that lies beside a model: in a folder, or in a repository on the Hugging Face hub.

        Args:
            source: a folder, a profile file, or a repository's id such as `"me/llava-1.5-7b-prefixkv"`.
            filename: the profile's name in the folder or repository.
            kwargs: what `huggingface_hub.hf_hub_download` takes, such as `revision`, `token`, `cache_dir`,
                `local_files_only`.

        Raises:
            ProfileError: there is no such file, folder or repository, or it cannot be reached, or the file breaks the
                format.
        """
        from .hub import find_profile

        return cls.load(find_profile(source, filename, **kwargs))

    def push_to_hub(self, repo_id: str, *, filename: str = "prefixkv-profile.safetensors", **kwargs: Any) -> str:
        """Upload the profile to a repository on the Hugging Face hub, which is made if there is none.

        Args:
            repo_id: such as `"me/llava-1.5-7b-prefixkv"`; the model's own repository will do.
            filename: the profile's name in the repository; it must end in `.safetensors`.
            kwargs: `private` (a new repository's visibility), `token`, and what `huggingface_hub.HfApi.upload_file`
                takes, such as `revision`, `commit_message`, `create_pr`.

        Returns:
            The web address of the commit.

        Raises:
            ProfileError: the name is not one of a profile, or the hub refuses; the message says why.
        """
        from .hub import upload_profile

        return upload_profile(self._to_bytes(), repo_id, filename, **kwargs)

    @staticmethod
    def available() -> list[str]:
        """Return the names of the bundled profiles, sorted."""
        return sorted(_bundled())

    def _to_bytes(self) -> bytes:
        """Return the file's content. Written here and not by safetensors, which promises no order of the metadata."""
        values = [*self._budgets.tolist(), *self._keep.flatten().tolist()]
        return _encode_header(self._metadata, *self._keep.shape) + struct.pack(f"<{len(values)}d", *values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PrefixProfile):
            return NotImplemented
        return self._to_bytes() == other._to_bytes()

    def __hash__(self) -> int:
        return hash(self._to_bytes())

    def __repr__(self) -> str:
        model, queries = self._metadata["model"], self._metadata["queries"]
        grid = f"{self._budgets[0]:g} to {self._budgets[-1]:g} in {len(self._budgets)}"
        return f"PrefixProfile(model={model!r}, n_layers={self.n_layers}, budgets={grid}, queries={queries!r})"


# What is in a profile.


def _as_table(field: str, value: Any) -> torch.Tensor:
    """Return a float64 copy on the CPU. Tensors of another dtype are refused: 0.1 in float32 is not the budget 0.1."""
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.float64:
            raise ProfileError(f"{field}: has dtype {value.dtype}; expected torch.float64 (`.double()`)")
        table = value.detach().cpu()
    else:
        try:
            table = torch.tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ProfileError(f"{field}: is no table of numbers ({error}); expected float64 values") from None
    return table.contiguous() + 0.0  # a copy in any case; and -0.0 becomes 0.0, so that equal values give equal bytes


def _shown(value: object) -> str:
    """A value in an error message: printable, in one line and not long, whatever a file may hold."""
    text = repr(str(value) if isinstance(value, Exception) else value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def _check_shapes(budgets: Sequence[int], keep: Sequence[int]) -> None:
    if len(budgets) != 1 or not 1 <= budgets[0] <= MAX_BUDGETS:
        raise ProfileError(
            f"budgets: has shape {_shown(list(budgets))}; expected [n_budgets], from 1 to {MAX_BUDGETS} budgets"
        )
    if len(keep) != 2 or keep[0] != budgets[0] or not 1 <= keep[1] <= MAX_LAYERS:
        expected = f"[n_budgets, n_layers] with n_budgets = {budgets[0]} as in budgets, from 1 to {MAX_LAYERS} layers"
        raise ProfileError(f"keep: has shape {_shown(list(keep))}; expected {expected}")


def _check_budgets(budgets: torch.Tensor) -> None:
    values = budgets.tolist()
    for index, value in enumerate(values):
        if not 0 < value <= 1:  # nan fails every comparison
            raise ProfileError(f"budgets: entry {index} is {value}; expected a fraction kept, in (0, 1]")
        if index and value <= values[index - 1]:
            raise ProfileError(f"budgets: {value} follows {values[index - 1]}; expected rising budgets")


def _check_keep(budgets: torch.Tensor, keep: torch.Tensor) -> None:
    at = _first(~((keep >= 0) & (keep <= 1)))
    if at is not None:
        raise _keep_error(budgets, at, f"is {keep[at].item()}", "a fraction kept, in [0, 1]")
    at = _first(keep[:-1] - keep[1:] > MAX_FALL + _ROUNDING)
    if at is not None:
        row, layer = at
        fall = f"falls from {keep[row, layer].item()} to {keep[row + 1, layer].item()} at the next budget"
        raise _keep_error(budgets, at, fall, f"a fall of at most {MAX_FALL}")
    means = keep.mean(dim=1)
    at = _first((means - budgets).abs() > MAX_MEAN_ERROR + _ROUNDING)
    if at is not None:
        budget, mean = budgets[at].item(), means[at].item()
        raise ProfileError(f"keep: has row mean {mean} at budget {budget}; expected it within {MAX_MEAN_ERROR} of that")


def _first(wrong: torch.Tensor) -> tuple[int, ...] | None:
    """Return the index of the first entry that is true, if there is one."""
    found = wrong.nonzero()
    return tuple(found[0].tolist()) if len(found) else None


def _keep_error(budgets: torch.Tensor, at: tuple[int, ...], problem: str, expected: str) -> ProfileError:
    row, layer = at
    return ProfileError(f"keep: layer {layer} at budget {budgets[row].item()} {problem}; expected {expected}")


def _complete_metadata(given: Mapping[str, str], n_layers: int) -> dict[str, str]:
    """Return the metadata with the format's own fields filled in, or refuse what is wrong in it."""
    if not isinstance(given, Mapping):
        raise ProfileError(f"metadata: is of type {type(given).__name__}; expected a mapping of strings to strings")
    for key, value in given.items():
        if not (_is_text(key) and _is_text(value)):
            raise ProfileError(f"metadata: {_shown(key)} is {_shown(value)}; expected a mapping of strings to strings")
    own = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "n_layers": str(n_layers)}
    defaults = {**dict.fromkeys(_DESCRIPTIVE, _UNKNOWN), **own, "library_version": _library_version()}
    metadata = {**defaults, **given}
    _check_format(metadata)
    if metadata["n_layers"] != str(n_layers):
        raise ProfileError(
            f"n_layers: is {_shown(metadata['n_layers'])}; expected '{n_layers}', the layers that keep has"
        )
    queries = metadata["queries"]
    if queries not in ("all", "text", _UNKNOWN) and not _NATURAL.fullmatch(queries):
        raise ProfileError(
            f"queries: is {_shown(queries)}; expected 'all', 'text', or how many of the prompt's last tokens count"
        )
    _check_ranking(metadata)
    _encode_header(metadata, MAX_BUDGETS, MAX_LAYERS)  # what can be made can be saved, and what is saved can be loaded
    return metadata


def _check_ranking(metadata: Mapping[str, str]) -> None:
    """Refuse a ranking that cannot be read. One without queries would be half of one, and means nothing."""
    if "ranking" not in metadata:
        return
    if metadata["queries"] == _UNKNOWN:
        raise ProfileError("queries: is 'unknown'; expected whose attention counts, as ranking is there")
    try:
        calibrated_ranking(metadata)
    except ValueError as error:
        raise ProfileError(f"ranking: {error}") from None


def _is_text(value: object) -> bool:
    """Whether this is a string that UTF-8 can hold: one with half of a surrogate pair is not."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _check_format(metadata: Mapping[str, str]) -> None:
    """Refuse what is no profile, or one of another version. First of all checks, as it decides what the others mean."""
    found, version = metadata.get("format"), metadata.get("format_version")
    if found != FORMAT:
        raise ProfileError(f"format: is {_shown(found)}; expected {FORMAT!r} (is this file a profile?)")
    if version is None or not _NATURAL.fullmatch(version):
        raise ProfileError(f"format_version: is {_shown(version)}; expected '{FORMAT_VERSION}'")
    if int(version) > FORMAT_VERSION:
        newer = "the profile was written by a newer version; upgrade prefixkv-cache"
        raise ProfileError(f"format_version: is {version}; expected at most {FORMAT_VERSION}: {newer}")


@functools.cache
def _library_version() -> str:
    try:
        return importlib.metadata.version("prefixkv-cache")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return _UNKNOWN


# The file.


def _bundled() -> dict[str, Path]:
    """Return the bundled profiles by name. A name is looked up here and never joined to a path."""
    return {path.name.removesuffix(SUFFIX): path for path in bundled_dir("profiles").glob(f"*{SUFFIX}")}


def _resolve(source: str | os.PathLike[str]) -> Path:
    """Return the path that `PrefixProfile.load` shall read."""
    if not isinstance(source, str):
        if not isinstance(source, os.PathLike):
            raise TypeError(f"profile is {source!r}; expected a path or the name of a bundled profile")
        return Path(source)
    if source.endswith(SUFFIX) or "/" in source or os.sep in source:
        return Path(source)
    bundled = _bundled()
    if source in bundled:
        return bundled[source]
    if os.path.isfile(source):
        return Path(source)
    names = ", ".join(sorted(bundled)) or "none"
    raise ProfileError(f"no bundled profile is named {source!r}; there are: {names}; a path ends in {SUFFIX}")


def _read_bounded(path: Path) -> bytes:
    """Read a whole file, but never more than a profile can have, and never from a device or pipe, which may not end."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise ProfileError(f"is {kind}; expected a {SUFFIX} file")
        if status.st_size > MAX_FILE_BYTES:
            raise ProfileError(f"has {status.st_size} bytes; expected at most {MAX_FILE_BYTES}")
        with open(path, "rb") as file:
            return file.read(MAX_FILE_BYTES)
    except ProfileError:
        raise
    except FileNotFoundError:
        raise ProfileError(f"there is no such file; expected a {SUFFIX} file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ProfileError(f"cannot be read: {error}") from None


def _parse(data: bytes) -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
    """Return budgets, keep and metadata of a file's content. What the values mean is checked by the constructor."""
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise ProfileError(f"header: has {length} bytes; expected at most {MAX_HEADER_BYTES} (is this file a profile?)")
    try:
        tensors = dict(deserialize(data))
        header = json.loads(data[8 : 8 + length].decode())
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ProfileError(
            f"header: is damaged or cut short ({_shown(error)}); expected a whole {SUFFIX} file"
        ) from None
    metadata = header.get("__metadata__") or {}
    _check_format(metadata)
    for key in _REQUIRED:
        if key not in metadata:
            raise ProfileError(f"{key}: is missing from the metadata; expected {', '.join(_REQUIRED)}")
    if set(tensors) != {"budgets", "keep"}:
        raise ProfileError(f"tensors: are {_shown(sorted(tensors))}; expected exactly 'budgets' and 'keep'")
    _check_shapes(tensors["budgets"]["shape"], tensors["keep"]["shape"])
    return _tensor("budgets", tensors["budgets"]), _tensor("keep", tensors["keep"]), metadata


def _tensor(field: str, entry: Mapping[str, Any]) -> torch.Tensor:
    """Return one tensor of a file; safetensors has checked that its shape and its bytes agree."""
    if entry["dtype"] != "F64":
        raise ProfileError(f"{field}: has dtype {_shown(entry['dtype'])}; expected F64")
    shape = entry["shape"]
    values = struct.unpack(f"<{math.prod(shape)}d", entry["data"])
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def _encode_header(metadata: Mapping[str, str], n_budgets: int, n_layers: int) -> bytes:
    """Return the head of a safetensors file, its length included, with sorted metadata."""
    split, end = 8 * n_budgets, 8 * n_budgets * (1 + n_layers)
    header = {
        "__metadata__": dict(sorted(metadata.items())),
        "budgets": {"dtype": "F64", "shape": [n_budgets], "data_offsets": [0, split]},
        "keep": {"dtype": "F64", "shape": [n_budgets, n_layers], "data_offsets": [split, end]},
    }
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format's own padding: the tensors begin at a multiple of 8
    if len(encoded) > MAX_HEADER_BYTES:
        raise ProfileError(f"metadata: takes {len(encoded)} bytes; expected at most {MAX_HEADER_BYTES} with the header")
    return struct.pack("<Q", len(encoded)) + encoded
