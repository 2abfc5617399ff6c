"""`PrefixProfile`: how much of the prompt's KV cache each layer or key head keeps, at each of a grid of budgets.

A calibrator makes a profile once for a model; the cache asks it for the keep ratios at its budget. The unit is
everywhere the fraction *kept*. Here the values are checked and interpolated; the file is file.py's part. Searches no
threshold and sees no model, key or query.

PrefixKV, arXiv 2412.03409 (there "global prefix configuration"); its published figures are *forget* ratios, 1 - keep.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import DEFAULT, Method
from ..rules.checks import check_budget
from .bundled import bundled_profiles, names_of_model
from .file import (
    DESCRIPTIVE,
    FORMAT,
    FORMAT_VERSION,
    SUFFIX,
    ProfileError,
    check_format,
    check_shapes,
    encode,
    parse,
    read_bounded,
    shown,
)
from .files import write_atomically
from .hub import find_profile, upload_profile

MAX_FALL = 0.001  # by how much a keep ratio may fall from one budget to the next
MAX_MEAN_ERROR = 0.005  # by how much the mean over layers and heads may differ from the budget
_ROUNDING = 1e-9  # so that a value that lies on one of the two limits is not refused for its last bit
_UNKNOWN = "unknown"
_ON_HUB = "prefixkv-profile.safetensors"


class PrefixProfile:
    """The keep ratio of each layer or key head at each of a grid of budgets, and the method they were made with.

    Immutable: tensors are copied in, and every property hands out a copy. Two profiles are equal when their files
    would be equal byte for byte.

    Args:
        budgets: float64 [n_budgets], rising, each in (0, 1]; a list of floats will do.
        keep: float64 [n_budgets, n_layers, n_heads], or [n_budgets, n_layers]: one length a layer. Each in [0, 1], not
            falling by more than 0.001 from one budget to the next, with the mean over layers and heads within 0.005 of
            the budget; nested lists will do.
        metadata: string to string. What the class knows itself (`format`, `format_version`, `n_layers`, `n_heads`,
            `library_version`) is filled in where it is absent; of `model`, `source`, `samples` and `created`, what is
            absent becomes `"unknown"`. `method` is a spelling, by default the default method's, and is kept in full.
            `measured`, where it is there, is as the property says. Further keys are kept.

    Raises:
        ProfileError: one of the rules above is broken; the message names the field and the rule.
    """

    __slots__ = ("_budgets", "_content", "_keep", "_metadata", "_method")

    def __init__(self, budgets: Any, keep: Any, metadata: Mapping[str, str] | None = None) -> None:
        budgets, keep = _as_table("budgets", budgets), _as_table("keep", keep)
        keep = keep[:, :, None] if keep.ndim == 2 else keep
        check_shapes(budgets.shape, keep.shape)
        _check_budgets(budgets)
        _check_keep(budgets, keep)
        self._budgets, self._keep = budgets, keep
        self._metadata = _complete_metadata({} if metadata is None else metadata, keep.shape[1], keep.shape[2])
        self._method, self._metadata["method"] = _read_method(self._metadata.get("method"))
        self._content = encode(budgets, keep, self._metadata)

    @property
    def budgets(self) -> Tensor:
        """The grid: float64 [n_budgets], rising, fractions kept."""
        return self._budgets.clone()

    @property
    def keep(self) -> Tensor:
        """The keep ratios: float64 [n_budgets, n_layers, n_heads], fractions kept."""
        return self._keep.clone()

    @property
    def metadata(self) -> dict[str, str]:
        """The description: string to string."""
        return dict(self._metadata)

    @property
    def n_layers(self) -> int:
        """For how many layers the profile holds keep ratios."""
        return self._keep.shape[1]

    @property
    def n_heads(self) -> int:
        """For how many key heads of a layer it does; 1: one length a layer."""
        return self._keep.shape[2]

    @property
    def method(self) -> Method:
        """What the keep ratios were made with, and what a cache does that is given nothing but this profile."""
        return self._method

    @property
    def measured(self) -> dict[str, Any] | None:
        """What the keep ratios were measured to cost, on samples that they were not made from; None: never measured.

        `{"samples": 100, "budgets": {"0.5": {"kl": 0.01, "agreement": 0.98, "uniform_kl": 0.02, ...}}}`: how many
        samples, and by budget KL divergence from and agreement with the full cache, those of uniform lengths beside
        them.
        """
        text = self._metadata.get("measured")
        return None if text is None else _read_measured(text)

    def keep_ratios(self, budget: float) -> Tensor:
        """Return the keep ratios at a budget: float64 [n_layers, n_heads], fractions kept.

        Linear between the budgets of the grid, so the mean is that of the two rows, interpolated; below the grid scaled
        toward 0, above it toward 1. A budget of the grid gives its row as it is; 1.0 gives exactly ones.

        Args:
            budget: a fraction in (0, 1]. An integer, so many pairs a head, is a fraction only beside a prompt's length.

        Raises:
            TypeError, ValueError: `budget` is no such fraction.
        """
        fraction = check_budget(budget)
        if isinstance(fraction, int):
            raise ValueError(f"budget is {budget!r}, pairs a head; a profile takes a fraction, in (0, 1], such as 0.5")
        # Nothing is kept at budget 0 and everything at 1: with these two anchors, scaling outside the grid
        # is interpolation too, and a last row that is not quite one cannot prune anything at budget 1.
        inner = int((self._budgets < 1).sum())
        anchors = [0.0, *self._budgets[:inner].tolist(), 1.0]
        edge = torch.ones_like(self._keep[:1])
        right = bisect_left(anchors, fraction)
        low, high = torch.cat([0 * edge, self._keep[:inner], edge])[right - 1 : right + 1]
        if anchors[right] == fraction:
            return high
        weight = (fraction - anchors[right - 1]) / (anchors[right] - anchors[right - 1])
        between = low + (high - low) * weight
        return between.clamp(min=torch.minimum(low, high), max=torch.maximum(low, high))  # rounding oversteps no row

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> PrefixProfile:
        """Read a profile from a file, or a bundled one by its name. Runs no code from the file.

        Args:
            source: a string without a path separator and without the suffix `.safetensors` is the name of a bundled
                profile or, failing that, of a file in the current folder; anything else is a path.

        Raises:
            ProfileError: there is no such file or name (the message lists the names there are), or the file breaks the
                format (the message names the file, the field and what was expected).
            TypeError: `source` is neither a string nor a path.
        """
        path = _resolve(source)
        try:
            return cls(*parse(read_bounded(path)))
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a file, in one step; the same content gives the same bytes.

        Args:
            path: where to; an existing file is replaced, the folder must exist.

        Raises:
            OSError: the file cannot be written. The old file, if any, is then as it was.
        """
        write_atomically(path, self._content)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, filename: str = _ON_HUB, **kwargs: Any
    ) -> PrefixProfile:
        """Read the profile that lies beside a model: in a folder, or in a repository on the Hugging Face hub.

        Args:
            source: a folder, a profile file, or a repository's id such as `"me/llava-1.5-7b-prefixkv"`.
            filename: the profile's name in the folder or repository.
            kwargs: what `huggingface_hub.hf_hub_download` takes, such as `revision`, `token`, `cache_dir`,
                `local_files_only`.

        Raises:
            ProfileError: there is no such file, folder or repository, or it cannot be reached, or the file breaks the
                format.
        """
        return cls.load(find_profile(source, filename, **kwargs))

    def push_to_hub(self, repo_id: str, *, filename: str = _ON_HUB, **kwargs: Any) -> str:
        """Upload the profile to a repository on the Hugging Face hub, which is made if there is none.

        Args:
            repo_id: such as `"me/llava-1.5-7b-prefixkv"`; the model's own repository will do.
            filename: the profile's name in the repository; it must end in `.safetensors`.
            kwargs: `private` (a new repository's visibility), `token`, and what `huggingface_hub.HfApi.upload_file`
                takes, such as `revision`, `commit_message`, `create_pr`.

        Returns:
            The web address of the commit.

        Raises:
            ProfileError: the name is not one of a profile, or the hub refuses; the message says why.
        """
        return upload_profile(self._content, repo_id, filename, **kwargs)

    @staticmethod
    def available() -> list[str]:
        """Return the names of the bundled profiles, sorted."""
        return list(bundled_profiles())

    def __eq__(self, other: object) -> bool:
        return self._content == other._content if isinstance(other, PrefixProfile) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content)

    def __repr__(self) -> str:
        model, method = self._metadata["model"], self._method.spell()
        grid = f"{self._budgets[0]:g} to {self._budgets[-1]:g} in {len(self._budgets)}"
        size = f"n_layers={self.n_layers}, n_heads={self.n_heads}"
        return f"PrefixProfile(model={model!r}, {size}, budgets={grid}, method={method!r})"


def find_bundled(config: Any, n_layers: int) -> PrefixProfile | None:
    """Return the bundled profile of a model, if there is one that says what it was measured to cost.

    Args:
        config: of the model; its name or path says which model it is.
        n_layers: how many of its layers can be pruned; a profile for another number is not this model's.
    """
    model = str(getattr(config, "name_or_path", "") or getattr(config, "_name_or_path", ""))
    for name in names_of_model(model):
        profile = PrefixProfile.load(name)
        if profile.n_layers == n_layers and profile.measured is not None:
            return profile
    return None


def _resolve(source: str | os.PathLike[str]) -> Path:
    """Return the path that `PrefixProfile.load` shall read."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"profile is {source!r}; expected a path or the name of a bundled profile")
    if not isinstance(source, str) or source.endswith(SUFFIX) or "/" in source or os.sep in source:
        return Path(source)
    bundled = bundled_profiles()
    if source in bundled:
        return bundled[source]
    if os.path.isfile(source):
        return Path(source)
    names = ", ".join(bundled) or "none"
    raise ProfileError(f"no bundled profile is named {source!r}; there are: {names}; a path ends in {SUFFIX}")


# What is in a profile.


def _as_table(field: str, value: Any) -> Tensor:
    """Return a float64 copy on the CPU. Tensors of another dtype are refused: 0.1 in float32 is not the budget 0.1."""
    if isinstance(value, Tensor):
        if value.dtype != torch.float64:
            raise ProfileError(f"{field}: has dtype {value.dtype}; expected torch.float64 (`.double()`)")
        table = value.detach().cpu()
    else:
        try:
            table = torch.tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ProfileError(f"{field}: is no table of numbers ({error}); expected float64 values") from None
    return table.contiguous() + 0.0  # a copy in any case; and -0.0 becomes 0.0, so that equal values give equal bytes


def _check_budgets(budgets: Tensor) -> None:
    values = budgets.tolist()
    for index, value in enumerate(values):
        if not 0 < value <= 1:  # nan fails every comparison
            raise ProfileError(f"budgets: entry {index} is {value}; expected a fraction kept, in (0, 1]")
        if index and value <= values[index - 1]:
            raise ProfileError(f"budgets: {value} follows {values[index - 1]}; expected rising budgets")


def _check_keep(budgets: Tensor, keep: Tensor) -> None:
    at = _first(~((keep >= 0) & (keep <= 1)))
    if at is not None:
        raise ProfileError(f"keep: {_place(budgets, at)} is {keep[at].item()}; expected a fraction kept, in [0, 1]")
    at = _first(keep[:-1] - keep[1:] > MAX_FALL + _ROUNDING)
    if at is not None:
        fall = f"falls from {keep[at].item()} to {keep[(at[0] + 1, *at[1:])].item()} at the next budget"
        raise ProfileError(f"keep: {_place(budgets, at)} {fall}; expected a fall of at most {MAX_FALL}")
    means = keep.mean(dim=(1, 2))
    at = _first((means - budgets).abs() > MAX_MEAN_ERROR + _ROUNDING)
    if at is not None:
        budget, mean = budgets[at].item(), means[at].item()
        raise ProfileError(f"keep: has mean {mean} at budget {budget}; expected it within {MAX_MEAN_ERROR} of that")


def _first(wrong: Tensor) -> tuple[int, ...] | None:
    """Return the index of the first entry that is true, if there is one."""
    found = wrong.nonzero()
    return tuple(found[0].tolist()) if len(found) else None


def _place(budgets: Tensor, at: tuple[int, ...]) -> str:
    row, layer, head = at
    return f"layer {layer}, head {head} at budget {budgets[row].item()}"


def _complete_metadata(given: Mapping[str, str], n_layers: int, n_heads: int) -> dict[str, str]:
    """Return the metadata with the format's own fields filled in, or refuse what is wrong in it."""
    expected = "expected a mapping of strings to strings"
    if not isinstance(given, Mapping):
        raise ProfileError(f"metadata: is of type {type(given).__name__}; {expected}")
    for key, value in given.items():
        if not (_is_text(key) and _is_text(value)):
            raise ProfileError(f"metadata: {shown(key)} is {shown(value)}; {expected}")
    sizes = {"n_layers": str(n_layers), "n_heads": str(n_heads)}
    own = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "library_version": _library_version()}
    metadata = {**dict.fromkeys(DESCRIPTIVE, _UNKNOWN), **own, **sizes, **given}
    check_format(metadata)
    for key, size in sizes.items():
        if metadata[key] != size:
            raise ProfileError(f"{key}: is {shown(metadata[key])}; expected '{size}', as keep has")
    if "measured" in metadata:
        _read_measured(metadata["measured"])
    return metadata


def _read_method(spelling: str | None) -> tuple[Method, str]:
    """Return the method and its full spelling; the default without one."""
    try:
        method = DEFAULT if spelling is None else Method.parse(spelling)
    except (TypeError, ValueError) as error:
        raise ProfileError(f"method: is no method ({shown(error)}); expected a method's spelling") from None
    return method, method.spell(full=True)


def _read_measured(text: str) -> dict[str, Any]:
    try:
        measured = json.loads(text)
        samples, rows = measured["samples"], measured["budgets"]
        figures = [value for row in rows.values() for value in row.values()]
        budgets = map(float, rows)
        fits = isinstance(samples, int) and samples > 0 and all(0 < budget <= 1 for budget in budgets)
        fits = fits and bool(figures) and all(map(math.isfinite, figures))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        fits, measured = False, {}
    if not fits:
        example = '{"samples": 100, "budgets": {"0.5": {"kl": 0.01, "agreement": 0.98}}}'
        raise ProfileError(f"measured: is {shown(text)}; expected JSON such as {example}")
    return measured


def _is_text(value: object) -> bool:
    """Whether this is a string that UTF-8 can hold: one with half of a surrogate pair is not."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


@functools.cache
def _library_version() -> str:
    try:
        return importlib.metadata.version("prefixkv-cache")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, not installed
        return _UNKNOWN
