"""kvpress beside this library: the same model, budget, machine and process, one after the other in one run.

    python benchmarks/peers.py [--geometry quarter] [--lengths 1024,4096] [--budgets 0.5,0.2]

kvpress (PyPI) needs transformers before 5.3, so the script makes an environment for it, in the user's cache folder or
under `--environment`, with CPU torch, and starts itself again there. This library runs from its source in that same
environment, so both see the same torch and the same transformers. Compared are kvpress' SnapKVPress (a window of last
queries), KnormPress (no queries at all: the least a press can do) and ObservedAttentionPress (all queries, from eager
weights, as it needs them) with ours, by profile: the paper's method with a window of 32 queries and with all of them,
and the default, by layer and by head in four segments. Time of the prompt phase, time of a decode step, bytes of the KV
tensors behind the prompt, and the peak of all tensors in the prompt phase.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from contextlib import nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("kvpress==0.5.5",)
TORCH = "torch==2.13.0"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def environment(folder: Path) -> Path:
    """The interpreter of the peers' environment, made where it is not there yet."""
    python = folder / "bin" / "python"
    if not (folder / ".made").exists():
        print(f"making an environment in {folder}", flush=True)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", "--retries", "0"]
        subprocess.run([*pip, "--extra-index-url", CPU_WHEELS, TORCH, *PACKAGES], check=True)
        (folder / ".made").touch()
    return python


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    if "--worker" not in sys.argv:
        folder = cache / "prefixkv-peers"
        if "--environment" in sys.argv:
            at = sys.argv.index("--environment")
            folder = Path(sys.argv[at + 1])
            del sys.argv[at : at + 2]
        paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [str(environment(folder)), str(HERE / "peers.py"), *sys.argv[1:], "--worker"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        raise SystemExit(done.returncode)
    work()


def work() -> None:
    from decode import checked_model
    from measure import fractions, numbers, parser, store

    made = parser(__doc__, geometry="quarter", dtype="float32", layers=None)
    made.add_argument("--lengths", type=numbers, default=[1024, 4096])
    made.add_argument("--budgets", type=fractions, default=[0.5, 0.2])
    made.add_argument("--turns", type=int, default=7)
    made.add_argument("--steps", type=int, default=30, help="decode steps that are timed")
    made.add_argument("--worker", action="store_true", help="this is the process inside the environment")
    arguments = made.parse_args()
    from importlib.metadata import version

    import kvpress

    model = checked_model(arguments)
    rows = [
        row
        for tokens in arguments.lengths
        for budget in arguments.budgets
        for row in measure(model, arguments, kvpress, tokens, budget)
    ]
    store("peers", arguments, rows, kvpress=version("kvpress"))


def measure(model: Any, arguments: Any, kvpress: Any, tokens: int, budget: float) -> list[dict[str, Any]]:
    from decode import prefilled, step
    from geometry import prompt
    from measure import peak_bytes, ratio, show
    from prefill import variants
    from transformers import DynamicCache

    from prefixkv_cache.tools.bench import take_turns

    ids = prompt(model, tokens)
    token = ids[:, :1].contiguous()
    dropped = 1 - budget

    def pressed(press: Any, attention: str = "sdpa") -> Any:
        model.set_attn_implementation(attention)
        cache = DynamicCache()
        with press(model) if press is not None else nullcontext():
            prefilled(model, ids, cache)
        model.set_attn_implementation("sdpa")
        return cache

    ours = variants(model, ["window", "all", "default", "by head"], budget)
    made = {name: lambda new=new: prefilled(model, ids, new()) for name, new in ours.items()}
    made["kvpress SnapKV"] = lambda: pressed(kvpress.SnapKVPress(compression_ratio=dropped, window_size=32))
    made["kvpress Knorm"] = lambda: pressed(kvpress.KnormPress(compression_ratio=dropped))
    if tokens <= 2048:  # eager weights of a longer prompt do not fit beside the rest
        made["kvpress ObservedAttention"] = lambda: pressed(
            kvpress.ObservedAttentionPress(compression_ratio=dropped), "eager"
        )
    prompt_times = take_turns(made, arguments.turns)
    caches = {name: make() for name, make in made.items()}
    held = {name: kv_bytes(cache) for name, cache in caches.items()}
    for cache in caches.values():
        step(model, cache, token)

    def one(name: str) -> Any:
        # kvpress leaves positions to the caller, as its own pipeline does: they go on from the tokens seen.
        position = ids.new_tensor([[tokens + steps[name]]])
        steps[name] += 1
        return decode_at(model, caches[name], token, position)

    steps = dict.fromkeys(made, 1)
    step_times = take_turns({name: lambda name=name: one(name) for name in made}, arguments.steps, warm_up=3)
    peaks = {name: peak_bytes(make, model.device) for name, make in made.items()}
    rows = []
    for name in list(made)[1:]:
        for phase, times in (("prompt", prompt_times), ("decode", step_times)):
            row = {"tokens": tokens, "budget": budget, "phase": phase, **ratio(times, name, "full")}
            row |= {"kv_mib": round(held[name] / 2**20, 2), "full_kv_mib": round(held["full"] / 2**20, 2)}
            row |= {"peak_mib": round(peaks[name] / 2**20, 1), "full_peak_mib": round(peaks["full"] / 2**20, 1)}
            rows.append(row)
            show(f"{tokens} tokens, budget {budget:g}, {phase}, KV {row['kv_mib']}, peak {row['peak_mib']} MiB", row)
    return rows


def kv_bytes(cache: Any) -> int:
    """Bytes of the memory that the key and value tensors stand in."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    return sum(tensor.untyped_storage().nbytes() for pair in pairs for tensor in pair)


def decode_at(model: Any, cache: Any, token: Any, position: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True).logits


if __name__ == "__main__":
    main()
