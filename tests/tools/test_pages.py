"""The drawn pages: one seed, one page; readings and questions say what is on it; marking counts what is right."""

from __future__ import annotations

import pytest

from prefixkv_cache.tools.demo import pages
from prefixkv_cache.tools.evaluate.tasks import Marks, drawn_samples

KNOWN_READING = (
    "line one: ice wave. line two: map letter. line three: box mouse train. "
    "line four: girl paper clock. line five: ship mask door."
)
KNOWN_QUESTIONS = [
    ("which line holds the word box?", "the third", "place"),
    ("which word stands before mouse?", "box", "before"),
    ("which word is first in the second line?", "map", "word"),
]


def test_a_seed_gives_one_page():
    for seed in range(20):
        first, second = pages.draw_page(seed), pages.draw_page(seed)
        assert first.image.tobytes() == second.image.tobytes() and first.image.size == (192, 192)
        assert first.lines == second.lines
        assert pages.questions(first, 3) == pages.questions(second, 3)


def test_a_known_seed_gives_the_known_page():
    """Fixed for good: the same words on every Python and platform, or held-out splits would drift."""
    page = pages.draw_page(pages.TEST_SEEDS[0])
    assert pages.describe(page) == KNOWN_READING
    assert [tuple(question) for question in pages.questions(page)[:3]] == KNOWN_QUESTIONS


def test_lines_and_words_are_in_number_and_all_different():
    drawn = [pages.draw_page(seed) for seed in range(100)]
    assert {len(page.lines) for page in drawn} == {3, 4, 5, 6}
    assert {len(line) for page in drawn for line in page.lines} == {2, 3}
    for page in drawn:
        assert len({each.word for each in page.objects}) == len(page.objects)
    assert {each.word for page in drawn for each in page.objects} == set(pages.WORDS)
    assert len(set(pages.WORDS)) == 100


@pytest.mark.parametrize("lines", [(0, 3), (4, 3), (3, 7)])
def test_too_few_or_too_many_lines_are_refused(lines):
    with pytest.raises(ValueError, match=f"1 to 6 lines, got {lines[0]} to {lines[1]}"):
        pages.draw_page(0, *lines)


def test_words_leave_dark_ink_in_their_own_cells_and_nowhere_else():
    """A word's box lies in its line and column; beside the boxes, but for descenders, there is paper."""
    for seed in range(30):
        page = pages.draw_page(seed)
        paper = page.image.copy()
        for each in page.objects:
            left, top, right, bottom = each.box
            assert (left // pages.COLUMN, right // pages.COLUMN) == (each.place, each.place)
            assert (top // pages.LINE, bottom // pages.LINE) == (each.line, each.line)
            inside = page.image.crop((left, top, right + 1, bottom + 1))
            assert min(min(pixel) for _, pixel in inside.getcolors(inside.width * inside.height)) < 110
            paper.paste((255, 255, 255), (left - 1, top - 1, right + 2, min(191, bottom + 7)))
        assert min(min(pixel) for _, pixel in paper.getcolors(192 * 192)) > 150


@pytest.mark.parametrize("seed", range(0, 50, 7))
def test_a_reading_parses_back_to_the_words(seed):
    page = pages.draw_page(seed)
    text = pages.describe(page)
    assert pages.parse_description(text) == {each.words for each in page.objects}
    assert pages.object_accuracy(text, page) == 1.0
    assert pages.object_accuracy("", page) == 0.0
    assert pages.wrong_objects(text, page) == set()
    assert pages.object_accuracy(text.upper().replace(":", " :").replace(".", " ."), page) == 1.0


def test_marking_counts_shares_and_extras():
    page = pages.draw_page(pages.TEST_SEEDS[1])
    first, *others = page.objects
    word = next(word for word in pages.WORDS if word != first.word)
    changed = pages.describe(page).replace(f": {first.word} ", f": {word} ", 1)
    assert pages.object_accuracy(changed, page) == len(others) / len(page.objects)
    assert pages.wrong_objects(changed, page) == {first.words._replace(word=word)}


def right_answer(page, question):
    """Recomputed from the lines by the words of the question alone."""
    text = question.text.rstrip("?.").split()
    lines = [[each.word for each in line] for line in page.lines]
    numbers = [pages.ORDINALS.index(word) for word in text if word in pages.ORDINALS]
    line = next((line for line in lines if text[-1] in line), [])
    if question.kind == "line":
        return " ".join(lines[numbers[0]])
    if question.kind == "word":
        return lines[numbers[1]][numbers[0]]
    if question.kind in ("follows", "before"):
        return line[line.index(text[-1]) + (1 if question.kind == "follows" else -1)]
    if question.kind == "place":
        return f"the {pages.ORDINALS[lines.index(line)]}"
    if question.kind == "column":
        return " ".join(each[numbers[0]] for each in lines)
    if question.kind == "exists":
        return "yes" if any(text[3] in each for each in lines) else "no"
    return pages.NUMBERS[len(lines)]


def test_questions_have_the_right_answers():
    asked = [(page, question) for page in map(pages.draw_page, range(100)) for question in pages.questions(page)]
    assert {question.kind for _, question in asked} == set(pages.QUESTION_KINDS)
    for page, question in asked:
        assert question.answer == right_answer(page, question)
        assert pages.answer_matches(f"{question.answer}.".upper(), question)
        assert not pages.answer_matches("nothing", question)


def test_pages_are_a_task_of_the_evaluation():
    samples = drawn_samples("pages", split="test", n=8, limit=50)
    assert [sample.task for sample in samples] == ["descriptions"] * 8 + ["questions"] * 8
    assert [sample.kind for sample in samples[8:]] == list(pages.QUESTION_KINDS)
    words = len(pages.draw_page(pages.TEST_SEEDS[0]).objects)
    assert samples[0].mark(samples[0].answer) == Marks(1, words, words, words)
    assert samples[0].mark("line one: nothing.") == Marks(0, words, 0, 0)
