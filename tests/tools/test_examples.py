"""Every example runs, on the repository's own model; the notebook's code cells too, without jupyter."""

import importlib.util
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from prefixkv_cache.cli import main
from prefixkv_cache.tools.demo import boards, scenes
from prefixkv_cache.tools.loading import prepare

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
DESCRIPTION = "the scene shows four objects."


def example(name):
    path = EXAMPLES / name
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def picture(tmp_path):
    scenes.draw_scene(scenes.TEST_SEEDS[17]).image.save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png")


def test_every_example_is_run_by_some_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*/test_*.py"))
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert path.stem in tests, path.name


def test_quickstart(picture, capsys):
    example("quickstart.py").main(["--max-new-tokens", "12"])
    drawn = capsys.readouterr().out
    assert re.findall(r"budget (\S+): (.*)", drawn) == [(b, "a small green diamond.") for b in ("1", "0.5", "0.2")]
    example("quickstart.py").main(["--image", picture, "--max-new-tokens", "12"])
    assert capsys.readouterr().out == drawn


def test_chat_says_what_it_is_told(picture, capsys):
    main = example("chat.py").main
    main(
        ["--budget", "0.9", "--image", picture, "--say", "what is at the bottom right?", "--say", "describe the scene."]
    )
    captured = capsys.readouterr()
    said = re.findall(r"model: (.*)", captured.out)
    assert said[0] == "a small green diamond." and said[1].startswith(DESCRIPTION)
    seen = [int(number) for number in re.findall(r"(\d+) tokens seen", captured.err)]
    assert 159 == seen[0] < seen[1]


@pytest.mark.parametrize("end", ["", "\n", "\nwhat is this?"], ids=["end of input", "empty line", "more behind it"])
def test_chat_asks_for_questions(monkeypatch, capsys, end):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"what is at the bottom right?\ndescribe the scene.\n{end}"))
    example("chat.py").main(["--budget", "1.0"])
    assert re.findall(r"model: (.{22})", capsys.readouterr().out) == ["a small green diamond.", DESCRIPTION[:22]]


AS_A_PERSON = {
    "quickstart.py": (["--max-new-tokens", "8"], "budget 0.2: "),
    "compress.py": (["--max-new-tokens", "8"], "what colour is the circle?"),
    "chat.py": (["--say", "describe it", "--max-new-tokens", "8"], "model: "),
    "batch.py": (["--max-new-tokens", "8"], "pairs a head by layer"),
    "make_published_profiles.py": (["--help"], "usage: "),
    "make_scene_data.py": (["--help"], "usage: "),
    "train_scene_vlm.py": (["--help"], "usage: "),
    "train_smol_llava.py": (["--help"], "usage: "),
    "gradio_app.py": (["--help"], "usage: "),
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_is_run_as_a_person_runs_it(tmp_path, name):
    words, said = AS_A_PERSON[name]
    command = [sys.executable, str(EXAMPLES / name), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and said in done.stdout and "Traceback" not in done.stderr, done.stderr


def test_the_turns_of_a_chat_add_up_to_the_conversation_as_the_template_writes_it():
    module = example("chat.py")
    image = scenes.draw_scene(scenes.TEST_SEEDS[17]).image
    chat = module.Chat(*module.load_model(str(module.SCENE_LLAVA)), image, 1.0)
    assert chat.ask("what is at the bottom right?") == "a small green diamond."
    chat.ask("what colour is the circle?")
    text = chat.processor.apply_chat_template(chat.messages)
    assert torch.equal(chat.ids, chat.processor(images=image, text=text, return_tensors="pt")["input_ids"])


def test_batch(picture, capsys):
    main = example("batch.py").main
    main([])
    assert capsys.readouterr().out.count("pairs a head by layer") == 3
    main(
        ["--image", picture, "--prompt", "what is at the bottom right?", "--image", picture, "--prompt", "describe it"]
    )
    assert capsys.readouterr().out.splitlines()[1].strip() == "a small green diamond."
    for wrong in (["--image", picture], ["--budget", "half"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_make_scene_data(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_scene_data.py", "--out", str(tmp_path), "--count", "2"])
    example("make_scene_data.py").main()
    assert len(json.loads((tmp_path / "scenes.json").read_text())) == 2


def test_compress(picture, capsys):
    main = example("compress.py").main
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("146 tokens seen") and [line for line in lines if line[0] != " "][2:] == [
        "what colour is the circle?", "describe the scene."
    ]  # fmt: skip
    assert lines[2] == "    a small green diamond." and lines[6].startswith("    the scene shows")
    words = ["--image", picture, "--prefix", "at the top .", "--question", "what is at the bottom right?"]
    main([*words, "--budget", "1.0", "--max-new-tokens", "12"])
    prefixed = capsys.readouterr().out
    assert re.match(r"1[45]\d tokens seen", prefixed) and len(prefixed.splitlines()) == 3


def test_what_example_and_commands_say_is_the_same(picture, tmp_path, capsys):
    question, path = "what is at the bottom right?", str(tmp_path / "scene.safetensors")
    example("compress.py").main(["--image", picture, "--question", question])
    wanted = capsys.readouterr().out.splitlines()[2].strip()
    model = ["--model", str(ROOT / "models" / "scene-llava")]
    assert main(["compress", *model, "--image", picture, "--budget", "0.5", "--out", path]) == 0
    capsys.readouterr()
    assert main(["generate", *model, "--cache", path, "--prompt", question]) == 0
    assert capsys.readouterr().out == f"{wanted}\n"


@pytest.mark.parametrize("name", ["scene-llava", "board-qwen2-vl"])
def test_the_app_reads_a_picture_once_and_answers_without_gradio(name):
    module = example("gradio_app.py")
    loaded = module.load_model(str(ROOT / "models" / name))
    seeds = (scenes if name == "scene-llava" else boards).TEST_SEEDS
    draw = scenes.draw_scene if name == "scene-llava" else boards.draw_board
    drawn = [draw(seed) for seed in seeds[17:19]]
    pictures = [module.Picture(*loaded, each.image, 1.0) for each in drawn]
    before = str(pictures[0].cache)
    for each, picture in zip(drawn, pictures, strict=True):  # the first is asked after the second was read
        questions = (scenes if name == "scene-llava" else boards).questions(each)
        for question in questions[:3]:
            pieces = list(picture.answer(question.text))
            inputs = prepare(loaded[1], [(question.text, [each.image])])
            out = loaded[0].generate(**inputs, do_sample=False, max_new_tokens=128)
            new = out[0, inputs["input_ids"].shape[1] :]
            assert pieces[-1] == loaded[1].decode(new, skip_special_tokens=True).strip()
            assert all(pieces[-1].startswith(piece) for piece in pieces)
    assert str(pictures[0].cache) == before and "(100% of full)" in pictures[0].facts()


def test_the_app_in_a_browser():
    pytest.importorskip("gradio", reason="the chat app needs gradio: the extra `examples`")
    from gradio_client import Client, handle_file

    module = example("gradio_app.py")
    read, image = [], scenes.draw_scene(scenes.TEST_SEEDS[17]).image

    class Picture(module.Picture):
        def __init__(self, *arguments):
            read.append(arguments[-1])
            super().__init__(*arguments)

    module.Picture = Picture
    app = module.build_app(*module.load_model(str(module.SCENE_LLAVA)), image)
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True)
    try:
        client, said = Client(url, verbose=False), []
        with tempfile.TemporaryDirectory() as folder:
            image.save(f"{folder}/scene.png")
            picture = handle_file(f"{folder}/scene.png")
            for budget in (0.5, 0.5, 0.25):
                said, question, facts = client.predict(
                    "what is at the bottom right?", said, picture, budget, api_name="/ask"
                )
                assert question == "" and f"({budget:.0%} of full)" in facts
            empty = client.predict(" ", said, picture, 0.5, api_name="/ask")
        assert [part["text"] for each in said[1::2] for part in each["content"]] == ["a small green diamond."] * 3
        assert read == [0.5, 0.25] and len(said) == 6 and empty[2] == "Give a picture and a question."
    finally:
        app.close()


def test_the_notebook_prefixkv_ipynb_runs():
    notebook = json.loads((EXAMPLES / "prefixkv.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)  # nothing stale is shown
    space = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"prefixkv.ipynb cell {number}", "exec"), space)
    assert len(cells) == 4
    assert {space["answers"][budget] for budget in (1.0, 0.5, 0.2)} == {"a small green diamond."}
    assert "srcdoc" in space["Page"](space["render_page"](space["report"]))._repr_html_()
