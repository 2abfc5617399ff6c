"""The public names with their arguments and defaults, against a snapshot that is checked in.

Whoever changes them on purpose makes the snapshot anew, `python tests/test_public_api.py --update`, and the change
is there to review; by the contract only optional keyword arguments may come. Annotations are left out.
"""

import argparse
import difflib
import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

from prefixkv_cache import PAPER, PrefixKVCache, PrefixProfile, calibrate, search_threshold
from prefixkv_cache.cli import COMMANDS

SNAPSHOT = Path(__file__).with_name("public_api.json")
MODULES = ("prefixkv_cache", "prefixkv_cache.baselines")
NOT_OURS = inspect.Parameter.empty


def signature(function):
    """`(profile=None, budget=0.5, *, config=None)`: names, kinds and defaults."""
    parameters = [each.replace(annotation=NOT_OURS) for each in inspect.signature(function).parameters.values()]
    return str(inspect.Signature(parameters))


def described_class(kind):
    """Bases, constructor, and the public members that the class itself defines."""
    members = {}
    for name, member in sorted(vars(kind).items()):
        if name[0] != "_" and isinstance(member, property):
            members[name] = "property"
        elif name[0] != "_" and callable(getattr(kind, name)):
            members[name] = signature(getattr(kind, name))
    constructor = None if issubclass(kind, Exception) else signature(kind)
    return {"bases": [base.__name__ for base in kind.__bases__], "constructor": constructor, "members": members}


def described_value(value):
    if isinstance(value, Mapping):
        return {name: repr(each) for name, each in value.items()}
    return described_class(value) if inspect.isclass(value) else signature(value)


def public_names(module):
    """What the module says is public, or, where it does not, what it defines without an underscore."""
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return sorted(getattr(module, "__all__", None) or (name for name in defined if name[0] != "_"))


def described_command(add_arguments):
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    options = {}
    for action in parser._actions:
        name = "/".join(action.option_strings) or action.dest
        options[name] = "required" if action.required else repr(action.default)
    return options


def public_api():
    api = {}
    for path in MODULES:
        module = importlib.import_module(path)
        for name in public_names(module):
            value = getattr(module, name)
            api[f"{path}.{name}"] = described_value(value)
    api["prefixkv"] = {name: described_command(add) for name, (add, _, _) in sorted(COMMANDS.items())}
    return json.loads(json.dumps(api))


def as_text(api):
    return json.dumps(api, indent=1, sort_keys=True) + "\n"


def test_the_public_api_is_the_snapshot():
    recorded, found = SNAPSHOT.read_text(encoding="utf-8"), as_text(public_api())
    changes = difflib.unified_diff(recorded.splitlines(), found.splitlines(), "snapshot", "now", lineterm="", n=1)
    assert found == recorded, "\n".join(["python tests/test_public_api.py --update", *changes])


def arguments(function, count):
    """The first arguments of a signature, `self` left out."""
    parts = signature(function).strip("()").split(", ")
    return [part for part in parts if part != "self"][:count]


def test_what_the_contract_fixes():
    """Whatever the snapshot is made to say."""
    constructor = arguments(PrefixKVCache, 7)
    assert constructor == [
        "profile=None", "budget=0.5", "*", "config=None", "queries=32", "sink=1", "distance=1",
    ]  # fmt: skip
    assert {"slack=64", "novelty=8.0", "diversity=0.5"} <= set(arguments(PrefixKVCache, 99))
    assert arguments(PrefixKVCache.for_model, 2) == ["model", "budget=0.5"]
    assert arguments(PrefixKVCache.paper, 3) == ["profile=None", "budget=0.5", "**kwargs"]
    assert dict(PAPER) == {
        "queries": "all", "distance": 25, "slack": 0, "novelty": 0.0, "diversity": 0.0, "average": "sum",
        "heads": "mean", "pooling": 1, "value_norm": False, "lengths": "search", "floor": 0.0, "cap": None,
        "temperature": 0.0, "recent": 1, "evict": "fixed-point", "merge": None, "text_floor": 0.0,
    }  # fmt: skip
    assert arguments(PrefixProfile, 3)[:2] == ["budgets", "keep"] and arguments(PrefixProfile.keep_ratios, 9) == [
        "budget"
    ]
    assert arguments(calibrate, 3)[:3] == ["model", "samples", "*"]
    assert {"budgets", "queries"} <= set(inspect.signature(calibrate).parameters)
    assert arguments(search_threshold, 4) == ["importance", "budget", "*", "sink=1"]
    for name in ("get_seq_length", "stored_lengths", "kept_positions", "nbytes", "reset"):
        assert hasattr(PrefixKVCache, name)
    for name in ("load", "save", "available"):
        assert hasattr(PrefixProfile, name)
    baselines = importlib.import_module("prefixkv_cache.baselines")
    for name in ("ElasticCache", "H2OCache", "StreamingLLMCache", "SnapKVCache", "PyramidKVCache"):
        assert issubclass(getattr(baselines, name), PrefixKVCache)
        assert getattr(baselines, name)(budget=0.5, config=None).budget == 0.5
    for name in ("demo", "generate", "calibrate", "inspect", "plot", "evaluate", "bench"):
        assert name in COMMANDS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", required=True, help="write the snapshot as it is now")
    parser.parse_args()
    SNAPSHOT.write_text(as_text(public_api()), encoding="utf-8")
    print(f"wrote {SNAPSHOT}")
