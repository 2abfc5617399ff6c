"""Plan of a calibration, and the arithmetic from the tables of all samples to a profile. Sees no model.

A row is what was found in one prompt: `{"n_tokens": 61, "tables": {name: nested lists of numbers}}`. Sums over rows are
exact, so neither the order nor the grouping of the samples can change a profile.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from ..methods import DEFAULT, PREFIXKV, Method, resolve
from ..profiles.profile import MAX_MEAN_ERROR, PrefixProfile
from ..rules.checks import check_budget, check_choice, check_integer
from ..rules.importance import DEFAULT_MAX_BYTES
from ..rules.lengths import fraction_of
from .descent import ANCHORS, EACH, MOST_VISITS, NOTHING, Descent
from .propose import CRITERIA, UNITS, blends, loss_ratios

DEFAULT_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Closer together where lengths change most; between two of them a profile interpolates."""
MEASURED = "measured"
UNIFORM, PAPER = "uniform", "paper"
"""Candidates that the others are held against: equal lengths, and the paper's ranking and search."""
REFERENCES = (UNIFORM, PAPER)
RANKINGS = (
    "default:floor=0.05",
    "default:score=attention;recent=0.1",
    "default:score=key-difference",
    "default:score=key-difference;floor=0.05",
)
"""Methods that the best lengths are also tried with, where no method was asked for."""
WRITTEN = ("method", "n_layers", "n_heads", "by", "measured")
"""Metadata that the calibrator writes by what it found."""

_DIVERGENCE, _LATER = 0, 3  # places in a row of costs
# The spread takes about six bytes a value; larger tables would not fit beside the rest in a profile's header.
_MAX_SPREAD_VALUES = 2**16

Row = dict[str, Any]
Costs = dict[str, list[tuple[float, float, float, float]]]
"""By proposal: (divergence, agreement, exact, later) at each budget, as `measure.Cost` has them."""


@dataclass(frozen=True)
class Candidate:
    """What may become the profile.

    Attributes:
        keep: float64 [n_budgets, 1 or n_layers, 1 or n_heads], keep ratios.
        method: how keys are ranked.
    """

    keep: Tensor
    method: Method


@dataclass(frozen=True)
class Plan:
    """What, beside model and samples, decides the lengths. Checked when it is made.

    Attributes:
        method: how the cache will rank its keys.
        by: `"mass"`, `"reconstruction"` or `"loss"`, or `"measured"`: all of them, and the best is kept.
        unit: `"layer"`: one length a layer, or `"head"`: one for each key head.
        budgets: fractions kept, rising, each in (0, 1].
        max_bytes: ceiling for the temporaries of the importance computation, per layer.
        rankings: with `by="measured"`, other methods that the best lengths are also tried with.

    Raises:
        TypeError, ValueError: an argument is not what is described above.
    """

    method: Method = DEFAULT
    by: str = MEASURED
    unit: str = "layer"
    budgets: tuple[float, ...] = DEFAULT_BUDGETS
    max_bytes: int = DEFAULT_MAX_BYTES
    rankings: tuple[Method, ...] = ()

    @classmethod
    def asked(cls, method: Method | str | None, by: str, unit: str, budgets: Sequence[float]) -> Plan:
        """The plan of a calibration.

        Without a method: for the paper's search the paper's, else the default, and if it is measured, others as well.
        """
        others = tuple(map(Method.parse, RANKINGS)) if method is None and by == MEASURED else ()
        method = PREFIXKV if method is None and by == "mass" else resolve(method)
        return cls(method, by, unit, tuple(budgets), rankings=others)

    def __post_init__(self) -> None:
        check_choice("by", self.by, (*CRITERIA, MEASURED))
        check_choice("unit", self.unit, UNITS)
        object.__setattr__(self, "budgets", tuple(sorted({_check_fraction(budget) for budget in self.budgets})))
        if not self.budgets:
            raise ValueError("budgets is empty; give fractions of the KV pairs to keep, such as [0.1, 0.2, 0.5, 1.0]")
        check_integer("max_bytes", self.max_bytes, 1)
        if self.method.protect.merge and self.by in (MEASURED, "loss"):
            raise ValueError(f"by={self.by!r} hides pruned pairs, and merge=True mixes them into others: take another")
        if self.by == "mass" and self.method.ranking.score == "combined":
            raise ValueError(
                f"by='mass' sums what keys score, and method {self.method.spell()!r} scores places: take another "
                "method, such as 'prefixkv', or by='measured'"
            )
        if (self.by, self.unit) == ("mass", "head") and not self.heads_differ:
            raise ValueError(
                f"by='mass' searches lengths on scores, and method {self.method.spell()!r} has one score for all heads "
                "of a layer: take unit='layer', a method with heads=each, or by='reconstruction'"
            )

    @property
    def heads_differ(self) -> bool:
        """Whether each head has scores of its own."""
        return self.method.ranking.heads == "each"

    @property
    def sink(self) -> int:
        """First tokens that are never pruned; each head keeps at least `sink + 1` pairs."""
        return self.method.protect.sink

    @property
    def is_measured(self) -> bool:
        """Whether a third of the samples is set aside to measure proposals."""
        return self.by == MEASURED

    @property
    def proposals(self) -> tuple[str, ...]:
        """Names of the tables that each sample is asked for: criterion and unit."""
        if not self.is_measured:
            return (f"{self.by}/{self.unit}",)
        units = UNITS if self.unit == "head" else ("layer",)
        names = [f"{by}/{unit}" for by in CRITERIA for unit in units]
        left_out = {"mass/head"} if not self.heads_differ else set()
        if self.method.ranking.score != "attention":  # other scores are no mass
            left_out |= {"mass/layer", "mass/head"}
        return (*(name for name in names if name not in left_out), PAPER)

    def sets_aside(self, index: int) -> bool:
        """Whether a sample is for measuring, and proposals are made without it."""
        return self.is_measured and index % 3 == 1

    @property
    def compared_at(self) -> tuple[float, ...]:
        """The few budgets at which candidates are compared; only the one that wins is measured at all of them."""
        return tuple(sorted({min(self.budgets, key=lambda budget: abs(budget - anchor)) for anchor in ANCHORS}))

    def steps(self, n_found: int, n_aside: int) -> int:
        """How much there is to do, in prompts, for so many samples of either kind."""
        if not self.is_measured:
            return n_found
        return n_found + n_aside * (3 + bool(self.rankings)) + self.visits(n_found)

    @property
    def floors(self) -> tuple[float | int, ...]:
        """Of the method and the other rankings: lengths are improved above each."""
        return tuple(dict.fromkeys(each.lengths.floor for each in (self.method, *self.rankings)))

    def visits(self, n_samples: int) -> int:
        """Prompts that a descent looks at."""
        return min(EACH * n_samples, MOST_VISITS)

    def keep(self, name: str, rows: Sequence[Row]) -> Tensor:
        """The keep ratios of one proposal: float64 [n_budgets, n_layers, n_heads], the mean over the samples.

        Raises:
            ValueError: a budget is too small for prompts this short.
        """
        tables, lengths = [row["tables"][name] for row in rows], [row["n_tokens"] for row in rows]
        if name.startswith("loss"):
            return loss_ratios(_mean(tables), self.budgets)
        keep = _mean(tables, lengths)
        self._check_means(keep, lengths)
        return keep

    def candidates(self, rows: Sequence[Row]) -> dict[str, Candidate]:
        """Proposals by name, uniform lengths first. A table that a row lacks is left out."""
        names = [name for name in self.proposals if all(name in row["tables"] for row in rows)]
        found = {UNIFORM: Candidate(torch.tensor(self.budgets, dtype=torch.float64).view(-1, 1, 1), self.method)}
        for name in names:
            keep = self.keep(name, rows)
            if name == PAPER:
                found[name] = Candidate(keep, PREFIXKV)
            else:
                found.update((own, Candidate(each, self.method)) for own, each in blends(name, keep, self.budgets))
        return found

    def ranked(self, name: str, keep: Tensor) -> dict[str, Candidate]:
        """The lengths of one candidate, with each of the other rankings."""
        return {own: Candidate(keep, method) for own, method in self._others(name).items()}

    def improved(self, keeps: Mapping[float | int, Tensor]) -> dict[str, Candidate]:
        """Lengths that were improved by gradient, with each of the rankings.

        Args:
            keeps: by floor; a ranking takes those above its own.
        """
        name = f"gradient/{self.unit}"
        methods = {name: self.method, **self._others(name)}
        return {
            own: Candidate(keeps[method.lengths.floor], method)
            for own, method in methods.items()
            if method.lengths.floor in keeps
        }

    def _others(self, name: str) -> dict[str, Method]:
        """The other rankings, by what lengths of this name are called with them."""
        return {f"{name}, {method.spell()}": method for method in self.rankings}

    def descent(self, of: Candidate, n_layers_and_heads: tuple[int, int], n_tokens: int, visits: int) -> Descent:
        """The descent from a candidate's lengths, above its method's floor in a prompt of so many tokens."""
        n_layers, n_heads = n_layers_and_heads
        units, keep = 1 if self.unit == "layer" else n_heads, of.keep
        keep = keep.expand(-1, n_layers, -1) if units > 1 else keep.mean(2, keepdim=True).expand(-1, n_layers, -1)
        profile = PrefixProfile(list(self.budgets), keep)
        start = torch.stack([profile.keep_ratios(anchor) for anchor in ANCHORS])
        least = fraction_of(of.method.lengths.floor, n_tokens)
        return Descent(start.expand(-1, -1, units).clone(), ANCHORS, visits, least)

    def _check_means(self, keep: Tensor, lengths: Sequence[int]) -> None:
        for budget, mean in zip(self.budgets, keep.mean((1, 2)).tolist(), strict=True):
            if abs(mean - budget) > MAX_MEAN_ERROR:
                least = math.fsum(min(self.sink + 1, n) / n for n in lengths) / len(lengths)
                raise ValueError(
                    f"budget {budget:g} cannot be calibrated on prompts of {min(lengths)} to {max(lengths)} tokens: it "
                    f"comes out as {mean:.4g}, since lengths are whole numbers and each layer keeps at least "
                    f"{self.sink + 1} tokens, here {least:.4g} of them. Leave this budget out, or take longer prompts"
                )


def _check_fraction(budget: Any) -> float:
    fraction = check_budget(budget)
    if isinstance(fraction, int):
        raise ValueError(f"budget is {budget!r}; a profile's grid holds fractions in (0, 1], such as 0.5 or 1.0")
    return fraction


def _mean(tables: Sequence[Any], divisors: Sequence[int] | None = None) -> Tensor:
    """float64, the exact mean of nested lists of one shape, each divided by its number."""
    tensors = [torch.tensor(table, dtype=torch.float64) for table in tables]
    if divisors is not None:
        tensors = [tensor / number for tensor, number in zip(tensors, divisors, strict=True)]
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise ValueError("samples were measured on different layers; calibrate on one model")
    columns = zip(*(tensor.flatten().tolist() for tensor in tensors), strict=True)
    means = [math.fsum(column) / len(tensors) for column in columns]
    return torch.tensor(means, dtype=torch.float64).view(tensors[0].shape)


def mean_costs(rows: Sequence[Row]) -> Costs:
    """What each candidate cost on the samples set aside: the mean over the rows, at the budgets it was measured at."""
    names = rows[0]["tables"]
    return {name: [tuple(each) for each in _mean([row["tables"][name] for row in rows]).tolist()] for name in names}


def advantage(costs: Costs, name: str) -> float:
    """Mean over the budgets of log(divergence / that of uniform lengths): negative where it is better.

    The answer's divergence and that of a part of the prompt count alike: a user may ask again.
    """
    pairs = [
        (own[place], uniform[place])
        for own, uniform in zip(costs[name], costs[UNIFORM], strict=True)
        for place in (_DIVERGENCE, _LATER)
    ]
    return math.fsum(math.log((own + NOTHING) / (uniform + NOTHING)) for own, uniform in pairs) / len(pairs)


def best(costs: Costs) -> str:
    """The candidate with the least divergence against uniform lengths; of equals the first."""
    return min((name for name in costs if name not in REFERENCES), key=lambda name: advantage(costs, name))


def measured_field(costs: Costs, name: str, budgets: Sequence[float], n_samples: int) -> str:
    """The metadata `measured` of a profile: JSON, by budget, with uniform lengths and the paper beside."""
    beside = [(name, ""), *((each, f"{each}_") for each in REFERENCES if each in costs)]
    fields = [f"{prefix}{field}" for _, prefix in beside for field in ("kl", "agreement", "exact")]
    columns = [[row[:_LATER] for row in costs[each]] for each, _ in beside]
    rows = [[value for cost in row for value in cost] for row in zip(*columns, strict=True)]
    by_budget = {
        f"{budget:g}": dict(zip(fields, (float(f"{value:.4g}") for value in row), strict=True))
        for budget, row in zip(budgets, rows, strict=True)
    }
    found = {"samples": n_samples, "beats_uniform": advantage(costs, name) < 0, "budgets": by_budget}
    return json.dumps(found, separators=(",", ":"))


def make_profile(
    plan: Plan,
    rows: Sequence[Row],
    metadata: Mapping[str, str],
    measured: Sequence[Row] = (),
    candidates: Mapping[str, Candidate] | None = None,
) -> PrefixProfile:
    """The profile of a calibration.

    Args:
        plan: of the calibration.
        rows: what was found in the samples that proposals are made of.
        metadata: more to write into it.
        measured: what the best candidate and the references cost on the samples set aside, at all budgets, where the
            plan is to measure.
        candidates: the best and the references.

    Raises:
        ValueError: a budget is too small for prompts this short.
    """
    more: dict[str, str] = {}
    if plan.is_measured:
        costs = mean_costs(measured)
        name = best(costs)
        won = (candidates or {})[name]
        more["measured"] = measured_field(costs, name, plan.budgets, len(measured))
    else:
        name = plan.proposals[0]
        won = Candidate(plan.keep(name, rows), plan.method)
        more.update(_spread(plan, name, rows))
    lengths = [row["n_tokens"] for row in rows]
    described = {
        "method": won.method.spell(full=True),
        "by": name.partition(",")[0],
        "samples": str(len(rows) + len(measured)),
        "tokens_min": str(min(lengths)),
        "tokens_mean": f"{math.fsum(lengths) / len(lengths):.1f}",
        "tokens_max": str(max(lengths)),
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return PrefixProfile(list(plan.budgets), won.keep, {**described, **more, **metadata})


def _spread(plan: Plan, name: str, rows: Sequence[Row]) -> dict[str, str]:
    """Standard deviation over the samples of each layer's keep ratio, JSON [n_budgets][n_layers], if there are two."""
    if len(rows) < 2 or name.startswith("loss"):
        return {}
    ratios = [torch.tensor(row["tables"][name], dtype=torch.float64).mean(2) / row["n_tokens"] for row in rows]
    if ratios[0].numel() > _MAX_SPREAD_VALUES:
        return {}
    means = _mean([each.tolist() for each in ratios])
    squares = _mean([((each - means) ** 2).tolist() for each in ratios]) * len(rows) / (len(rows) - 1)
    values = [[round(math.sqrt(value), 4) for value in row] for row in squares.tolist()]
    return {"spread": json.dumps(values, separators=(",", ":"))}


def table(costs: Costs, budgets: Sequence[float]) -> Iterable[str]:
    """Lines of the measured divergences, the best proposal first: of the answer, and of a part of the prompt."""
    shown = [(field, place) for field in (_DIVERGENCE, _LATER) for place, each in enumerate(budgets) if each < 1]
    width, half = max(map(len, costs)), 8 * len(shown) // 2
    yield f"{'KL to the full cache':{width}}  {'of the answer at':>{half}}{'of the prompt again at':>{max(half, 24)}}"
    yield f"{'':{width}}  " + "".join(f"{budgets[place]:>8g}" for _, place in shown)
    for name in sorted(costs, key=lambda name: advantage(costs, name)):
        yield f"{name:{width}}  " + "".join(f"{costs[name][place][field]:8.3f}" for field, place in shown)
