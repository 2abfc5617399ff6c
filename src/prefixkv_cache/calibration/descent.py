"""Lengths improved by gradient descent on what pruning costs: all layers or heads at once, around the best so far.

A count of pairs has no gradient. So a pair is faded instead of pruned: `log sigmoid((r - e) / t)` is added to its
attention logit, with r the keep ratio of its head, e the ratio at which the pair comes in, and t a temperature that
falls. That heads can be told apart by gradients is known from DuoAttention (arXiv 2410.10819); there a head is full or
it is not. Sees prompts (measure.py), and no samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..profiles.profile import PrefixProfile
from .measure import AnsweredPrompt

ANCHORS = (0.1, 0.2, 0.5)
"""Budgets that are improved; a profile interpolates between them."""
EACH, MOST_VISITS = 8, 64
"""How often each sample is looked at, and all together at most."""
_WARM, _COLD = 0.03, 0.015  # temperatures, in keep ratio, of the first and the last visits
_RATE, _LEAST_RATE = 0.2, 0.02
_EDGE = 0.003  # ratios nearer to 0 or 1 would hardly move
NOTHING = 1e-2
"""In nats a token: between divergences far below it there is nothing to choose, and nothing to improve."""


class Descent:
    """Keep ratios on their way. Their mean at each anchor is the budget, and no ratio falls from anchor to anchor.

    Args:
        start: float64 [n_anchors, n_layers, n_heads], keep ratios.
        anchors: budgets, rising.
        visits: how often `step` will be called.
        least: keep ratio that no unit falls below, but for budgets that hardly reach it.
    """

    def __init__(self, start: Tensor, anchors: Sequence[float], visits: int, least: float = 0.0):
        self.anchors, self._visits, self._done = list(anchors), visits, 0
        self._least = [min(least, budget / 2) for budget in anchors]
        self._free = self._to_free(start).requires_grad_(True)
        self._optimiser = torch.optim.Adam([self._free], lr=_RATE, betas=(0.8, 0.99))

    def ratios(self) -> Tensor:
        """float64 [n_anchors, n_layers, n_heads], differentiable."""
        found: list[Tensor] = []
        for free, budget, least in zip(self._free, self.anchors, self._least, strict=True):
            below = (found[-1] if found else torch.zeros_like(free)).clamp_min(least)
            found.append(_with_mean(free, below, budget))
        return torch.stack(found)

    def _to_free(self, start: Tensor) -> Tensor:
        below = torch.cat([torch.zeros_like(start[:1]), start[:-1]])
        below = torch.maximum(below, start.new_tensor(self._least).view(-1, 1, 1))
        return torch.logit(((start - below) / (1 - below).clamp_min(_EDGE)).clamp(_EDGE, 1 - _EDGE))

    def at_budgets(self, budgets: Sequence[float]) -> Tensor:
        """float64 [n_budgets, n_layers, n_heads], as a profile interpolates between the anchors."""
        profile = PrefixProfile(self.anchors, self.ratios().detach())
        return torch.stack([profile.keep_ratios(budget) for budget in budgets])

    def step(self, prompt: AnsweredPrompt, entries: Mapping[int, Tensor]) -> float:
        """Look at one prompt and take a step; returns the mean of the logarithms of the divergences.

        Args:
            prompt: what is looked at.
            entries: its `entry_ratios`.
        """
        progress = self._done / max(1, self._visits)
        temperature = _WARM if progress < 2 / 3 else _COLD
        self._optimiser.param_groups[0]["lr"] = _RATE * (1 - progress) + _LEAST_RATE
        self._optimiser.zero_grad()
        continuations = prompt.continuations()
        total = 0.0
        with prompt.frozen(), torch.enable_grad():
            ratios = self.ratios()
            # Each loss frees its own graph; what it says of the ratios is gathered here, and goes further back once.
            gathered = ratios.detach().requires_grad_(True)
            for continuation in continuations:
                gates = [
                    {
                        index: fade(entry, ratio.to(entry.device), temperature)
                        for (index, entry), ratio in zip(entries.items(), of_layers, strict=True)
                    }
                    for of_layers in gathered
                ]
                for divergences in prompt.faded_divergences(gates, continuation):
                    loss = (divergences + NOTHING).log().mean(1).sum() / (len(self.anchors) * len(continuations))
                    loss.backward()
                    total += loss.item()
            ratios.backward(gathered.grad)
        if bool(self._free.grad is not None and self._free.grad.isfinite().all()):
            self._optimiser.step()
        self._done += 1
        return total


def fade(entry: Tensor, ratio: Tensor, temperature: float) -> Tensor:
    """What is added to the attention logits of the pairs.

    Args:
        entry: float [batch, kv_heads, n], the keep ratio at which a pair comes in; 0: it always stays.
        ratio: float64 [kv_heads or 1], keep ratios.
        temperature: in keep ratio.

    Returns:
        float32 [batch, kv_heads, n], at most 0.
    """
    faded = F.logsigmoid((ratio.float()[None, :, None] - entry) / temperature)
    return torch.where(entry > 0, faded, torch.zeros_like(faded))


def _with_mean(free: Tensor, below: Tensor, mean: float) -> Tensor:
    """`below + (1 - below) * sigmoid(free + shift)`, with the shift that makes the mean right; differentiable."""

    def at(shift: Any) -> Tensor:
        return below + (1 - below) * torch.sigmoid(free + shift)

    with torch.no_grad():
        low, high = -30.0, 30.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if at(middle).mean() > mean else (middle, high)
        share = torch.sigmoid(free + low)
        slope = ((1 - below) * share * (1 - share)).mean().clamp_min(1e-12)
    # One step of Newton's method from the solution: it stays where it is, and has the gradient of the solution.
    return at(low - (at(low).mean() - mean) / slope)
