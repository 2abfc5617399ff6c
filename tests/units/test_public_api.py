"""The public names with their arguments and defaults, against a snapshot that is checked in.

Whoever changes them on purpose makes the snapshot anew, `python tests/units/test_public_api.py --update`, and the
change is there to review; by the contract only optional keyword arguments may come. Annotations are left out.
"""

import argparse
import difflib
import inspect
import json
from pathlib import Path

import prefixkv_cache
from prefixkv_cache import Method, PrefixKVCache, PrefixProfile, calibrate, methods, search_threshold
from prefixkv_cache.cli import COMMANDS, _tool

SNAPSHOT = Path(__file__).with_name("public_api.json")


def signature(function):
    """`(profile=None, budget=0.5, *, config=None)`: names, kinds and defaults."""
    nothing = inspect.Parameter.empty
    parameters = [each.replace(annotation=nothing) for each in inspect.signature(function).parameters.values()]
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
    if value is methods:
        return {name: method.spell(full=True) for name, method in methods.NAMED.items()}
    return described_class(value) if inspect.isclass(value) else signature(value)


def described_command(name):
    parser = argparse.ArgumentParser(add_help=False)
    _tool(name, "add_arguments")(parser)
    options = {}
    for action in parser._actions:
        spelled = "/".join(action.option_strings) or action.dest
        options[spelled] = "required" if action.required else repr(action.default)
    return options


def public_api():
    api = {f"prefixkv_cache.{name}": described_value(getattr(prefixkv_cache, name)) for name in prefixkv_cache.__all__}
    api["prefixkv"] = {name: described_command(name) for name in sorted(COMMANDS)}
    return json.loads(json.dumps(api))


def as_text(api):
    return json.dumps(api, indent=1, sort_keys=True) + "\n"


def test_the_public_api_is_the_snapshot():
    recorded, found = SNAPSHOT.read_text(encoding="utf-8"), as_text(public_api())
    changes = difflib.unified_diff(recorded.splitlines(), found.splitlines(), "snapshot", "now", lineterm="", n=1)
    assert found == recorded, "\n".join(["python tests/units/test_public_api.py --update", *changes])


def arguments(function):
    """Those of a signature, `self` left out."""
    return [part for part in signature(function).strip("()").split(", ") if part != "self"]


def test_what_the_contract_fixes():
    """Whatever the snapshot is made to say."""
    names = ["method", "config", "image_mask", "max_new_tokens", "prune_sliding", "quantize", "offloading", "max_bytes"]
    constructor = arguments(PrefixKVCache)
    assert constructor[:3] == ["profile=None", "budget=0.5", "*"]
    assert [part.partition("=")[0] for part in constructor[3:]] == names
    assert arguments(PrefixKVCache.for_model)[:3] == ["model", "budget=0.5", "*"]
    assert "inputs=None" in arguments(PrefixKVCache.for_model)
    assert arguments(PrefixProfile) == ["budgets", "keep", "metadata=None"]
    assert arguments(PrefixProfile.keep_ratios) == ["budget"]
    assert arguments(calibrate)[:3] == ["model", "samples", "*"] and len(inspect.signature(calibrate).parameters) <= 10
    assert arguments(search_threshold) == ["importance", "budget", "*", "sink=1"]
    assert arguments(Method.parse) == ["text"] and arguments(Method.replace) == ["**changes"]
    for name in ("get_seq_length", "stored_lengths", "kept_positions", "nbytes", "reset"):
        assert hasattr(PrefixKVCache, name)
    for name in ("load", "save", "available", "from_pretrained", "push_to_hub", "method", "measured"):
        assert hasattr(PrefixProfile, name)
    for name in ("DEFAULT", "PREFIXKV", "ELASTIC", "H2O", "STREAMING", "SNAPKV", "PYRAMIDKV", "UNIFORM", "RANDOM"):
        assert methods.NAMED[name.lower()] == getattr(methods, name)
    fixed = {"demo", "generate", "calibrate", "inspect", "plot", "evaluate", "report", "bench"}
    assert set(COMMANDS) == fixed | {"compress", "recommend"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", required=True, help="write the snapshot as it is now")
    parser.parse_args()
    SNAPSHOT.write_text(as_text(public_api()), encoding="utf-8")
    print(f"wrote {SNAPSHOT}")
