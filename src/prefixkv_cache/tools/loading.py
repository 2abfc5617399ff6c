"""A path or hub id in, model and processor out; prompts and pictures in, what `model(**inputs)` takes out.

The one way in which every command loads a model: transformers' Auto classes and the processor's chat template. Knows
nothing of caches.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadError(ValueError):
    """A model, processor or picture that cannot be loaded; the message names it and says why."""


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Load a model of the image-text-to-text kind, or one of text alone, and its processor, ready to generate.

    Args:
        name: folder, or id on the hub.
        dtype: `"auto"` (as saved; float32 on a CPU that would have to emulate half precision), or a key of `DTYPES`.
        device: where to put the whole model; None: a GPU if there is one.
        device_map: instead of `device`: transformers' own spreading (needs accelerate), such as `"auto"`.
        attn_implementation: transformers' name of the attention backend; None: the model's default.

    Returns:
        (model in eval mode, processor; of a model of text alone its tokenizer)

    Raises:
        LoadError: there is no such model, it is not of this kind, or some of its weights are not there.
    """
    if not os.path.isdir(name) and name.count("/") != 1:
        raise LoadError(f"cannot load {name!r}: there is no such folder, and an id on the hub reads owner/name")
    import transformers
    from transformers import AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar for each file, between the lines of our own report
    if device is None:
        device = "cpu" if device_map == "cpu" or not torch.cuda.is_available() else "cuda"
    elif device_map is not None:
        raise LoadError(f"--device {device} and --device-map {device_map} both say where the model goes; give one")
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if dtype == "auto" and device == "cpu":
        # Half-precision arithmetic is slow or missing on most CPUs; the weights are the same numbers.
        options["dtype"] = torch.float32
    if device_map is not None:
        if importlib.util.find_spec("accelerate") is None:
            cure = "pip install '.[calibrate]' in a checkout, 'prefixkv-cache[calibrate]' elsewhere"
            raise LoadError(f"--device-map needs accelerate: {cure}")
        options["device_map"] = device_map
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        processor = AutoProcessor.from_pretrained(name)
        model, found = _auto_class(name).from_pretrained(name, output_loading_info=True, **options)
        if device_map is None:
            model.to(device)
    except LoadError:
        raise
    except Exception as error:  # files of others, read by code of others: anything may come
        raise LoadError(f"cannot load {name!r} as an image-text-to-text model: {_first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise LoadError(
            f"{name!r} lacks {len(missing)} weights of its model, such as {missing[0]!r}: this release of transformers "
            f"({transformers.__version__}) does not know the layout in which it was saved"
        )
    return model.eval(), processor


def _auto_class(name: str) -> Any:
    """The Auto class of a model: with pictures where it can, of text where transformers knows it as such alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    kind = AutoConfig.from_pretrained(name).model_type
    sees = kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    reads = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if reads and not sees else AutoModelForImageTextToText


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture whole, as RGB.

    Raises:
        LoadError: there is no such file, or it is no picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise LoadError(f"there is no image {os.fspath(path)!r}") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise LoadError(f"cannot read {os.fspath(path)!r} as an image: {_first_line(error)}") from None


def chat_text(processor: Any, prompt: str, n_images: int = 1) -> str:
    """The prompt as the model was trained to see it: by the processor's chat template, images before the text.

    A processor without a template gets its image tokens and the prompt, a line each.
    """
    if getattr(processor, "chat_template", None):
        try:
            return _templated(processor, [("user", prompt, n_images)], add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's makers
            raise LoadError(f"the model's chat template failed: {_first_line(error)}") from error
    return "".join(f"{getattr(processor, 'image_token', '<image>')}\n" for _ in range(n_images)) + prompt


def _templated(processor: Any, turns: Sequence[tuple[str, str, int]], **options: Any) -> str:
    """What the template makes of (role, text, pictures before it); one of a model of text alone takes strings."""
    reads_text = not hasattr(processor, "tokenizer")
    messages = [
        {"role": role, "content": text if reads_text else [{"type": "image"}] * n + [{"type": "text", "text": text}]}
        for role, text, n in turns
    ]
    return processor.apply_chat_template(messages, tokenize=False, **options)


def answer_ids(processor: Any, prompt: str, answer: str, n_images: int = 1) -> list[int]:
    """The tokens with which the model would say this answer to this prompt, without an end-of-text token.

    Between prompt and answer stands what the chat template puts there; a space, where the template does not tell and
    the prompt does not end in one.

    Args:
        processor: of the model.
        prompt: what the user says.
        answer: not empty.
        n_images: pictures before the prompt.

    Raises:
        LoadError: the answer has no tokens.
    """
    asked, answer = chat_text(processor, prompt, n_images), answer.strip()
    said = asked + _separator(processor, prompt, answer, n_images, asked) + answer
    tokenizer = getattr(processor, "tokenizer", processor)
    before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, said))
    if whole[: len(before)] == before:
        ids = list(whole[len(before) :])
    else:  # the first token of the answer would reach back into the prompt
        ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if not ids:
        raise LoadError(f"the answer {answer!r} to {prompt!r} has no tokens")
    return ids


def _separator(processor: Any, prompt: str, answer: str, n_images: int, asked: str) -> str:
    if getattr(processor, "chat_template", None):
        try:
            whole = _templated(processor, [("user", prompt, n_images), ("assistant", answer, 0)])
        except Exception:  # a template may refuse to write for the assistant
            whole = ""
        if whole.startswith(asked) and answer in whole:
            between = whole[len(asked) : whole.index(answer, len(asked))]
            if not between.strip():
                return between
    return "" if asked[-1:].isspace() else " "


def prepare(processor: Any, requests: Sequence[tuple[str, Sequence[Image.Image]]], device: Any = None) -> Any:
    """What `model(**inputs)` and `model.generate(**inputs)` take, one row a request, padded on the left.

    Args:
        processor: of the model.
        requests: (prompt, pictures) for each row.
        device: where the tensors shall be.
    """
    texts = [chat_text(processor, prompt, len(pictures)) for prompt, pictures in requests]
    return prepare_texts(processor, texts, [list(of_row) for _, of_row in requests], device)


def prepare_texts(
    processor: Any, texts: Sequence[str], pictures: Sequence[list[Image.Image]], device: Any = None
) -> Any:
    """The same, of texts that the chat template has written."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if len(texts) > 1:
        tokenizer.padding_side = "left"
    options: dict[str, Any] = {"padding": True} if len(texts) > 1 else {}
    if tokenizer is not processor:
        options["images"] = pictures if any(pictures) else None
    elif any(pictures):
        raise LoadError("this model reads text only; leave the picture out")
    inputs = processor(text=list(texts), return_tensors="pt", **options)
    return inputs.to(device) if device is not None else inputs


def image_positions(inputs: Any, config: Any) -> list[list[int]]:
    """The columns of `input_ids` that hold image tokens, for each row; empty lists where the config names none."""
    token = getattr(config, "image_token_id", None)
    if token is None:
        token = getattr(config, "image_token_index", None)
    return [[] if token is None else (row == token).nonzero().flatten().tolist() for row in inputs["input_ids"]]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
