"""What calibrating on a sample costs, over a plain forward of the same sample: time and peak memory.

    python benchmarks/calibrate.py [--lengths 1024,2048,4096] [--repeats 5] [--threads 1] [--device cuda]

A LLaVA of random weights and a small geometry; one image and words up to each length. The plain forward computes the
last row of logits and builds no cache; both take turns, after a warm-up, and the medians are compared. The cost depends
on the share that attention has in the forward, which grows with length / hidden size and is printed: at equal length it
is larger here than in a 7B model. Memory is what the call needs at its peak beyond what stood before it, by torch's own
count of what it allocates: the allocator's on a GPU, the profiler's on a CPU.
Before anything is timed, the importances are held against plain attention weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, numbers, peak_bytes, store, take_turns
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from prefixkv_cache.calibrate import DEFAULT_BUDGETS
from prefixkv_cache.calibrated_for import DEFAULT, plain_ranking, write_ranking
from prefixkv_cache.observe import observe
from prefixkv_cache.scoring import Ranking
from prefixkv_cache.threshold import search_lengths

RANKINGS = {"plain, 32": plain_ranking(32), "plain, all": plain_ranking("all"), "default": DEFAULT}
IMAGE, IMAGE_TOKENS, VOCABULARY = 9, 576, 1000


def build_model(arguments: argparse.Namespace) -> Any:
    text = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4 // 32 * 32,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128,
        num_key_value_heads=arguments.hidden // 128,
        vocab_size=VOCABULARY,
        max_position_embeddings=max(arguments.lengths),
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=96, patch_size=4
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=IMAGE_TOKENS)
    model = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # a fresh model's attention is uniform
            parameter.data.mul_(8)
    model.set_attn_implementation("sdpa")
    return model.to(arguments.device, getattr(torch, arguments.dtype))


def make_sample(length: int, model: Any) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(length)
    words = torch.randint(10, VOCABULARY, (length - IMAGE_TOKENS,), generator=random)
    ids = torch.cat([words[:5], torch.full((IMAGE_TOKENS,), IMAGE), words[5:]])[None]
    pixels = torch.randn(1, 3, 96, 96, generator=random)
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in sample.items()}


def plain_forward(model: Any, sample: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        model(**sample, use_cache=False, logits_to_keep=1)


def calibrate_sample(model: Any, sample: dict[str, torch.Tensor], ranking: Ranking) -> None:
    """What `calibrate` does with one sample."""
    for scores in observe(model, sample, ranking=ranking):
        search_lengths(scores, DEFAULT_BUDGETS)


def check(model: Any, sample: dict[str, torch.Tensor]) -> float:
    """Largest difference of the importances from those of the weights that the eager backend returns, relative."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**sample, output_attentions=True, logits_to_keep=1).attentions
    model.set_attn_implementation("sdpa")
    worst = 0.0
    for queries in (32, "all"):
        first = 0 if queries == "all" else -int(queries)
        expected = torch.stack([layer[0, :, first:].double().sum(1).mean(0).cpu() for layer in weights])
        (importance,) = observe(model, sample, ranking=plain_ranking(queries))
        worst = max(worst, float((importance - expected).abs().max() / expected.max()))
    return worst


def measure(model: Any, length: int, repeats: int) -> list[dict[str, Any]]:
    sample = make_sample(length, model)
    calls: dict[str, Callable[[], None]] = {"plain": lambda: plain_forward(model, sample)}
    for name, ranking in RANKINGS.items():
        calls[name] = lambda ranking=ranking: calibrate_sample(model, sample, ranking)
    times = take_turns(calls, repeats)
    memory = {name: peak_bytes(call, model.device) for name, call in calls.items()}
    return [_row(length, name, times, memory) for name in RANKINGS]


def _row(length: int, name: str, times: dict[str, list[tuple[float, float]]], memory: dict[str, int]) -> dict[str, Any]:
    (plain, plain_processor), (ours, our_processor) = (
        [statistics.median(each) for each in zip(*times[of], strict=True)] for of in ("plain", name)
    )
    ratios = sorted(one[0] / other[0] for one, other in zip(times[name], times["plain"], strict=True))
    return {
        "tokens": length,
        "queries": RANKINGS[name].queries,
        "ranking": write_ranking(RANKINGS[name]),
        "plain_seconds": round(plain, 4),
        "calibrate_seconds": round(ours, 4),
        "time_ratio": round(ours / plain, 3),
        "time_ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "processor_time_ratio": round(our_processor / plain_processor, 3),
        "plain_peak_mib": round(memory["plain"] / 2**20, 1),
        "calibrate_peak_mib": round(memory[name] / 2**20, 1),
        "memory_ratio": round(memory[name] / memory["plain"], 3),
    }


def attention_share(hidden: int, length: int) -> float:
    """Arithmetic of causal attention in that of a decoder layer."""
    attention = 2 * length**2 * hidden
    return attention / (attention + 2 * length * hidden**2 * (4 + 3 * 11 / 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=numbers, default=[1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--hidden", type=int, default=1024, help="multiple of 128")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder that the result is added to")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = build_model(arguments)
    error = check(model, make_sample(min(arguments.lengths), model))
    print(f"importance against plain weights: largest relative difference {error:.1e}")
    if error > (1e-4 if arguments.dtype == "float32" else 2e-2):
        raise SystemExit("the importances are wrong; nothing was timed")
    rows = []
    for length in arguments.lengths:
        for row in measure(model, length, arguments.repeats):
            row["attention_share"] = round(attention_share(arguments.hidden, length), 3)
            rows.append(row)
            print(
                f"{length:>6} tokens, queries {row['queries']!s:>3}, {row['ranking']}: "
                f"{row['time_ratio']:.2f} x the forward's time "
                f"({row['time_ratio_range'][0]:.2f} to {row['time_ratio_range'][1]:.2f}; processor time "
                f"{row['processor_time_ratio']:.2f} x), "
                f"{row['memory_ratio']:.2f} x its memory; attention is "
                f"{row['attention_share']:.0%} of its arithmetic",
                flush=True,
            )
    store("calibrate", arguments, rows)


if __name__ == "__main__":
    main()
