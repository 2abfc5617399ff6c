"""What the package draws by itself to evaluate on. Names only: `--help` imports no torch."""

DRAWN = {"scenes": "draw_scene", "boards": "draw_board", "pages": "draw_page"}
"""Tasks that the package draws itself: the module of `tools.demo`, and what draws one picture from a seed."""
TASKS = ("descriptions", "questions")
SPLITS = ("validation", "test")
