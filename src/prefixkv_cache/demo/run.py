"""`prefixkv demo`: questions about a drawn scene, answered with the full cache and with pruned ones.

The bundled model is loaded through the same code as any other model (loading.py), and pruned by the same cache. Draws
the scene (scenes.py), prints a table, and writes a picture of what was kept (picture.py).
"""

from __future__ import annotations

import difflib
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..bundled import bundled_dir
from ..cache import PAPER, PrefixKVCache
from ..generate import Answer, answer
from ..loading import image_positions, load_model, prepare
from ..profile import PrefixProfile
from . import scenes
from .picture import KeptMap, draw_kept

MODEL = "scene-llava"
BUDGETS = (0.5, 0.2, 0.1)
MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class Setting:
    """One row of the table: a name, and a function that makes an empty cache."""

    name: str
    budget: float
    make: Callable[[], Cache]


def run_demo(seed: int, out: str, model_name: str | None = None, threads: int = 1) -> None:
    """Run the demo: table on standard output, picture in the file `out`.

    Args:
        seed: of the scene.
        out: PNG file; its folder is made if there is none.
        model_name: folder of a model trained on the scenes; None: the bundled one.
        threads: CPU threads for torch. The model is so small that a second one mostly waits for the first.

    Raises:
        FileNotFoundError: the bundled model is not part of this installation.
    """
    if threads < 1:
        raise ValueError(f"--threads must be at least 1; got {threads}")
    torch.set_num_threads(threads)
    target = Path(out)
    if target.suffix.lower() != ".png":
        raise ValueError(f"--out must be a .png file; got {out!r}")
    folder = Path(model_name) if model_name else bundled_dir("models") / MODEL
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {str(folder)!r}; make one with examples/train_scene_vlm.py")
    started = time.perf_counter()
    model, processor = load_model(str(folder))
    scene = scenes.draw_scene(seed)
    print(f"scene {seed}: {len(scene.objects)} objects; model {folder.name}, loaded in {_since(started)}")

    settings = list(_settings(model))
    prompts = [scenes.DESCRIBE_PROMPTS[0], *(question.text for question in _short_questions(scene, seed))]
    truths = [None, *(question.answer for question in _short_questions(scene, seed))]
    # The first call of a process pays for set-up that is not the full cache's fault.
    answer(model, processor, prepare(processor, [(prompts[0], [scene.image])], model.device), settings[0].make(), 3)
    for prompt, truth in zip(prompts, truths, strict=True):
        inputs = prepare(processor, [(prompt, [scene.image])], model.device)
        results = [answer(model, processor, inputs, setting.make(), MAX_NEW_TOKENS) for setting in settings]
        _print_table(prompt, truth, scene, settings, results)
    _save(_picture(model, processor, scene, prompts[0], settings), target)
    print(f"\nwhat was kept: {target} ({_since(started)} in all)", file=sys.stdout)


def _settings(model: Any) -> list[Setting]:
    """The full cache; for each budget the bundled profile if there is one, the search on the prompt, and the paper."""
    settings = [Setting("full cache (DynamicCache)", 1.0, lambda: DynamicCache(config=model.config))]
    variants: list[tuple[str, Mapping[str, Any]]] = []
    if MODEL in PrefixProfile.available():
        variants.append(("profile", {"profile": MODEL}))
    variants += [("search", {"profile": None}), ("the paper's rule", PAPER)]
    for name, options in variants:
        for budget in BUDGETS:
            # Defaults bind the loop's values; a closure would see the last ones only.
            def make(budget: float = budget, options: Mapping[str, Any] = options) -> Cache:
                return PrefixKVCache(budget=budget, config=model.config, **options)

            settings.append(Setting(name, budget, make))
    return settings


def _short_questions(scene: scenes.Scene, seed: int) -> Sequence[scenes.Question]:
    """Two questions of different kinds, always the same ones for a scene."""
    found: dict[str, scenes.Question] = {}
    for question in scenes.questions(scene, seed):
        found.setdefault(question.kind, question)
    return [found[kind] for kind in ("object", "colour", "count", "place") if kind in found][:2]


def agreement(text: str, reference: str) -> float:
    """Share of words that two answers have in common, in order: 2 * matches / all words (difflib's ratio)."""
    return difflib.SequenceMatcher(None, text.split(), reference.split(), autojunk=False).ratio()


def _print_table(
    prompt: str, truth: str | None, scene: scenes.Scene, settings: Sequence[Setting], results: Sequence[Answer]
) -> None:
    full = results[0]
    print(f"\n> {prompt}" + (f"   (truth: {truth})" if truth else ""))
    print(f"{'cache':<26}{'budget':>7}{'agrees':>8}{'KV KiB':>9}{'s':>7}  pairs stored, by layer")
    for setting, result in zip(settings, results, strict=True):
        pairs = " ".join(f"{stored:>3}" for stored in result.stored)
        numbers = f"{setting.budget:>7g}{agreement(result.text, full.text):>8.2f}{result.nbytes / 1024:>9.0f}"
        print(f"{setting.name:<26}{numbers}{result.seconds:>7.2f}  {pairs}")
        right = "" if truth else f" [{scenes.object_accuracy(result.text, scene):.0%} of the objects right]"
        same = result is not full and result.text == full.text
        print(f"    {'(the same answer)' if same else result.text}{right}")


def _picture(model: Any, processor: Any, scene: scenes.Scene, prompt: str, settings: Sequence[Setting]) -> Any:
    inputs = prepare(processor, [(prompt, [scene.image])], model.device)
    patches = image_positions(inputs, model.config)[0]
    maps = []
    for setting in settings[1:]:
        cache = setting.make()
        # One new token comes out of the prompt's own forward: nothing has been decoded, or evicted, yet.
        answer(model, processor, inputs, cache, 1)
        assert isinstance(cache, PrefixKVCache)
        kept = [set(cache.kept_positions(layer)[0].tolist()) for layer in range(len(cache))]
        layers = [[patch in of_layer for patch in patches] for of_layer in kept]
        maps.append(KeptMap((setting.name, f"budget {setting.budget:g}"), layers, cache.stored_lengths()))
    side = round(len(patches) ** 0.5)
    if side * side != len(patches):
        raise ValueError(f"the image's {len(patches)} tokens are no square grid, so there is no map to draw")
    length = inputs["input_ids"].shape[1]
    caption = (f'"{prompt}"', f"{length} prompt tokens, {len(patches)} of them image", "bright: kept; dark: pruned")
    return draw_kept(scene.image, side, maps, caption)


def _save(picture: Any, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".prefixkv-{uuid.uuid4().hex}.tmp"
    try:
        picture.save(temporary, format="PNG")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.1f} s"
