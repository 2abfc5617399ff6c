"""Profile files from somebody who means harm. What holds for every file is in fuzz/hostile.py, and is checked there.

The mutations run in a process of their own, for its limit on memory and its audit hook, which stay for good once set.
`PREFIXKV_MUTATIONS=1000000` loads that many.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import hostile
from prefixkv_cache.profile import PrefixProfile, ProfileError

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
    hostile.good(512, 1024).save(path)
    whole = path.read_bytes()
    for _ in range(10):
        path.write_bytes(hostile.mutate(whole, rng))
        hostile.check(path)


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
