"""From a `Report` to one HTML file that needs nothing else: no network, no library, no second file.

The template (page.html, page.css, page.js) is part of the package. All that comes from a user or a model goes in as
JSON that cannot end its script element, and the script puts it on the page as text, never as markup.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
import uuid
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..calibrated_for import plain_ranking, spell_ranking
from .collect import Picture, Report

LONGEST_EDGE = 1280
"""Pixels; a larger picture is shown smaller. The maps are drawn in the browser, at this size or below."""
N_POINTS = 96
"""Points of a curve; they lie closer where few keys are kept."""


def render_page(report: Report) -> str:
    """The whole page as text."""
    template = files("prefixkv_cache.report")
    text = {name: template.joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    parts = {
        "title": html.escape(f"{report.model}: {report.prompt}"[:120]),
        "css": text["css"].strip(),
        "js": text["js"].strip(),
        "data": _json(_page_data(report)),
    }
    # In one pass: what is filled in may itself hold a {{name}}.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text["html"])


def write_page(report: Report, out: str | os.PathLike[str]) -> None:
    """Write the page in one step: a reader sees the whole of it, or what was there before."""
    path = Path(out)
    temporary = path.with_name(f".prefixkv-{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(render_page(report), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _json(data: Any) -> str:
    """JSON for a script element: no `<` of its text can open or close anything."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page_data(report: Report) -> dict[str, Any]:
    hidden = set(report.image_columns)
    return {
        "prompt": report.prompt,
        "facts": _facts(report),
        "footer": f"Made by prefixkv report, prefixkv-cache {version('prefixkv-cache')}. "
        "Maps and shares are of the moment after the prompt, before the first new token.",
        "tokens": ["" if i in hidden else text for i, text in enumerate(report.tokens)],
        "imageColumns": report.image_columns,
        "pictures": [_picture(picture) for picture in report.pictures],
        "layers": report.layers,
        "curves": _curves(report),
        "full": {"text": report.full.text, "nTokens": report.full.n_tokens, "nbytes": report.full_bytes},
        "budgets": [
            {
                "budget": each.budget,
                "threshold": each.threshold,
                "kept": _bits(each.kept, len(report.tokens)),
                "mass": [round(mass, 6) for mass in each.mass],
                "missed": [float(f"{missed:.4g}") for missed in each.missed],
                "nbytes": each.nbytes,
                "text": each.answer.text,
                "nTokens": each.answer.n_tokens,
                "agrees": each.agrees,
            }
            for each in sorted(report.pruned, key=lambda each: each.budget)
        ],
    }


def _facts(report: Report) -> str:
    queries = report.ranking.queries
    whose = f"{queries} prompt tokens" if isinstance(queries, str) else f"the last {queries} prompt tokens"
    _, *others = spell_ranking(report.ranking).replace(":", "").split(", ")
    ranked = ", ".join((f"keys ranked by the attention of {whose}", *others))
    layers = f"{len(report.layers)} layers"
    if report.n_whole:
        layers += f" pruned, {report.n_whole} left whole"
    source = f"lengths from the profile {report.source}" if report.source else "lengths searched on this prompt"
    image = f"{len(report.tokens)} prompt tokens, {len(report.image_columns)} of them image"
    return " \u00b7 ".join((report.model, image, layers, source, ranked))


def _picture(picture: Picture) -> dict[str, Any]:
    tokens = picture.tokens
    return {
        "name": picture.name,
        "source": _data_uri(picture.image),
        "columns": list(tokens.columns) if tokens else [],
        "views": [
            {"name": view.name, "rows": view.rows, "columns": view.columns, "tokens": list(view.tokens)}
            for view in (tokens.views if tokens else [])
        ],
    }


def _data_uri(image: Image.Image) -> str:
    """PNG for drawings, JPEG for photographs: whichever is smaller."""
    image = image.convert("RGB")
    image.thumbnail((LONGEST_EDGE, LONGEST_EDGE))
    encoded: list[tuple[int, str, bytes]] = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        encoded.append((buffer.tell(), kind, buffer.getvalue()))
    _, kind, content = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _bits(kept: list[list[int]], n_tokens: int) -> str:
    """A bit for each layer and token, one layer after the other, the first token in the highest bit; base64."""
    marks = np.zeros((len(kept), n_tokens), dtype=bool)
    for layer, columns in enumerate(kept):
        marks[layer, columns] = True
    return base64.b64encode(np.packbits(marks).tobytes()).decode()


def _curves(report: Report) -> list[dict[str, Any]]:
    """One or two sets of lines, a line for each layer: what its best keys hold together, by how many they are.

    First what ranked the keys; where that was more than attention, on a logarithmic scale of what is left out, since a
    discount of repetition leaves almost all of the score to a few keys. Then the attention, unless that was the first.
    """
    attention = _lines("attention", report.importance, 0)
    if report.ranking == plain_ranking(report.ranking.queries):
        return [attention]
    smallest = min([1.0, *(missed for each in report.pruned for missed in each.missed if missed > 0)])
    decades = 4 * min(max(math.ceil(-math.log10(smallest) / 4), 1), 4)
    return [_lines("score", report.scores, decades), attention]


def _lines(of: str, shares: torch.Tensor, decades: int) -> dict[str, Any]:
    """Heights of the lines at numbers of keys that lie closer near 0.

    They are 16-bit integers, low byte first, one layer after the other, in base64. Without decades 65535 stands for all
    the mass and 0 for none; with them 65535 for all of it left out, and 0 for a share of 10 to the minus `decades`.
    """
    n_keys = shares.shape[1]
    counts = sorted({round(n_keys * (point / (N_POINTS - 1)) ** 2) for point in range(N_POINTS)})
    # From the smallest up, so that what a few keys leave over is more than a rounding error.
    left = shares.double().sort(1).values.cumsum(1).flip(1)
    left = torch.nn.functional.pad(left / left[:, :1].clamp_min(torch.finfo(torch.float64).tiny), (0, 1))[:, counts]
    heights = 1 + left.clamp_min(1e-99).log10() / decades if decades else 1 - left
    levels = (heights.clamp(0, 1) * 65535).round().to(torch.int64).numpy().astype("<u2")
    return {
        "of": of,
        "decades": decades,
        "x": [round(count / n_keys, 6) for count in counts],
        "heights": base64.b64encode(levels.tobytes()).decode(),
    }
