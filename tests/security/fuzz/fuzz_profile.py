"""Coverage-guided fuzzing of profile files: `pip install atheris`, then

    python tests/security/fuzz/fuzz_profile.py -max_total_time=600 [corpus folder]

Half of the inputs are mutated by libFuzzer, half in the ways of hostile.py, where the rules are that each one is held
against. The profiles that come with the package and a few small ones are there to begin with. libFuzzer's own options
are taken (`-help=1`); an input that breaks a rule is written to a file `crash-...`, and given as an argument it is run
again by itself.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["prefixkv_cache.profiles", "prefixkv_cache.methods.method"]):
    import prefixkv_cache.profiles.profile  # noqa: F401  (instrumented)

import hostile

from prefixkv_cache.profiles.bundled import bundled_profiles

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-profile-"))
FILE = FOLDER / "fuzzed.safetensors"
SEEDS: list[bytes] = []


def one_input(data: bytes) -> None:
    FILE.write_bytes(data)
    hostile.check(FILE)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return atheris.Mutate(data, max_size)
    try:
        return hostile.mutate(data, rng)[:max_size]
    except Exception:  # too damaged already to be taken apart as a profile
        return hostile.mutate(rng.choice(SEEDS), rng)[:max_size]


def main() -> None:
    SEEDS.append(hostile.good_version_1())
    for path in bundled_profiles().values():
        SEEDS.append(path.read_bytes())
    for shape in ((3, 3, 2), (1, 1, 1), (2, 8, 4)):
        hostile.good(*shape).save(FILE)
        SEEDS.append(FILE.read_bytes())
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, data in enumerate(SEEDS):
        (corpus / str(number)).write_bytes(data)
    arguments = [*sys.argv, "-timeout=10", "-rss_limit_mb=2048", "-max_len=20000"]
    if not any(Path(argument).is_file() for argument in sys.argv[1:]):
        arguments.append(str(corpus))
    atheris.Setup(arguments, one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
