"""A safetensors file of a saved cache: bytes to metadata and tensors, and back. What they mean is saved.py's.

Reading runs no code. The header is bounded, and held against the size of the file, before anything else is read; then
each tensor is read into its own memory, one at a time. A checksum over header and data finds what was damaged on the
way; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..profiles.file import shown

MAX_HEADER_BYTES = 2**24  # some 100,000 tensors
MAX_AXES = 4
_CHECKSUM = "sha256"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class SavedCacheError(ValueError):
    """The file of a saved cache breaks a rule of the format, or is not one of this model; the message says where."""


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a file. Equal content gives equal bytes.

    Raises:
        ValueError: a dtype that the format does not know, or too much for a header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts, end = [], 0
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype not in _NAMES:
            raise ValueError(f"a cache of {tensor.dtype} cannot be saved; expected one of {', '.join(_DTYPES)}")
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(data)],
        }
        parts.append(data)
        end += len(data)
    checksum = hashlib.sha256(_canonical(header))
    for part in parts:
        checksum.update(part)
    header["__metadata__"][_CHECKSUM] = checksum.hexdigest()
    encoded = _canonical(header)
    encoded += b" " * (-len(encoded) % 8)  # the format's own padding
    if len(encoded) > MAX_HEADER_BYTES:
        raise ValueError(f"the header of this cache takes {len(encoded)} bytes; expected at most {MAX_HEADER_BYTES}")
    return b"".join([struct.pack("<Q", len(encoded)), encoded, *parts])


def _canonical(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


class TensorFile:
    """An open file whose header has been read and found sound.

    Attributes:
        metadata: string to string.
        shapes: of each tensor, by name.
        dtypes: likewise.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        size = _regular_size(file)
        self._header, self._start = _read_header(file, size)
        self.metadata = _metadata(self._header.pop("__metadata__", None))
        self._places = _check_entries(self._header, size - self._start)
        self.shapes = {name: tuple(entry["shape"]) for name, entry in self._header.items()}
        self.dtypes = {name: _DTYPES[entry["dtype"]] for name, entry in self._header.items()}

    def read(self, place: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """All tensors, each handed to `place` (which may move it) as soon as it is read.

        Raises:
            SavedCacheError: the checksum differs.
        """
        said = self.metadata.get(_CHECKSUM)
        rest = {key: text for key, text in self.metadata.items() if key != _CHECKSUM}
        checksum, found = hashlib.sha256(_canonical({**self._header, "__metadata__": rest})), {}
        self._file.seek(self._start)
        for name in self._places:
            tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
            values: Any = tensor.flatten().view(torch.uint8).numpy()
            data = memoryview(values)
            if self._file.readinto(data) != len(data):  # type: ignore[attr-defined]
                raise SavedCacheError(f"{name}: ends early; expected {len(data)} bytes")
            checksum.update(data)
            found[name] = place(name, tensor)
        if checksum.hexdigest() != said:
            raise SavedCacheError(f"{_CHECKSUM}: is {shown(said)}; expected {checksum.hexdigest()!r}: damaged")
        return found


@contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """Open a file; whatever is wrong with it, within the context too, is a `SavedCacheError` that names it."""
    try:
        with _open(Path(path)) as file:
            yield TensorFile(file)
    except SavedCacheError as error:
        raise SavedCacheError(f"{shown(os.fspath(path))[1:-1]}: {error}") from None


def _open(path: Path) -> BinaryIO:
    expected = "expected the .safetensors file of a saved cache"
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would not open before somebody writes to it
            raise SavedCacheError(f"file: is no regular file; {expected}")
        return open(path, "rb")
    except FileNotFoundError:
        raise SavedCacheError(f"file: there is none; {expected}") from None
    except SavedCacheError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise SavedCacheError(f"file: cannot be read: {shown(error)}; {expected}") from None


def _regular_size(file: BinaryIO) -> int:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise SavedCacheError("file: is no regular file; expected the .safetensors file of a saved cache")
    return status.st_size


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header as JSON, and where the tensors begin."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        most = min(MAX_HEADER_BYTES, max(size - 8, 0))
        raise SavedCacheError(f"header: has {length} bytes; expected at most {most} (cut short, or no saved cache?)")
    try:
        header = json.loads(file.read(length).decode())
    except (ValueError, RecursionError) as error:
        raise SavedCacheError(f"header: is damaged ({shown(error)}); expected JSON") from None
    if not isinstance(header, dict):
        raise SavedCacheError("header: is no JSON object; expected tensors by name and __metadata__")
    return header, 8 + length


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise SavedCacheError("__metadata__: is missing or not of strings; expected text by name")
    return found


def _check_entries(entries: dict[str, Any], data_bytes: int) -> list[str]:
    """Refuse tensors that do not lie one behind the other and fill the file; return their names in that order."""
    places = []
    for name, entry in entries.items():
        try:
            dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            sizes = [*shape, start, end]
            whole = all(type(each) is int and 0 <= each <= data_bytes + 1 for each in sizes)
            fits = whole and len(shape) <= MAX_AXES and end - start == math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError):
            fits, start, end = False, 0, 0
        if not fits:
            expected = "a known dtype, a shape, and offsets that fit both"
            raise SavedCacheError(f"{shown(name)}: is {shown(entry)}; expected {expected}, within {data_bytes} bytes")
        places.append((start, end, name))
    places.sort()
    ends = [0, *(end for _, end, _ in places)]
    if [start for start, _, _ in places] != ends[:-1] or ends[-1] != data_bytes:
        raise SavedCacheError(
            f"data_offsets: the tensors reach to byte {ends[-1]} of {data_bytes}; expected each behind the last one, "
            "to the file's end (is it cut short?)"
        )
    return [name for _, _, name in places]
