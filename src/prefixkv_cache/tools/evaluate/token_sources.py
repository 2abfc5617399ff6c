"""Token sources: teacher-forced and greedy.

A source is shown the logits of every step and names one token a row. It knows no model and no cache. `ended` says in
which rows it has named its last token; what it names there afterwards is padding, which nobody looks at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Forced:
    """Names the tokens of given answers, whatever the logits, and sums up how likely they were.

    Args:
        answers: token ids for each row, at least one.
        pad: token for rows that have ended.
        reference: log-probabilities of another run of the same answers; None: this run's are kept, for others.

    Attributes:
        nll: float64 [rows], minus the sum of the log-probabilities of the answer so far.
        kl: float64 [rows], the sum over the steps so far of KL(reference || own); zeros without a reference.
        agree: int64 [rows], in how many steps so far the reference holds the same token most likely; zeros without one.
        log_probs: one float32 [rows that go on, vocabulary] for each step, in CPU memory; empty with a reference.
    """

    def __init__(
        self,
        answers: Sequence[Sequence[int]],
        pad: int,
        reference: Sequence[Tensor] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.lengths = torch.tensor([len(answer) for answer in answers], device=device)
        longest = int(self.lengths.max())
        padded = [[*answer, *[pad] * (longest + 1 - len(answer))] for answer in answers]
        self._tokens = torch.tensor(padded, device=device)
        self._reference = reference
        self._step = 0
        self.nll = torch.zeros(len(answers), dtype=torch.float64, device=device)
        self.kl = torch.zeros_like(self.nll)
        self.agree = torch.zeros_like(self.lengths)
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
            if self._reference is None:
                self.log_probs.append(log_probs.cpu())
            else:
                reference = self._reference[self._step].to(logits.device)
                self.kl[going] += divergence(reference, log_probs)
                self.agree[going] += (reference.argmax(-1) == log_probs.argmax(-1)).long()
        self._step += 1
        return tokens


class Greedy:
    """Names the most likely token, as `generate(do_sample=False)` does, up to an end-of-text token or a limit.

    Args:
        limits: int64 [rows], at most so many tokens.
        eos: ids of the tokens that end a text.
        pad: token for rows that have ended.
    """

    def __init__(self, limits: Tensor, eos: Sequence[int], pad: int):
        self._limits, self._pad = limits, pad
        self._eos = torch.tensor(list(eos), dtype=torch.int64, device=limits.device)
        self._named: list[Tensor] = []
        self.ended = torch.zeros_like(limits, dtype=torch.bool)

    def next(self, logits: Tensor) -> Tensor:
        """The next token of each text, int64 [rows], from float32 [rows, vocabulary]."""
        tokens = logits.argmax(-1).masked_fill(self.ended, -1)
        self._named.append(tokens)
        self.ended = self.ended | torch.isin(tokens, self._eos) | (len(self._named) >= self._limits)
        return tokens.masked_fill(tokens < 0, self._pad)

    @property
    def texts(self) -> list[list[int]]:
        """The tokens of each row, an end-of-text token included."""
        return [[token for token in row if token >= 0] for row in torch.stack(self._named, dim=1).tolist()]


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
