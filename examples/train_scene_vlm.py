"""Train a small vision-language model that reads drawn pictures, from random weights, on a CPU or a GPU.

    python examples/train_scene_vlm.py --out models/scene-llava
    python examples/train_scene_vlm.py --family qwen2-vl --task boards --out models/board-qwen2-vl

What comes out is an ordinary transformers checkpoint with its processor. `scene_vlm/families.py` says what the models
are made of, `scene_vlm/tasks.py` what they learn. Nothing is downloaded, and nothing of the pruning library takes part:
the models know only plain attention.

Two stages, because a decoder that starts beside blind eyes first learns the language by heart and then sits on a
plateau. Stage one trains the vision tower and the projector alone: each image token must say what it lies on. Stage two
trains everything on the answers; the image tokens keep their own small loss for a while. From about the middle of the
run on, wide attention over the picture has a small price (see `Focus`), because a picture this small can be read by
averaging, which no large model does and which would leave a study of pruning nothing to find.
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
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from scene_vlm.families import FAMILIES, Family, Grid
from scene_vlm.language import ASSISTANT, SPECIAL, USER, WORD
from scene_vlm.tasks import TASKS, Level, Picture, Task

IGNORE = -100


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What one step needs: pictures with image tokens of one grid, and rows padded on the right.

    `patches` are the truths of the image tokens, [batch, image tokens, questions]; `shares` is what part of its answer
    each token is.
    """

    grid: Grid
    pixel_values: torch.Tensor
    patches: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    shares: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "grid"}
        return Batch(self.grid, **moved)


@dataclass
class Row:
    """One picture with its turns: tokens, positions by axis, turn of each token (0: all see it), labels and shares."""

    ids: list[int]
    positions: list[list[int]]
    turns: list[int]
    labels: list[int]
    shares: list[float]


class BatchMaker:
    """Makes batch n of a run from the run's seed and n alone, so that a resumed run sees what an unbroken one saw."""

    def __init__(
        self, family: Family, tokens: dict[str, int], batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.family, self.task, self.tokens = family, family.task, tokens
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.start = len(self.encode(family.opening()))  # the first image token's place in a row

    def encode(self, text: str) -> list[int]:
        """The tokenizer's own result for the task's language, without its overhead."""
        return [self.tokens[word] for word in WORD.findall(text)]

    def drawn(self, number: int, level: Level) -> list[Picture]:
        """This process's pictures of a batch: each seed of the training range is used once in a run."""
        seeds = self.task.module.TRAIN_SEEDS
        first = (self.seed * 50_000_000 + number * self.batch_size) % len(seeds)
        return [
            self.task.draw(seeds[(first + i) % len(seeds)], level)
            for i in range(self.rank, self.batch_size, self.world)
        ]

    def row(self, picture: Picture, max_questions: int) -> Row:
        """A picture, a description and some questions.

        Three times in four the turns do not see each other and each starts right behind the picture: as many
        one-turn prompts for the price of one picture. Else they are one conversation.
        """
        rng = random.Random(f"{self.seed}/{picture.seed}")
        together = rng.random() < 0.25
        module = self.task.module
        turns = [(question.text, f"{question.answer}.") for question in module.questions(picture)][:max_questions]
        turns.insert(rng.randrange(len(turns) + 1), (rng.choice(module.DESCRIBE_PROMPTS), module.describe(picture)))
        return self.packed(picture, turns, together)

    def packed(self, picture: Picture, turns: list[tuple[str, str]], together: bool) -> Row:
        """A picture with turns of a prompt and an answer each, as one conversation (`together`) or side by side."""
        row, start = self.opening(picture)
        begin = start
        for number, (prompt, answer) in enumerate(turns, 1):
            asked = self.encode((USER if together and number > 1 else "") + prompt + ASSISTANT)
            answered = self.encode(answer + "<eos>")
            begin = begin if together else start
            row.ids += asked + answered
            for axis in row.positions:
                axis += range(begin, begin + len(asked) + len(answered))
            begin += len(asked) + len(answered)
            row.turns += [0 if together else number] * (len(asked) + len(answered))
            row.labels += [IGNORE] * len(asked) + answered
            row.shares += [0.0] * len(asked) + [1 / len(answered)] * len(answered)
        return row

    def opening(self, picture: Picture) -> tuple[Row, int]:
        """All that stands before the first prompt, and the position that comes next."""
        grid = self.task.token_grid(picture)
        image, begin = self.family.positions(self.start, grid)
        after = self.encode(self.family.after)
        ids = self.encode(self.family.opening()) + [self.tokens[self.family.image]] * (grid[0] * grid[1]) + after
        ends = list(range(begin, begin + len(after)))
        positions = [[*range(self.start), *axis, *ends] for axis in image]
        return Row(ids, positions, [0] * len(ids), [IGNORE] * len(ids), [0.0] * len(ids)), begin + len(after)

    def make(self, number: int, level: Level, max_questions: int) -> Batch:
        drawn = self.drawn(number, level)
        rows = [self.row(picture, max_questions) for picture in drawn]
        turns = padded([row.turns for row in rows], -1)
        axes = [padded([row.positions[axis] for row in rows], 0) for axis in range(self.family.axes)]
        return Batch(
            grid=self.task.token_grid(drawn[0]),
            pixel_values=self.family.pixels(drawn),
            patches=torch.stack([self.task.patch_truths(picture) for picture in drawn]),
            input_ids=padded([row.ids for row in rows], self.tokens[SPECIAL["pad_token"]]),
            position_ids=torch.stack(axes) if len(axes) > 1 else axes[0],
            attention_mask=turn_mask(turns),
            labels=padded([row.labels for row in rows], IGNORE),
            shares=padded([row.shares for row in rows], 0.0),
        )


def padded(rows: list[list[Any]], fill: float) -> torch.Tensor:
    """Right-padded to a multiple of 16, which keeps the number of different shapes small."""
    width = math.ceil(max(map(len, rows)) / 16) * 16
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def turn_mask(turns: torch.Tensor) -> torch.Tensor:
    """[batch, 1, query, key], True where a token may look: back in its own turn, and at what belongs to turn 0."""
    same = (turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None])
    return same.tril()[:, None]


# --- training ---------------------------------------------------------------------------------------------------------


class PatchReader(nn.Module):
    """Reads off an image token, as the decoder gets it, what it lies on; used in training only and thrown away."""

    def __init__(self, hidden_size: int, patch_classes: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.heads = nn.ModuleList(nn.Linear(hidden_size, classes) for classes in patch_classes)

    def forward(self, features: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
        """Mean loss: tokens on an object weigh four times as much as the background, most of a picture of objects."""
        features = self.norm(features)
        weight = 1.0 + 3.0 * (truths[..., 0] > 0).float()
        losses = [
            F.cross_entropy(head(features).flatten(0, 1).float(), truths[..., i].flatten(), reduction="none")
            for i, head in enumerate(self.heads)
        ]
        return (torch.stack(losses).sum(0) * weight.flatten()).sum() / weight.sum()


class Focus:
    """How widely the decoder's heads look over the picture, as a loss: mean entropy (nats) over the image keys.

    These pictures are small enough to be read by averaging all image tokens in every head, and left alone the decoder
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

    def loss(self, real: torch.Tensor, image_tokens: int) -> torch.Tensor:
        """Over the layers of the last forward; `real` is [batch, tokens], False at padding. Forgets that forward."""
        end = self.start + image_tokens
        picked = torch.cat(
            [
                torch.randint(self.start + image_tokens // 2, end, (self.images,)),
                torch.randint(end, real.shape[1], (self.texts,)),
            ]
        ).to(real.device)
        weight = real[:, picked].float()[:, None].expand(-1, self.calls[0][0].config.num_attention_heads, -1)
        entropies = torch.stack([self.entropy(*call, picked, end) for call in self.calls])
        self.calls.clear()
        return (F.relu(entropies - 1.0) * weight).sum() / weight.sum() / len(entropies)

    def entropy(self, attention, hidden, cos, sin, picked: torch.Tensor, end: int) -> torch.Tensor:
        """[batch, heads, picked] of one layer."""
        keys = torch.arange(self.start, end, device=hidden.device)
        query = turned(attention.q_proj, hidden, cos, sin, picked, attention.head_dim)
        key = turned(attention.k_proj, hidden, cos, sin, keys, attention.head_dim)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # each group's heads share one
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
    late_focus: float = 0.0
    even: float = 1.0  # from this share on, answers count alike, however short; before it, their tokens do

    def rate(self, done: float) -> float:
        """Learning rate: a warm-up at the start of each stage, then a cosine down to 1 % of the peak."""
        since = done if done < self.eyes else done - self.eyes
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done - self.eyes) / (1 - self.eyes))))
        return self.peak_rate * min(1.0, since / self.warmup + 0.01) * (0.01 + 0.99 * cosine)

    def focus_weight(self, done: float) -> float:
        """Price of a wide look: none until the model reads, then rising to its full value; `late_focus` comes later."""
        return sum(
            price * min(1.0, max(0.0, done - start) / 0.06)
            for price, start in ((self.focus, 0.46), (self.late_focus, 0.62))
        )

    def patch_weight(self, done: float) -> float:
        """Weight of the image tokens' own loss: all of it in stage one, gone at two thirds of the run."""
        return 1.0 if done < self.eyes else 0.3 * max(0.0, 1 - done / 0.66)


class Trainer:
    """The model with its optimizer, its clock and its checkpoint; `run` goes on from wherever it stands."""

    def __init__(self, args: argparse.Namespace, rank: int = 0) -> None:
        torch.manual_seed(args.seed)
        self.rank, self.world = rank, args.processes
        self.args = args
        self.device = torch.device(args.device)
        self.family = FAMILIES[args.family](TASKS[args.task]())
        self.task = self.family.task
        shares = {"eyes": self.task.eyes, "even": self.task.even, "late_focus": self.task.late_focus}
        self.plan = Plan(peak_rate=args.rate, **shares)
        self.processor = self.family.build_processor()
        self.model = self.family.build_model(self.processor.tokenizer).to(self.device)
        self.family.prepare(self.model)
        hidden_size = self.model.config.text_config.hidden_size
        self.reader = PatchReader(hidden_size, self.task.patch_classes).to(self.device)
        tokens = self.processor.tokenizer.get_vocab()
        self.maker = BatchMaker(self.family, tokens, args.batch_size, args.seed, rank, self.world)
        self.focus = Focus(self.model.model.language_model, start=self.maker.start)
        self.optimizers = self.build_optimizers()
        self.step, self.seconds = 0, 0.0

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the layers' matrices, AdamW for all else; Muon's steps are scaled to the size of AdamW's."""
        named = [*self.model.named_parameters(), *self.reader.named_parameters()]
        inner = {name for name, weight in named if re.search(r"(layers|blocks)\.", name) and weight.ndim == 2}
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
        level = self.task.level(done, self.plan.eyes, random.Random(f"{self.args.seed}/{self.step}"))
        batch = self.maker.make(self.step, level, max_questions=8 if blind else 0).to(self.device)
        with self.autocast():
            losses = self.losses(batch, answers=blind, even=done >= self.plan.even)
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

    def losses(self, batch: Batch, answers: bool, even: bool) -> dict[str, torch.Tensor]:
        """The image is encoded once: its tokens answer for themselves and go to the decoder."""
        inner = self.model.model
        features = self.family.features(self.model, batch.pixel_values, batch.grid)
        losses = {"patch": self.reader(features, batch.patches)}
        if answers:
            embeds = inner.get_input_embeddings()(batch.input_ids)
            start, image_tokens = self.maker.start, features.shape[1]
            embeds = torch.cat([embeds[:, :start], features, embeds[:, start + image_tokens :]], dim=1)
            hidden = inner.language_model(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state
            wanted = batch.labels[:, 1:] != IGNORE
            logits = self.model.lm_head(hidden[:, :-1][wanted])
            real = batch.input_ids != self.processor.tokenizer.pad_token_id
            losses["focus"] = self.focus.loss(real, image_tokens)
            losses["answer"] = F.cross_entropy(logits.float(), batch.labels[:, 1:][wanted])
            if even:
                each = F.cross_entropy(logits.float(), batch.labels[:, 1:][wanted], reduction="none")
                share = batch.shares[:, 1:][wanted]
                losses["answer"] = (each * share).sum() / share.sum()
        return losses

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.args.bfloat16 else nullcontext()

    def save(self) -> None:
        """The model for use, and beside it (never in it) the state to go on from."""
        if self.rank:
            return
        save_model(self.family, self.model, self.processor, Path(self.args.out))
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


def save_model(family: Family, model: PreTrainedModel, processor: ProcessorMixin, out: Path) -> None:
    """Write float16 weights and all else into a folder of its own, then move file by file into place."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    half = family.build_model(processor.tokenizer)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(fresh)
    processor.save_pretrained(fresh)
    out.mkdir(parents=True, exist_ok=True)
    for path in fresh.iterdir():
        os.replace(path, out / path.name)
    fresh.rmdir()


def check_shortcuts(trainer: Trainer) -> None:
    """The trainer's quick inputs must be the processor's and the model's own, or training is for another model."""
    task, family, maker, processor = trainer.task, trainer.family, trainer.maker, trainer.processor
    picture = task.draw(task.module.TRAIN_SEEDS[0])
    description = task.module.describe(picture)
    prompts = (task.module.questions(picture)[0].text, task.module.DESCRIBE_PROMPTS[0])
    turns = [(prompt, description) for prompt in prompts]
    messages = []
    for number, (prompt, answer) in enumerate(turns):
        image = [] if number else [{"type": "image"}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": prompt}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    inputs = processor(images=picture.image, text=processor.apply_chat_template(messages), return_tensors="pt")
    quick = maker.packed(picture, turns, together=True)
    if inputs["input_ids"][0].tolist() != quick.ids:
        raise RuntimeError("the quick tokens differ from the tokenizer's")
    if family.prompt_positions(trainer.model, inputs).tolist() != quick.positions:
        raise RuntimeError("the quick positions differ from the model's")
    pixels = inputs["pixel_values"].view(family.pixels([picture]).shape)
    if not torch.allclose(pixels, family.pixels([picture]), atol=1e-6):
        raise RuntimeError("the quick pixels differ from the image processor's")
    if processor.decode(maker.encode(description)) != description:
        raise RuntimeError("a description does not survive encoding and decoding")


# --- evaluation -------------------------------------------------------------------------------------------------------


def chat_inputs(processor: ProcessorMixin, items: list[tuple[Picture, str]]) -> dict[str, torch.Tensor]:
    """Left-padded inputs of one-turn prompts, through the chat template like any user's."""
    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}] for _, prompt in items
    ]
    texts = [processor.apply_chat_template(message, add_generation_prompt=True) for message in messages]
    return processor(images=[picture.image for picture, _ in items], text=texts, padding=True, return_tensors="pt")


@torch.inference_mode()
def answers(model, processor, items: list[tuple[Picture, str]], batch_size: int = 50) -> Iterator[str]:
    """Free greedy generation."""
    for start in range(0, len(items), batch_size):
        inputs = chat_inputs(processor, items[start : start + batch_size]).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        out = model.generate(**inputs)
        yield from processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(model, processor, task: Task, seeds: range) -> dict:
    """Descriptions by object accuracy, questions by exact match for each kind, on pictures of these seeds."""
    module = task.module
    drawn = [task.draw(seed) for seed in seeds]
    texts = list(answers(model, processor, [(picture, module.DESCRIBE_PROMPTS[0]) for picture in drawn]))
    right = [module.object_accuracy(text, picture) for text, picture in zip(texts, drawn, strict=True)]
    objects = sum(len(picture.objects) for picture in drawn)
    hits = sum(share * len(picture.objects) for share, picture in zip(right, drawn, strict=True))
    extras = sum(len(module.wrong_objects(text, picture)) for text, picture in zip(texts, drawn, strict=True))
    asked = [(picture, question) for picture in drawn for question in module.questions(picture)]
    replies = answers(model, processor, [(picture, question.text) for picture, question in asked], batch_size=100)
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for (_, question), reply in zip(asked, replies, strict=True):
        by_kind[question.kind].append(module.answer_matches(reply, question))
    total = [hit for hits_of_kind in by_kind.values() for hit in hits_of_kind]
    return {
        "seeds": [seeds.start, seeds.stop],
        "objects": objects,
        "objects_right": round(hits / objects, 4),
        "wrong_objects_stated": extras,
        "descriptions_word_for_word": sum(t == module.describe(p) for t, p in zip(texts, drawn, strict=True))
        / len(drawn),
        "questions": len(total),
        "questions_right": round(sum(total) / len(total), 4),
        "questions_right_by_kind": {kind: round(sum(v) / len(v), 4) for kind, v in sorted(by_kind.items())},
    }


@torch.inference_mode()
def attention_spread(model, processor, task: Task, seeds: range, mass: float = 0.9) -> dict[str, list[float]]:
    """Share of the prompt's keys that hold 90 % of the attention of its last queries (mean over heads), by layer.

    For the last 32 tokens, most of which lie in the picture, and for the text behind the picture alone; the attention
    is summed over those queries first, as pruning does, or taken one query at a time.
    """
    model.set_attn_implementation("eager")
    shares: dict[str, list[torch.Tensor]] = defaultdict(list)
    for seed in seeds:
        picture = task.draw(seed)
        prompts = [question.text for question in task.module.questions(picture)[:2]]
        for prompt in (task.module.DESCRIBE_PROMPTS[0], *prompts):
            inputs = chat_inputs(processor, [(picture, prompt)]).to(model.device)
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


def evaluate_saved(args: argparse.Namespace) -> None:
    """Load what was saved, as any user would, in two precisions, and print what it reaches on the test split."""
    processor = AutoProcessor.from_pretrained(args.out)
    task = TASKS[args.task]()
    seeds = task.module.TEST_SEEDS
    results: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForImageTextToText.from_pretrained(args.out, dtype=dtype).eval().to(args.device)
        results[str(dtype).removeprefix("torch.")] = evaluate(model, processor, task, seeds[: args.test_scenes])
        if dtype == torch.float32:
            results["keys_for_90_percent"] = attention_spread(model, processor, task, seeds[:8])
    print(json.dumps(results, indent=2), flush=True)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="models/scene-llava", help="folder of the checkpoint")
    parser.add_argument("--family", choices=FAMILIES, default="llava", help="what the model is made of")
    parser.add_argument("--task", choices=TASKS, default="scenes", help="what it learns to read")
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
    parser.add_argument("--test-scenes", type=int, default=300, help="held-out pictures of the evaluation")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--print-every", type=int, default=50)
    args = parser.parse_args()
    if args.family == "llava" and args.task != "scenes":
        parser.error("the LLaVA sees pictures of one size only: --task scenes")
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
    check_shortcuts(trainer)
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
    evaluate_saved(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
