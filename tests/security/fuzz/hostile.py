"""Hostile profile files, and what has to hold for every one of them.

`mutate` damages a good profile in one of many ways; `check` loads a file and says what came of it. Both are used by the
fuzz target beside this file and by `python tests/security/fuzz/hostile.py`, which loads many mutations in a process of
its own:

- only a `ProfileError` ends a load, in one short line that names the file; what is not refused is a valid profile;
- no load takes more than a second of processor time, nor the process more than 256 MiB on top of what it had;
- nothing but that one file is opened, nothing is imported, compiled, unpickled, run or connected to (an audit hook).

Prints a JSON line and exits with 0, or ends in the traceback of the first file that breaks a rule, which it keeps.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from prefixkv_cache import Method
from prefixkv_cache.profiles.profile import PrefixProfile, ProfileError

SECONDS, MEMORY, LONGEST_MESSAGE = 1.0, 256 * 2**20, 1000
HEADER = 8  # bytes of its length
PATHS = ("../../etc/passwd", "/etc/passwd", "C:\\x", "file:///etc/passwd", ".", "~", "\0", "%s%n", "a" * 5000)
NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e400, -0.0)
SPELLINGS = (
    "snapkv", "snapkv:", ":", "snapkv:queries=1e400", "h2o:recent=nan", "h2o:recent=0.1;recent=0.2", "__class__",
    "snapkv:pooling=" + "9" * 900, "prefixkv:replace=1", "prefixkv:score=os.system", "a:" + "queries=1;" * 500,
)  # fmt: skip
MEASUREMENTS = (
    "{}", "[" * 100_000, '{"samples": 1e999, "budgets": {}}', '{"samples": 3, "budgets": {"nan": {"kl": 1}}}',
    '{"samples": 3, "budgets": {"0.5": {"kl": 1e999}}}', '{"samples": 3, "budgets": {"0.5": {"kl": 1}}}', "9" * 5000,
)  # fmt: skip
THINGS = (None, True, "", "1", "x", [], {}, [1], [[]], {"a": 1}, *NUMBERS, *PATHS)
DTYPES = ("F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "f64", "F128", "", "F64 ", 64, None, ["F64"])
DEEP_LISTS, DEEP_OBJECTS = "[" * 100_000, '{"a":' * 100_000
MANY_TENSORS = json.dumps({f"t{i}": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]} for i in range(3000)})
RANKING_1 = "average=sum heads=each pooling=7 value_norm=true diversity=0.0 novelty=0.0"
DOUBLES = (math.nan, math.inf, -math.inf, -0.0, 5e-324, -1e-9, 1 + 1e-12, 1.0, 0.0, 2.0, 1e308)


def good(n_budgets: int = 3, n_layers: int = 3, n_heads: int = 2) -> PrefixProfile:
    """A profile whose rows rise."""
    lean = torch.linspace(-0.3, 0.3, n_layers * n_heads, dtype=torch.float64).reshape(n_layers, n_heads)
    lean -= lean.mean()
    budgets = torch.arange(1, n_budgets + 1, dtype=torch.float64) / n_budgets
    keep = budgets[:, None, None] + torch.minimum(budgets, 1 - budgets)[:, None, None] * lean
    measured = {"samples": 9, "budgets": {"0.5": {"kl": 0.1, "agreement": 0.9}}}
    metadata = {"model": "tiny", "source": "mutations", "method": "snapkv", "measured": json.dumps(measured)}
    return PrefixProfile(budgets, keep, metadata)


def good_version_1() -> bytes:
    """The content of a file as version 1 was written."""
    profile = good(3, 3, 1)
    metadata = {**profile.metadata, "format_version": "1", "method": "prefixkv", "queries": "32", "ranking": RANKING_1}
    del metadata["n_heads"]
    return save({"budgets": profile.budgets, "keep": profile.keep[:, :, 0]}, metadata)


# Mutations: (bytes, random) -> bytes.


def _flip(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 50])):
        damaged[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _place(data: bytes, rng: random.Random) -> int:
    """Half of the hits go to the header, where the rules are."""
    return rng.randrange(rng.choice([len(data), min(len(data), HEADER), min(len(data), 600)]))


def _cut(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return rng.choice([data[:at], data[at:], data[:at] + data[at + rng.choice([1, 8, 64]) :]])


def _grow(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.choice([rng.randbytes(8), bytes(100), data[at : at + 64], b"[" * 2000, data]) + data[at:]


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    patch = rng.choice(
        [b"\xff" * 8, bytes(8), b'"', b"{", b"}", b",", b"9" * 30, b"\\u0000", b"\\ud800", rng.randbytes(4)]
    )
    return data[:at] + patch + data[at + len(patch) :]


def _header_length(data: bytes, rng: random.Random) -> bytes:
    true = int.from_bytes(data[:HEADER], "little")
    length = rng.choice([0, 1, true - 1, true + 1, true + 8, len(data), 2**20, 2**20 + 1, 2**31, 2**63, 2**64 - 1])
    return struct.pack("<Q", length) + data[HEADER:]


def _doubles(data: bytes, rng: random.Random) -> bytes:
    """Other numbers in the tables."""
    start = HEADER + int.from_bytes(data[:HEADER], "little")
    values = list(struct.unpack(f"<{(len(data) - start) // 8}d", data[start : start + (len(data) - start) // 8 * 8]))
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(values))
        values[at] = rng.choice([*DOUBLES, values[at] + rng.uniform(-0.02, 0.02), rng.uniform(0, 1), values[at - 1]])
    return data[:start] + struct.pack(f"<{len(values)}d", *values)


def _on_header(change: Callable[[dict[str, Any], random.Random], Any]) -> Callable[[bytes, random.Random], bytes]:
    """A mutation of the header as JSON, with a true length in front."""

    def mutate_header(data: bytes, rng: random.Random) -> bytes:
        end = HEADER + int.from_bytes(data[:HEADER], "little")
        header = json.loads(data[HEADER:end])
        changed = change(header, rng)
        text = (changed if isinstance(changed, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + data[end:]

    return mutate_header


def _shape(header: dict[str, Any], rng: random.Random) -> None:
    entry = header[rng.choice(["budgets", "keep"])]
    shape = entry["shape"]
    kind = rng.choice(["number", "drop", "more", "swap", "thing", "offsets"])
    if kind == "number" and shape:
        shape[rng.randrange(len(shape))] = rng.choice(NUMBERS)
    elif kind == "drop":
        entry["shape"] = shape[:-1]
    elif kind == "more":
        entry["shape"] = [*shape, *rng.choice([[1], [0], [1] * 5000, [2**32, 2**32]])]
    elif kind == "swap":
        entry["shape"] = shape[::-1]
    elif kind == "thing":
        entry["shape"] = rng.choice(THINGS)
    else:
        entry["data_offsets"] = rng.choice([rng.choices(NUMBERS, k=2), [0, 0], [8, 0], [0], rng.choice(THINGS)])


def _dtype(header: dict[str, Any], rng: random.Random) -> None:
    header[rng.choice(["budgets", "keep"])]["dtype"] = rng.choice(DTYPES)


def _entry(header: dict[str, Any], rng: random.Random) -> None:
    """A tensor that is missing, is another, or comes by a name that looks like a path."""
    name = rng.choice(["budgets", "keep"])
    kind = rng.choice(["rename", "add", "drop", "thing", "key"])
    if kind == "rename":
        header[rng.choice(PATHS)] = header.pop(name)
    elif kind == "add":
        header[rng.choice(PATHS)] = {"dtype": "F64", "shape": [0], "data_offsets": [96, 96]}
    elif kind == "drop":
        del header[name]
    elif kind == "thing":
        header[name] = rng.choice(THINGS)
    else:
        header[name][rng.choice(["dtype", "shape", "data_offsets", "more"])] = rng.choice(THINGS)


def _metadata(header: dict[str, Any], rng: random.Random) -> None:
    metadata = header["__metadata__"]
    key = rng.choice(sorted(metadata))
    kind = rng.choice(["drop", "thing", "path", "add", "all", "method", "measured"])
    if kind == "drop":
        del metadata[key]
    elif kind == "thing":
        metadata[key] = rng.choice(THINGS)
    elif kind == "path":
        metadata[key] = rng.choice(PATHS)
    elif kind == "add":
        metadata[rng.choice(PATHS)] = rng.choice(["x" * 100_000, "\ud800", "\u0000", "\u2028", '"', *PATHS])
    elif kind == "all":
        header["__metadata__"] = rng.choice(THINGS)
    else:
        metadata[kind] = rng.choice(SPELLINGS if kind == "method" else MEASUREMENTS)


def _text(header: dict[str, Any], rng: random.Random) -> str:
    """JSON that a parser may choke on."""
    text = json.dumps(header)
    return rng.choice([
        DEEP_LISTS, DEEP_OBJECTS, MANY_TENSORS, "9" * 5000, "null", text + text, "\ufeff" + text, " " * 10_000 + text,
        text.replace("{", '{"keep":1,', 1), text.replace("}", ',"__metadata__":{}}', 1),
        text[:-1] + ',"keep":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}', '"' + "\\u0000" * 1000 + '"',
        text.replace('"F64"', "NaN"), text.replace("0", "1e999"),
    ])  # fmt: skip


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _cut, _grow, _overwrite, _header_length, _doubles, _doubles, _on_header(_shape), _on_header(_dtype),
    _on_header(_entry), _on_header(_metadata), _on_header(_text),
)  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One damage to the bytes of a good profile; now and then a second one on top."""
    damaged = rng.choice(MUTATIONS)(data, rng)
    return damaged if rng.random() < 0.8 or not damaged else rng.choice([_flip, _cut, _grow, _overwrite])(damaged, rng)


# What has to hold.


def check(path: Path) -> PrefixProfile | None:
    """Load the file: a valid profile, or None where it is refused as it should be. Anything else is raised."""
    try:
        profile = PrefixProfile.load(path)
    except ProfileError as error:
        message = str(error)
        assert message.startswith(str(path)), f"the error does not name the file: {message}"
        assert message.isprintable() and len(message) < LONGEST_MESSAGE, (
            f"no error to show to anybody: {message[:5000]!r}"
        )
        return None
    assert_valid(profile)
    return profile


def assert_valid(profile: PrefixProfile) -> None:
    """What the format promises, by plain arithmetic."""
    budgets, size = profile.budgets.tolist(), (profile.n_layers, profile.n_heads)
    keep = profile.keep.flatten(1).tolist()
    assert budgets == sorted(set(budgets)) and budgets[0] > 0 and budgets[-1] <= 1
    assert profile.keep.shape == (len(budgets), *size) and min(size) >= 1
    assert all(0 <= ratio <= 1 for row in keep for ratio in row)
    for budget, row in zip(budgets, keep, strict=True):
        assert abs(math.fsum(row) / len(row) - budget) <= 0.005 + 1e-8
    for lower, higher in itertools.pairwise(keep):
        assert all(left - right <= 0.001 + 1e-8 for left, right in zip(lower, higher, strict=True))
    metadata = profile.metadata
    assert (metadata["format"], metadata["format_version"]) == ("prefixkv-profile", "2")
    assert (metadata["n_layers"], metadata["n_heads"]) == tuple(map(str, size))
    assert Method.parse(metadata["method"]) == profile.method
    assert profile.measured is None or profile.measured["samples"] > 0
    assert all(isinstance(text, str) for pair in metadata.items() for text in pair)


class Watch:
    """An audit hook: within `with watch(path)` nothing may happen but the opening of this one file."""

    FORBIDDEN = (
        "import", "compile", "exec", "marshal", "pickle", "subprocess", "os.", "socket", "ctypes", "shutil", "mmap",
    )  # fmt: skip

    def __init__(self) -> None:
        self.path: Path | None = None
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def __call__(self, path: Path) -> Iterator[None]:
        self.path = path
        try:
            yield
        finally:
            self.path = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.path is None:
            return
        if event == "open" and str(arguments[0]) == str(self.path):
            return
        if event == "open" or event.startswith(self.FORBIDDEN):
            raise AssertionError(f"loading {self.path} caused {event}{arguments!r}")


def limit_memory(extra: int) -> None:
    """From here on the process may map that much more, where the system knows such a limit."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + extra, resource.RLIM_INFINITY))


def run(mutations: int, seed: int, folder: Path) -> dict[str, Any]:
    rng, path, again = random.Random(seed), folder / "hostile.safetensors", folder / "again.safetensors"
    seeds = [good_version_1()]
    for shape in ((3, 3, 2), (1, 1, 1), (10, 8, 4)):
        good(*shape).save(again)
        seeds.append(again.read_bytes())
    for data in seeds:  # what is imported on the way is imported now
        path.write_bytes(data)
        if check(path) is None:
            raise AssertionError("the profile that all mutations start from is refused")
    counts: Counter[str] = Counter()
    slowest, watch = 0.0, Watch()
    limit_memory(MEMORY)
    for _ in range(mutations):
        path.write_bytes(mutate(rng.choice(seeds), rng))
        start = time.process_time()
        with watch(path):
            profile = check(path)
        slowest = max(slowest, time.process_time() - start)
        counts["refused" if profile is None else "valid"] += 1
        if profile is not None:
            profile.save(again)
            assert PrefixProfile.load(again) == profile
    assert slowest < SECONDS, f"a load took {slowest:.2f} s"
    assert sorted(os.listdir(folder)) == ["again.safetensors", "hostile.safetensors"]
    return {"mutations": mutations, "seed": seed, **counts, "slowest_ms": round(1000 * slowest, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))  # stays where a rule was broken
    print(json.dumps(run(arguments.mutations, arguments.seed, folder)))
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


if __name__ == "__main__":
    main()
