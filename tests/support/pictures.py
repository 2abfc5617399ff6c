"""Image processors of many families at the size of the tiny models in zoo.py, and what each token of a picture sees.

The reference for the report's maps: paint one spot of a picture, and the image feature that changes most is the token
that lies there. Attention is taken out of the vision towers, so that a feature follows its own patch. Nothing here
knows how a family lays out its tokens.
"""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchFeature, Idefics3Processor, LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import zoo
from zoo_inputs import beside

EDGE, PATCH = 16, 4  # pixels, as zoo.py has them
SQUARE = {"height": EDGE, "width": EDGE}
PIXELS = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
IMAGE = 4  # id of the token that stands for a piece of an image


class ImagesOnly:
    """A processor as far as a real one can be had without torchvision: its image processor.

    The prompt gets as many image tokens as the model has features for them.
    """

    def __init__(self, image_processor, model, **options):
        self.image_processor, self._model, self._options = image_processor, model, options
        self.tokenizer = _tokenizer("<image>")

    def __call__(self, text, images, return_tensors):
        inputs = self.image_processor(images=images[0], return_tensors=return_tensors, **self._options)
        ids = torch.tensor([[5, 5, *[IMAGE] * len(features(self._model, inputs)), 5]])
        inputs = {name: inputs[name] for name in PIXELS if name in inputs} | {"input_ids": ids}
        return BatchFeature(inputs | beside(self._model.config.model_type, ids, ids > 0, (ids == IMAGE).long()))


def _llava(model):
    pictures = CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size=SQUARE)
    return LlavaProcessor(pictures, _tokenizer("<image>"), PATCH, "default", num_additional_image_tokens=1)


def _llava_next(model):
    pinpoints = model.config.image_grid_pinpoints
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": EDGE}, crop_size=SQUARE, image_grid_pinpoints=pinpoints
    )
    return LlavaNextProcessor(pictures, _tokenizer("<image>"), PATCH, "default", num_additional_image_tokens=1)


def _onevision(model):
    pinpoints = model.config.image_grid_pinpoints
    return ImagesOnly(LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=pinpoints), model)


def _qwen(model):
    vision = model.config.vision_config
    pictures = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=vision.spatial_merge_size, temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": 64, "longest_edge": 4096},
    )  # fmt: skip
    return ImagesOnly(pictures, model)


def _idefics3(model):
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokens = _tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places)
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 3 * EDGE}, max_image_size={"longest_edge": EDGE})
    return Idefics3Processor(pictures, tokens, image_seq_len=(EDGE // PATCH // model.config.scale_factor) ** 2)


def _mistral3(model):
    edge = PATCH * model.config.spatial_merge_size
    patch = {"height": edge, "width": edge}
    return ImagesOnly(PixtralImageProcessorPil(patch_size=patch, size={"longest_edge": 32}), model)


def _internvl(model):
    tiles = GotOcr2ImageProcessorPil(size=SQUARE, min_patches=1, max_patches=6)
    return ImagesOnly(tiles, model, crop_to_patches=True)


PROCESSORS = {
    "llava": _llava,
    "gemma3": lambda model: ImagesOnly(Gemma3ImageProcessorPil(size=SQUARE), model),
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "llava_next": _llava_next,
    "llava_onevision": _onevision,
    "mistral3": _mistral3,
    "idefics3": _idefics3,
    "internvl": _internvl,
}


def family(name):
    """A tiny model without attention in its vision tower, and its processor."""
    model = zoo.tiny(name)
    model.config.image_token_id = model.config.image_token_index = IMAGE
    for path, parameter in model.named_parameters():
        if "vision" in path and path.endswith(("o_proj.weight", "out_proj.weight", "attn.proj.weight")):
            parameter.data.zero_()
    return SimpleNamespace(name=name, model=model, processor=PROCESSORS[name](model))


def inputs_of(family, *pictures):
    """What the processor makes of a prompt with these pictures."""
    return family.processor(text=["<image>" * len(pictures) + " what"], images=[list(pictures)], return_tensors="pt")


def image_columns(family, inputs):
    """Where in the prompt image tokens stand."""
    return [column for column, token in enumerate(inputs["input_ids"][0].tolist()) if token == IMAGE]


def features(model, inputs):
    """The features of a prompt's pictures, one for each image token, in the order of the tokens."""
    owner = model if hasattr(model, "get_image_features") else model.model
    found = owner.get_image_features(**{name: inputs[name] for name in PIXELS if name in inputs})
    if not isinstance(found, (torch.Tensor, list, tuple)):
        found = found.last_hidden_state if found.pooler_output is None else found.pooler_output
    pieces = [found] if isinstance(found, torch.Tensor) else found
    return torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in pieces])


def painted(height, width, spot=None):
    """A grey picture, with a bright spot where one is given: top, left, bottom, right in parts of the picture."""
    pixels = np.full((height, width, 3), 60, dtype=np.uint8)
    if spot is not None:
        top, left, bottom, right = (part * edge for part, edge in zip(spot, (height, width) * 2, strict=True))
        rows, columns = (slice(round(a), max(round(b), round(a) + 1)) for a, b in ((top, bottom), (left, right)))
        pixels[rows, columns] = 230
    return Image.fromarray(pixels)


def _tokenizer(*special):
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *special]
    assert tokens[IMAGE] == special[0]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*tokens, "what"])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=list(special),
    )  # fmt: skip
