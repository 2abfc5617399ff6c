"""Draw the newest stored results into docs/images/: decoding, prompt phase, memory, peers, soak.

python benchmarks/plots.py [--results benchmarks/results] [--out docs/images]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent


def newest(folder: Path, benchmark: str) -> dict[str, Any] | None:
    """The newest result, and the rows of older ones of the same model, dtype and threads that it did not measure."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{benchmark}-*.json"))]
    if not found:
        return None
    same = [each for each in found if describe(each)[:-10] == describe(found[-1])[:-10]]
    keys = ("tokens", "budget", "variant", "against", "phase", "max_new_tokens", "batch", "segments", "seconds")
    rows = {tuple(row.get(key) for key in keys): row for each in same for row in each.get("rows", [])}
    return {**found[-1], "rows": list(rows.values())}


def describe(result: dict[str, Any]) -> str:
    machine = result["machine"]
    layers = f", {result['layers']} of its layers" if result.get("layers") else ""
    time = ", processor time" if by_processor_time(result) else ""
    threads = f"{machine['threads']} thread(s){time}"
    return f"{result.get('geometry')}{layers}, {result.get('dtype')}, {threads}, {result['created'][:10]}"


def bars(axes: Any, groups: list[str], series: dict[str, list[float | None]], spread: dict[str, list[Any]]) -> None:
    """Groups of bars, a colour for each series, with whiskers from quartile to quartile."""
    width = 0.8 / max(len(series), 1)
    for index, (name, values) in enumerate(series.items()):
        at = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        heights = [value or 0.0 for value in values]
        lines = axes.bar(at, heights, width * 0.92, label=name)
        axes.bar_label(lines, [f"{value:.2f}" if value else "" for value in values], fontsize=7, padding=2)
        for x, quartiles in zip(at, spread.get(name, []), strict=False):
            if quartiles:
                axes.plot([x, x], quartiles, color="black", linewidth=1)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(groups)), groups)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    axes.spines[["top", "right"]].set_visible(False)


def ratios(result: dict[str, Any], against: Any, name: Any) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Group rows by length and series by `name(row)`, of the rows whose base passes `against`."""
    rows = [row for row in result["rows"] if against(row)]
    lengths = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys(name(row) for row in rows))
    found = {(row["tokens"], name(row)): row for row in rows}
    picked = {one: [found.get((length, one), {}) for length in lengths] for one in names}
    if by_processor_time(result):
        # Of which there are no quartiles; wall time's would tell of the other programs.
        return heading(lengths), {one: [row.get("processor_ratio") for row in picked[one]] for one in names}, {}
    series = {one: [row.get("ratio") for row in of_one] for one, of_one in picked.items()}
    spread = {one: [row.get("quartiles") for row in of_one] for one, of_one in picked.items()}
    return heading(lengths), series, spread


def heading(lengths: list[int]) -> list[str]:
    return [f"{length} tokens" for length in lengths]


def by_processor_time(result: dict[str, Any]) -> bool:
    """On one thread processor time says what wall time says on a quiet machine."""
    return result["machine"]["threads"] == 1 and any("processor_ratio" in row for row in result.get("rows", []))


def draw(title: str, result: dict[str, Any], panels: list[tuple[str, Any, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False)
    for each, (label, against, name) in zip(axes[0], panels, strict=True):
        bars(each, *ratios(result, against, name))
        each.set_ylabel(label)
    figure.suptitle(f"{title} ({describe(result)})", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(path)


def memory_name(row: dict[str, Any]) -> str:
    segments = f", {row['segments']} segments" if row.get("segments") else ""
    return f"{row['budget']:g}{segments}{', planned' if row['max_new_tokens'] else ''}"


def draw_soak(result: dict[str, Any], path: Path) -> None:
    rows = result["rows"]
    minutes = [row["seconds"] / 60 for row in rows]
    figure, axes = plt.subplots(2, 1, figsize=(7, 4.5), sharex=True, layout="constrained")
    rise = f"{result['rss_rise_mib_per_hour']:+.1f} MiB an hour after the warm-up"
    for at, column, label in ((0, "rss_bytes", rise), (1, "largest_cache_bytes", "largest cache"),
                              (1, "tensor_bytes", "live tensors between cycles")):  # fmt: skip
        axes[at].plot(minutes, [row[column] / 2**20 for row in rows], lw=0.8, label=label)
        axes[at].legend(loc="lower right" if at == 0 else "upper right")
    axes[0].set(ylabel="resident memory, MiB", ylim=(0, None))
    axes[1].set(xlabel="minutes of processor time", ylabel="tensors, MiB")
    figure.suptitle(f"{rows[-1]['cycles']:,} cycles, {rows[-1]['tokens']:,} tokens")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=HERE / "results")
    made.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images")
    arguments = made.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if result := newest(arguments.results, "decode"):
        of = lambda row: f"{row['variant'].replace('ours', 'budget')}"  # noqa: E731
        panels = [
            ("time of a step / DynamicCache", lambda row: row["against"] == "full", of),
            ("time of a step / the ideal cache", lambda row: row["against"].startswith("ideal"), of),
        ]
        draw("Decoding", result, panels, arguments.out / "bench-decode.png")
    if result := newest(arguments.results, "prefill"):
        whole = lambda row: row["batch"] == 1 and row["against"] == "full"  # noqa: E731
        panels = [("time of the prompt phase / DynamicCache", whole, lambda row: row["variant"])]
        draw("Prompt phase", result, panels, arguments.out / "bench-prefill.png")
    if result := newest(arguments.results, "memory"):
        panels = [("peak of KV bytes / (budget x full + a layer)", lambda row: "ratio" in row, memory_name)]
        draw("KV memory", result, panels, arguments.out / "bench-memory.png")
    if result := newest(arguments.results, "peers"):
        phase = lambda wanted: lambda row: row["phase"] == wanted and row["budget"] == min(result["budgets"])  # noqa: E731
        name = lambda row: row["variant"]  # noqa: E731
        panels = [(f"{wanted} / full cache", phase(wanted), name) for wanted in ("prompt", "decode")]
        draw(f"Beside kvpress, budget {min(result['budgets']):g}", result, panels, arguments.out / "bench-peers.png")
    if (result := newest(arguments.results, "soak")) and result["rows"]:
        draw_soak(result, arguments.out / "soak.png")


if __name__ == "__main__":
    main()
