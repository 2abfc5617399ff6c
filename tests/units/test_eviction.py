"""The decode rule over several turns, against lists of tokens: which token leaves, at each step and between turns.

The layer's part is played here: slots hold tokens, a prompt and a crop put them in order again.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from prefixkv_cache.rules.eviction import QueueEviction, fixed_point


class Slow:
    """A row as a list of tokens in the order in which they came."""

    def __init__(self, keep, distance, headroom):
        self.keep, self.distance, self.headroom = keep, distance, headroom
        self.held, self.seen, self.point, self.steps = [], 0, None, 0
        self.origin = None  # how many pairs stand before the first answer

    def begin_turn(self):
        """What is held beyond the share leaves. Returns how much of the prompt may stay beyond the share."""
        if self.steps <= 0:
            return 0
        if self.origin is None:
            self.origin = self.point
        beyond = max(0, int(len(self.held) - self.seen * self.keep))
        del self.held[self.origin : self.origin + min(self.headroom, beyond)]
        return self.headroom // 2

    def prompt(self, tokens, fed):
        self.held += tokens
        self.seen += fed
        self.steps = 0
        self.point = len(self.held) - self.distance
        if self.point < 1:
            self.point = len(self.held) // 2

    def step(self, token):
        self.held.append(token)
        self.seen += 1
        self.steps += 1
        if len(self.held) - self.seen * self.keep >= 1 + self.headroom and self.point < len(self.held) - 1:
            del self.held[self.point]

    def crop(self, removed):
        first = self.held[-1] + 1 - removed
        self.held = [token for token in self.held if token < first]
        self.seen = max(len(self.held), self.seen - removed)
        self.steps -= removed
        self.point = min(self.point, max(len(self.held) - 1, 0))
        self.origin = self.origin and min(self.origin, len(self.held))


class Row:
    """The same with the rule under test: slots, and what each holds."""

    def __init__(self, keep, distance, headroom):
        self.make = lambda stored, seen, keep, origin: QueueEviction(
            stored, seen, keep, fixed_point(stored, distance), headroom, origin
        )
        self.keep, self.slots, self.rule = keep, [], None

    def begin_turn(self):
        if self.rule is None:
            return 0
        leaving = set(self.rule.leaving_for(0, 0))
        self.slots = [token for place, token in enumerate(sorted(self.slots)) if place not in leaving]
        return self.rule.allowance

    def prompt(self, tokens, fed):
        seen = self.rule.seen if self.rule else 0
        self.slots = sorted(self.slots) + tokens
        self.rule = self.make(len(self.slots), seen + fed, self.keep, self.rule and self.rule.origin)

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
def test_turns(turns, keep, distance, headroom):
    slow, row, now = Slow(keep, distance, headroom), Row(keep, distance, headroom), 0
    for fed, steps, removed in turns:
        allowance = slow.begin_turn()
        assert row.begin_turn() == allowance
        count = min(max(2, round(keep * fed)) + allowance, fed)
        tokens = [*range(now, now + count - 1), now + fed - 1]
        now += fed
        for each in (slow, row):
            each.prompt(tokens, fed)
        for _ in range(steps):
            for each in (slow, row):
                each.step(now)
            now += 1
            assert sorted(row.slots) == slow.held
            assert row.rule.stored == len(slow.held) and row.rule.seen == slow.seen
        if removed and steps > removed:
            now -= removed
            for each in (slow, row):
                each.crop(removed)
            assert sorted(row.slots) == slow.held


def turn(row, first, prompt, steps):
    """A prompt of so many tokens, pruned to its share and the allowance, and so many steps; returns the next token."""
    kept = min(round(row.keep * prompt) + row.begin_turn(), prompt)
    row.prompt([*range(first, first + kept - 1), first + prompt - 1], prompt)
    for token in range(first + prompt, first + prompt + steps):
        row.step(token)
    return first + prompt + steps


def test_each_turn_has_the_headroom_to_itself():
    """However many answers came before: a short question is kept whole, and an answer of the headroom's length too."""
    row, now = Row(keep=0.2, distance=1, headroom=64), 0
    now = turn(row, now, 100, 100)
    assert row.rule.stored == 104  # 0.2 * 200, and the headroom
    for _ in range(5):
        question = range(now, now + 30)
        now = turn(row, now, 30, 45)
        assert set(question) <= set(row.slots) and set(range(now - 45, now)) <= set(row.slots)
        assert row.rule.stored - row.rule.seen * 0.2 < 1 + 64
        now = turn(row, now, 300, 100)  # a long one by its share, and half of the headroom
        assert row.rule.stored - row.rule.seen * 0.2 < 1 + 64


def test_pieces_of_one_prompt_are_not_turns():
    row, now = Row(keep=0.2, distance=1, headroom=64), 0
    for _ in range(5):
        now = turn(row, now, 50, 0)
    assert len(row.slots) == 50


def test_without_headroom_nothing_leaves_between_turns():
    row, now = Row(keep=0.3, distance=25, headroom=0), 0
    for _ in range(3):
        now = turn(row, now, 120, 40)
        assert not row.rule.leaving_for(0, 0) and row.rule.allowance == 0
