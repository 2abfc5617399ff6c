"""What turns groups of numbers into codes of a few bits: the libraries behind transformers' own quantised caches.

A library chooses each group's scale and shift, and the codes; a number is then `code * scale - shift`. Where codes are
kept is up to quantized.py. They are packed here and not by the library, which packs the first half of all groups beside
the second: there no pair could be moved, or leave, by itself; and optimum-quanto compiles C++ before it first unpacks.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Grouped: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Codes uint8 [n, size], and scale and shift [n, 1] of each group, in the dtype of the numbers."""

NAMES = ("int8", "int4", "hqq-int8", "hqq-int4")
"""What `quantize=` takes: optimum-quanto where no library is named."""


@dataclass(frozen=True)
class Quantizer:
    """A library, and how many bits it gives a number.

    Attributes:
        name: one of `NAMES`.
        bits: 8 or 4.
    """

    name: str
    bits: int

    def __call__(self, groups: Tensor) -> Grouped:
        """Codes, scales and shifts of groups [n, size], each by itself."""
        return (_by_hqq if self.name.startswith("hqq") else _by_quanto)(groups, self.bits)

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [..., size] -> [..., bytes]: of 4 bits, the second half of the numbers lies in the upper bits."""
        if self.bits == 8:
            return codes
        low, high = F.pad(codes, (0, codes.shape[-1] % 2)).chunk(2, -1)
        return low | high << 4

    def unpack(self, codes: Tensor, size: int) -> Tensor:
        """uint8 [..., bytes] -> [..., size]."""
        return codes if self.bits == 8 else torch.cat([codes & 15, codes >> 4], -1)[..., :size]


def find_quantizer(name: Any) -> Quantizer | None:
    """The one of that name; None: nothing is quantised.

    Raises:
        TypeError, ValueError: there is none of that name.
        ImportError: its library is not installed.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"quantize must be one of {', '.join(NAMES)}, or None; got {name!r}")
    if name not in NAMES:
        raise ValueError(f"quantize must be one of {', '.join(NAMES)}, or None; got {name!r}")
    library, line = ("hqq", "hqq") if name.startswith("hqq") else ("optimum.quanto", "'prefixkv-cache[quantize]'")
    if not _is_there(library):
        raise ImportError(f"quantize={name!r} needs {library}, which is not installed: pip install {line}")
    return Quantizer(name, int(name[-1]))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _by_quanto(groups: Tensor, bits: int) -> Grouped:
    from optimum.quanto import MaxOptimizer, qint4, qint8

    scale, shift = MaxOptimizer()(groups, qint8 if bits == 8 else qint4, 0, None)
    scale, shift = scale.view(-1, 1), shift.view(-1, 1)
    codes = torch.ops.quanto.quantize_affine(groups, bits, 0, None, scale, shift)
    return codes & (1 << bits) - 1, scale, shift  # a group of one number repeated has scale 0, and any code


def _by_hqq(groups: Tensor, bits: int) -> Grouped:
    from hqq.core.quantize import Quantizer as Hqq  # pyright: ignore[reportMissingImports]

    size, device = groups.shape[1], groups.device
    codes, found = Hqq.quantize(groups, nbits=bits, group_size=size, axis=1, bitpack=False, device=device)
    scale, zero = found["scale"], found["zero"]
    return codes.to(torch.uint8), scale.to(groups.dtype), (zero * scale).to(groups.dtype)
