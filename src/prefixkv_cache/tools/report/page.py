"""From a `Report` to one HTML file that needs nothing else: no network, no library, no second file.

The template (page.html, page.css, maps.js, page.js) is part of the package. All that comes from a user or a model goes
in as JSON that cannot end its script element, and the script puts it on the page as text, never as markup.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from PIL import Image

from ..answer import Answer
from ..arguments import say_budget
from .collect import Picture, Pruned, Report

LONGEST_EDGE = 1280
"""Pixels; a larger picture is shown smaller. The maps are drawn in the browser, at this size or below."""
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def render_page(report: Report) -> str:
    """The whole page as text."""
    template = files("prefixkv_cache.tools.report")
    names = {"html": "page.html", "css": "page.css", "maps": "maps.js", "js": "page.js"}
    text = {part: template.joinpath(name).read_text(encoding="utf-8").strip() for part, name in names.items()}
    parts = text | {
        "title": html.escape(f"{report.model}: {report.prompt}"[:120]),
        "data": _json(_page_data(report)),
    }
    # In one pass: what is filled in may itself hold a {{name}}.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text["html"]) + "\n"


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
        "Maps and shares are of the prompt's end, before the first new token.",
        "tokens": ["" if i in hidden else text for i, text in enumerate(report.tokens)],
        "imageColumns": report.image_columns,
        "pictures": [_picture(picture) for picture in report.pictures],
        "layers": report.layers,
        "full": _answer(report.full),
        "budgets": [_cache(each, "", report) for each in reversed(report.pruned)],
        "others": [
            _cache(each, f", {report.beside.spell()}", report) for each in reversed(report.others) if report.beside
        ],
    }


def _cache(pruned: Pruned, method: str, report: Report) -> dict[str, Any]:
    return {
        "label": say_budget(pruned.budget) + method,
        "verdict": verdict(pruned, report.full),
        "ratio": pruned.ratio,
        "kept": _head_counts(pruned.kept, len(report.tokens)),
        "lengths": [[len(of_head) for of_head in heads] for heads in pruned.kept],
        "mass": [round(mass, 6) for mass in pruned.mass],
        **_answer(pruned.answer),
    }


def verdict(pruned: Pruned, full: Answer) -> str:
    """`the same answer, saves 42 %`, of the memory at the answer's end, or `differs from the third word on`."""
    words, others = pruned.answer.text.split(), full.text.split()
    if words == others:
        saved = 1 - pruned.answer.nbytes / full.nbytes
        return f"the same answer, saves {100 * saved:.0f} %" if saved >= 0.005 else "the same answer, saves nothing"
    pairs = enumerate(zip(words, others, strict=False))
    place = next((i for i, (one, other) in pairs if one != other), min(len(words), len(others)))
    return f"differs from {f'the {ORDINALS[place]} word' if place < len(ORDINALS) else f'word {place + 1}'} on"


def _answer(said: Answer) -> dict[str, Any]:
    return {"text": said.text, "nTokens": said.n_tokens, "nbytes": [said.prompt_nbytes, said.nbytes]}


def _facts(report: Report) -> str:
    layers = f"{len(report.layers)} layers"
    if report.n_whole:
        layers += f" pruned, {report.n_whole} left whole"
    source = f"the profile {report.source}" if report.source else report.method.lengths.lengths
    image = f"{len(report.tokens)} prompt tokens, {len(report.image_columns)} of them image"
    return " \u00b7 ".join((report.model, image, layers, f"method: {report.method.spell()}", f"lengths: {source}"))


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


def _head_counts(kept: list[list[list[int]]], n_tokens: int) -> str:
    """By layer and token, how many of the layer's key heads keep it, a byte each; base64."""
    counts = bytearray(len(kept) * n_tokens)
    for layer, heads in enumerate(kept):
        for column in (column for columns in heads for column in columns):
            counts[layer * n_tokens + column] += 1
    return base64.b64encode(counts).decode()
