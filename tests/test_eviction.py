"""The decode rule over several turns, against lists of tokens: which token leaves at each step.

The layer's part is played here: slots hold tokens, a prompt and a crop put them in order again.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from prefixkv_cache.eviction import FixedPointEviction


class Slow:
    """A row as a list of tokens in the order in which they came, and a list of those that leave before all others."""

    def __init__(self, keep, distance, slack):
        self.keep, self.distance, self.slack = keep, distance, slack
        self.held, self.owed, self.seen, self.point = [], [], 0, None

    def prompt(self, tokens, fed):
        if self.point is not None:
            next_out = self.owed + self.held[self.point :]
            beyond = max(0, int(len(self.held) - self.seen * self.keep))
            self.owed = next_out[: min(self.slack, beyond)]
        self.held += tokens
        self.seen += fed
        self.point = len(self.held) - self.distance
        if self.point < 1:
            self.point = len(self.held) // 2
        # What the fixed point takes in anyway is not owed twice.
        self.owed = [token for token in self.owed if token in self.held[: self.point]]

    def step(self, token):
        self.held.append(token)
        self.seen += 1
        if len(self.held) - self.seen * self.keep >= 1 + self.slack:
            if self.owed:
                self.held.remove(self.owed.pop(0))
                self.point -= 1
            elif self.point < len(self.held) - 1:
                del self.held[self.point]

    def crop(self, removed):
        first = self.held[-1] + 1 - removed
        self.held = [token for token in self.held if token < first]
        self.seen = max(len(self.held), self.seen - removed)
        self.point = min(self.point, max(len(self.held) - 1, 0))
        self.owed = [token for token in self.owed if token in self.held[: self.point]]


class Row:
    """The same with the rule under test: slots, and what each holds."""

    def __init__(self, keep, distance, slack):
        self.make = lambda *state: FixedPointEviction(*state, distance=distance, slack=slack)
        self.keep, self.slots, self.rule = keep, [], None

    def prompt(self, tokens, fed):
        owed, seen = (self.rule.owed(), self.rule.seen) if self.rule else ((), 0)
        self.slots = sorted(self.slots) + tokens
        self.rule = self.make(len(self.slots), seen + fed, self.keep, owed)

    def step(self, token):
        self.rule = self.rule.copy()
        slot = self.rule.next_slot()
        self.slots[slot : slot + 1] = [token]

    def crop(self, removed):
        first = max(self.slots) + 1 - removed
        self.slots = [token for token in sorted(self.slots) if token < first]
        self.rule = self.rule.shortened(len(self.slots), removed)


TURNS = st.lists(
    st.tuples(st.integers(2, 30), st.integers(0, 25), st.integers(0, 2)), min_size=1, max_size=5
)  # tokens of a prompt, steps behind it, how many of these are taken back


@settings(max_examples=400, deadline=None)
@given(TURNS, st.sampled_from([0.1, 0.25, 0.5, 0.8, 1.0]), st.integers(1, 6), st.sampled_from([0, 1, 3, 8, 20]))
def test_turns(turns, keep, distance, slack):
    slow, row, now = Slow(keep, distance, slack), Row(keep, distance, slack), 0
    for fed, steps, removed in turns:
        count = max(2, round(keep * fed))
        tokens = [*range(now, now + count - 1), now + fed - 1]
        now += fed
        for each in (slow, row):
            each.prompt(tokens, fed)
        for _ in range(steps):
            for each in (slow, row):
                each.step(now)
            now += 1
            if keep < 1:
                assert sorted(row.slots) == slow.held
                assert row.rule.stored == len(slow.held) and row.rule.seen == slow.seen
        if removed and steps > removed and keep < 1:
            now -= removed
            for each in (slow, row):
                each.crop(removed)
            assert sorted(row.slots) == slow.held


def test_each_answer_has_the_slack_to_itself():
    """What an answer held beyond the share leaves first in the next turn, the oldest first, before anything new."""
    row = Row(keep=0.2, distance=1, slack=64)
    row.prompt(list(range(20)), 100)
    for token in range(100, 200):
        row.step(token)
    assert row.rule.stored == 104  # 0.2 * 200 and the slack
    row.prompt(list(range(200, 220)), 100)
    for token in range(300, 400):
        row.step(token)
    assert set(range(320, 400)) <= set(row.slots)  # at least 80 of the new answer: 64 / (1 - 0.2)
    assert set(range(200, 219)) <= set(row.slots)
    assert row.rule.stored - row.rule.seen * 0.2 < 1 + 64


def test_without_slack_nothing_is_owed():
    row = Row(keep=0.3, distance=25, slack=0)
    row.prompt(list(range(40)), 120)
    for token in range(120, 160):
        row.step(token)
    assert row.rule.owed() == ()
