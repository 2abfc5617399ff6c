"""Every example runs, on the repository's own model; the notebook's code cells too, without jupyter."""

import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefixkv_cache.tools.demo import scenes

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


def test_an_example_is_run_as_a_person_runs_it(tmp_path):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--max-new-tokens", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("budget ") == 3, done.stderr


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


def test_the_app_answers_without_gradio():
    module = example("gradio_app.py")
    model, processor = module.load_model(str(module.SCENE_LLAVA))
    image = scenes.draw_scene(scenes.TEST_SEEDS[17]).image
    answer, facts = module.reply(model, processor, image, [], "what is at the bottom right?", 0.5)
    assert answer == "a small green diamond." and facts.startswith("159 tokens seen, 82 pairs a head kept (52%)")
    history = [{"role": "user", "content": "what is at the bottom right?"}, {"role": "assistant", "content": answer}]
    answer, facts = module.reply(model, processor, image, history, "describe the scene.", 1.0)
    assert answer.startswith(DESCRIPTION) and "(100%)" in facts


def test_the_app_can_be_built():
    pytest.importorskip("gradio", reason="the chat app needs gradio, which is no part of the test extra")
    module = example("gradio_app.py")
    app = module.build_app(*module.load_model(str(module.SCENE_LLAVA)), None)
    assert any(type(block).__name__ == "Slider" for block in app.blocks.values())


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
