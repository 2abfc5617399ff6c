"""Turn the figures published with PrefixKV (arXiv 2412.03409) into the two bundled LLaVA-1.5 profiles, by layer.

    python examples/make_published_profiles.py

The figures in `examples/data/prefixkv-published.json` are *forget* ratios, by overall forget ratio; a profile holds
what is *kept*: keep = 1 - forget, at budget 1 - overall forget ratio. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from decimal import Decimal
from pathlib import Path

from prefixkv_cache import PrefixProfile
from prefixkv_cache.methods import PREFIXKV

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "data" / "prefixkv-published.json"
OUT = ROOT / "profiles"
CREATED = "2026-11-21"
LIBRARY_VERSION = "0.1.0"  # of the first release that bundles them: a later one does not change what they hold
MODELS = {  # name in the data: name of the profile, and the model that has transformers' own format
    "llava-v1.5-7b": ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"),
    "llava-v1.5-13b": ("llava-1.5-13b", "llava-hf/llava-1.5-13b-hf"),
}


def profile_from_forget(forget: dict[str, list[float]], metadata: dict[str, str]) -> PrefixProfile:
    """Return the profile of one model.

    Args:
        forget: by overall forget ratio, written in decimals, the forget ratio of each layer.
        metadata: string to string, as in `PrefixProfile`.
    """
    # Decimal: 1 - 0.9 is to be the budget 0.1, not 0.09999999999999998.
    rows = sorted((float(1 - Decimal(overall)), [1 - ratio for ratio in ratios]) for overall, ratios in forget.items())
    budgets, keep = zip(*rows, strict=True)
    return PrefixProfile(list(budgets), [list(row) for row in keep], metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the published figures (JSON)")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write to")
    parser.add_argument("--created", default=CREATED, help="the date to write into the profiles")
    args = parser.parse_args()

    published = json.loads(args.data.read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    for key, (name, model) in MODELS.items():
        metadata = {
            "model": model,
            "method": PREFIXKV.spell(full=True),  # what they were made for
            "source": f"{published['source']}; PrefixKV, arXiv 2412.03409; keep = 1 - forget",
            "samples": "unknown",
            "library_version": LIBRARY_VERSION,
            "created": args.created,
        }
        path = args.out / f"{name}.safetensors"
        profile_from_forget(published[key], metadata).save(path)
        print(f"{path}: {PrefixProfile.load(path)!r}")


if __name__ == "__main__":
    main()
