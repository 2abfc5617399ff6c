"""Runs the tests with other releases of transformers, each in an environment of its own.

`python scripts/versions.py` takes the oldest supported release, the first with today's cache interface, and one from
the middle; `python scripts/versions.py 5.4.0` only that one. The environments lie in `.venv-versions/`, are made where
they are missing, and are used again; torch is the one that constraints.txt names. What a release itself cannot do is
skipped, and pytest's report says why. Prints a line for each release; the exit status is 0 if all tests passed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

VERSIONS = ("4.57.6", "5.4.0", "5.17.0")
TESTS = ("tests/laws", "tests/units", "tests/models/test_models.py")
ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".venv-versions"


def pinned(package):
    """`package==version` as constraints.txt has it."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def environment(version):
    """The Python of this release's environment, which is made if it is not there."""
    folder = ENVIRONMENTS / version
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / ".installed"
    if not done.exists():
        print(f"making {folder.relative_to(ROOT)}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        packages = [*map(pinned, ("torch", "pytest", "pytest-xdist", "hypothesis")), f"transformers=={version}"]
        # The package itself from this checkout, with whatever else it needs.
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages, "--editable", ROOT], check=True)
        done.touch()
    return python


def test(version, arguments):
    """Run the tests with this release; whether they passed, and the last line of pytest's report."""
    try:
        python = environment(version)
    except subprocess.CalledProcessError:
        return False, "the environment could not be made"
    options = ("-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal")
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", *options, *TESTS, *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=one_thread, stdout=subprocess.PIPE, text=True) as run:
        last = ""
        for line in run.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    return run.returncode == 0, re.sub(r"^=+ | =+$", "", last)


def main():
    """The command line; arguments that are no release go to pytest."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"releases; default: {' '.join(VERSIONS)}")
    options, arguments = parser.parse_known_args()
    results = {version: test(version, arguments) for version in options.versions or VERSIONS}
    print()
    for version, (_, summary) in results.items():
        print(f"transformers {version}: {summary}")
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
