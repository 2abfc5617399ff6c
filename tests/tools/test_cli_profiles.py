"""The commands that make, show and draw profiles: as a person runs them, on a tiny model in a folder."""

import json
import multiprocessing
import os
import random
import shutil
import socket
import sys

import pytest
import torch
from PIL import Image

import tiny_vlm
from prefixkv_cache import PrefixProfile, calibrate, methods
from prefixkv_cache.cli import main
from prefixkv_cache.tools import loading
from prefixkv_cache.tools.data import read_records
from prefixkv_cache.tools.inspect import describe_profile, read_spread

GRID = ["--budgets", "0.1,0.5,1.0"]
MEASURED = {"samples": 9, "budgets": {"0.5": {"kl": 0.0123, "agreement": 0.9}, "0.1": {"kl": 0.5, "uniform_kl": 1.0}}}


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


def calibrate_arguments(home, out, *more):
    return ["calibrate", "--by", "mass", "--model", home / "model", "--data", home / "data.json",
            "--images", home / "images", "--out", out, *GRID, *more]  # fmt: skip


def without_date(path):
    created = PrefixProfile.load(path).metadata["created"].encode()
    content = path.read_bytes()
    assert content.count(created) == 1 and len(created) == len("2026-11-21T01:02:03Z")
    return content.replace(created, b"then")


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def made(home, run, tmp_path):
    """A profile made by the command from six of the eight records."""
    out = tmp_path / "made.safetensors"
    assert run(*calibrate_arguments(home, out, "--samples", 6))[0] == 0
    return out


# calibrate


def test_calibrate_writes_a_profile_and_nothing_else_and_says_what_it_does(home, run, made, tmp_path):
    profile = PrefixProfile.load(made)
    metadata = profile.metadata
    assert (profile.n_layers, profile.n_heads) == (3, 1) and profile.budgets.tolist() == [0.1, 0.5, 1.0]
    assert (metadata["samples"], metadata["source"]) == ("6", "data.json, seed 0")
    assert (metadata["model"], metadata["by"], metadata["dtype"]) == ("model", "mass/layer", "float32")
    assert profile.method == methods.PREFIXKV and profile.measured is None
    status, out, err = run(*calibrate_arguments(home, made, "--samples", "all"))
    assert status == 0 and "3 layers from 8 samples" in out
    assert "calibrating on 8 of 8 records" in err and "8/8" in err and "prompt/s" in err
    assert PrefixProfile.load(made).metadata["source"] == "data.json, all 8 records"
    assert files_in(tmp_path) == ["made.safetensors"]


@pytest.mark.parametrize("spelling", ["prefixkv", "snapkv:queries=8;pooling=3"])
def test_the_command_measures_what_the_function_does_for_the_method_asked_for(home, run, made, tmp_path, spelling):
    out = tmp_path / "p.safetensors"
    assert run(*calibrate_arguments(home, out, "--samples", 2, "--method", spelling))[0] == 0
    model, processor = loading.load_model(str(home / "model"), device="cpu")
    records = read_records(home / "data.json", home / "images")
    chosen = [records[index] for index in sorted(random.Random(0).sample(range(len(records)), 2))]
    samples = [loading.prepare(processor, [(each.prompt, [loading.open_image(each.images[0])])]) for each in chosen]
    profile = calibrate(model, samples, budgets=[0.1, 0.5, 1.0], method=spelling, by="mass")
    found = PrefixProfile.load(out)
    assert found.method == profile.method == methods.Method.parse(spelling)
    assert (found.keep - profile.keep).abs().max() < 1e-12
    assert (found.keep - PrefixProfile.load(made).keep).abs().max() > 1e-3


def test_calibrate_by_head_and_measured(home, run, tmp_path):
    out = tmp_path / "p.safetensors"
    more = ["--samples", 3, "--by", "measured", "--unit", "head", "--budgets", "0.5"]
    status, said, _ = run(*calibrate_arguments(home, out, *more))
    assert status == 0 and "kept: " in said and PrefixProfile.load(out).measured["samples"] == 1
    status, said, _ = run("inspect", out)
    assert status == 0 and "measured against the full cache on 1 samples" in said


@pytest.mark.parametrize("batch_size", [3, 8])
def test_batches_give_the_same_profile(home, run, made, tmp_path, batch_size):
    out = tmp_path / "batched.safetensors"
    assert run(*calibrate_arguments(home, out, "--samples", 6, "--batch-size", batch_size))[0] == 0
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
                     "--samples", 2, "--out", out, *GRID)  # fmt: skip
    assert status == 0 and PrefixProfile.load(out).metadata["source"] == "images, seed 0"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bad_images_are_reported_skipped_and_counted(home, run, tmp_path, batch_size):
    images = tmp_path / "images"
    shutil.copytree(home / "images", images)
    (images / "picture-2.png").write_bytes(b"no picture")
    (images / "picture-5.png").unlink()
    arguments = calibrate_arguments(home, tmp_path / "p.safetensors", "--images", images)
    status, out, err = run(*arguments, "--batch-size", batch_size)
    assert status == 0 and "6 samples, 2 skipped" in out
    assert "skipped record 'r2': cannot read" in err and "skipped record 'r5': there is no image" in err
    shutil.rmtree(images)
    images.mkdir()
    (tmp_path / "p.safetensors").unlink()
    status, _, err = run(*arguments)
    assert status == 2 and "all samples failed (8); the last one: there is no image" in err
    assert files_in(tmp_path) == ["images"]


def test_ctrl_c_leaves_a_state_and_resume_goes_on(home, run, made, tmp_path, monkeypatch):
    out = tmp_path / "p.safetensors"
    opened = []

    def open_three(path):
        if len(opened) == 3:
            raise KeyboardInterrupt
        opened.append(path)
        return Image.open(path).convert("RGB")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "open_image", open_three)
        status, _, err = run(*calibrate_arguments(home, out, "--samples", 6))
    assert status == 130 and "3 samples are kept in " in err and "; go on with --resume" in err
    assert files_in(tmp_path) == [made.name, "p.safetensors.state.json"]

    status, _, err = run(*calibrate_arguments(home, out, "--samples", 6))
    assert status == 2 and "go on with --resume, or delete it" in err and err.count("\n") == 1
    for other, field in ((["--samples", 6, "--method", "h2o"], "method"), (["--samples", 5], "data")):
        status, _, err = run(*calibrate_arguments(home, out, *other, "--resume"))
        assert status == 2 and f"another run, whose {field} was" in err

    status, _, err = run(*calibrate_arguments(home, out, "--samples", 6, "--resume"))
    assert status == 0 and "3 of them done before" in err
    assert without_date(out) == without_date(made) and files_in(tmp_path) == [made.name, out.name]


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
    assert without_date(out) == without_date(made) and files_in(tmp_path) == [made.name, out.name]


def test_several_processes_do_not_share_a_device_map(home, run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run(*calibrate_arguments(home, tmp_path / "p.safetensors", "--device-map", "auto"))
    assert status == 2 and "--device-map spreads one model" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budgets", "0,0.5"], "'0' is no budget"),
        (["--budgets", "0.5,64"], "budget"),
        (["--method", "snapkv:queries=0"], "queries must be"),
        (["--method", "best"], "there is no method 'best'"),
        (["--by", "luck"], "invalid choice"),
        (["--unit", "token"], "invalid choice"),
        (["--samples", "0"], "not a whole number of at least 1"),
        (["--batch-size", "0"], "not a whole number of at least 1"),
        (["--data", "none.json"], "there is no data file 'none.json'"),
        (["--images", "none"], "there is no folder 'none' of images"),
        (["--out", "profile"], "the name of a profile ends in .safetensors"),
        (["--out", "/dev/null/p.safetensors"], "lies in '/dev/null', which is a file and no folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2_before_the_model_loads(home, run, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("loaded the model"))
    status, out, err = run(*calibrate_arguments(home, tmp_path / "p.safetensors", *more))
    assert (status, out, len(err.splitlines())) == (2, "", 1) and message in err
    assert not list(tmp_path.iterdir())


def test_no_model_and_too_small_budgets(home, run, tmp_path):
    arguments = calibrate_arguments(home, tmp_path / "p.safetensors", "--samples", 1)
    status, _, err = run(*arguments, "--model", tmp_path)
    assert status == 2 and "cannot load" in err
    status, _, err = run(*arguments, "--budgets", "0.001")
    assert status == 2 and "budget 0.001 cannot be calibrated on prompts of" in err
    assert not (tmp_path / "p.safetensors").exists()


# inspect


def by_head(**metadata):
    keep = [[[0.0, 0.2], [0.04, 0.16]], [[0.3, 0.7], [0.4, 0.6]]]
    return PrefixProfile([0.1, 0.5], keep, {"method": "snapkv:queries=64", **metadata})


def test_inspect_prints_layers_metadata_and_checks(run, made):
    status, out, err = run("inspect", made)
    lines, profile = out.splitlines(), PrefixProfile.load(made)
    assert (status, err) == (0, "") and not any("by key head" in line for line in lines)
    assert "layer     0.1    0.5      1" in lines
    for layer in range(3):
        assert f"{layer:>5} " + "".join(f"{ratio:>7.3f}" for ratio in profile.keep[:, layer, 0]) in lines
    assert {("samples", "6"), ("method", "prefixkv"), ("n_heads", "1")} <= {tuple(line.split()) for line in lines}
    for words in ("largest fall", "row's mean", "spread over 6 samples", "never measured"):
        assert any(words in line for line in lines)
    status, out, _ = run("inspect", "llava-1.5-7b", "--budgets", "0.25,0.5")
    assert status == 0 and "layer    0.25    0.5" in out.replace("layer   0.25", "layer    0.25")
    assert "llava-hf/llava-1.5-7b-hf" in out and "prefixkv\n" in out


def test_inspect_shows_heads_and_what_was_measured():
    lines = describe_profile(by_head(measured=json.dumps(MEASURED)), [0.5, 0.3]).splitlines()
    start = lines.index("percent kept at budget 0.5, by key head (line) and layer (column)")
    assert lines[start + 1 : start + 5] == ["layer    0   1", "    0   30  40", "    1   70  60", " mean   50  50"]
    assert "percent kept at budget 0.3, by key head (line) and layer (column)" in lines
    assert "    0   0.300  0.500" in lines and any("mean of its 2 key heads" in line for line in lines)
    start = lines.index("measured against the full cache on 9 samples that the profile was not made from")
    assert [line.split() for line in lines[start + 1 : start + 4]] == [
        ["budget", "kl", "agreement", "uniform_kl"], ["0.1", "0.5", "-", "1"], ["0.5", "0.0123", "0.9", "-"],
    ]  # fmt: skip


def test_inspect_refuses_what_is_no_profile(run, tmp_path, made):
    (tmp_path / "bad.safetensors").write_bytes(made.read_bytes()[:100])
    for words, message in [
        (["none"], "no bundled profile"), ([tmp_path / "bad.safetensors"], "damaged or cut short"),
        ([made, "--budgets", "64"], "takes a fraction"), ([made, "--budgets", "1"], "write 1.0 for everything"),
    ]:  # fmt: skip
        status, out, err = run("inspect", *words)
        assert (status, out) == (2, "") and message in err and err.count("\n") == 1


def test_what_somebody_else_wrote_is_shown_without_harm():
    measured = json.dumps({"samples": 1, "budgets": {"0.5": {"\x1b[31m": 1}}})
    profile = by_head(model="a\x1b[31m\nb", spread='[["x"]]', samples="9", measured=measured)
    assert "\x1b" not in describe_profile(profile)
    for spread in ("", "5", "[[0.1]]", "[[0.1, 2.0]]", '{"a": 1}', "[[NaN, 0]]", "[" * 100_000):
        assert read_spread(PrefixProfile([0.5], [[0.4, 0.6]], {"spread": spread})) is None
    assert read_spread(PrefixProfile([0.5], [[0.4, 0.6]], {"spread": "[[0.1, 0.2]]"})) == [[0.1, 0.2]]


# plot


def test_plot_draws_layers_and_heads_and_says_what_it_wrote(run, made, tmp_path):
    one, two, heads = tmp_path / "one.png", tmp_path / "two.svg", tmp_path / "heads.safetensors"
    by_head().save(heads)
    assert run("plot", made, "--out", one) == (0, f"wrote {one}\n", "")
    assert run("plot", heads, "llava-1.5-13b", "--out", two, "--budgets", "0.2,0.6")[:2] == (0, f"wrote {two}\n")
    with Image.open(one) as picture:
        assert picture.width > picture.height > 400
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    text = two.read_text()
    assert text.rstrip().endswith("</svg>")
    comments = [line.strip() for line in text.splitlines() if line.strip().startswith("<!--")]
    for said in ("snapkv:queries=64, samples: unknown", "prefixkv, samples: unknown", "budget 0.2", "key head"):
        assert f"<!-- {said} -->" in comments
    assert files_in(tmp_path) == sorted([made.name, heads.name, "one.png", "two.svg"])


def test_plot_refuses_bad_input_and_leaves_nothing(run, tmp_path, monkeypatch):
    for arguments, message in [
        (("llava-1.5-7b", "--out", tmp_path / "p.docx"), "ends in .png, .svg, .pdf"),
        (("llava-1.5-7b", "--out", "/dev/null/p.png"), "is a file and no folder"),
        (("none", "--out", tmp_path / "p.png"), "no bundled profile"),
        (("llava-1.5-7b", "--out", tmp_path / "p.png", "--budgets", "64"), "takes a fraction"),
    ]:
        status, _, err = run("plot", *arguments)
        assert status == 2 and message in err and err.count("\n") == 1
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run("plot", "llava-1.5-7b", "--out", tmp_path / "p.png")
    assert status == 2 and "pip install '.[plot]' in a checkout" in err
    assert not files_in(tmp_path)
