"""What all benchmarks share: ratios of times, peaks of memory, and results that are stored and never overwritten.

Every figure is a ratio within one run. The variants take turns, one call each, so that whatever else the machine does
meets all of them alike; a ratio is the median over the turns, with the quartiles beside it. Beside wall time stands the
processor time of all threads, which other programs disturb less; on one thread and a quiet machine the two agree.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).resolve().parent / "results"


def ratio(times: Mapping[str, list[tuple[float, float]]], name: str, base: str) -> dict[str, Any]:
    """Median wall time of `name` and of `base`, and the median and quartiles of their ratio, turn by turn."""
    pairs = list(zip(times[name], times[base], strict=True))
    wall, processor = ([one[at] / max(other[at], 1e-9) for one, other in pairs] for at in (0, 1))
    low, _, high = statistics.quantiles(wall, n=4) if len(wall) > 1 else wall * 3
    return {
        "variant": name,
        "against": base,
        "milliseconds": round(1e3 * statistics.median(each[0] for each in times[name]), 3),
        "base_milliseconds": round(1e3 * statistics.median(each[0] for each in times[base]), 3),
        "ratio": round(statistics.median(wall), 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "processor_ratio": round(statistics.median(processor), 3),
        "turns": len(pairs),
    }


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """What the call needs at its peak, beyond what stood before: by the allocator on a GPU, the profiler on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


def machine(device: str = "cpu") -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    if device.startswith("cuda"):
        name = f"{torch.cuda.get_device_name()}; {name}"
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def steady_memory() -> None:
    """Start again with an allocator that keeps freed memory.

    glibc gives large blocks back to the system at every free, and asking for them again costs a CPU more time than
    some of what is measured here, and not always the same. Without effect elsewhere.
    """
    keeps = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
    if any(name not in os.environ for name in keeps):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **keeps})


def parser(description: str | None, *, geometry: str, dtype: str, layers: int | None) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have, with their defaults."""
    from geometry import GEOMETRIES

    steady_memory()
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--geometry", default=geometry, choices=sorted(GEOMETRIES))
    made.add_argument("--layers", type=int, default=layers, help="fewer than the geometry's own")
    made.add_argument("--dtype", default=dtype, choices=["float32", "bfloat16", "float16"])
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, help="CPU threads for torch")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder that the result is added to")
    return made


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def fractions(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def store(benchmark: str, arguments: argparse.Namespace, rows: Iterable[Mapping[str, Any]], **more: Any) -> Path:
    """Write the rows, with the arguments and the machine, to a new file; print them as the last line."""
    created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%SZ")
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    facts = {"benchmark": benchmark, "created": created, **settings, **more, "machine": machine(arguments.device)}
    result = {**facts, "rows": list(rows)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{benchmark}-{created}.json"
    with open(path, "x", encoding="utf-8") as file:  # never over an older one
        json.dump(result, file, indent=1)
        file.write("\n")
    print(json.dumps(result), flush=True)
    return path


def verdict(value: float, goal: float | None) -> str:
    return "" if goal is None else f"   goal {goal:g}: {'met' if value <= goal else 'MISSED'}"


def show(title: str, row: Mapping[str, Any], goal: float | None = None) -> None:
    low, high = row["quartiles"]
    print(
        f"{title}: {row['variant']} over {row['against']} {row['ratio']:.3f} ({low:.3f} to {high:.3f}; "
        f"processor time {row['processor_ratio']:.3f}), "
        f"{row['milliseconds']:.1f} ms against {row['base_milliseconds']:.1f}{verdict(row['ratio'], goal)}",
        flush=True,
    )
