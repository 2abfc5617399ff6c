"""The demo: questions about a drawn scene, answered with the full cache and with pruned ones.

Loads the bundled model as any other (`loading.py`), draws the scene (`scenes.py`), prints a table, and writes a picture
of what was kept (`picture.py`).
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ...cache.cache import PrefixKVCache
from ...methods import PREFIXKV, Method
from ...profiles.bundled import bundled_dir
from ..answer import Answer, answer, kept_columns
from ..arguments import out_path, write_out
from ..loading import image_positions, load_model, prepare
from . import scenes
from .picture import KeptMap, draw_kept

MODEL = "scene-llava"
BUDGETS = (0.5, 0.2, 0.1)
MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class Setting:
    """One row of the table: a name, a budget, and a function that makes an empty cache for some inputs."""

    name: str
    budget: float
    make: Callable[[Any], Cache]


@dataclass(frozen=True)
class Request:
    """A prompt about a scene, ready for the model; `truth` is None where the whole scene is to be described."""

    prompt: str
    truth: str | None
    scene: scenes.Scene
    inputs: Any


def run_demo(seed: int, out: str, model_name: str | None = None, method: str | None = None, threads: int = 1) -> None:
    """Run the demo: table on standard output, picture in the file `out`.

    Args:
        seed: of the scene.
        out: PNG file; its folder is made if there is none.
        model_name: folder of a model trained on the scenes; None: the bundled one.
        method: spelling of one more method to compare with.
        threads: CPU threads for torch. The model is so small that a second one mostly waits for the first.

    Raises:
        FileNotFoundError: the bundled model is not part of this installation.
        ValueError: no such method, or a picture's name that does not end in .png.
    """
    torch.set_num_threads(threads)
    target = out_path(out, "a picture", ".png")
    more = None if method is None else Method.parse(method)
    folder = Path(model_name) if model_name else bundled_dir("models") / MODEL
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {str(folder)!r}; make one with examples/train_scene_vlm.py")
    started = time.perf_counter()
    model, processor = load_model(str(folder))
    scene = scenes.draw_scene(seed)
    print(f"scene {seed}: {len(scene.objects)} objects; model {folder.name}, loaded in {_since(started)}")

    requests = list(_requests(model, processor, scene, seed))
    settings = list(_settings(model, more))
    for request in requests:
        results = [
            answer(model, processor, request.inputs, each.make(request.inputs), MAX_NEW_TOKENS) for each in settings
        ]
        ends = [
            _bytes_at(results[0].n_tokens, model, processor, request, *pair)
            for pair in zip(settings, results, strict=True)
        ]
        _print_table(request, settings, results, ends)
    content = io.BytesIO()
    _picture(model, processor, requests[0], settings[1:]).save(content, format="PNG")
    write_out(target, content.getvalue())
    print(f"\nwhat was kept: {target} ({_since(started)} in all)")


def _settings(model: Any, more: Method | None) -> Iterator[Setting]:
    """The full cache; the default, with the model's measured profile if there is one; the paper; one more method."""
    yield Setting("full cache", 1.0, lambda inputs: DynamicCache(config=model.config))
    name = "default, profile" if PrefixKVCache.for_model(model).profile else "default"
    for budget in BUDGETS:  # defaults of arguments bind the loop's values
        yield Setting(name, budget, lambda inputs, budget=budget: PrefixKVCache.for_model(model, budget, inputs=inputs))
    for method, budgets in ((PREFIXKV, BUDGETS[:2]), (more, BUDGETS)):
        for budget in budgets if method else ():

            def make(inputs: Any, budget: float = budget, method: Method | None = method) -> Cache:
                return PrefixKVCache(None, budget, method=method, config=model.config)

            yield Setting("the paper" if method is PREFIXKV else f"{method and method.spell()}", budget, make)


def _requests(model: Any, processor: Any, scene: scenes.Scene, seed: int) -> Iterator[Request]:
    """The description, and two questions of different kinds, always the same ones for a scene."""
    found: dict[str, scenes.Question] = {}
    for question in scenes.questions(scene, seed):
        found.setdefault(question.kind, question)
    short = [found[kind] for kind in ("object", "colour", "count", "place") if kind in found][:2]
    for text, truth in [(scenes.DESCRIBE_PROMPTS[0], None), *((each.text, each.answer) for each in short)]:
        yield Request(text, truth, scene, prepare(processor, [(text, [scene.image])], model.device))


def _bytes_at(n_tokens: int, model: Any, processor: Any, request: Request, setting: Setting, result: Answer) -> int:
    """KV bytes after so many new tokens: answers differ in length, and a longer one holds more pairs."""
    if result.n_tokens != n_tokens:
        cache = setting.make(request.inputs)
        result = answer(model, processor, request.inputs, cache, n_tokens, min_new_tokens=n_tokens)
    return result.nbytes


def _print_table(request: Request, settings: Sequence[Setting], results: Sequence[Answer], ends: Sequence[int]) -> None:
    full = results[0]
    print(f"\n> {request.prompt}" + (f"   (truth: {request.truth})" if request.truth else ""))
    print(f"KV KiB at the prompt's end, and {full.n_tokens} tokens later, where the full cache's answer ends")
    print(f"{'cache':<18}{'keeps':>6}{'prompt':>9}{'answer':>9}")
    for setting, result, end in zip(settings, results, ends, strict=True):
        sizes = f"{result.prompt_nbytes / 1024:>9.0f}{end / 1024:>9.0f}"
        print(f"{setting.name:<18}{setting.budget:>6.0%}{sizes}   {_verdict(request, result, full)}")
        if result is full or result.text != full.text:
            print(f"    {result.text}")


def _verdict(request: Request, result: Answer, full: Answer) -> str:
    """Whether the answer is the full cache's, and what it says that is not so."""
    same = "" if result is full else "the same answer" if result.text == full.text else "another answer"
    if request.truth is None:
        invented = scenes.wrong_objects(result.text, request.scene)
        names = "; ".join(sorted(f"{each.size} {each.colour} {each.shape} at the {each.place}" for each in invented))
        right = f"{scenes.object_accuracy(result.text, request.scene):.0%} of the objects right"
        said = [same, right, f"invented: {names}" if names else "nothing invented"]
    else:
        said = [same, "right" if result.text.rstrip(".") == request.truth.rstrip(".") else "wrong"]
    return ", ".join(filter(None, said))


def _picture(model: Any, processor: Any, request: Request, settings: Sequence[Setting]) -> Any:
    patches = image_positions(request.inputs, model.config)[0]
    side = round(len(patches) ** 0.5)
    if side * side != len(patches):
        raise ValueError(f"the image's {len(patches)} tokens are no square grid, so there is no map to draw")
    maps = []
    for setting in settings:
        cache = setting.make(request.inputs)
        # One new token comes out of the prompt's own forward: nothing has been decoded, or evicted, yet.
        result = answer(model, processor, request.inputs, cache, 1)
        assert isinstance(cache, PrefixKVCache)
        kept = [[set(of_head) for of_head in kept_columns(cache, layer)] for layer in range(len(cache))]
        shares = [[sum(patch in own for own in heads) / len(heads) for patch in patches] for heads in kept]
        maps.append(KeptMap((setting.name, f"keeps {setting.budget:.0%}"), shares, result.stored))
    length = request.inputs["input_ids"].shape[1]
    caption = (
        f'"{request.prompt}"',
        f"{length} prompt tokens, {len(patches)} of them image",
        "bright: kept; dark: pruned",
    )
    return draw_kept(request.scene.image, side, maps, caption)


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.1f} s"
