"""Text tasks: a prompt, which is pruned, what comes behind it, and the answer. Knows no model; loads nothing.

- `summary`: the instruction comes first, then the passage; the answer is the model's own.
- `lookup`: three codes are hidden in a passage, and the question for one of them ends the prompt.
- `turn2`: the same, but the question comes in a second turn, after the pruning.
- `continuation`: a passage without a chat around it; the answer is how it goes on.
- `extract`: three codes are hidden in a passage, and all are asked for at the end.
- `pairs`: a list of words of a passage, each with a number, and the question for one of them at the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...rules.checks import check_choice
from .passages import PASSAGE, passages

CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Hanoi", "Quito", "Dakar", "Riga", "Perth", "Seoul", "Turin", "Leeds")
_CONTINUED = 200  # characters of a passage that are the answer of `continuation`
_CHARACTERS_A_PAIR = 30  # of a passage for each line of `pairs`, so that its prompt is as long as the other tasks'


@dataclass(frozen=True)
class Case:
    """One case of a task.

    Attributes:
        prompt: what is pruned: a user's turn, or plain text.
        chat: whether the prompt is a turn of a chat.
        reply, question: the second turn, if there is one: what the model said to the first, and what it is asked next.
        lead: how the answer begins; it is given, and not measured.
        answer: what is measured; None: the model's own greedy answer.
    """

    prompt: str
    chat: bool = True
    reply: str = ""
    question: str = ""
    lead: str = ""
    answer: str | None = None

    def tokens(self, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
        """The tokens of the prompt, of what is fed behind it unmeasured, and of the answer (empty: the model's own)."""
        prompt = self.prompt
        if self.chat:
            prompt = _templated(tokenizer, [{"role": "user", "content": self.prompt}])
        behind = self.lead
        if self.question:
            turns = [
                {"role": "user", "content": self.prompt},
                {"role": "assistant", "content": self.reply},
                {"role": "user", "content": self.question},
            ]
            behind = _templated(tokenizer, turns).removeprefix(prompt) + behind
        texts = (prompt, behind, self.answer or "")
        first, second, third = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        return first, second, third


def _templated(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def summary(passage: str, number: int) -> Case:
    """The instruction first."""
    del number
    return Case(f"Summarize the following passage in a few sentences.\n\n{passage}")


def lookup(passage: str, number: int) -> Case:
    """Three codes hidden, one asked for."""
    text, (city, *_), (code, *_) = _hidden(passage, number)
    return Case(f"{text}\n\nWhat is the secret code of {city}?", lead=f"The secret code of {city} is ", answer=code)


def turn2(passage: str, number: int) -> Case:
    """The question comes after the pruning."""
    text, (city, *_), (code, *_) = _hidden(passage, number)
    question = f"What is the secret code of {city}?"
    lead = f"The secret code of {city} is "
    return Case(f"Read this text.\n\n{text}", reply="I have read it.", question=question, lead=lead, answer=code)


def continuation(passage: str, number: int) -> Case:
    """Plain text, cut at a word."""
    del number
    cut = passage.index(" ", len(passage) - _CONTINUED)
    return Case(passage[:cut], chat=False, answer=passage[cut:])


def extract(passage: str, number: int) -> Case:
    """All three codes, in the order asked."""
    text, cities, codes = _hidden(passage, number)
    asked = f"List the secret codes of {cities[0]}, {cities[1]} and {cities[2]}."
    lines = "\n".join(f"{city}: {code}" for city, code in zip(cities, codes, strict=True))
    lead = f"{cities[0]}: "
    return Case(f"{text}\n\n{asked}", lead=lead, answer=lines.removeprefix(lead))


def pairs(passage: str, number: int) -> Case:
    """A list of words and numbers."""
    choice = random.Random(number)
    words = sorted({word for word in passage.split() if word.isalpha() and word.islower() and len(word) > 3})
    words = choice.sample(words, min(len(words), len(passage) // _CHARACTERS_A_PAIR))
    numbers = [str(choice.randint(1_000, 9_999)) for _ in words]
    lines = "\n".join(f"{word}: {each}" for word, each in zip(words, numbers, strict=True))
    asked = choice.randrange(len(words))
    question = f"What is the number of {words[asked]}?"
    return Case(f"{lines}\n\n{question}", lead=f"The number of {words[asked]} is ", answer=numbers[asked])


def _hidden(passage: str, number: int) -> tuple[str, list[str], list[str]]:
    """A passage with three codes between its sentences, cities and codes, the one that is asked for first."""
    choice = random.Random(number)
    cities = choice.sample(CITIES, 3)
    codes = [str(choice.randint(10_000, 99_999)) for _ in cities]
    sentences = passage.split(". ")
    places = sorted(choice.sample(range(1, len(sentences)), 3), reverse=True)
    for place, city, code in zip(places, cities, codes, strict=True):
        sentences.insert(place, f"The secret code of {city} is {code}")
    asked = choice.randrange(3)
    order = [asked, *(each for each in range(3) if each != asked)]
    return ". ".join(sentences), [cities[each] for each in order], [codes[each] for each in order]


TASKS: dict[str, Callable[[str, int], Case]] = {
    "summary": summary,
    "lookup": lookup,
    "turn2": turn2,
    "continuation": continuation,
    "extract": extract,
    "pairs": pairs,
}


def cases(task: str, split: str, number: int, length: int = PASSAGE) -> list[Case]:
    """The first cases of a task; no two of them share a passage.

    Args:
        task: one of `TASKS`.
        split: `"choose"` or `"report"`.
        number: how many.
        length: of the passages, in characters at least; 1700 make prompts of about 400 tokens, 8000 of about 1800.

    Raises:
        ValueError: there is no such task or split, or there are too few passages.
    """
    check_choice("task", task, tuple(TASKS))
    found, own = [], []
    for passage in passages(split):
        own.append(passage)
        if sum(map(len, own)) >= length:
            found.append(" ".join(own))
            own = []
    if number > len(found):
        raise ValueError(f"{split!r} has {len(found)} passages of {length} characters; {number} were asked for")
    return [TASKS[task](passage, index) for index, passage in enumerate(found[:number])]
