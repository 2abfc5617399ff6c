"""The commands that make, show and draw profiles, and the hub: as a person runs them, on a tiny model in a folder."""

import importlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import warnings
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from PIL import Image

import tiny_vlm
from prefixkv_cache import PAPER, PrefixKVCache, PrefixProfile, ProfileError, calibrate, calibrated_for
from prefixkv_cache.cli import main
from prefixkv_cache.data import read_records
from prefixkv_cache.loading import load_model, open_image, prepare
from prefixkv_cache.profile_report import describe_profile, read_spread

command_module = importlib.import_module("prefixkv_cache.calibrate_command")
GRID = ["--budgets", "0.1,0.5,1"]
DEFAULT_RANKING = "average=sum heads=mean pooling=1 value_norm=false diversity=0.5 novelty=8.0"
PLAIN_RANKING = "average=sum heads=mean pooling=1 value_norm=false diversity=0.0 novelty=0.0"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, eight pictures, and a data file of eight questions of different lengths."""
    folder = tmp_path_factory.mktemp("home")
    tiny_vlm.save_model(folder / "model")
    names = tiny_vlm.save_pictures(folder / "images", 8)
    said = [f"<image>\nwhat is there in the picture{' red' * index}" for index in range(8)]
    records = [
        {"id": f"r{index}", "image": name, "conversations": [{"from": "human", "value": text}]}
        for index, (name, text) in enumerate(zip(names, said, strict=True))
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def run(home, tmp_path, capsys):
    """Run a command in this process; returns exit status, standard output and standard error."""

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse
            status = ended.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


def calibrate_arguments(home, out, *more):
    return ["calibrate", "--model", home / "model", "--data", home / "data.json", "--images", home / "images",
            "--out", out, *GRID, *more]  # fmt: skip


def without_date(path):
    profile = PrefixProfile.load(path)
    created = profile.metadata["created"].encode()
    content = path.read_bytes()
    assert content.count(created) == 1 and len(created) == len("2026-11-21T01:02:03Z")
    return content.replace(created, b"then")


@pytest.fixture
def made(home, run, tmp_path):
    """A profile made by the command from six of the eight records."""
    out = tmp_path / "made.safetensors"
    status, *_ = run(*calibrate_arguments(home, out, "--samples", 6))
    assert status == 0
    return out


# calibrate


def test_calibrate_writes_a_profile_and_nothing_else(made, tmp_path):
    profile = PrefixProfile.load(made)
    metadata = profile.metadata
    assert profile.n_layers == 3 and profile.budgets.tolist() == [0.1, 0.5, 1.0]
    assert (metadata["samples"], metadata["source"]) == ("6", "data.json, seed 0")
    assert (metadata["model"], metadata["queries"], metadata["dtype"]) == ("model", "32", "float32")
    assert metadata["ranking"] == DEFAULT_RANKING
    assert [path.name for path in tmp_path.iterdir()] == ["made.safetensors"]


@pytest.mark.parametrize(
    ("more", "queries", "ranking"),
    [
        (["--paper"], "all", PLAIN_RANKING),
        (["--queries", "text"], "text", DEFAULT_RANKING),
        (["--queries", "8", "--novelty", "0", "--diversity", "0"], "8", PLAIN_RANKING),
        (
            ["--average", "visible", "--heads", "each", "--pooling", "3", "--value-norm", "--diversity", "0.25"],
            "32",
            "average=visible heads=each pooling=3 value_norm=true diversity=0.25 novelty=8.0",
        ),
    ],
)
def test_calibrate_for_another_ranking(home, run, made, tmp_path, more, queries, ranking):
    out = tmp_path / "p.safetensors"
    status, *_ = run(*calibrate_arguments(home, out, "--samples", 6, *more))
    assert status == 0
    profile = PrefixProfile.load(out)
    assert (profile.metadata["queries"], profile.metadata["ranking"]) == (queries, ranking)
    assert (profile.keep - PrefixProfile.load(made).keep).abs().max() > 1e-3


def test_the_command_measures_what_the_function_does(home, run, tmp_path):
    out = tmp_path / "p.safetensors"
    assert run(*calibrate_arguments(home, out, "--samples", 2, "--queries", 8, "--heads", "max"))[0] == 0
    model, processor = load_model(str(home / "model"), device="cpu")
    records = read_records(home / "data.json", home / "images")
    chosen = [records[index] for index in sorted(random.Random(0).sample(range(len(records)), 2))]
    samples = [prepare(processor, [(each.prompt, [open_image(each.images[0])])]) for each in chosen]
    profile = calibrate(model, samples, budgets=[0.1, 0.5, 1], queries=8, heads="max")
    assert (PrefixProfile.load(out).keep - profile.keep).abs().max() < 1e-12


def test_a_mismatch_is_told_in_one_line(home, run, made, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrated_for, "_told", {})
    paper = tmp_path / "paper.safetensors"
    assert run(*calibrate_arguments(home, paper, "--samples", 2, "--paper"))[0] == 0
    generate = ["generate", "--model", home / "model", "--image", home / "images" / "picture-0.png", "--prompt",
                "what is red ?", "--max-new-tokens", 2, "--profile"]  # fmt: skip
    status, _, err = run(*generate, paper)
    assert status == 0
    told = [line for line in err.splitlines() if "was calibrated for" in line]
    assert len(told) == 1 and "ProfileMismatchWarning" not in err
    assert told[0].startswith("prefixkv generate: the profile of 'model'") and "queries='all'" in told[0]
    assert told[0].endswith("; here: --paper")
    status, _, err = run(*generate, paper, "--paper")
    assert status == 0 and "was calibrated for" not in err
    status, _, err = run(*generate, made, "--paper", "--queries", 8)
    assert status == 0 and err.count("was calibrated for") == 1 and "; here: neither --queries nor --paper\n" in err
    status, _, err = run(*generate, made)
    assert status == 0 and "was calibrated for" not in err
    shown = warnings.showwarning
    assert run("inspect", "none")[0] == 2 and warnings.showwarning is shown


OF_COMMAND = {
    "generate": ["--max-new-tokens", 2, "--prompt", "what is red ?"],
    "report": ["--max-new-tokens", 2, "--budgets", "0.5", "--out", "report.html", "--prompt", "what is red ?"],
    "bench": ["--new-tokens", 2, "--turns", 1, "--budgets", "0.5", "--prompt", "what is red ?"],
}
DEFAULT_RULE = {"queries": 32, "distance": 1, "slack": 64, "novelty": 8.0, "diversity": 0.5}


@pytest.mark.parametrize("command", OF_COMMAND)
@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ([], DEFAULT_RULE),
        (["--queries", "8"], {**DEFAULT_RULE, "queries": 8}),
        (["--paper"], PAPER),
        (["--paper", "--queries", "8"], {**PAPER, "queries": 8}),
    ],
)
def test_the_rule_of_a_command_is_what_was_asked_for(home, run, tmp_path, monkeypatch, command, options, rule):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrated_for, "_told", {})
    made, real = [], PrefixKVCache.for_model.__func__

    def watch(cls, *arguments, **kwargs):
        made.append(real(cls, *arguments, **kwargs))
        return made[-1]

    monkeypatch.setattr(PrefixKVCache, "for_model", classmethod(watch))
    status, _, err = run(command, "--model", home / "model", *OF_COMMAND[command], *options)
    assert (status, "was calibrated for" in err) == (0, False)
    assert made
    for cache in made:
        assert {name: getattr(cache, name, getattr(cache.ranking, name, None)) for name in rule} == dict(rule)


@pytest.mark.parametrize("command", OF_COMMAND)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--queries", "0"], "queries must be"),
        (["--paper", "--queries", "-3"], "queries must be"),
        (["--paper", "--profile", "no-such"], "no-such"),
        (["--paper", "--budgets", "1.5"], "1.5"),
    ],
    ids=str,
)
def test_a_rule_that_cannot_be_is_told_before_the_model_is_loaded(run, tmp_path, monkeypatch, command, options, words):
    monkeypatch.chdir(tmp_path)
    options = ["--budget", *options[2:]] if command == "generate" and "--budgets" in options else options
    status, out, err = run(command, "--model", "no-model", *OF_COMMAND[command], *options)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"prefixkv {command}: ") and words in err and "no-model" not in err


def test_calibrate_says_what_it_does(home, run, tmp_path):
    status, out, err = run(*calibrate_arguments(home, tmp_path / "p.safetensors", "--samples", "all"))
    assert status == 0
    assert "3 layers from 8 samples" in out
    assert "calibrating on 8 of 8 records" in err and "8/8" in err and "sample/s" in err
    assert PrefixProfile.load(tmp_path / "p.safetensors").metadata["source"] == "data.json, all 8 records"


def test_calibrate_without_tqdm_prints_lines(home, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    status, _, err = run(*calibrate_arguments(home, tmp_path / "p.safetensors", "--samples", 2))
    assert status == 0
    assert "2 of 2 samples" in err and "samples/s" in err


@pytest.mark.parametrize("batch_size", [3, 8])
def test_batches_give_the_same_profile(home, run, made, tmp_path, batch_size):
    out = tmp_path / "batched.safetensors"
    status, *_ = run(*calibrate_arguments(home, out, "--samples", 6, "--batch-size", batch_size))
    assert status == 0
    one, other = PrefixProfile.load(made), PrefixProfile.load(out)
    assert (one.keep - other.keep).abs().max() < 2 / 73 / 6  # at most a pair in one sample, see `calibrate`


def test_the_seed_says_which_records(home, run, tmp_path):
    kept = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(kept)}.safetensors"
        assert run(*calibrate_arguments(home, out, "--samples", 3, "--seed", seed))[0] == 0
        kept.append(without_date(out))
    assert kept[0] == kept[1] != kept[2]


def test_a_folder_of_images_with_one_prompt(home, run, tmp_path):
    out = tmp_path / "p.safetensors"
    status, *_ = run("calibrate", "--model", home / "model", "--images", home / "images", "--prompt", "what is red ?",
                     "--samples", 2, "--queries", "all", "--out", out, *GRID)  # fmt: skip
    assert status == 0
    assert PrefixProfile.load(out).metadata["queries"] == "all"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bad_images_are_reported_skipped_and_counted(home, run, tmp_path, batch_size):
    images = tmp_path / "images"
    shutil.copytree(home / "images", images)
    (images / "picture-2.png").write_bytes(b"no picture")
    (images / "picture-5.png").unlink()
    status, out, err = run("calibrate", "--model", home / "model", "--data", home / "data.json", "--images", images,
                           "--out", tmp_path / "p.safetensors", "--batch-size", batch_size, *GRID)  # fmt: skip
    assert status == 0
    assert "6 samples, 2 skipped" in out
    assert "skipped record 'r2': cannot read" in err and "skipped record 'r5': there is no image" in err


def test_all_bad_is_an_error(home, run, tmp_path):
    (tmp_path / "images").mkdir()
    status, _, err = run("calibrate", "--model", home / "model", "--data", home / "data.json",
                         "--images", tmp_path / "images", "--out", tmp_path / "p.safetensors", *GRID)  # fmt: skip
    assert status == 2
    assert "all samples failed (8); the last one: there is no image" in err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_ctrl_c_leaves_a_state_and_resume_goes_on(home, run, made, tmp_path, monkeypatch):
    out = tmp_path / "p.safetensors"
    opened = []

    def open_three(path):
        if len(opened) == 3:
            raise KeyboardInterrupt
        opened.append(path)
        return Image.open(path).convert("RGB")

    with monkeypatch.context() as patch:
        patch.setattr(command_module, "open_image", open_three)
        status, _, err = run(*calibrate_arguments(home, out, "--samples", 6))
    assert status == 130
    assert "3 samples are kept; go on with --resume" in err
    assert {path.name for path in tmp_path.iterdir()} == {made.name, "p.safetensors.state.json"}

    status, _, err = run(*calibrate_arguments(home, out, "--samples", 6, "--queries", "all", "--resume"))
    assert status == 2 and "another calibration, whose queries was 32; this one has 'all'" in err
    status, _, err = run(*calibrate_arguments(home, out, "--samples", 6, "--novelty", "2", "--resume"))
    assert status == 2 and f"another calibration, whose ranking was '{DEFAULT_RANKING}'; this one has 'average=" in err
    status, _, err = run(*calibrate_arguments(home, out, "--samples", 5, "--resume"))
    assert status == 2 and "another calibration, whose data was" in err

    status, _, err = run(*calibrate_arguments(home, out, "--samples", 6, "--resume"))
    assert status == 0 and "3 of them done before" in err
    assert without_date(out) == without_date(made)
    assert {path.name for path in tmp_path.iterdir()} == {made.name, out.name}


def _one_of_two(rank, port, arguments):
    # Each process of a launcher is told in this way who it is.
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    torch.set_num_threads(1)
    sys.exit(main([str(argument) for argument in arguments]))


def run_two_processes(arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_one_of_two, args=(rank, port, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.skipif(sys.platform != "linux", reason="forks, which is quick and not everywhere sound")
def test_two_processes_write_the_file_of_one(home, made, tmp_path):
    out = tmp_path / "two.safetensors"
    assert run_two_processes(calibrate_arguments(home, out, "--samples", 6)) == [0, 0]
    assert without_date(out) == without_date(made)
    assert {path.name for path in tmp_path.iterdir()} == {made.name, out.name}


def test_several_processes_do_not_share_a_device_map(home, run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run(*calibrate_arguments(home, tmp_path / "p.safetensors", "--device-map", "auto"))
    assert status == 2 and "--device-map spreads one model" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budgets", "0,0.5"], "budget is 0.0"),
        (["--budgets", "a"], "invalid budgets"),
        (["--queries", "0"], "queries must be"),
        (["--queries", "some"], "invalid queries"),
        (["--novelty", "-1"], "novelty must be"),
        (["--novelty", "much"], "invalid float value"),
        (["--diversity", "1.5"], "diversity must be"),
        (["--pooling", "2"], "pooling must be an odd number"),
        (["--heads", "some"], "invalid choice"),
        (["--average", "some"], "invalid choice"),
        (
            ["--paper", "--queries", "32"],
            "--paper says all of the ranking, the plain one of all queries; leave",
        ),
        (["--novelty", "0", "--paper"], "leave --novelty out"),
        (["--paper", "--value-norm"], "leave --value-norm out"),
        (["--samples", "0"], "--samples and --batch-size must be at least 1"),
        (["--samples", "some"], "invalid count"),
        (["--batch-size", "0"], "--samples and --batch-size must be at least 1"),
        (["--sink", "-1"], "sink must be"),
        (["--data", "none.json"], "there is no data file 'none.json'"),
        (["--images", "none"], "there is no folder 'none' of images"),
        (["--out", "profile"], "a profile's name ends in .safetensors"),
        (["--out", "none/p.safetensors"], "there is no folder 'none'"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_status_2_before_the_model_loads(home, run, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr("prefixkv_cache.loading.load_model", lambda *_, **__: pytest.fail("loaded the model"))
    status, out, err = run(*calibrate_arguments(home, tmp_path / "p.safetensors", *more))
    assert status == 2 and out == ""
    assert message in err
    assert len([line for line in err.splitlines() if "error" in line or line.startswith("prefixkv calibrate:")]) == 1
    assert not list(tmp_path.iterdir())


def test_no_model_and_too_small_budgets(home, run, tmp_path):
    arguments = calibrate_arguments(home, tmp_path / "p.safetensors", "--samples", 1)
    status, _, err = run(*arguments, "--model", tmp_path)
    assert status == 2 and "cannot load" in err
    status, _, err = run(*arguments, "--budgets", "0.001")
    assert status == 2 and "budget 0.001 cannot be calibrated on prompts of" in err
    assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "wrong", "program"),
    [
        ([], "COMMAND", "prefixkv"),
        (["--nope"], "COMMAND", "prefixkv"),
        (["nope"], "'nope'", "prefixkv"),
        (["generate"], "--model, --prompt", "prefixkv generate"),
        (["generate", "--model", "m", "--prompt", "x", "--nope", "a b"], "--nope 'a b'", "prefixkv generate"),
        (["generate", "--model", "m", "--prompt", "x", "--budget", "half"], "'half'", "prefixkv generate"),
        (["inspect", "p", "--budgets", "0.1,x"], "'0.1,x'", "prefixkv inspect"),
        (["calibrate", "--model", "m", "--out", "a\nb", "--heads", "so\nme"], "--heads", "prefixkv calibrate"),
        (["plot", "p"], "--out", "prefixkv plot"),
        (["bench", "--model"], "--model", "prefixkv bench"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_told_in_one_line(run, arguments, wrong, program):
    """No page of usage: what is wrong, and the help that knows better."""
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(f"{program}: ") and wrong in err and err.endswith(f"; see {program} --help\n")


@pytest.mark.parametrize("command", ["calibrate", "inspect", "plot"])
def test_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and out.startswith(f"usage: prefixkv {command}")


# inspect


def test_inspect_prints_layers_metadata_and_checks(run, made):
    status, out, err = run("inspect", made)
    assert status == 0 and err == ""
    lines = out.splitlines()
    assert "samples               6" in lines
    assert "layer     0.1    0.5      1" in lines
    keep = PrefixProfile.load(made).keep
    for layer in range(3):
        numbers = "".join(f"{keep[row, layer]:>7.3f}" for row in range(3))
        assert f"{layer:>5} {numbers}" in lines
    assert any("largest fall" in line for line in lines) and any("row's mean" in line for line in lines)
    assert any("spread over 6 samples" in line for line in lines)
    assert f"ranking               {DEFAULT_RANKING}" in lines
    assert "for a cache that ranks alike: PrefixKVCache(profile, budget)" in lines


def test_inspect_bundled_and_at_other_budgets(run):
    status, out, _ = run("inspect", "llava-1.5-7b", "--budgets", "0.25,0.5")
    assert status == 0
    assert "layer    0.25    0.5" in out.replace("layer   0.25", "layer    0.25") and "llava-hf/llava-1.5-7b-hf" in out
    assert "PrefixKVCache(profile, budget, queries='all', diversity=0.0, novelty=0.0), or PrefixKVCache.paper(" in out
    assert "ranks alike" not in describe_profile(PrefixProfile([0.5], [[0.4, 0.6]]))


def test_inspect_refuses_what_is_no_profile(run, tmp_path, made):
    (tmp_path / "bad.safetensors").write_bytes(made.read_bytes()[:100])
    for name, message in [("none", "no bundled profile"), (tmp_path / "bad.safetensors", "damaged or cut short")]:
        status, out, err = run("inspect", name)
        assert status == 2 and out == "" and message in err and err.count("\n") == 1
    assert run("inspect", made, "--budgets", "2")[0] == 2


def test_what_somebody_else_wrote_is_shown_without_harm():
    metadata = {"model": "a\x1b[31m\nb", "spread": '[["x"]]', "samples": "9"}
    profile = PrefixProfile([0.5], [[0.4, 0.6]], metadata)
    assert "\x1b" not in describe_profile(profile)
    for spread in ("", "5", "[[0.1]]", "[[0.1, 2.0]]", '{"a": 1}', "[[NaN, 0]]", "[" * 100_000):
        assert read_spread(PrefixProfile([0.5], [[0.4, 0.6]], {"spread": spread})) is None
    assert read_spread(PrefixProfile([0.5], [[0.4, 0.6]], {"spread": "[[0.1, 0.2]]"})) == [[0.1, 0.2]]


# plot


def test_plot_draws_one_and_two_profiles(run, made, tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.svg"
    assert run("plot", made, "--out", one)[0] == 0
    assert run("plot", made, "llava-1.5-13b", "--out", two, "--budgets", "0.2,0.6")[0] == 0
    with Image.open(one) as picture:
        assert picture.width > picture.height > 400
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    text = two.read_text()
    assert text.rstrip().endswith("</svg>")
    comments = [line.strip() for line in text.splitlines() if line.strip().startswith("<!--")]
    assert "<!-- queries: 32, diversity: 0.5, novelty: 8.0, samples: 6 -->" in comments
    assert "<!-- queries: all, samples: unknown -->" in comments
    assert {path.name for path in tmp_path.iterdir()} == {made.name, "one.png", "two.svg"}


def test_plot_refuses_bad_input_and_leaves_nothing(run, made, tmp_path, monkeypatch):
    for arguments, message in [
        ((made, "--out", tmp_path / "p.docx"), "ends in .png, .svg, .pdf"),
        ((made, "--out", tmp_path / "none/p.png"), "there is no folder"),
        (("none", "--out", tmp_path / "p.png"), "no bundled profile"),
        ((made, "--out", tmp_path / "p.png", "--budgets", "0"), "budget is 0.0"),
    ]:
        status, _, err = run("plot", *arguments)
        assert status == 2 and message in err and err.count("\n") == 1
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run("plot", made, "--out", tmp_path / "p.png")
    assert status == 2 and "pip install 'prefixkv-cache[plot]'" in err
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


# the hub


class Hub:
    """A stand-in for the hub, in a folder: what HfApi and hf_hub_download do, for the little that we ask of them."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def __call__(self, token=None):
        self.calls.append(("login", token))
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.calls.append(("create", repo_id, private))
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message, **more):
        self.calls.append(("upload", repo_id, more))
        (self.folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(self, repo_id, filename, **more):
        self.calls.append(("download", repo_id, more))
        path = self.folder / repo_id / filename
        if not path.exists():
            raise huggingface_hub.errors.HFValidationError(f"404:\n no {filename}")
        return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    return hub


def test_what_goes_to_the_hub_comes_back(hub):
    profile = PrefixProfile.load("llava-1.5-7b")
    url = profile.push_to_hub("me/a-model", private=True, token="secret", revision="main")
    assert url == "https://hub/me/a-model/commit/1"
    assert hub.calls == [
        ("login", "secret"),
        ("create", "me/a-model", True),
        ("upload", "me/a-model", {"revision": "main"}),
    ]
    assert PrefixProfile.from_pretrained("me/a-model", revision="main") == profile
    assert hub.calls[-1] == ("download", "me/a-model", {"revision": "main"})
    profile.push_to_hub("me/a-model", filename="all.safetensors")
    assert PrefixProfile.from_pretrained("me/a-model", filename="all.safetensors") == profile


def test_a_pull_request_makes_no_repository(hub):
    (hub.folder / "you/model").mkdir(parents=True)
    PrefixProfile.load("llava-1.5-7b").push_to_hub("you/model", create_pr=True)
    assert [call[0] for call in hub.calls] == ["login", "upload"]


def test_from_pretrained_reads_folders_and_files(tmp_path, hub):
    profile = PrefixProfile.load("llava-1.5-7b")
    profile.save(tmp_path / "prefixkv-profile.safetensors")
    assert PrefixProfile.from_pretrained(tmp_path) == profile
    assert PrefixProfile.from_pretrained(str(tmp_path)) == profile
    assert PrefixProfile.from_pretrained(tmp_path / "prefixkv-profile.safetensors") == profile
    assert hub.calls == []


def test_what_the_hub_refuses_is_one_clear_error(tmp_path, hub):
    profile = PrefixProfile.load("llava-1.5-7b")
    with pytest.raises(
        ProfileError, match=r"cannot get 'prefixkv-profile.safetensors' of 'me/none' from the hub: 404: no"
    ):
        PrefixProfile.from_pretrained("me/none")
    with pytest.raises(ProfileError, match="there is no such file"):
        PrefixProfile.from_pretrained(tmp_path)
    with pytest.raises(ProfileError, match=r"ends in \.safetensors"):
        profile.push_to_hub("me/a-model", filename="profile.bin")
    with pytest.raises(ProfileError, match="cannot upload"):
        profile.push_to_hub("you/none", create_pr=True)
