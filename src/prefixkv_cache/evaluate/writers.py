"""Who says what comes next in each row: the reference answer, the most likely token, or chance.

A writer is shown the logits of every step and names one token a row. It knows no model and no cache. `ended` says in
which rows it has named its last token; what it names there afterwards is padding, which nobody looks at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Forced:
    """Says the reference answers, whatever the logits, and keeps account of how likely they were.

    Args:
        answers: token ids for each row, at least one.
        pad: token for rows that have ended.
        keep: remember the distributions, for others to be compared with.
        reference: the distributions of another run of the same answers.

    Attributes:
        nll: float64 [rows], minus the sum of the log-probabilities of the answer so far.
        kl: float64 [rows], the sum over the steps so far of KL(reference || own); zeros without a reference.
        log_probs: one float32 [rows that go on, vocabulary] for each step, in CPU memory; empty unless kept.
    """

    def __init__(
        self,
        answers: Sequence[Sequence[int]],
        pad: int,
        *,
        keep: bool = False,
        reference: Sequence[Tensor] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.lengths = torch.tensor([len(answer) for answer in answers], device=device)
        longest = int(self.lengths.max())
        padded = [[*answer, *[pad] * (longest + 1 - len(answer))] for answer in answers]
        self._tokens = torch.tensor(padded, device=device)
        self._keep, self._reference = keep, reference
        self._step = 0
        self.nll = torch.zeros(len(answers), dtype=torch.float64, device=device)
        self.kl = torch.zeros_like(self.nll)
        self.log_probs: list[Tensor] = []

    @property
    def ended(self) -> Tensor:
        """Which rows have ended, bool [rows]."""
        return self._step >= self.lengths

    def next(self, logits: Tensor) -> Tensor:
        """The next token of each answer, int64 [rows], from float32 [rows, vocabulary]."""
        tokens = self._tokens[:, min(self._step, self._tokens.shape[1] - 1)]
        going = (~self.ended).nonzero().flatten()
        if len(going):
            log_probs = logits[going].log_softmax(-1)
            self.nll[going] -= log_probs.gather(1, tokens[going, None])[:, 0].double()
            if self._keep:
                self.log_probs.append(log_probs.cpu())
            if self._reference is not None:
                self.kl[going] += divergence(self._reference[self._step].to(logits.device), log_probs)
        self._step += 1
        return tokens


class Greedy:
    """Says the most likely token, as `generate(do_sample=False)` does, up to an end-of-text token or a limit.

    Args:
        rows: of the batch.
        limit: at most so many tokens.
        eos: ids of the tokens that end a text.
        pad: token for rows that have ended.
    """

    def __init__(self, rows: int, limit: int, eos: Sequence[int], pad: int, device: torch.device | str = "cpu"):
        self._limit, self._pad = limit, pad
        self._eos = torch.tensor(list(eos), dtype=torch.int64, device=device)
        self._said: list[Tensor] = []
        self._stopped = torch.zeros(rows, dtype=torch.bool, device=device)

    @property
    def ended(self) -> Tensor:
        """Which rows have ended, bool [rows]."""
        return self._stopped | (len(self._said) >= self._limit)

    def next(self, logits: Tensor) -> Tensor:
        """The next token of each text, int64 [rows], from float32 [rows, vocabulary]."""
        tokens = self._choose(logits).masked_fill(self._stopped, self._pad)
        if len(self._said) < self._limit:
            self._said.append(tokens)
        self._stopped = self._stopped | torch.isin(tokens, self._eos)
        return tokens

    def _choose(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    @property
    def texts(self) -> list[list[int]]:
        """The tokens of each row, an end-of-text token included."""
        rows = torch.stack(self._said, dim=1).tolist()
        ends = set(self._eos.tolist())
        return [row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))] for row in rows]


class Sampled(Greedy):
    """Says a token by chance, at temperature 1.

    Args:
        seed: of the chance; the same seed says the same on the same logits.
        rows, limit, eos, pad: as for `Greedy`.
    """

    def __init__(self, seed: int, rows: int, limit: int, eos: Sequence[int], pad: int, device: torch.device | str):
        super().__init__(rows, limit, eos, pad, device)
        self._chance = torch.Generator().manual_seed(seed)

    def _choose(self, logits: Tensor) -> Tensor:
        chosen = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=self._chance)[:, 0]
        return chosen.to(logits.device)


def divergence(reference: Tensor, log_probs: Tensor) -> Tensor:
    """KL(reference || own) in nats, float64 [rows], from float32 log-probabilities [rows, vocabulary].

    As the sum of p (d + exp(-d) - 1) with d = log p - log q: the same as the sum of p d, as both distributions add up
    to 1, but with no negative term, so that rounding adds up to nothing where the two agree.
    """
    reference, log_probs = reference.double(), log_probs.double()
    difference = reference - log_probs
    each = reference.exp() * (difference + (-difference).expm1())
    # Of a token that the reference excludes (log-probability minus infinity), q remains.
    return each.where(reference > -torch.inf, log_probs.exp()).sum(-1)
