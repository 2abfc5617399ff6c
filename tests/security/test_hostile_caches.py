"""Files of saved caches from somebody who means harm: refused in one line that names file and field, or harmless.

Most damage ends at the checksum. So most mutations sign their work again, as somebody who means harm would, and meet
the rules behind it. What is loaded after all has to go on without an error.

`PREFIXKV_MUTATIONS=100000` loads that many.
"""

import functools
import hashlib
import json
import os
import pickle
import random
import resource
import struct
import warnings

import pytest
import torch
from fuzz import hostile
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from prefixkv_cache import PrefixKVCache
from prefixkv_cache.cache.tensor_file import MAX_HEADER_BYTES, SavedCacheError
from watch import make_profile

MUTATIONS = int(os.environ.get("PREFIXKV_MUTATIONS", 3000))
INTEGERS = (0, -1, 1, 2, 3, 7, 10, 20, 64, 2**31, 2**32, 2**62, -(2**63), 2**63 - 1)


@functools.cache
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def fed(cache, rows=1):
    ids = torch.arange(rows * 20).view(rows, 20) % 49 + 1
    mask = torch.ones_like(ids)
    mask[1:, :5] = 0
    for at, end in enumerate([20, 21, 22, 23], start=-1):
        more = mask if at < 0 else torch.nn.functional.pad(mask, (0, at + 1), value=1)
        new = ids if at < 0 else ids[:, at, None]
        model()(input_ids=new, attention_mask=more, past_key_values=cache)
        assert cache.get_seq_length() == end
    return cache


def noted(cache):
    cache.notes = {"question": '{"before": "a", "after": "b", "skip": 1}'}
    return cache


SEEDS = {
    "default": lambda: fed(PrefixKVCache(None, 0.5, method="default:headroom=2")),
    "batch": lambda: fed(PrefixKVCache(None, 0.5, method="prefixkv:distance=3"), rows=2),
    "profile": lambda: fed(PrefixKVCache(make_profile(2, 2), 0.4, image_mask=torch.zeros(2, 20).bool()), rows=2),
    "h2o": lambda: fed(PrefixKVCache(None, 6, method="h2o")),
    "planned": lambda: fed(PrefixKVCache(None, 0.5, max_new_tokens=8)),
    "compressed": lambda: noted(PrefixKVCache.compress(model(), {"input_ids": torch.arange(1, 21)[None]}, 0.4)),
    "all": lambda: fed(PrefixKVCache(None, 1.0)),
}


@functools.cache
def good(name):
    """The bytes of a whole file."""
    path = f"/tmp/hostile-cache-{os.getpid()}.safetensors"
    SEEDS[name]().save(path)
    with open(path, "rb") as file:
        data = file.read()
    os.unlink(path)
    return data


def parts(data):
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def joined(header, data, sign=True):
    """A file, with the checksum that it should have."""
    about = header.get("__metadata__")
    if sign and isinstance(about, dict):
        about.pop("sha256", None)
        about["sha256"] = hashlib.sha256(canonical(header) + data).hexdigest()
    text = canonical(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def canonical(header):
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def check(path):
    """The cache of a file, or None where it is refused as it should be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PrefixKVCache.load(path, model())
    except SavedCacheError as error:
        message = str(error)
        assert message.startswith(str(path)) and ": " in message[len(str(path)) :], message
        assert message.isprintable() and len(message) < 1000 and "expected" in message, message[:3000]
        return None


def go_on(cache):
    """A few tokens and a turn."""
    rows = next(iter(cache.layers)).batch_size
    for n in (1, 1, 1, 4, 1):
        model()(input_ids=torch.full((rows, n), 7), past_key_values=cache)


# Mutations of (header, data): either may be changed.


def _thing(value, rng):
    """Some value of a JSON tree, replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        return {**value, key: _thing(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        kind = rng.choice(["thing", "thing", "drop", "twice"])
        middle = {"thing": [_thing(value[at], rng)], "drop": [], "twice": [value[at]] * 2}[kind]
        return value[:at] + middle + value[at + 1 :]
    if type(value) is int and rng.random() < 0.7:
        return value + rng.choice([-1, 1, 2, 8, 64])
    return rng.choice(hostile.THINGS)


def _layers(header, data, rng):
    about = header["__metadata__"]
    about["layers"] = json.dumps(_thing(json.loads(about["layers"]), rng))
    return data


def _metadata(header, data, rng):
    about = header["__metadata__"]
    key = rng.choice(sorted(about))
    if rng.random() < 0.2:
        del about[key]
    else:
        some = ["", "0", "1", "-1", "None", "9" * 5000, "[" * 100_000, "nan", "Infinity", *hostile.SPELLINGS, "{}"]
        about[key] = rng.choice([*some, about[key] + "0", rng.choice(hostile.THINGS)])
    return data


def _entry(header, data, rng):
    name = rng.choice(sorted(header))
    kind = rng.choice(["drop", "rename", "thing", "shape", "dtype"])
    if kind == "drop":
        del header[name]
    elif kind == "rename":
        header[rng.choice([*hostile.PATHS, name + "x", "0.9.keys"])] = header.pop(name)
    elif kind == "thing" or name == "__metadata__":
        header[name] = _thing(header[name], rng)
    elif kind == "shape":
        header[name]["shape"] = rng.choice([header[name]["shape"][::-1], [1, *header[name]["shape"]], [0, 2**63], [-1]])
    else:
        header[name]["dtype"] = rng.choice([*hostile.DTYPES, "F32", "I64", "BOOL"])
    return data


def _numbers(header, data, rng):
    """Other numbers in the tensors that say how to go on."""
    names = [each for each in header if each.endswith(("rows", "queue", "positions", "keep", "received", "_ids"))]
    header_of = header[rng.choice(names)]
    start, end = header_of["data_offsets"]
    if start == end:
        return data
    at = start + 8 * rng.randrange((end - start) // 8) if end - start >= 8 else start
    packed = (
        struct.pack("<q", rng.choice(INTEGERS))
        if rng.random() < 0.8
        else struct.pack("<d", rng.choice(hostile.DOUBLES))
    )
    return data[:at] + packed[: end - at] + data[at + len(packed[: end - at]) :]


def _cut_data(header, data, rng):
    return rng.choice([data[:-8], data + bytes(8), data[8:], b""])


SIGNED = (_layers, _layers, _metadata, _entry, _numbers, _numbers, _cut_data)
PLAIN = (hostile._flip, hostile._cut, hostile._grow, hostile._overwrite, hostile._header_length)


def mutate(data, rng):
    if rng.random() < 0.25:
        return rng.choice(PLAIN)(data, rng)
    header, tensors = parts(data)
    tensors = rng.choice(SIGNED)(header, tensors, rng)
    try:
        return joined(header, tensors, sign=rng.random() < 0.95)
    except ValueError:  # half of a surrogate pair
        return data[:-1]


def test_mutations(tmp_path):
    rng, path = random.Random(0), tmp_path / "a.safetensors"
    for name in SEEDS:
        path.write_bytes(good(name))
        assert check(path) is not None, "what all mutations start from is refused"
        header, data = parts(good(name))
        path.write_bytes(joined(header, data))
        assert path.read_bytes() == good(name), "the tests sign as the library does"
    before, counts = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {"refused": 0, "valid": 0}
    for _ in range(MUTATIONS):
        path.write_bytes(mutate(good(rng.choice(list(SEEDS))), rng))
        cache = check(path)
        counts["refused" if cache is None else "valid"] += 1
        if cache is not None and cache.layers[0].segments:
            go_on(cache)
            cache.copy().save(tmp_path / "b.safetensors")
            assert check(tmp_path / "b.safetensors") is not None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # KiB
    assert counts["valid"] / MUTATIONS < 0.3, counts


@pytest.mark.parametrize("name", SEEDS)
def test_damage_is_found(name, tmp_path):
    """Any one bit."""
    path, data, rng = tmp_path / "a.safetensors", good(name), random.Random(1)
    for _ in range(100):
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        padding = data[:at].endswith(b" ") or data[at : at + 1] == b" "
        assert check(path) is None or padding
        path.write_bytes(data[:at])
        assert check(path) is None


HOSTILE = {
    "empty": b"",
    "short": b"\x07",
    "zeros": bytes(4096),
    "pickle": pickle.dumps({"keys": [0.5]}),
    "list for a header": struct.pack("<Q", 7) + b"[1,2,3]",
    "endless header": struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * 100,
    "deep header": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "a profile": b"",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(case, tmp_path):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[case])
    if case == "a profile":
        hostile.good().save(path)
    assert check(path) is None


@pytest.mark.skipif(os.name == "nt", reason="pipes are files only on POSIX")
def test_what_is_no_regular_file_is_refused_without_reading(tmp_path):
    pipe, huge = tmp_path / "pipe", tmp_path / "huge"
    os.mkfifo(pipe)
    with open(huge, "wb") as file:
        file.truncate(2**36)  # sparse: takes no room
    for path in (tmp_path, pipe, huge, tmp_path / "gone", "/dev/zero"):
        assert check(path) is None
    with pytest.raises(SavedCacheError, match="file: cannot be read"):
        PrefixKVCache.load(tmp_path / "a\0b", model())


def test_a_huge_tensor_is_refused_before_it_is_made(tmp_path):
    header, data = parts(good("default"))
    header["0.0.keys"]["shape"] = [1, 2, 2**40, 4]
    header["0.0.keys"]["data_offsets"] = [0, 2**45]
    path = tmp_path / "a.safetensors"
    path.write_bytes(joined(header, data))
    with pytest.raises(SavedCacheError, match=r"0\.0\.keys"):
        PrefixKVCache.load(path, model())


def test_it_is_plain_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(good("default"))
    assert set(load_file(path)) >= {"0.0.keys", "0.0.values", "0.0.positions", "1.0.rows"}
