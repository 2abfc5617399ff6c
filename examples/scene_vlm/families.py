"""What the models are made of: for each family its processor, its random weights, and how a picture goes into it.

A family knows its task's texts and sizes of pictures, and nothing of training.
"""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaddleOCRVLProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from scene_vlm.language import USER, build_tokenizer, chat_template
from scene_vlm.tasks import Picture, Scenes, Task

MAX_NEW_TOKENS = 112
Grid = tuple[int, int]  # rows and columns of the image tokens


class Family:
    """One architecture, made for one task.

    `marks` are its special tokens, `image` the one that each image token replaces, and `before` and `after` what
    stands around them; `axes` is how many position numbers a token has.
    """

    marks: tuple[str, ...]
    image: str
    before = ""
    after = ""
    axes = 1

    def __init__(self, task: Task) -> None:
        self.task = task

    def build_processor(self) -> ProcessorMixin:
        raise NotImplementedError

    def build_model(self, tokenizer) -> PreTrainedModel:
        """The architecture, with random weights."""
        raise NotImplementedError

    def prepare(self, model) -> None:
        """Change how a model computes, not what, where training is quicker for it."""

    def pixels(self, pictures: list[Picture]) -> torch.Tensor:
        """What the image processor gives for pictures of one size (the run checks that), at a fraction of the time."""
        raise NotImplementedError

    def features(self, model, pixel_values: torch.Tensor, grid: Grid) -> torch.Tensor:
        """[batch, image tokens, hidden]: the image tokens as the decoder gets them."""
        raise NotImplementedError

    def positions(self, start: int, grid: Grid) -> tuple[list[list[int]], int]:
        """Positions of the image tokens on each axis, if the first is `start`, and that of the token behind them."""
        raise NotImplementedError

    def prompt_positions(self, model, inputs) -> torch.Tensor:
        """[axes, tokens]: the positions that the model itself gives to the processor's only row."""
        raise NotImplementedError

    def opening(self) -> str:
        """What stands in front of the image tokens."""
        return f"<bos>{USER}{self.before}"

    def template(self) -> str:
        return chat_template(f"{self.before}{self.image}{self.after}")


def normalised(pictures: list[Picture]) -> torch.Tensor:
    """[batch, 3, height, width], from -1 to 1."""
    width, height = pictures[0].image.size
    raw = torch.frombuffer(bytearray(b"".join(each.image.tobytes() for each in pictures)), dtype=torch.uint8)
    return (raw.view(len(pictures), height, width, 3).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def special_ids(tokenizer) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


class Llava(Family):
    """A CLIP vision tower, a projector and a Llama decoder; pictures of one size."""

    marks = ("<image>",)
    image = "<image>"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if not isinstance(task, Scenes):
            raise ValueError("this LLaVA sees pictures of one size only: train it on 'scenes', not on 'boards'")
        self.image_size = task.module.IMAGE_SIZE
        self.image_tokens = (self.image_size // task.token_pixels) ** 2

    def build_processor(self) -> LlavaProcessor:
        """Word-level tokenizer and CLIP image processor."""
        pictures = CLIPImageProcessorPil(
            size={"shortest_edge": self.image_size},
            crop_size={"height": self.image_size, "width": self.image_size},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        return LlavaProcessor(
            image_processor=pictures,
            tokenizer=build_tokenizer(self.task.texts(), self.marks),
            patch_size=self.task.token_pixels,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,  # the tower's CLS token, which "default" takes off again
            chat_template=self.template(),
        )

    def build_model(self, tokenizer) -> LlavaForConditionalGeneration:
        ids = special_ids(tokenizer)
        vision = CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=self.image_size,
            patch_size=self.task.token_pixels,
            projection_dim=128,
        )
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            **ids,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids(self.image),
            image_seq_length=self.image_tokens,
            vision_feature_layer=-1,  # the tower is ours, so its last layer is the useful one
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
            **ids,
        )
        model = LlavaForConditionalGeneration(config)
        model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **ids)
        return model

    def pixels(self, pictures: list[Picture]) -> torch.Tensor:
        return normalised(pictures)

    def features(self, model, pixel_values: torch.Tensor, grid: Grid) -> torch.Tensor:
        return torch.stack(list(model.model.get_image_features(pixel_values).pooler_output))

    def positions(self, start: int, grid: Grid) -> tuple[list[list[int]], int]:
        end = start + grid[0] * grid[1]
        return [list(range(start, end))], end

    def prompt_positions(self, model, inputs) -> torch.Tensor:
        return torch.arange(inputs["input_ids"].shape[1])[None]


class Qwen2VL(Family):
    """A vision tower with rotary positions, a 2 x 2 merger and a decoder with M-RoPE; pictures of any size.

    Its processor is not `Qwen2VLProcessor`, which cannot be made without a video processor, hence not without
    torchvision, but PaddleOCR-VL's, which does the same to pictures and text and knows no video.
    """

    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    names = ("image", "video", "vision_start", "vision_end")
    image, before, after = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
    axes = 3
    merge = 2
    frames = 2  # a still picture goes in twice, as in every Qwen2-VL

    @property
    def patch(self) -> int:
        return self.task.token_pixels // self.merge

    def build_processor(self) -> PaddleOCRVLProcessor:
        """Word-level tokenizer and Qwen2-VL's image processor, which leaves pictures of whole tokens as they are."""
        edge = self.task.token_pixels
        pictures = Qwen2VLImageProcessorPil(
            patch_size=self.patch,
            merge_size=self.merge,
            temporal_patch_size=self.frames,
            size={"shortest_edge": (4 * edge) ** 2, "longest_edge": (24 * edge) ** 2},  # fewest and most pixels
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        tokenizer = build_tokenizer(self.task.texts(), self.marks, [f"{name}_token" for name in self.names])
        return PaddleOCRVLProcessor(pictures, tokenizer, chat_template=self.template())

    def build_model(self, tokenizer) -> Qwen2VLForConditionalGeneration:
        ids = special_ids(tokenizer)
        marks = dict(zip(self.names, self.marks, strict=True))
        config = Qwen2VLConfig(
            vision_config={
                "depth": 3,
                "embed_dim": 96,
                "hidden_size": 128,
                "num_heads": 4,
                "mlp_ratio": 4,
                "patch_size": self.patch,
                "spatial_merge_size": self.merge,
                "temporal_patch_size": self.frames,
            },
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 128,
                "intermediate_size": 352,
                "num_hidden_layers": 8,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "rope_parameters": {"rope_type": "default", "rope_theta": 40.0, "mrope_section": [4, 6, 6]},
                **ids,
            },
            tie_word_embeddings=False,
            **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()},
            **ids,
        )
        model = Qwen2VLForConditionalGeneration(config)
        model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **ids)
        return model

    def prepare(self, model) -> None:
        """On a CPU the plain product of matrices beats the fused attention on the way back."""
        if model.device.type == "cpu":
            model.model.visual.set_attn_implementation("eager")

    def pixels(self, pictures: list[Picture]) -> torch.Tensor:
        """[batch, patches, values]: patch after patch, the four of each image token together."""
        images = normalised(pictures)
        patches = images.unflatten(3, (-1, self.merge, self.patch)).unflatten(2, (-1, self.merge, self.patch))
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
        repeats = [1] * 6 + [self.frames, 1, 1]
        return patches.repeat(repeats).flatten(5).flatten(1, 4)

    def features(self, model, pixel_values: torch.Tensor, grid: Grid) -> torch.Tensor:
        whole = torch.tensor([[1, grid[0] * self.merge, grid[1] * self.merge]] * len(pixel_values))
        found = model.model.get_image_features(pixel_values.flatten(0, 1), whole.to(pixel_values.device))
        return torch.stack(list(found.pooler_output))

    def positions(self, start: int, grid: Grid) -> tuple[list[list[int]], int]:
        """Time, height and width: all begin at `start`, and the text goes on behind the longer edge."""
        rows, columns = grid
        height = [start + row for row in range(rows) for _ in range(columns)]
        width = [start + column for column in range(columns)] * rows
        return [[start] * (rows * columns), height, width], start + max(grid)

    def prompt_positions(self, model, inputs) -> torch.Tensor:
        found, _ = model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
        )
        return found[:, 0]


FAMILIES = {"llava": Llava, "qwen2-vl": Qwen2VL}
