"""The command line itself: bad input is one line, help is quick, Ctrl-C ends it, `--method` is what is used."""

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

import tiny_vlm
from prefixkv_cache import PrefixKVCache, methods
from prefixkv_cache.cli import COMMANDS, main
from prefixkv_cache.tools import arguments as types
from prefixkv_cache.tools.evaluate.results import Results, Unit
from prefixkv_cache.tools.loading import load_model

SCRIPT = "import sys; from prefixkv_cache.cli import main; print('ready', flush=True); sys.exit(main())"
INTERRUPTED_IMPORT = """
import sys
class Interrupt:
    def find_spec(name, *where):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.modules.pop("argparse", None)
sys.meta_path.insert(0, Interrupt)
from prefixkv_cache.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny_vlm.save_model(folder / "model")
    tiny_vlm.save_pictures(folder / "images", 1)
    return folder


# Start and end.


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_version_and_help_are_quick(arguments):
    """In processor time, as wall time is whatever else the machine does."""

    def spent():
        return sum(os.times()[2:4])  # by children that have ended

    seconds = []
    for _ in range(3):
        started = spent()
        done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
        seconds.append(spent() - started)
    assert done.returncode == 0 and not done.stderr
    assert "prefixkv" in done.stdout
    assert min(seconds) < 0.5


def test_the_package_loads_nothing_before_a_name_is_asked_for():
    script = """
import sys, prefixkv_cache
heavy = {"torch", "transformers", "numpy", "PIL", "safetensors"}
assert set(prefixkv_cache.__all__) <= set(dir(prefixkv_cache))
assert not heavy & set(sys.modules)
from prefixkv_cache import PrefixProfile
assert "transformers" not in sys.modules
for name in prefixkv_cache.__all__:
    assert getattr(prefixkv_cache, name).__name__.endswith(name)
try:
    prefixkv_cache.nothing
except AttributeError as error:
    assert "'prefixkv_cache' has no attribute 'nothing'" in str(error)
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("module", ["argparse", "prefixkv_cache.tools.generate", "torch", "numpy", "transformers"])
def test_ctrl_c_while_something_is_imported(module):
    script, words = INTERRUPTED_IMPORT.format(module=module), ["generate", "--model", "m", *COMMON]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr in ("", "prefixkv: interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("seconds", [0.05, 0.3, 1, 2, 4])
def test_ctrl_c_at_any_time_is_status_130_and_no_traceback(home, seconds):
    """Through imports and loading to the last token."""
    words = [*COMMON, "--model", home / "model", "--max-new-tokens", "400"]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "generate", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err and "Exception ignored" not in err
    assert process.returncode == 130, err


def test_an_interrupt_that_became_another_error_is_an_interrupt(run, monkeypatch):
    def interrupted(arguments):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("numpy could not be imported") from None

    monkeypatch.setattr("prefixkv_cache.tools.generate.run", interrupted)
    assert run("generate", "--model", "m", *COMMON) == (130, "", "prefixkv: interrupted\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "a b"),
        (RuntimeError(), "RuntimeError"),
        (KeyError("layer"), "KeyError: 'layer' (PREFIXKV_DEBUG=1 shows where)"),
    ],
)
def test_what_a_tool_raises_is_one_line_unless_asked_for(run, monkeypatch, error, line):
    def fails(arguments):
        raise error

    monkeypatch.setattr("prefixkv_cache.tools.generate.run", fails)
    assert run("generate", "--model", "m", *COMMON) == (2, "", f"prefixkv generate: {line}\n")
    monkeypatch.setenv("PREFIXKV_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["generate", "--model", "m", *COMMON])


def test_a_reader_that_has_gone_is_no_error(home):
    words = ["generate", "--model", home / "model", *COMMON, "--max-new-tokens", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "prefixkv_cache.cli", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait(120) == 0
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


# Arguments.

COMMON = ["--prompt", "what is red ?"]


@pytest.mark.parametrize(
    ("arguments", "wrong", "program"),
    [
        ([], "COMMAND", "prefixkv"),
        (["--nope"], "COMMAND", "prefixkv"),
        (["nope"], "'nope'", "prefixkv"),
        (["generate"], "--model, --prompt", "prefixkv generate"),
        (["generate", "--model", "m", *COMMON, "--nope", "a b"], "--nope 'a b'", "prefixkv generate"),
        (["generate", "--model", "m", *COMMON, "--budget", "half"], "'half'", "prefixkv generate"),
        (["generate", "--model", "m", *COMMON, "--budget", "1"], "write 1.0 for everything", "prefixkv generate"),
        (["generate", "--model", "m", *COMMON, "--max-new-tokens", "0"], "at least 1", "prefixkv generate"),
        (["report", "--model", "m", *COMMON, "--budgets", "0.1,\nx"], "is no budget", "prefixkv report"),
        (["inspect", "p", "--budgets", "0.1,x"], "'x'", "prefixkv inspect"),
        (["calibrate", "--model", "m", "--out", "a\nb", "--by", "so\nme"], "--", "prefixkv calibrate"),
        (["plot", "p"], "--out", "prefixkv plot"),
        (["recommend", "--model", "m", "--data", "d", "--max-loss", "2"], "'2' is no share", "prefixkv recommend"),
        (["demo", "--threads", "0"], "at least 1", "prefixkv demo"),
        (["bench", "--model"], "--model", "prefixkv bench"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_told_in_one_line(run, arguments, wrong, program):
    """No page of usage: what is wrong, and the help that knows better."""
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(f"{program}: ") and wrong in err and err.endswith(f"; see {program} --help\n")


@pytest.mark.parametrize(
    ("text", "value"), [("0.3", 0.3), ("1.0", 1.0), ("1e-2", 0.01), ("2", 2), ("512", 512), (".5", 0.5)]
)
def test_a_budget_is_a_fraction_or_a_number_of_pairs(text, value):
    found = types.budget(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["1", "0", "-3", "1.5", "0.0", "nan", "inf", "1e3", "", "a", "0,3"])
def test_what_is_no_budget(text):
    with pytest.raises(types.argparse.ArgumentTypeError, match=r"such as 512|write 1\.0"):
        types.budget(text)


OF_COMMAND = {
    "generate": ["--max-new-tokens", "2", *COMMON],
    "report": ["--max-new-tokens", "2", "--budgets", "0.5", "--out", "report.html", *COMMON],
    "bench": ["--new-tokens", "2", "--turns", "1", "--budgets", "0.5", *COMMON],
}


@pytest.mark.parametrize("command", OF_COMMAND)
@pytest.mark.parametrize("spelling", [None, "prefixkv", "snapkv:queries=8;pooling=3"])
def test_the_method_of_a_command_is_what_was_asked_for(home, run, tmp_path, monkeypatch, command, spelling):
    monkeypatch.chdir(tmp_path)
    made, for_model = [], PrefixKVCache.for_model.__func__

    def watch(cls, *arguments, **options):
        made.append(for_model(cls, *arguments, **options))
        return made[-1]

    monkeypatch.setattr(PrefixKVCache, "for_model", classmethod(watch))
    options = [] if spelling is None else ["--method", spelling]
    assert run(command, "--model", home / "model", *OF_COMMAND[command], *options)[0] == 0
    assert made
    assert {cache.method for cache in made} == {methods.Method.parse(spelling or "default")}


@pytest.mark.parametrize("command", OF_COMMAND)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "nope"], "there is no method 'nope'"),
        (["--method", "snapkv:queries=-3"], "queries"),
        (["--method", "prefixkv", "--profile", "no-such"], "no-such"),
    ],
    ids=str,
)
def test_a_method_that_cannot_be_is_told_before_the_model_is_loaded(
    run, tmp_path, monkeypatch, command, options, words
):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(command, "--model", "no-model", *OF_COMMAND[command], *options)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"prefixkv {command}: ") and words in err and "no-model" not in err


def test_a_mismatch_is_told_once_and_in_one_line(home, run, tmp_path, monkeypatch):
    from prefixkv_cache import PrefixProfile

    monkeypatch.chdir(tmp_path)
    metadata = {"method": methods.PREFIXKV.spell(full=True)}
    PrefixProfile([0.2, 0.5], [[0.2] * 3, [0.5] * 3], metadata).save(tmp_path / "paper.safetensors")
    words = ["report", "--model", home / "model", "--profile", "paper.safetensors", *OF_COMMAND["report"]]
    shown = warnings.showwarning
    for more, told in (((), 0), (("--method", "prefixkv"), 0), (("--method", "snapkv", "--budgets", "0.5,0.2"), 1)):
        status, _, err = run(*words, *more)
        lines = [line for line in err.splitlines() if "was made with" in line]
        assert (status, len(lines)) == (0, told) and "Warning" not in err
        assert all(line.startswith("prefixkv report: ") for line in lines)
    assert warnings.showwarning is shown


# Where the model goes, and where files go.


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_device_map_on_a_cpu_leaves_the_dtype_as_it_is_without(tmp_path, device_map):
    pytest.importorskip("accelerate")
    if torch.cuda.is_available() and device_map == "auto":
        pytest.skip("there is a GPU")
    loaded, processor = load_model(str(tiny_vlm.save_model(tmp_path / "float32")), device="cpu")
    loaded.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for options, dtype in (({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)):
        model, _ = load_model(str(tmp_path / "model"), device_map=device_map, **options)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_device_beside_a_device_map_is_refused(home, run):
    where = ["--device", "cpu", "--device-map", "auto"]
    status, _, err = run("generate", "--model", home / "model", *COMMON, *where)
    assert status == 2 and "--device cpu and --device-map auto both say" in err


def test_folders_of_out_are_made(home, run, tmp_path):
    out = tmp_path / "a" / "b"
    model = ["--model", home / "model"]
    status, *_ = run("report", *model, *OF_COMMAND["report"], "--out", out / "report.html")
    assert status == 0 and (out / "report.html").is_file()
    data = ["--images", home / "images", "--prompt", "what ?", "--by", "mass", "--budgets", "0.5"]
    status, *_ = run("calibrate", *model, *data, "--out", out / "c" / "p.safetensors")
    assert status == 0 and [path.name for path in (out / "c").iterdir()] == ["p.safetensors"]
    status, said, _ = run("plot", "scene-llava", "--out", out / "d" / "p.svg")
    assert (status, said) == (0, f"wrote {out / 'd' / 'p.svg'}\n") and (out / "d" / "p.svg").is_file()
    for where in ("report.html/p.html", "c/p.safetensors/q/p.html"):
        status, _, err = run("report", *model, *COMMON, "--out", out / where)
        assert status == 2 and "which is a file and no folder" in err
    status, _, err = run("report", *model, *COMMON, "--out", out / "report.html" / "..")
    assert status == 2 and "ends in .html" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "results-0.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device.*results-0\.jsonl"):
        Results(tmp_path, {}).add(Unit(0, "a", 0.5), [{}])


# prefixkv generate


def test_generate_says_what_it_took(home, run):
    image = home / "images" / "picture-0.png"
    words = ["generate", "--model", home / "model", "--image", image, *COMMON, "--compare", "--max-new-tokens", "3"]
    status, out, err = run(*words, "--budget", "20")
    full, pruned = (line for line in err.splitlines() if "KV " in line)
    assert status == 0 and len(out.splitlines()) == 1
    assert full.startswith("full cache: ") and "of full" not in full
    said = "budget 20 pairs (default, lengths: uniform): "
    n_tokens = int(pruned.removeprefix(said).split()[0])  # fewer than 3 if the random weights end early
    assert pruned.startswith(said) and f"{20 + n_tokens - 1} pairs a head" in pruned
    assert pruned.count("of full") == 2
    with_everything = run(*words, "--budget", "1.0")[2].splitlines()[-1]
    assert "budget 100 %" in with_everything and "(100% of full) at the prompt's end" in with_everything


@pytest.mark.parametrize(
    ("command", "change", "words"),
    [
        ("generate", ["--prompt", "  "], "--prompt is empty"),
        ("generate", ["--image", "none.png"], "there is no image 'none.png'"),
        ("generate", [], "cannot load 'no-model'"),
        ("report", ["--out", "report.pdf"], "ends in .html"),
        ("report", ["--out", "/dev/null/report.html"], "is a file and no folder"),
        ("report", ["--prompt", "  "], "--prompt is empty"),
        ("report", ["--image", "none.png"], "none.png"),
        ("demo", ["--out", "demo.jpg"], "the name of a picture ends in .png"),
        ("demo", ["--method", "nope"], "there is no method 'nope'"),
        ("demo", [], "there is no model folder 'no-model'"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_before_the_model_is_loaded(run, tmp_path, monkeypatch, command, change, words):
    monkeypatch.chdir(tmp_path)
    prompt = [] if command == "demo" else COMMON
    status, out, err = run(command, "--model", "no-model", *prompt, *change)
    lines = [line for line in err.splitlines() if line != "loading no-model"]
    assert (status, out, len(lines)) == (2, "", 1)
    assert words in lines[0] and (not change or "no-model" not in err)
