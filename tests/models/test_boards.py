"""The drawn boards: one seed, one board; readings and questions say what is on it; marking counts what is right."""

from __future__ import annotations

import pytest

from prefixkv_cache.tools.demo import boards, scenes

KNOWN_READING = (
    "the board has four rows and five columns. "
    "row one reads orange six, blue two, red six, purple four, cyan seven. "
    "row two reads orange zero, cyan seven, red nine, cyan eight, orange six. "
    "row three reads blue six, blue two, green two, green eight, purple zero. "
    "row four reads purple nine, cyan zero, orange seven, purple two, orange one."
)
KNOWN_QUESTIONS = [
    ("what colour is row one column five?", "cyan", "colour"),
    ("what is in row four column five?", "orange one", "tile"),
    ("read row three.", "blue six, blue two, green two, green eight, purple zero", "row"),
]


def test_the_surface_is_that_of_scenes():
    """Whoever trains or judges a model treats the two modules alike, but for the name of the drawing function."""
    shared = {"describe", "questions", "answer_matches", "object_accuracy", "wrong_objects", "parse_description"}
    shared |= {"DESCRIBE_PROMPTS", "QUESTION_KINDS", "TRAIN_SEEDS", "VALIDATION_SEEDS", "TEST_SEEDS"}
    for module, picture in ((scenes, scenes.draw_scene(0)), (boards, boards.draw_board(0))):
        assert shared <= set(dir(module))
        assert picture.seed == 0
        assert {type(thing.words).__name__ for thing in picture.objects} <= {"ObjectWords", "TileWords"}


def test_a_seed_gives_one_board():
    for seed in range(20):
        first, second = boards.draw_board(seed), boards.draw_board(seed)
        assert first.image.tobytes() == second.image.tobytes()
        assert first.objects == second.objects
        assert boards.questions(first, 3) == boards.questions(second, 3)


def test_a_known_seed_gives_the_known_board():
    """Fixed for good: the same words on every Python and platform, or held-out splits would drift."""
    board = boards.draw_board(boards.TEST_SEEDS[0])
    assert boards.describe(board) == KNOWN_READING
    assert [tuple(question) for question in boards.questions(board)[:3]] == KNOWN_QUESTIONS


def test_every_grid_comes_up_and_the_picture_fits_it():
    drawn = [boards.draw_board(seed) for seed in range(100)]
    assert {(board.rows, board.columns) for board in drawn} == set(boards.GRIDS)
    for board in drawn:
        edges = (boards.MARGIN + boards.CELL * cells for cells in (board.columns, board.rows))
        assert board.image.size == tuple(edges)


@pytest.mark.parametrize("grid", [(1, 3), (3, 6)])
def test_a_grid_too_small_or_too_large_is_refused(grid):
    with pytest.raises(ValueError, match=f"2 to 5 rows and columns, got {grid[0]} and {grid[1]}"):
        boards.draw_board(0, grid)


@pytest.mark.parametrize("grid", [(2, 2), (5, 4), None])
def test_tiles_lie_in_their_own_cells_in_reading_order(grid):
    for seed in range(30):
        board = boards.draw_board(seed, grid)
        cells = [(tile.row, tile.column) for tile in board.objects]
        assert cells == [(row, column) for row in range(board.rows) for column in range(board.columns)]
        for tile in board.objects:
            left, top, right, bottom = ((edge - boards.MARGIN) // boards.CELL for edge in tile.box)
            assert (left, top, right, bottom) == (tile.column, tile.row, tile.column, tile.row)


def test_a_tile_shows_its_colour_and_dark_ink():
    """The corner of a tile is its colour, give or take; every digit leaves ink, and no two the same."""
    for seed in range(10):
        board = boards.draw_board(seed)
        for tile in board.objects:
            corner = board.image.getpixel(tile.box[:2])
            assert all(abs(a - b) <= 12 for a, b in zip(corner, boards.COLOURS[tile.colour], strict=True))
            inside = board.image.crop(tile.box)
            assert any(max(pixel) < 40 for _, pixel in inside.getcolors(inside.width * inside.height))


@pytest.mark.parametrize("seed", range(0, 50, 7))
def test_a_reading_parses_back_to_the_tiles(seed):
    board = boards.draw_board(seed)
    text = boards.describe(board)
    assert boards.parse_description(text) == {tile.words for tile in board.objects}
    assert boards.object_accuracy(text, board) == 1.0
    assert boards.object_accuracy("", board) == 0.0
    assert boards.wrong_objects(text, board) == set()
    assert boards.object_accuracy(text.upper().replace(",", " ,").replace(".", " ."), board) == 1.0


def test_marking_counts_shares_and_extras():
    board = boards.draw_board(boards.TEST_SEEDS[1])
    first, *others = board.objects
    digit = next(digit for digit in boards.DIGITS if digit != first.digit)
    changed = boards.describe(board).replace(f"reads {first.name}", f"reads {first.colour} {digit}", 1)
    assert boards.object_accuracy(changed, board) == len(others) / len(board.objects)
    assert boards.wrong_objects(changed, board) == {first.words._replace(digit=digit)}


def test_a_reading_cut_short_counts_what_it_holds():
    board = boards.draw_board(3)
    first_row = boards.describe(board).split(". ")[1]
    assert boards.object_accuracy(first_row, board) == board.columns / len(board.objects)
    assert boards.wrong_objects(first_row, board) == set()


def test_questions_have_the_right_answers():
    """Recomputed from the tiles by the words of the question alone."""
    asked = [(board, question) for board in map(boards.draw_board, range(100)) for question in boards.questions(board)]
    assert {question.kind for _, question in asked} == set(boards.QUESTION_KINDS)
    for board, question in asked:
        words = question.text.rstrip("?.").split()
        tiles = board.objects
        for axis in ("row", "column"):
            if axis in words:
                number = boards.DIGITS.index(words[words.index(axis) + 1]) - 1
                tiles = [tile for tile in tiles if getattr(tile, axis) == number]
        if question.kind == "colour by digit":
            tiles = [tile for tile in tiles if tile.digit == words[-1]]
        if question.kind == "digit by colour":
            tiles = [tile for tile in tiles if tile.colour == words[-2]]
        if question.kind not in ("row", "column"):
            assert len(tiles) == 1
        field = question.kind.split()[0]
        said = [getattr(tile, field if field in ("colour", "digit") else "name") for tile in tiles]
        assert question.answer == ", ".join(said)
        assert boards.answer_matches(f"{question.answer} .".upper(), question)
        assert not boards.answer_matches("nothing", question)
