"""The first hour of a new user: what the README says is done, and what is printed is looked at.

By default the commands run in this process, with fewer tokens, and the examples are left to test_examples.py. With
`PREFIXKV_FIRST_HOUR=1` (`make first-hour`) all of it is done as a person does it, which takes a quarter of an hour:

- the checkout is copied, an empty environment is made, and `pip install` is what the README says, with constraints.txt;
- every command of the README runs as it stands there, with M, its pictures and its data in their places;
- its Python blocks run, and every example that does not train a model.

Left out are `make test`, which runs this file, and the extras `study` and `lm-eval`, which bring models and data sets.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from prefixkv_cache.tools.demo import scenes

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WHOLE = bool(os.environ.get("PREFIXKV_FIRST_HOUR"))
MODEL = ROOT / "models" / "scene-llava"
KV = r"KV [\d.]+ MiB \(\d+% of full\) at the prompt's end, [\d.]+ MiB \(\d+% of full\) at the answer's end"

# What each command of the README prints, on standard output and on standard error, and which file it writes; and what
# keeps it short.
SAYS = {
    "demo": (r"scene \d+: 4 objects(.|\n)*what was kept: out/demo.png", "", "out/demo.png", []),
    "generate": (r"\w+", f"loading .*\n(.|\n)*full cache: .*\n(.|\n)*budget 30 % .*{KV}", None,
                 ["--max-new-tokens", "4"]),
    "report": (r"report.html: \d+ KiB; open it in a browser", "observing", "report.html", ["--max-new-tokens", "4"]),
    "recommend": (r"budget +answers lost(.|\n)*(recommended: budget=|none of these budgets)", r"answer/s", None,
                  ["--budgets", "0.5,0.2", "--max-new-tokens", "8"]),
    "calibrate": (r"my-profile.safetensors: 8 layers", r"calibrating on 4 of 4 records", "my-profile.safetensors",
                  ["--by", "mass", "--unit", "layer", "--budgets", "0.2,0.5,1.0"]),
    "evaluate": (r"results: \d+ rows in results.csv, summary.md, run.json, 1 drawings", r"evaluating 4 samples: ",
                 "results/summary.md", ["--methods", "snapkv", "--budgets", "0.5", "--max-new-tokens", "4"]),
    "bench": (r"KV prompt, MiB +KV answer, MiB(.|\n)*full(.|\n)*0\.5(.|\n)*0\.2", "loading", None,
              ["--new-tokens", "2", "--turns", "1"]),
    "compress": (r"menu.safetensors", "loading", "menu.safetensors", []),
    "inspect": (r"keep ratio \(fraction of the prompt's pairs kept\) by layer", "", None, []),
}  # fmt: skip
BAD = [
    ("", "COMMAND"),
    ("nope", "'nope'"),
    ("demo --out demo.jpg", "the name of a picture ends in .png"),
    ("demo --model nowhere", "there is no model folder 'nowhere'"),
    ("generate --model nope --prompt x", "there is no such folder, and an id on the hub reads owner/name"),
    ("generate --model M --prompt x --image none.png", "there is no image 'none.png'"),
    ("generate --model M --prompt x --image questions.json", "cannot read 'questions.json' as an image"),
    ("generate --model M --prompt x --budget 1", "write 1.0 for everything"),
    ("generate --model M --prompt x --budget 30%", "'30%' is no budget"),
    ("generate --model M --prompt x --method snapkw", "there is no method 'snapkw'"),
    ("generate --model M --prompt x --profile llava-1.5-7c", "no bundled profile is named 'llava-1.5-7c'"),
    ("generate --model M --prompt x --profile me/my-model", "there is no such file"),
    ("report --model M --prompt x --out report.pdf", "the name of a page ends in .html"),
    ("report --model M --prompt x --beside nope", "there is no method 'nope'"),
    ("recommend --model M --data none.json", "there is no data file 'none.json'"),
    ("recommend --model M --data questions.json --images folder --max-loss 2", "'2' is no share"),
    ("calibrate --model M --data questions.json --out profile", "the name of a profile ends in .safetensors"),
    ("calibrate --model M --images folder --out p.safetensors", "a folder of images needs a prompt"),
    ("evaluate --model M --data cat.png --out out/e", "cannot read the data file 'cat.png'"),
    ("evaluate --model M --data scenes --out questions.json", "which is a file; give a folder"),
    ("bench --model M", "say what the model shall read"),
    ("bench --model M --tokens 10 --budgets 0.5,x", "'x' is no budget"),
    ("compress --model M --out c.safetensors", "compress"),
    ("inspect questions.json", "questions.json"),
    ("plot llava-1.5-7b --out plot.gif", "the name of a picture ends in .png"),
]
PYTHON_HEAD = """
from PIL import Image
from prefixkv_cache.tools.loading import load_model, chat_text
model, processor = load_model(M)
image = Image.open("cat.png")
prompt = chat_text(processor, "what is at the bottom right?")
"""


@pytest.fixture(scope="module")
def person(tmp_path_factory):
    """Someone at a terminal, in a folder with a picture, some questions, and nothing else."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "folder").mkdir()
    records = []
    for seed in scenes.TEST_SEEDS[:4]:
        scene = scenes.draw_scene(seed)
        scene.image.save(desk / "folder" / f"{seed}.png")
        question = scenes.questions(scene, 1)[0]
        records.append({"question": question.text, "answer": question.answer, "image": f"{seed}.png"})
    (desk / "questions.json").write_text(json.dumps(records))
    for name in ("cat.png", "menu.png"):
        shutil.copy(desk / "folder" / f"{scenes.TEST_SEEDS[0]}.png", desk / name)
    return Person(desk)


class Person:
    """Types commands.

    Attributes:
        desk: the current folder.
        checkout: a copy of the repository; this one, unless all is done.
    """

    def __init__(self, desk):
        self.desk, self.checkout, self.bin = desk, ROOT, Path(sys.executable).parent
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if WHOLE:
            self._install()

    def _install(self):
        self.checkout = self.desk / "checkout"
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for name in filter(None, listed.splitlines()):
            if (ROOT / name).is_file():
                (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.checkout / name)
        subprocess.run([sys.executable, "-m", "venv", self.desk / "env"], check=True)
        self.bin = self.desk / "env" / "bin"
        self.environment["PATH"] = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        self.environment.pop("PYTHONPATH", None)

    def types(self, *words, folder=None, stdin="", timeout=1500):
        """(status, standard output, standard error) of a command."""
        done = subprocess.run(
            list(map(str, words)), cwd=folder or self.desk, env=self.environment, input=stdin, capture_output=True,
            text=True, timeout=timeout,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def prefixkv(person, run, monkeypatch):
    """Run the command with these words, M being the model; at the desk."""
    monkeypatch.chdir(person.desk)

    def call(words, *more):
        words = [str(MODEL) if word == "M" else word for word in words] + list(more)
        return person.types(person.bin / "prefixkv", *words) if WHOLE else run(*words)

    return call


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def readme_lines(program):
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == program]


@pytest.mark.skipif(not WHOLE, reason="installs: PREFIXKV_FIRST_HOUR=1")
def test_the_package_installs_as_the_readme_says(person):
    """First what makes the commands run, then every extra that the README's table names."""
    installs = [words for words in readme_lines("pip") if words == ["install", "."]]
    extras = [shlex.split(found)[1:] for found in re.findall(r"`(pip install [^`]*\[\w[\w-]*\]'?)`", README)]
    assert installs and len(extras) >= 6
    for words in installs + [each for each in extras if not re.search("study|lm-eval|dev", each[-1])]:
        status, _, err = person.types(
            "pip", *words[:1], "-q", "-c", "constraints.txt", *words[1:], folder=person.checkout
        )
        assert status == 0, err
        status, out, err = person.types("prefixkv", "--version")
        assert (status, err) == (0, "") and out.startswith("prefixkv-cache ")


@pytest.mark.parametrize("words", readme_lines("prefixkv"), ids=lambda words: words[0])
def test_the_readme_s_commands_say_what_they_do(person, prefixkv, words):
    out_says, err_says, file, shorter = SAYS[words[0]]
    status, out, err = prefixkv(words, *([] if WHOLE else shorter))
    assert status == 0, err
    assert re.search(out_says, out) and re.search(err_says, err), (out, err)
    assert file is None or (person.desk / file).stat().st_size > 500


@pytest.mark.parametrize(("line", "says"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_that_names_it(person, prefixkv, line, says):
    before = sorted(person.desk.rglob("*")) if not WHOLE else None
    status, out, err = prefixkv(shlex.split(line))
    told = [each for each in err.splitlines() if not each.startswith("loading ")]
    assert (status, out, len(told)) == (2, "", 1) and says in told[0] and told[0].startswith("prefixkv")
    assert before is None or sorted(person.desk.rglob("*")) == before  # nothing is written


def test_other_commands(person, prefixkv):
    status, out, _ = prefixkv(["inspect", "llava-1.5-7b"])
    assert status == 0 and "never measured against the full cache" in out
    status, out, _ = prefixkv(["plot", "scene-llava", "--out", "new/folder/plot.png"])
    assert (status, out) == (0, "wrote new/folder/plot.png\n") and (person.desk / "new/folder/plot.png").exists()


def test_a_demo_s_smaller_budgets_hold_fewer_bytes(prefixkv):
    """Of one method, at both ends, in every table."""
    status, out, _ = prefixkv(["demo", "--out", "again/demo.png"])
    tables = out.split("\n> ")[1:]
    assert status == 0 and len(tables) == 3
    for table in tables:
        rows = re.findall(r"^(full cache|default, profile|the paper) +(\d+)% +(\d+) +(\d+) ", table, re.MULTILINE)
        assert len(rows) == 6
        for (name, budget, *ends), (other, smaller, *less) in itertools.pairwise(rows):
            if name == other:
                assert int(budget) > int(smaller) and all(int(a) > int(b) for a, b in zip(ends, less, strict=True))


@pytest.mark.skipif(not WHOLE, reason="runs in the environment that was made: PREFIXKV_FIRST_HOUR=1")
def test_the_readme_s_python_runs_and_its_first_block_is_silent(person):
    head = PYTHON_HEAD.replace("load_model(M)", f"load_model({str(MODEL)!r})")
    first, *rest = blocks("python")
    status, out, err = person.types("python", "-W", "error", "-c", head + first)
    assert (status, out, err) == (0, "", "")
    said = "\nprint(repr(cache), cache.stored_lengths())\n"
    status, out, err = person.types("python", "-c", head + first + said + "".join(rest))
    warned = [line for line in err.splitlines() if "Warning" in line]
    assert status == 0 and all("MethodMismatchWarning" in line for line in warned), err  # this model has a profile
    assert "bytes=" in out and "in a full cache" in out


EXAMPLES = {
    "quickstart.py": ([], "", r"budget 0.2: a small green diamond\."),
    "batch.py": ([], "", r"\w"),
    "chat.py": ([], "what is at the bottom right?\n", r"a small green diamond\."),
    "compress.py": ([], "", r"\w"),
    "make_scene_data.py": (["--out", "drawn", "--count", "1"], "", ""),
    "make_published_profiles.py": (["--help"], "", "usage"),
    "train_scene_vlm.py": (["--help"], "", "usage"),
    "train_smol_llava.py": (["--help"], "", "usage"),
}


@pytest.mark.skipif(not WHOLE, reason="test_examples.py runs them in this environment: PREFIXKV_FIRST_HOUR=1")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_it_is(person, name):
    words, stdin, says = EXAMPLES[name]
    status, out, err = person.types("python", person.checkout / "examples" / name, *words, stdin=stdin)
    assert status == 0, err
    assert re.search(says, out), (out, err)


@pytest.mark.skipif(not WHOLE, reason="starts a server: PREFIXKV_FIRST_HOUR=1")
def test_the_browser_s_chat_starts_and_ends(person):
    words = ["python", str(person.checkout / "examples" / "gradio_app.py"), "--port", "17860"]
    log, end = person.desk / "gradio.log", time.monotonic() + 300
    environment = {**person.environment, "PYTHONUNBUFFERED": "1"}
    with (
        log.open("w") as file,
        subprocess.Popen(words, cwd=person.desk, env=environment, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        try:
            # The last line that is said when the server is up.
            while (
                "To create a public link" not in log.read_text() and process.poll() is None and time.monotonic() < end
            ):
                time.sleep(0.2)
            with urllib.request.urlopen("http://127.0.0.1:17860", timeout=60) as page:
                assert page.status == 200
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()
    said = log.read_text()
    assert "http://127.0.0.1:17860" in said and "Traceback" not in said, said


@pytest.mark.skipif(not WHOLE, reason="test_examples.py runs it in this environment: PREFIXKV_FIRST_HOUR=1")
def test_the_notebook_s_cells_run(person):
    cells = json.loads((person.checkout / "examples" / "prefixkv.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))
    status, _, err = person.types("python", "-c", code, folder=person.checkout / "examples")
    assert status == 0, err


def test_every_example_is_played():
    played = {*EXAMPLES, "gradio_app.py", "prefixkv.ipynb"}
    assert {path.name for path in (ROOT / "examples").glob("*.*")} - {"__init__.py"} <= played
