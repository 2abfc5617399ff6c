"""Is this checkout fit to be released? Builds it, looks into what was built, installs that alone and tries it.

`make release-check`, or `python scripts/release_check.py [--pythons 3.10,3.12] [--tests]`. In order:

1. sdist and wheel are built in a fresh folder (the wheel from the sdist), and `twine check --strict` has no complaint;
2. the wheel holds the package, its marker of types, profiles, the demo's model and the licence, and nothing else; the
   sdist holds tests and documentation too, so that whoever packages it can test it;
3. the version is the same in the file names, the metadata and the changelog;
4. for each Python found: the wheel is installed into an empty environment, with its core dependencies only, and there
   `pip check`, `prefixkv --version`, `prefixkv inspect` and `prefixkv demo` run, in a folder away from the checkout.
   With `--tests` the tests of the laws, the units and of hostile profiles run there as well.

The tools and environments lie in `.venv-release/` and are used again; the wheel is always installed afresh. Prints one
line for each step; the exit status is 0 if all held. A Python that is not on this machine is named and left out.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-release"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TESTS = ("tests/laws", "tests/units", "tests/security")
IN_WHEEL = ("py.typed", "profiles/llava-1.5-7b.safetensors", "models/scene-llava/model.safetensors")
IN_SDIST = (
    "tests/conftest.py",
    "tests/support/oracle.py",
    "docs/how-it-works.md",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
)


class NotReady(Exception):
    """What is wrong, and where."""


def run(*command: object, **options: object) -> str:
    """Run a command; its output, or `NotReady` with the end of it."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode:
        raise NotReady(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def inside(environment: Path, program: str) -> Path:
    return environment / ("Scripts" if os.name == "nt" else "bin") / program


def fresh(environment: Path, python: str | None = None) -> Path:
    """The Python of an environment, which is made if it is not there."""
    if not inside(environment, "python").exists():
        if python is None:
            venv.create(environment, with_pip=True)
        else:
            run(python, "-m", "venv", environment)
    return inside(environment, "python")


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NotReady(otherwise)


# What is built.


def build(folder: Path) -> tuple[Path, Path]:
    """Wheel and sdist."""
    python = fresh(ENVIRONMENTS / "tools")
    run(python, "-m", "pip", "install", "--quiet", "build", "twine")
    run(python, "-m", "build", "--outdir", folder, ROOT)
    run(python, "-m", "twine", "check", "--strict", *folder.iterdir())
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def look_into(wheel: Path, sdist: Path) -> str:
    """The version, if all that should be inside is there and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = email.message_from_bytes(archive.read(metadata))
    version = described["Version"]
    info = f"prefixkv_cache-{version}.dist-info/"
    for name in IN_WHEEL:
        require(f"prefixkv_cache/{name}" in names, f"{name} is not in the wheel")
    require(any(name.startswith(info) and name.endswith("LICENSE") for name in names), "no licence in the wheel")
    strays = [name for name in names if not name.startswith(("prefixkv_cache/", info)) or "__pycache__" in name]
    require(not strays, f"the wheel holds what it should not: {strays}")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for name in IN_SDIST:
        require(name in packed, f"{name} is not in the sdist")
    strays = sorted(name for name in packed if name.startswith((".venv", "out/", "runs/", ".git/")))
    require(not strays, f"the sdist holds what it should not: {strays[:5]}")
    require(f"-{version}-" in wheel.name and f"-{version}.tar" in sdist.name, "file names and metadata differ")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    require(f"## [{version}]" in changelog, f"CHANGELOG.md says nothing of {version}")
    return version


# What is installed.


def interpreters(wanted: list[str]) -> Iterator[tuple[str, str | None]]:
    """Version and path of each Python that was asked for; None where there is none."""
    for version in wanted:
        candidates = [
            shutil.which(f"python{version}"),
            *sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python")),
        ]
        if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
            candidates.insert(0, sys.executable)
        yield version, next((str(path) for path in candidates if path and works(path)), None)


def works(python: str | Path) -> bool:
    return subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0


def try_wheel(wheel: Path, version: str, python: str, name: str, tests: bool) -> str:
    python = str(fresh(ENVIRONMENTS / name, python))
    run(python, "-m", "pip", "install", "--quiet", wheel)  # what it depends on, where that is not there yet
    run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    with tempfile.TemporaryDirectory() as folder:
        away = {"cwd": folder, "env": {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}}
        run(python, "-m", "pip", "check", **away)
        missing = "import importlib.util as u; print(u.find_spec('matplotlib'), u.find_spec('pytest'))"
        require(run(python, "-c", missing, **away).strip() == "None None", f"{python} has more than the core")
        command = inside(ENVIRONMENTS / name, "prefixkv")
        require(version in run(command, "--version", **away), "prefixkv --version says another version")
        run(command, "inspect", "llava-1.5-7b", **away)
        said = run(command, "demo", **away)
        require("budget" in said, f"prefixkv demo did not run as it should:\n{said}")
        return run_tests(python, Path(folder)) if tests else "demo ran with the core alone"


def run_tests(python: str, folder: Path) -> str:
    """The tests on the installed wheel, from a copy of the checkout without `src`; the environment stays as it is."""
    run(python, "-m", "pip", "install", "--quiet", "--target", folder / "extra", "pytest", "hypothesis")
    skipped = shutil.ignore_patterns("src", ".*", "out", "runs", "__pycache__")
    checkout = shutil.copytree(ROOT, folder / "checkout", ignore=skipped)
    away = {"cwd": checkout, "env": {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder / "extra")}}
    report = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, **away)
    return re.sub(r"^=+ | =+$", "", report.strip().splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pythons", default=",".join(PYTHONS), help="versions to install on (%(default)s)")
    parser.add_argument("--tests", action="store_true", help="run the tests on the installed wheel, too (minutes each)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheel, sdist = build(Path(folder))
            print(f"built: {wheel.name} ({wheel.stat().st_size / 2**20:.1f} MiB), {sdist.name}", flush=True)
            version = look_into(wheel, sdist)
            print(f"contents: as they should be, version {version}", flush=True)
            for name, python in interpreters(arguments.pythons.split(",")):
                said = (
                    "not on this machine"
                    if python is None
                    else try_wheel(wheel, version, python, name, arguments.tests)
                )
                print(f"Python {name}: {said}", flush=True)
        except NotReady as error:
            print(f"not ready: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
