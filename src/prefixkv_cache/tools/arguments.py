"""Arguments that several commands share, and what they are turned into. Standard library only at import.

`--help` of a command imports its tool module and this one, so neither imports torch, transformers or Pillow at its top.
"""

from __future__ import annotations

import argparse
import math
import os
import warnings
from pathlib import Path
from typing import Any


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model; `load` loads it."""
    parser.add_argument(
        "--model", required=True, metavar="M", help="folder or hub id of a model of pictures and text, or text"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", metavar="D", help="such as cpu, cuda:0; default: a GPU if there is one")
    parser.add_argument("--device-map", metavar="MAP", help="spread the model by accelerate, such as auto")
    parser.add_argument("--attn-implementation", metavar="A", help="eager, sdpa, ...; default: the model's")


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Model and processor, as `loading.load_model` returns them."""
    from . import loading

    names = ("dtype", "device", "device_map", "attn_implementation")
    return loading.load_model(arguments.model, **{name: getattr(arguments, name) for name in names})


def add_prompt(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--image` and `--prompt`; `read_prompt` checks and opens them."""
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("--prompt", required=required, metavar="TEXT")


def read_prompt(arguments: argparse.Namespace) -> tuple[str, list[Any]]:
    """The prompt and its pictures.

    Raises:
        ValueError: an empty prompt, or a file that is no picture.
    """
    from .loading import open_image

    if not arguments.prompt.strip():
        raise ValueError("--prompt is empty; say what the model shall answer")
    return arguments.prompt, [open_image(path) for path in arguments.image]


def add_method(parser: argparse.ArgumentParser, default: str = "the profile's, else the default") -> None:
    """`--method`: a name, or a name and what differs."""
    parser.add_argument("--method", metavar="M", help=f"such as snapkv or 'snapkv:queries=64;pooling=5' ({default})")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Which cache, but for its budget; `cache_options` makes arguments of `PrefixKVCache.for_model` of it."""
    parser.add_argument(
        "--profile", metavar="P", help="file or bundled name; default: the model's measured one, if any"
    )
    add_method(parser)


def cache_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `--profile` and `--method` say, as arguments of `PrefixKVCache.for_model`.

    Raises:
        TypeError, ValueError, OSError: no cache can be made of them; found without the model.
    """
    from ..cache.cache import PrefixKVCache

    options = {name: value for name in ("profile", "method") if (value := getattr(arguments, name)) is not None}
    with warnings.catch_warnings():  # said once, by the cache that is used
        warnings.simplefilter("ignore")
        PrefixKVCache(**options)
    return options


# Files to write: looked at before the work is done, written at its end.


def out_path(text: str, what: str, *suffixes: str) -> Path:
    """The file of `--out`; its folder need not be there yet.

    Args:
        text: as given.
        what: what is written, for the message.
        suffixes: of which the name must end in one.

    Raises:
        ValueError, OSError: another suffix, a folder, or a place where nothing can be written.
    """
    path = Path(text)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"--out is {text!r}; the name of {what} ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise IsADirectoryError(f"--out is {text!r}, which is a folder; give a file's name")
    return _check_writable(path)


def out_folder(text: str) -> Path:
    """The folder of `--out`, which need not be there yet.

    Raises:
        OSError: it is a file, or nothing can be written there.
    """
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--out is {text!r}, which is a file; give a folder")
    return _check_writable(path)


def _check_writable(path: Path) -> Path:
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        kind = "which cannot be written to" if above.is_dir() else "which is a file and no folder"
        raise OSError(f"--out is {os.fspath(path)!r} and lies in {os.fspath(above)!r}, {kind}")
    return path


def write_out(path: Path, content: bytes | str) -> None:
    """Write a file in one step, in a folder that is made if there is none.

    Raises:
        OSError: it cannot be written; names the file.
    """
    from ..profiles.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


# Types of arguments: text in, a value or argparse's error out.


def budget(text: str) -> float | int:
    """`0.3`: a fraction of the pairs; `512`: so many pairs a head; a bare `1` could be either and is refused."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value == 1:
        raise argparse.ArgumentTypeError("'1' is ambiguous: write 1.0 for everything, or the number of pairs a head")
    if value is not None and value > 1:
        return value
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if value is not None or not 0 < fraction <= 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no budget: expected a fraction kept, in (0, 1] such as 0.3, or a number of pairs a head "
            "such as 512"
        )
    return fraction


def budgets(text: str) -> tuple[float | int, ...]:
    """Several of them, with commas between."""
    return tuple(map(budget, text.split(",")))


def share(text: str) -> float:
    """A share, from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: expected a number from 0 to 1, such as 0.02")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def count(text: str) -> int | None:
    """A whole number of at least 1, or `all`, which is None."""
    return None if text == "all" else positive(text)


def say_budget(value: float | int) -> str:
    """`30 %` or `512 pairs`."""
    return f"{value} pairs" if isinstance(value, int) else f"{100 * value:.4g} %"
