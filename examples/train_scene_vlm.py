"""Train a small LLaVA that reads drawn scenes, from random weights, on a CPU (or a GPU if there is one).

    python examples/train_scene_vlm.py --out models/scene-llava

What comes out is an ordinary transformers checkpoint: a CLIP vision tower, a projector and a Llama decoder inside
`LlavaForConditionalGeneration`, with a `LlavaProcessor` around a word-level tokenizer and CLIP's image processor.
Pictures and texts come from `prefixkv_cache.demo.scenes`; nothing is downloaded, and nothing of the pruning library
takes part: the model knows only plain attention.

Two stages, because a decoder that starts beside blind eyes first learns the language by heart and then sits on a
plateau. Stage one trains the vision tower and the projector alone: each image token must say what object it lies on.
Stage two trains everything on the answers; the image tokens keep their own small loss for a while. From about the
middle of the run on, wide attention over the picture has a small price (see `Focus`), because a scene this small can
be read by averaging, which no large model does and which would leave a study of pruning nothing to find.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from prefixkv_cache.demo import scenes
from prefixkv_cache.demo.scenes import Scene

PATCH = 8
SIDE = scenes.IMAGE_SIZE // PATCH  # patches along one edge
IMAGE_TOKENS = SIDE * SIDE
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
IMAGE, USER, ASSISTANT = "<image>", "<user>", "<assistant>"
WORD = re.compile(r"<\w+>|\w+|[^\w\s]")
IGNORE = -100
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


# --- what the model is made of ----------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Every token of the scene language; the words are gathered from a few hundred training scenes."""
    texts = [*scenes.DESCRIBE_PROMPTS, " ".join(scenes.NUMBERS)]
    for seed in scenes.TRAIN_SEEDS[:400]:
        scene = scenes.draw_scene(seed, 1, 9)
        texts.append(scenes.describe(scene))
        texts += [f"{question.text} {question.answer}." for question in scenes.questions(scene)]
    words = sorted({word for text in texts for word in WORD.findall(text)})
    return [*SPECIAL.values(), IMAGE, USER, ASSISTANT, *words]


def build_processor() -> LlavaProcessor:
    """Word-level tokenizer and CLIP image processor; text in usual spelling and spacing comes in and goes out."""
    tokens = vocabulary()
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=SPECIAL["unk_token"]))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        padding_side="left",
        clean_up_tokenization_spaces=True,
        model_max_length=1024,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        **SPECIAL,
    )
    size = scenes.IMAGE_SIZE
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's CLS token, which "default" takes off again
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The architecture, with random weights: the one place to change for another family."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=scenes.IMAGE_SIZE,
        patch_size=PATCH,
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
        **{f"{name}_token_id": value for name, value in ids.items()},
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,  # the tower is ours, so its last layer is the useful one
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **{f"{name}_token_id": value for name, value in ids.items()},
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=112,
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
    )
    return model


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What one step needs: rows padded on the right; `patches` are the truths of the image tokens, [batch, 144, 4]."""

    pixel_values: torch.Tensor
    patches: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass
class Row:
    """One picture with its turns: tokens, positions, which turn each token belongs to (0: all see it), and labels."""

    ids: list[int]
    positions: list[int]
    turns: list[int]
    labels: list[int]


class BatchMaker:
    """Makes batch n of a run from the run's seed and n alone, so that a resumed run sees what an unbroken one saw."""

    def __init__(self, tokens: dict[str, int], batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.tokens, self.batch_size, self.seed, self.rank, self.world = tokens, batch_size, seed, rank, world

    def encode(self, text: str) -> list[int]:
        """The tokenizer's own result for scene language, without its overhead."""
        return [self.tokens[word] for word in WORD.findall(text)]

    def drawn(self, number: int, fewest: int, most: int) -> list[Scene]:
        """This process's scenes of a batch: each seed of the training range is used once in a run."""
        first = (self.seed * 50_000_000 + number * self.batch_size) % len(scenes.TRAIN_SEEDS)
        return [
            scenes.draw_scene(scenes.TRAIN_SEEDS[(first + i) % len(scenes.TRAIN_SEEDS)], fewest, most)
            for i in range(self.rank, self.batch_size, self.world)
        ]

    def row(self, scene: Scene, max_questions: int) -> Row:
        """A picture, a description and some questions.

        Three times in four the turns do not see each other and each starts right behind the picture: as many
        one-turn prompts for the price of one picture. Else they are one conversation.
        """
        rng = random.Random(f"{self.seed}/{scene.seed}")
        together = rng.random() < 0.25
        turns = [(question.text, f"{question.answer}.") for question in scenes.questions(scene)][:max_questions]
        turns.insert(rng.randrange(len(turns) + 1), (rng.choice(scenes.DESCRIBE_PROMPTS), scenes.describe(scene)))
        ids = self.encode(f"<bos>{USER}") + [self.tokens[IMAGE]] * IMAGE_TOKENS
        row = Row(ids, list(range(len(ids))), [0] * len(ids), [IGNORE] * len(ids))
        start = len(ids)
        for number, (prompt, answer) in enumerate(turns, 1):
            asked = self.encode((USER if together and number > 1 else "") + prompt + ASSISTANT)
            answered = self.encode(answer + "<eos>")
            begin = len(row.ids) if together else start
            row.ids += asked + answered
            row.positions += range(begin, begin + len(asked) + len(answered))
            row.turns += [0 if together else number] * (len(asked) + len(answered))
            row.labels += [IGNORE] * len(asked) + answered
        return row

    def make(self, number: int, fewest: int, most: int, max_questions: int) -> Batch:
        drawn = self.drawn(number, fewest, most)
        rows = [self.row(scene, max_questions) for scene in drawn]
        turns = padded([row.turns for row in rows], -1)
        return Batch(
            pixel_values=torch.stack([pixels(scene) for scene in drawn]),
            patches=torch.stack([patch_truths(scene) for scene in drawn]),
            input_ids=padded([row.ids for row in rows], self.tokens[SPECIAL["pad_token"]]),
            position_ids=padded([row.positions for row in rows], 0),
            attention_mask=turn_mask(turns),
            labels=padded([row.labels for row in rows], IGNORE),
        )


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    """Right-padded to a multiple of 16, which keeps the number of different shapes small."""
    width = math.ceil(max(map(len, rows)) / 16) * 16
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def turn_mask(turns: torch.Tensor) -> torch.Tensor:
    """[batch, 1, query, key], True where a token may look: back in its own turn, and at what belongs to turn 0."""
    same = (turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None])
    return same.tril()[:, None]


def pixels(scene: Scene) -> torch.Tensor:
    """What the image processor gives for a picture of this size (the run checks that), at a fraction of the time."""
    raw = torch.frombuffer(bytearray(scene.image.tobytes()), dtype=torch.uint8)
    return (raw.view(scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


PATCH_CLASSES = (len(scenes.RADII) + 1, len(scenes.COLOURS) + 1, len(scenes.SHAPES) + 1, scenes.GRID**2)


def patch_truths(scene: Scene) -> torch.Tensor:
    """[144, 4]: size, colour and shape (0: background) of the object at each patch's centre, and the patch's cell."""
    truths = torch.zeros(SIDE, SIDE, 4, dtype=torch.long)
    cell = torch.arange(SIDE) // (SIDE // scenes.GRID)
    truths[..., 3] = cell[:, None] * scenes.GRID + cell
    names = (list(scenes.RADII), list(scenes.COLOURS), list(scenes.SHAPES))
    for thing in scene.objects:
        left, top, right, bottom = (patch_edge(value) for value in thing.box)
        words = (thing.size, thing.colour, thing.shape)
        codes = [options.index(word) + 1 for options, word in zip(names, words, strict=True)]
        truths[top:bottom, left:right, :3] = torch.tensor(codes)
    return truths.view(IMAGE_TOKENS, 4)


def patch_edge(pixel: int) -> int:
    """The first patch whose centre lies at or behind this pixel."""
    return math.ceil((pixel - PATCH / 2) / PATCH)


# --- training ---------------------------------------------------------------------------------------------------------


class PatchReader(nn.Module):
    """Reads an object's words off an image token as the decoder gets it; used in training only and thrown away."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.heads = nn.ModuleList(nn.Linear(hidden_size, classes) for classes in PATCH_CLASSES)

    def forward(self, features: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
        """Mean loss: patches on an object weigh four times as much as the background, which is most of the picture."""
        features = self.norm(features)
        weight = 1.0 + 3.0 * (truths[..., 0] > 0).float()
        losses = [
            F.cross_entropy(head(features).flatten(0, 1).float(), truths[..., i].flatten(), reduction="none")
            for i, head in enumerate(self.heads)
        ]
        return (torch.stack(losses).sum(0) * weight.flatten()).sum() / weight.sum()


class Focus:
    """How widely the decoder's heads look over the picture, as a loss: mean entropy (nats) over the image keys.

    These scenes are small enough to be read by averaging all image tokens in every head, and left alone the decoder
    does just that: its attention stays uniform. Large models do not have that way out, so a small price is put on it.
    The attention is computed again for a sample of the queries, from what went into each attention layer.
    """

    def __init__(self, decoder: nn.Module, start: int, texts: int = 32, images: int = 16) -> None:
        self.start, self.texts, self.images = start, texts, images
        self.calls: list[tuple] = []
        for layer in decoder.layers:
            layer.self_attn.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls.append((attention, kwargs["hidden_states"], *kwargs["position_embeddings"]))

    def loss(self, real: torch.Tensor) -> torch.Tensor:
        """Over the layers of the last forward; `real` is [batch, tokens], False at padding. Forgets that forward."""
        end = self.start + IMAGE_TOKENS
        picked = torch.cat(
            [
                torch.randint(self.start + IMAGE_TOKENS // 2, end, (self.images,)),
                torch.randint(end, real.shape[1], (self.texts,)),
            ]
        ).to(real.device)
        weight = real[:, picked].float()[:, None].expand(-1, self.calls[0][0].config.num_attention_heads, -1)
        entropies = torch.stack([self.entropy(*call, picked) for call in self.calls])
        self.calls.clear()
        return (F.relu(entropies - 1.0) * weight).sum() / weight.sum() / len(entropies)

    def entropy(self, attention, hidden, cos, sin, picked: torch.Tensor) -> torch.Tensor:
        """[batch, heads, picked] of one layer."""
        keys = torch.arange(self.start, self.start + IMAGE_TOKENS, device=hidden.device)
        query = turned(attention.q_proj, hidden, cos, sin, picked, attention.head_dim)
        key = turned(attention.k_proj, hidden, cos, sin, keys, attention.head_dim)
        logits = (query @ key.transpose(-1, -2)).float() * attention.scaling
        logits = logits.masked_fill(keys[None, :] > picked[:, None], -1e9)
        log = logits.log_softmax(-1)
        return -(log.exp() * log).sum(-1)


def turned(project: nn.Module, hidden, cos, sin, at: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Queries or keys of the tokens `at`, rotary positions applied: [batch, heads, at, head_dim]."""
    heads = project(hidden[:, at]).unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return apply_rotary_pos_emb(heads, heads, cos[:, at], sin[:, at])[0]


@dataclass
class Plan:
    """The schedule, as functions of the share of the run that is done (0 to 1)."""

    eyes: float = 0.12  # share of the run that is stage one
    peak_rate: float = 1.5e-3
    warmup: float = 0.01
    focus: float = 0.02

    def rate(self, done: float) -> float:
        """Learning rate: a warm-up at the start of each stage, then a cosine down to 1 % of the peak."""
        since = done if done < self.eyes else done - self.eyes
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done - self.eyes) / (1 - self.eyes))))
        return self.peak_rate * min(1.0, since / self.warmup + 0.01) * (0.01 + 0.99 * cosine)

    def objects(self, done: float) -> tuple[int, int]:
        """Fewest and most objects in a scene: few words to tell apart at first, the real task soon."""
        return (1, 4) if self.eyes < done < self.eyes + 0.08 else (2, 7) if done < 0.5 else (4, 7)

    def focus_weight(self, done: float) -> float:
        """Price of a wide look: none until the model reads, then rising to its full value."""
        return self.focus * min(1.0, max(0.0, done - 0.46) / 0.06)

    def patch_weight(self, done: float) -> float:
        """Weight of the image tokens' own loss: all of it in stage one, gone at two thirds of the run."""
        return 1.0 if done < self.eyes else 0.3 * max(0.0, 1 - done / 0.66)


class Trainer:
    """The model with its optimizer, its clock and its checkpoint; `run` goes on from wherever it stands."""

    def __init__(self, args: argparse.Namespace, rank: int = 0) -> None:
        torch.manual_seed(args.seed)
        self.rank, self.world = rank, args.processes
        self.args, self.plan = args, Plan(peak_rate=args.rate)
        self.device = torch.device(args.device)
        self.processor = build_processor()
        self.model = build_model(self.processor.tokenizer).to(self.device)
        self.reader = PatchReader(self.model.config.text_config.hidden_size).to(self.device)
        self.maker = BatchMaker(self.processor.tokenizer.get_vocab(), args.batch_size, args.seed, rank, self.world)
        self.focus = Focus(self.model.model.language_model, start=len(self.maker.encode(f"<bos>{USER}")))
        self.optimizers = self.build_optimizers()
        self.step, self.seconds = 0, 0.0

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the layers' matrices, AdamW for all else; Muon's steps are scaled to the size of AdamW's."""
        named = [*self.model.named_parameters(), *self.reader.named_parameters()]
        inner = {name for name, weight in named if "layers." in name and weight.ndim == 2}
        muon = torch.optim.Muon(
            [weight for name, weight in named if name in inner], weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        )
        others = [weight for name, weight in named if name not in inner]
        return [muon, torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]

    def groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def done(self) -> float:
        """Share of the run that is behind us: by steps, or by time where --minutes runs out first."""
        by_time = self.seconds / (self.args.minutes * 60) if self.args.minutes else 0.0
        return max(self.step / self.args.steps, by_time)

    def run(self) -> None:
        """Train to the end, with a checkpoint and a usable model every --save-minutes."""
        saved = self.seconds
        seen: dict[str, list[float]] = defaultdict(list)
        while (done := self.done()) < 1:
            start = time.perf_counter()
            for name, value in self.train_step(done).items():
                seen[name].append(value)
            self.step += 1
            self.seconds = self.agreed(self.seconds + time.perf_counter() - start)
            if self.step % self.args.print_every == 0:
                self.report(done, seen)
                seen.clear()
            if self.seconds - saved > self.args.save_minutes * 60:
                saved = self.seconds
                self.save()
        self.save()

    def agreed(self, value: float) -> float:
        """The first process's clock is everybody's, so that all change stage at the same step."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        torch.distributed.broadcast(shared, 0)
        return shared.item()

    def share_gradients(self) -> None:
        """Mean of the gradients over the processes, in one message; a weight unused in this stage has none anywhere."""
        if self.world == 1:
            return
        gradients = [weight.grad for group in self.groups() for weight in group["params"]]
        gradients = [gradient for gradient in gradients if gradient is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / self.world).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def report(self, done: float, seen: dict[str, list[float]]) -> None:
        if self.rank:
            return
        rate = self.step / self.seconds
        left = self.seconds / max(done, 1e-6) * (1 - done)
        values = "  ".join(f"{name} {sum(values) / len(values):.4f}" for name, values in seen.items())
        clock = f"{rate:.2f} steps/s  {self.seconds / 60:.1f} min  left {left / 60:.1f} min"
        print(f"step {self.step}  {values}  {clock}", flush=True)

    def train_step(self, done: float) -> dict[str, float]:
        """One batch: loss of the answers (stage two), loss of the image tokens, clip, step."""
        blind = done >= self.plan.eyes
        batch = self.maker.make(self.step, *self.plan.objects(done), max_questions=8 if blind else 0).to(self.device)
        with self.autocast():
            losses = self.losses(batch, answers=blind)
        total = losses["patch"] * self.plan.patch_weight(done) + losses.get("answer", 0.0)
        total = total + losses.get("focus", 0.0) * self.plan.focus_weight(done)
        for group in self.groups():
            group["lr"] = self.plan.rate(done)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.share_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}

    def losses(self, batch: Batch, answers: bool) -> dict[str, torch.Tensor]:
        """The image is encoded once: its tokens answer for themselves and go to the decoder."""
        inner = self.model.model
        features = torch.stack(list(inner.get_image_features(batch.pixel_values).pooler_output))
        losses = {"patch": self.reader(features, batch.patches)}
        if answers:
            embeds = inner.get_input_embeddings()(batch.input_ids)
            start = self.focus.start
            embeds = torch.cat([embeds[:, :start], features, embeds[:, start + IMAGE_TOKENS :]], dim=1)
            hidden = inner.language_model(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state
            wanted = batch.labels[:, 1:] != IGNORE
            logits = self.model.lm_head(hidden[:, :-1][wanted])
            losses["focus"] = self.focus.loss(batch.input_ids != self.model.config.text_config.pad_token_id)
            losses["answer"] = F.cross_entropy(logits.float(), batch.labels[:, 1:][wanted])
        return losses

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.args.bfloat16 else nullcontext()

    def save(self) -> None:
        """The model for use, and beside it (never in it) the state to go on from."""
        if self.rank:
            return
        save_model(self.model, self.processor, Path(self.args.out))
        state = {
            "model": self.model.state_dict(),
            "reader": self.reader.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        target = state_file(self.args.out)
        torch.save(state, target.with_suffix(".tmp"))
        os.replace(target.with_suffix(".tmp"), target)
        print(f"saved {self.args.out} at step {self.step}, {time.process_time() / 60:.1f} CPU minutes", flush=True)

    def resume(self) -> None:
        state = torch.load(state_file(self.args.out), map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.reader.load_state_dict(state["reader"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"resumed at step {self.step}, {self.seconds / 60:.1f} minutes in", flush=True)


def state_file(out: str) -> Path:
    path = Path(out)
    return path.with_name(path.name + ".training-state.pt")


def save_model(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write float16 weights and all else into a folder of its own, then move file by file into place."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    half = build_model(processor.tokenizer)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(fresh)
    processor.save_pretrained(fresh)
    out.mkdir(parents=True, exist_ok=True)
    for path in fresh.iterdir():
        os.replace(path, out / path.name)
    fresh.rmdir()


def check_shortcuts(processor: LlavaProcessor, maker: BatchMaker) -> None:
    """The trainer's quick pixels and quick tokens must be the processor's, or training is for another model."""
    scene = scenes.draw_scene(scenes.TRAIN_SEEDS[0])
    question = scenes.questions(scene)[0]
    turns = [(question.text, [{"type": "image"}]), (scenes.DESCRIBE_PROMPTS[0], [])]
    messages = []
    for prompt, picture in turns:
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": prompt}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": scenes.describe(scene)}]})
    text = processor.apply_chat_template(messages)
    inputs = processor(images=scene.image, text=text, return_tensors="pt")
    quick = maker.encode(text.replace(IMAGE, IMAGE * IMAGE_TOKENS))
    if inputs["input_ids"][0].tolist() != quick:
        raise RuntimeError("the quick tokens differ from the tokenizer's")
    if not torch.allclose(inputs["pixel_values"][0], pixels(scene), atol=1e-6):
        raise RuntimeError("the quick pixels differ from the image processor's")
    if processor.decode(maker.encode(scenes.describe(scene))) != scenes.describe(scene):
        raise RuntimeError("a description does not survive encoding and decoding")


# --- evaluation -------------------------------------------------------------------------------------------------------


def chat_inputs(processor: LlavaProcessor, items: list[tuple[Scene, str]]) -> dict[str, torch.Tensor]:
    """Left-padded inputs of one-turn prompts, through the chat template like any user's."""
    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}] for _, prompt in items
    ]
    texts = [processor.apply_chat_template(message, add_generation_prompt=True) for message in messages]
    return processor(images=[scene.image for scene, _ in items], text=texts, padding=True, return_tensors="pt")


@torch.inference_mode()
def answers(model, processor, items: list[tuple[Scene, str]], batch_size: int = 50) -> Iterator[str]:
    """Free greedy generation."""
    for start in range(0, len(items), batch_size):
        inputs = chat_inputs(processor, items[start : start + batch_size]).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        out = model.generate(**inputs)
        yield from processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(model, processor, seeds: range) -> dict:
    """Descriptions by object accuracy, questions by exact match for each kind, on scenes of these seeds."""
    drawn = [scenes.draw_scene(seed) for seed in seeds]
    texts = list(answers(model, processor, [(scene, scenes.DESCRIBE_PROMPTS[0]) for scene in drawn]))
    right = [scenes.object_accuracy(text, scene) for text, scene in zip(texts, drawn, strict=True)]
    objects = sum(len(scene.objects) for scene in drawn)
    hits = sum(share * len(scene.objects) for share, scene in zip(right, drawn, strict=True))
    extras = sum(len(scenes.wrong_objects(text, scene)) for text, scene in zip(texts, drawn, strict=True))
    asked = [(scene, question) for scene in drawn for question in scenes.questions(scene)]
    replies = answers(model, processor, [(scene, question.text) for scene, question in asked], batch_size=100)
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for (_, question), reply in zip(asked, replies, strict=True):
        by_kind[question.kind].append(scenes.answer_matches(reply, question))
    total = [hit for hits_of_kind in by_kind.values() for hit in hits_of_kind]
    return {
        "seeds": [seeds.start, seeds.stop],
        "objects": objects,
        "objects_right": round(hits / objects, 4),
        "wrong_objects_stated": extras,
        "descriptions_word_for_word": sum(t == scenes.describe(s) for t, s in zip(texts, drawn, strict=True))
        / len(drawn),
        "questions": len(total),
        "questions_right": round(sum(total) / len(total), 4),
        "questions_right_by_kind": {kind: round(sum(v) / len(v), 4) for kind, v in sorted(by_kind.items())},
    }


@torch.inference_mode()
def attention_spread(model, processor, seeds: range, mass: float = 0.9) -> dict[str, list[float]]:
    """Share of the prompt's keys that hold 90 % of the attention of its last queries (mean over heads), by layer.

    For the last 32 tokens, most of which lie in the picture, and for the text behind the picture alone; the attention
    is summed over those queries first, as pruning does, or taken one query at a time.
    """
    model.set_attn_implementation("eager")
    shares: dict[str, list[torch.Tensor]] = defaultdict(list)
    for seed in seeds:
        scene = scenes.draw_scene(seed)
        for prompt in (scenes.DESCRIBE_PROMPTS[0], *(question.text for question in scenes.questions(scene)[:2])):
            inputs = chat_inputs(processor, [(scene, prompt)]).to(model.device)
            weights = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0].mean(1)
            texts = int((inputs["input_ids"][0].flip(0) == model.config.image_token_id).nonzero()[0])
            for name, queries in (("last 32 queries", 32), ("text queries", texts)):
                shares[f"{name}, summed"].append(share_of_keys(weights[:, -queries:].sum(1), mass))
                shares[f"{name}, one at a time"].append(share_of_keys(weights[:, -queries:], mass).mean(1))
    model.set_attn_implementation("sdpa")
    return {name: [round(x, 3) for x in torch.stack(each).mean(0).tolist()] for name, each in sorted(shares.items())}


def share_of_keys(weights: torch.Tensor, mass: float) -> torch.Tensor:
    """[..., keys] -> [...]: the shortest falling-sorted prefix that reaches the mass, as a share of the keys."""
    ordered = weights.sort(dim=-1, descending=True).values
    reached = ordered.cumsum(-1) / ordered.sum(-1, keepdim=True)
    return ((reached < mass).sum(-1) + 1) / weights.shape[-1]


def evaluate_saved(out: str, device: str, count: int) -> None:
    """Load what was saved, as any user would, in two precisions, and print what it reaches on the test split."""
    processor = AutoProcessor.from_pretrained(out)
    results: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForImageTextToText.from_pretrained(out, dtype=dtype).eval().to(device)
        results[str(dtype).removeprefix("torch.")] = evaluate(model, processor, scenes.TEST_SEEDS[:count])
        if dtype == torch.float32:
            results["keys_for_90_percent"] = attention_spread(model, processor, scenes.TEST_SEEDS[:8])
    print(json.dumps(results, indent=2), flush=True)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="models/scene-llava", help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=6000, help="length of the run and of its schedule")
    parser.add_argument("--minutes", type=float, default=80, help="end, cooled down, by then if the steps take longer")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=None, help="default: 2 on a CPU, one thread each; else 1")
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="autocast in training")
    parser.add_argument("--resume", action="store_true", help="go on from the training state beside --out")
    parser.add_argument("--evaluate-only", action="store_true")
    parser.add_argument("--test-scenes", type=int, default=300, help="held-out scenes of the evaluation")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--print-every", type=int, default=50)
    args = parser.parse_args()
    if args.processes is None:
        args.processes = 2 if args.device == "cpu" else 1
    if args.processes > 1 and args.device != "cpu":
        parser.error("more than one process is for the CPU only")
    return args


def train(rank: int, args: argparse.Namespace, meeting_place: str) -> None:
    """One process of the run. On a CPU two processes of one thread beat one of two, which wait at every operation."""
    if args.processes > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=args.processes
        )
    trainer = Trainer(args, rank)
    check_shortcuts(trainer.processor, trainer.maker)
    if rank == 0:
        print(f"{sum(weight.numel() for weight in trainer.model.parameters()):,} parameters, {args.device}", flush=True)
    if args.resume:
        trainer.resume()
    trainer.run()
    if args.processes > 1:
        torch.distributed.destroy_process_group()


def main() -> int:
    args = parse_args()
    if not args.evaluate_only:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(train, (args, f"{folder}/meeting"), nprocs=args.processes)
    evaluate_saved(args.out, args.device, args.test_scenes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
