"""Profile files from somebody who means harm. What holds for every file is in fuzz/hostile.py, and is checked there.

The mutations run in a process of their own, for its limit on memory and its audit hook, which stay for good once set.
`PREFIXKV_MUTATIONS=1000000` loads that many.
"""

import json
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz import hostile

from prefixkv_cache.profiles.file import MAX_FILE_BYTES
from prefixkv_cache.profiles.profile import PrefixProfile, ProfileError

MUTATIONS = int(os.environ.get("PREFIXKV_MUTATIONS", 10_000))
posix = pytest.mark.skipif(os.name == "nt", reason="links and pipes are files only on POSIX")


def test_ten_thousand_mutations():
    command = [sys.executable, hostile.__file__, "--mutations", str(MUTATIONS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["mutations"] == result["refused"] + result["valid"] == MUTATIONS
    # The damage is real, and does not always hit what is refused first.
    assert 0.02 < result["valid"] / MUTATIONS < 0.3


def test_the_largest_profiles_are_damaged_too(tmp_path):
    """Megabytes of numbers or of text: refused or not, in no more time than it takes to read them."""
    rng, path = random.Random(0), tmp_path / "a.safetensors"
    hostile.good(128, 128, 64).save(path)
    whole = path.read_bytes()
    for _ in range(10):
        path.write_bytes(hostile.mutate(whole, rng))
        hostile.check(path)


def raw(header, data=b""):
    """A file with any header at all."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(shape, start, end):
    return {"dtype": "F64", "shape": shape, "data_offsets": [start, end]}


TABLE = {
    "__metadata__": hostile.good(1, 1, 1).metadata, "budgets": entry([1], 0, 8), "keep": entry([1, 1, 1], 8, 16),
}  # fmt: skip
HOSTILE = {
    "empty": b"",
    "short": b"\x07",
    "zeros": bytes(4096),
    "pickle": pickle.dumps({"keep": [0.5]}),
    "list for a header": raw([1, 2, 3]),
    "not utf-8": raw(b'{"__metadata__":{"format":"\xff\xfe"}}'),
    "utf-16": raw('{"__metadata__":{}}'.encode("utf-16")),
    "half of a surrogate pair": raw(b'{"__metadata__":{"format":"\\ud800"}}'),
    "more header than allowed": raw(
        json.dumps(TABLE).encode() + b" " * 2**20, struct.pack("<2d", 1.0, 1.0)
    ),
    "much of nothing": raw(
        TABLE | {"keep": entry([1, 0, 2**64 - 1], 8, 8)}, struct.pack("<d", 1.0)
    ),
    "many tensors": raw({f"t{i}": entry([0], 0, 0) for i in range(15_000)}),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(case, tmp_path):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[case])
    assert hostile.check(path) is None


def test_the_largest_profile_is_loaded(tmp_path):
    grid = torch.arange(1, 1025, dtype=torch.float64) / 1024
    path = tmp_path / "a.safetensors"
    PrefixProfile(grid, grid[:, None, None].expand(-1, 128, 8), {"notes": "x" * 1_000_000}).save(path)
    assert path.stat().st_size <= MAX_FILE_BYTES
    profile = hostile.check(path)
    assert profile is not None and (profile.n_layers, profile.n_heads) == (128, 8)


@posix
def test_what_is_no_regular_file_is_refused_without_reading(tmp_path):
    folder, huge = tmp_path / "a.safetensors", tmp_path / "c.safetensors"
    folder.mkdir()
    with open(huge, "wb") as file:
        file.truncate(2**36)  # sparse: takes no room
    paths = [(folder, "a folder"), (Path("/dev/zero"), "no regular file"), (huge, str(MAX_FILE_BYTES))]
    for path, word in [*paths, (tmp_path / "gone", "no such file"), (tmp_path / "a\0b", "null")]:
        with pytest.raises(ProfileError) as caught:
            PrefixProfile.load(path)
        assert str(path) in str(caught.value) and word in str(caught.value) and "expected" in str(caught.value)


@posix
def test_links(tmp_path):
    """A link to a profile is that profile; a link to anything else is refused, and shows nothing of what it is."""
    good, secret = tmp_path / "good.safetensors", tmp_path / "secret"
    hostile.good().save(good)
    secret.write_text("the secret of the house\n" * 100)
    loop, pipe = tmp_path / "loop", tmp_path / "pipe"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    link = tmp_path / "link.safetensors"
    link.symlink_to(good)
    assert PrefixProfile.load(link) == PrefixProfile.load(good)
    for target in (secret, loop, pipe, tmp_path, tmp_path / "gone", Path("/dev/zero"), Path("/proc/self/mem")):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(ProfileError) as caught:
            PrefixProfile.load(link)
        assert str(link) in str(caught.value) and "secret of" not in str(caught.value)
    assert hostile.check(link) is None


@posix
def test_saving_over_a_link_leaves_what_it_points_to(tmp_path):
    other, link = tmp_path / "other", tmp_path / "link.safetensors"
    other.write_text("not mine")
    link.symlink_to(other)
    hostile.good().save(link)
    assert other.read_text() == "not mine" and not link.is_symlink()
    assert PrefixProfile.load(link) == hostile.good()


@pytest.mark.parametrize("seed", range(20))
def test_names_are_never_made_into_paths(seed, tmp_path, monkeypatch):
    """What looks like a name is bundled, or a file right here, or refused."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(seed)
    pieces = ["..", ".", "~", "llava-1.5-7b", "%2e%2e", "\\", "*", "?", "[a-z]", "\0", "\n", "$HOME", " ", ":", "con"]
    for _ in range(50):
        name = "".join(rng.choices(pieces, k=rng.randint(1, 5)))
        if name not in PrefixProfile.available():
            with pytest.raises(ProfileError):
                PrefixProfile.load(name)
