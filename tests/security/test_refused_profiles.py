"""Every rule of the profile format: what breaks it is refused, and the error names file, field and rule."""

import copy
import math

import pytest
import torch
from safetensors.torch import save_file

from prefixkv_cache.profiles.profile import PrefixProfile, ProfileError

BUDGETS = [0.2, 0.5, 1.0]
KEEP_1 = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [1.0, 1.0, 1.0]]
KEEP = [[[k - 0.05, k + 0.05] if k < 1 else [1.0, 1.0] for k in row] for row in KEEP_1]
METADATA = PrefixProfile(BUDGETS, KEEP, {"method": "snapkv"}).metadata
METADATA_1 = {**METADATA, "format_version": "1", "method": "prefixkv", "queries": "32"}
del METADATA_1["n_heads"]
RANKING_1 = "average=sum heads=each pooling=7 value_norm=true diversity=0.0 novelty=0.0"


def write(path, budgets=BUDGETS, keep=KEEP, metadata=METADATA, dtype=torch.float64, **extra):
    """Write a file with safetensors' own writer, unchecked."""
    tensors = {"budgets": budgets, "keep": keep, **extra}
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in tensors.items() if value is not None}
    save_file(tensors, path, metadata=metadata)
    return path


def _with(row, layer, head, value):
    keep = copy.deepcopy(KEEP)
    keep[row][layer][head] = value
    return {"keep": keep}


def _metadata(**more):
    return {"metadata": METADATA | more}


def _version_1(**more):
    return {"keep": KEEP_1, "metadata": METADATA_1 | more}


def _ranking_1(good, bad):
    return _version_1(ranking=RANKING_1.replace(good, bad))


TABLES = {
    "nan": (_with(1, 1, 0, math.nan), ["keep", "layer 1, head 0 at budget 0.5 is nan", "[0, 1]"]),
    "inf": (_with(1, 1, 1, math.inf), ["keep", "layer 1, head 1 at budget 0.5 is inf", "[0, 1]"]),
    "negative": (_with(0, 0, 0, -0.1), ["keep", "layer 0, head 0 at budget 0.2 is -0.1", "[0, 1]"]),
    "above one": (_with(2, 2, 1, 1.0000001), ["keep", "layer 2, head 1 at budget 1.0", "[0, 1]"]),
    "falling": (_with(1, 2, 0, 0.24), ["keep", "layer 2, head 0", "falls", "0.001"]),
    "mean": (_with(0, 2, 1, 0.3801), ["keep", "mean", "0.2", "0.005"]),
    "budgets fall": (dict(budgets=[0.5, 0.2, 1.0]), ["budgets", "0.2 follows 0.5", "rising"]),
    "budgets stand": (dict(budgets=[0.2, 0.2, 1.0]), ["budgets", "0.2 follows 0.2", "rising"]),
    "budget zero": (dict(budgets=[0.0, 0.5, 1.0]), ["budgets", "entry 0 is 0.0", "(0, 1]"]),
    "budget above": (dict(budgets=[0.2, 0.5, 1.5]), ["budgets", "entry 2 is 1.5", "(0, 1]"]),
    "budget nan": (dict(budgets=[0.2, math.nan, 1.0]), ["budgets", "entry 1 is nan", "(0, 1]"]),
    "flat keep": (dict(keep=BUDGETS), ["keep", "shape [3]", "[n_budgets, n_layers, n_heads]"]),
    "deep keep": (dict(keep=[KEEP]), ["keep", "shape [1, 3, 3, 2]", "[n_budgets, n_layers, n_heads]"]),
    "row missing": (dict(keep=KEEP[:2]), ["keep", "shape [2, 3, 2]", "n_budgets = 3"]),
    "scalar budget": (dict(budgets=0.5), ["budgets", "shape []", "[n_budgets]"]),
    "no budgets": (dict(budgets=[], keep=[[]]), ["budgets", "shape [0]", "[n_budgets]"]),
    "no heads": (dict(keep=[[[], []]] * 3), ["keep", "shape [3, 2, 0]", "1 to 1024 heads"]),
    "too many layers": (dict(keep=[[[b]] * 1025 for b in BUDGETS]), ["keep", "shape [3, 1025, 1]", "1 to 1024 layers"]),
    "too many values": (dict(keep=[[[b] * 592] * 592 for b in BUDGETS]), ["keep", "[3, 592, 592]", "1048576 values"]),
    "other layers": (_metadata(n_layers="32"), ["n_layers", "'32'", "'3'"]),
    "other heads": (_metadata(n_heads="8"), ["n_heads", "'8'", "'2'"]),
    "other format": (_metadata(format="pt"), ["format", "'pt'", "prefixkv-profile"]),
    "newer": (_metadata(format_version="3"), ["format_version", "newer version; upgrade"]),
    "version text": (_metadata(format_version="2.0"), ["format_version", "'2.0'", "'2'"]),
    "no method": (_metadata(method="best"), ["method", "there is no method 'best'"]),
    "no field": (_metadata(method="snapkv:novelty=8.0"), ["method", "novelty=8.0"]),
    "no value": (_metadata(method=""), ["method", "spelling"]),
    "too long": (_metadata(method="snapkv:pooling=" + "9" * 900), ["method", "spelling"]),
    "measured text": (_metadata(measured="well"), ["measured", "'well'", "JSON"]),
    "measured list": (_metadata(measured="[1]"), ["measured", "'[1]'", "JSON"]),
    "measured nan": (_metadata(measured='{"samples": 1, "budgets": {"0.5": {"kl": NaN}}}'), ["measured", "NaN"]),
    "measured nothing": (_metadata(measured='{"samples": 1, "budgets": {}}'), ["measured", "JSON"]),
    "measured budget": (_metadata(measured='{"samples": 1, "budgets": {"2": {"kl": 1}}}'), ["measured", "JSON"]),
    "measured samples": (_metadata(measured='{"samples": 0, "budgets": {"0.5": {"kl": 1}}}'), ["measured", "JSON"]),
}  # fmt: skip
WRONG = {
    **TABLES,
    "float32": (dict(dtype=torch.float32), ["budgets", "F32", "F64"]),
    "int64": (dict(dtype=torch.int64), ["budgets", "I64", "F64"]),
    "two axes": (dict(keep=KEEP_1), ["keep", "shape [3, 3]", "[n_budgets, n_layers, n_heads]"]),
    "keep missing": (dict(keep=None), ["tensors", "['budgets']", "'budgets' and 'keep'"]),
    "one more": (dict(spread=KEEP), ["tensors", "spread", "exactly"]),
    "no metadata": (dict(metadata=None), ["format", "None", "prefixkv-profile"]),
    "version zero": (_metadata(format_version="0"), ["format_version", "'0'", "'1' or '2'"]),
    **{
        f"no {key} in {data['format_version']}": (
            {"metadata": {k: v for k, v in data.items() if k != key}, "keep": KEEP}, [f"{key}: ", "expected"]
        )
        for data in (METADATA, METADATA_1) for key in data
    },
    "three axes in 1": (_version_1() | {"keep": KEEP}, ["keep", "shape [3, 3, 2]", "[n_budgets, n_layers] with"]),
    "queries in 1": (_version_1(queries="-8"), ["queries", "'-8'", "'all'"]),
    "text in 1": (_version_1(queries="text"), ["queries", "'text'", "calibrate again"]),
    "layers in 1": (_version_1(n_layers="4"), ["n_layers", "'4'", "'3'"]),
    "average in 1": (_ranking_1("sum", "visible"), ["ranking", "average='visible'", "calibrate again"]),
    "novelty in 1": (_ranking_1("novelty=0.0", "novelty=8.0"), ["ranking", "novelty='8.0'", "calibrate again"]),
    "diversity in 1": (_ranking_1("diversity=0.0", "diversity=0.5"), ["ranking", "diversity='0.5'", "calibrate again"]),
    "pooling in 1": (_ranking_1("7", "8"), ["ranking", "odd number"]),
    "value in 1": (_ranking_1("true", "yes"), ["ranking", "yes"]),
    "order in 1": (_version_1(ranking="heads=each"), ["ranking", "'heads=each'", "average=sum"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_breaks_a_rule_is_refused(case, tmp_path):
    change, words = WRONG[case]
    path = write(tmp_path / "wrong.safetensors", **change)
    with pytest.raises(ProfileError) as caught:
        PrefixProfile.load(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in [str(path), "expected", *words]), message
    if case in TABLES:
        with pytest.raises(ProfileError) as caught:
            PrefixProfile(change.get("budgets", BUDGETS), change.get("keep", KEEP), change.get("metadata", METADATA))
        assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((torch.tensor(BUDGETS), KEEP), ["budgets", "torch.float32", "double"]),
        ((BUDGETS, [[0.1], [0.4, 0.5], [1.0]]), ["keep", "float64"]),
        ((BUDGETS, "keep"), ["keep", "float64"]),
        ((None, KEEP), ["budgets", "float64"]),
        ((BUDGETS, KEEP, {"model": 7}), ["metadata", "'model' is 7", "strings"]),
        ((BUDGETS, KEEP, {7: "model"}), ["metadata", "7", "strings"]),
        ((BUDGETS, KEEP, {"model": "\ud800"}), ["metadata", "strings"]),
        ((BUDGETS, KEEP, [("model", "tiny")]), ["metadata", "list", "strings"]),
        ((BUDGETS, KEEP, {"notes": "x" * 2**20}), ["metadata", "bytes", "at most"]),
        ((BUDGETS, KEEP_1, METADATA_1), ["format_version", "'1'", "'2'"]),
    ],
)
def test_the_constructor_refuses_wrong_types(args, words):
    with pytest.raises(ProfileError) as caught:
        PrefixProfile(*args)
    assert all(word in str(caught.value) for word in words)
