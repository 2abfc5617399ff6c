"""Profile files: a path to bytes, bytes to budgets, keep ratios and metadata, and back. Format version 2.

A file is safetensors: pure data, so reading one runs no code, and a damaged or hostile one ends in a `ProfileError` and
nothing else. Version 1 (one length a layer, no method, never measured) is read and becomes version 2, which alone is
written. What the values mean is checked by profile.py.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from ..methods import PREFIXKV

FORMAT = "prefixkv-profile"
FORMAT_VERSION = 2
SUFFIX = ".safetensors"

# Far above any model, and small enough that the worst file costs some 9 MiB and well under a second.
MAX_BUDGETS = 1024
MAX_LAYERS = 1024
MAX_HEADS = 1024
MAX_VALUES = 2**20  # of keep: budgets times layers times heads
MAX_HEADER_BYTES = 2**20
MAX_FILE_BYTES = 8 + MAX_HEADER_BYTES + 8 * (MAX_BUDGETS + MAX_VALUES)

DESCRIPTIVE = ("model", "source", "samples", "created")
_REQUIRED = {  # metadata, by format version
    1: ("format", "format_version", "n_layers", "method", "queries", "library_version", *DESCRIPTIVE),
    2: ("format", "format_version", "n_layers", "n_heads", "method", "library_version", *DESCRIPTIVE),
}
_AXES = ("n_budgets", "n_layers", "n_heads")
_NATURAL = re.compile(r"[1-9][0-9]{0,8}")


class ProfileError(ValueError):
    """A profile, or the file of one, breaks a rule of the format; the message names file, field and rule."""


def shown(value: object) -> str:
    """A value in an error message: printable, in one line and not long, whatever a file may hold."""
    text = repr(str(value) if isinstance(value, Exception) else value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def check_format(metadata: Mapping[str, str], versions: Sequence[int] = (FORMAT_VERSION,)) -> int:
    """Return the format version, or refuse what is no profile, or one of another version."""
    found, version = metadata.get("format"), metadata.get("format_version")
    if found != FORMAT:
        raise ProfileError(f"format: is {shown(found)}; expected {FORMAT!r} (is this file a profile?)")
    number = int(version) if version is not None and _NATURAL.fullmatch(version) else 0
    if number > FORMAT_VERSION:
        newer = "the profile was written by a newer version; upgrade prefixkv-cache"
        raise ProfileError(f"format_version: is {version}; expected at most {FORMAT_VERSION}: {newer}")
    if number not in versions:
        expected = " or ".join(f"'{each}'" for each in versions)
        raise ProfileError(f"format_version: is {shown(version)}; expected {expected}")
    return number


def check_shapes(budgets: Sequence[int], keep: Sequence[int], n_axes: int = 3) -> None:
    """Refuse shapes that are not [n_budgets] and [n_budgets, n_layers, n_heads], or too large.

    Args:
        budgets, keep: the shapes.
        n_axes: 2 for a table of version 1, [n_budgets, n_layers].
    """
    if len(budgets) != 1 or not 1 <= budgets[0] <= MAX_BUDGETS:
        raise ProfileError(
            f"budgets: has shape {shown(list(budgets))}; expected [n_budgets], from 1 to {MAX_BUDGETS} budgets"
        )
    limits = (budgets[0], MAX_LAYERS, MAX_HEADS)
    fits = len(keep) == n_axes and all(1 <= size <= limit for size, limit in zip(keep, limits, strict=False))
    if not fits or keep[0] != budgets[0]:
        axes = f"[{', '.join(_AXES[:n_axes])}] with n_budgets = {budgets[0]} as in budgets"
        most = f"from 1 to {MAX_LAYERS} layers and 1 to {MAX_HEADS} heads"
        raise ProfileError(f"keep: has shape {shown(list(keep))}; expected {axes}, {most}")
    if math.prod(keep) > MAX_VALUES:
        raise ProfileError(f"keep: has shape {shown(list(keep))}; expected at most {MAX_VALUES} values")


def read_bounded(path: Path) -> bytes:
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
        raise ProfileError(f"cannot be read: {error}; expected a {SUFFIX} file") from None


def parse(data: bytes) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Return budgets [n_budgets], keep [n_budgets, n_layers, n_heads] and metadata, as of version 2.

    Raises:
        ProfileError: the bytes are no profile, or one of a version or method that is no longer known.
    """
    tensors, metadata = _open(data)
    version = check_format(metadata, (1, 2))
    for key in _REQUIRED[version]:
        if key not in metadata:
            raise ProfileError(f"{key}: is missing from the metadata; expected {', '.join(_REQUIRED[version])}")
    if set(tensors) != {"budgets", "keep"}:
        raise ProfileError(f"tensors: are {shown(sorted(tensors))}; expected exactly 'budgets' and 'keep'")
    check_shapes(tensors["budgets"]["shape"], tensors["keep"]["shape"], n_axes=1 + version)
    budgets, keep = (_tensor(field, tensors[field]) for field in ("budgets", "keep"))
    return (budgets, keep, metadata) if version == 2 else (budgets, keep[:, :, None], _from_version_1(metadata))


def _open(data: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what safetensors finds: tensors by name, not yet decoded, and the metadata."""
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise ProfileError(f"header: has {length} bytes; expected at most {MAX_HEADER_BYTES} (is this file a profile?)")
    try:
        tensors = dict(deserialize(data))
        header = json.loads(data[8 : 8 + length].decode())
    except (SafetensorError, ValueError, RecursionError) as error:
        damaged = f"is damaged or cut short ({shown(error)})"
        raise ProfileError(f"header: {damaged}; expected a whole {SUFFIX} file") from None
    return tensors, header.get("__metadata__") or {}


def _tensor(field: str, entry: Mapping[str, Any]) -> Tensor:
    """Return one tensor of a file; safetensors has checked that its shape and its bytes agree."""
    if entry["dtype"] != "F64":
        raise ProfileError(f"{field}: has dtype {shown(entry['dtype'])}; expected F64")
    shape = entry["shape"]
    values = struct.unpack(f"<{math.prod(shape)}d", entry["data"])
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def _from_version_1(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata as of version 2: the fields that said how keys were ranked become the method."""
    queries, text = metadata["queries"], metadata.get("ranking")
    if queries not in ("all", "unknown") and not _NATURAL.fullmatch(queries):
        again = " (calibrate again)" if queries == "text" else ""
        raise ProfileError(f"queries: is {shown(queries)}; expected 'all' or how many last tokens count{again}")
    window = int(queries) if _NATURAL.fullmatch(queries) else "all"
    method = PREFIXKV.replace(queries=window, **({} if text is None else _ranking_1(text)))
    kept = {key: value for key, value in metadata.items() if key not in ("queries", "ranking", "measured")}
    return {**kept, "format_version": str(FORMAT_VERSION), "n_heads": "1", "method": method.spell(full=True)}


def _ranking_1(text: str) -> dict[str, Any]:
    """Return the fields of a method that a version 1 `ranking` stands for, or refuse what no method has any more.

    Written as `average=sum heads=mean pooling=1 value_norm=false diversity=0.0 novelty=0.0`.
    """
    only = {"average": "sum", "diversity": "0.0", "novelty": "0.0"}
    names, _, given = zip(*(part.partition("=") for part in text.split(" ")), strict=True)
    values: dict[str, str] = dict(zip(names, given, strict=True))
    if list(names) != ["average", "heads", "pooling", "value_norm", "diversity", "novelty"]:
        raise ProfileError(f"ranking: is {shown(text)}; expected such as 'average=sum heads=mean pooling=1 ...'")
    for name, value in only.items():
        if values[name] != value:
            gone = f"has {name}={shown(values[name])}, which no method has any more"
            raise ProfileError(f"ranking: {gone}; expected {name}={value}: calibrate again")
    try:
        fields = {
            "heads": values["heads"],
            "pooling": int(values["pooling"]),
            "value_norm": {"true": True, "false": False}[values["value_norm"]],
        }
        PREFIXKV.replace(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"ranking: is {shown(text)}; expected what a method takes: {shown(error)}") from None
    return fields


def encode(budgets: Tensor, keep: Tensor, metadata: Mapping[str, str]) -> bytes:
    """Return a file's content. Written here and not by safetensors, which promises no order of the metadata.

    Args:
        budgets: float64 [n_budgets].
        keep: float64 [n_budgets, n_layers, n_heads].
        metadata: written sorted, so that equal content gives equal bytes.

    Raises:
        ProfileError: the metadata is too long for a header.
    """
    split, end = 8 * budgets.numel(), 8 * (budgets.numel() + keep.numel())
    header = {
        "__metadata__": dict(sorted(metadata.items())),
        "budgets": {"dtype": "F64", "shape": list(budgets.shape), "data_offsets": [0, split]},
        "keep": {"dtype": "F64", "shape": list(keep.shape), "data_offsets": [split, end]},
    }
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format's own padding: the tensors begin at a multiple of 8
    if len(encoded) > MAX_HEADER_BYTES:
        raise ProfileError(f"metadata: takes {len(encoded)} bytes; expected at most {MAX_HEADER_BYTES} with the header")
    values = [*budgets.tolist(), *keep.flatten().tolist()]
    return struct.pack("<Q", len(encoded)) + encoded + struct.pack(f"<{len(values)}d", *values)
