"""What the documentation says is so: its Python runs, its commands parse, what it names is there, its site builds.

The Python blocks of a file run in order, in one namespace and an empty folder. Blocks may use what an application has
and the documentation cannot show, and what lies on the hub; both are stand-ins here:

- `model`, `processor`, `image`, `prompt` (with its image token), `inputs` and `samples` are there from the beginning:
  a tiny random LLaVA of 32 layers in a folder named llava-1.5-7b-hf, so that the profile of LLaVA-1.5-7B fits it;
- so are `context_inputs`, the same as `inputs`, and `inputs_with_more`, the token ids of both and of a question behind;
- the hub ids of `HUB` are that model, in `from_pretrained` and in what the library itself loads; other ids fail;
- the hub takes and gives profiles: it is a folder;
- `my-profile.safetensors`, `cat.png` and the folder `models` of this repository lie in the current folder.

A block that cannot run with these is written differently, or the stand-ins grow. None is skipped, but where the library
that quantises is not installed, pages that use it.
"""

import re
import shlex
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from PIL import Image

import tiny_vlm
from prefixkv_cache.cli import make_parser
from prefixkv_cache.profiles.bundled import bundled_dir
from prefixkv_cache.tools.loading import load_model, prepare

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted(ROOT.glob("docs/*.md"))
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *DOCS, *sorted(ROOT.glob("models/*/README.md"))]
DIARY = "notes.md"  # of the repository, not of the site; names what is gone
HUB = ("llava-hf/llava-1.5-7b-hf",)


def blocks(page, language):
    """(first line, text) of each fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start()) + 2, match[1]) for match in found]


def name(page):
    return str(page.relative_to(ROOT))


WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "llava-1.5-7b-hf"
    return tiny_vlm.save_model(folder, layers=32)


def _load_locally(load, folders, name, *arguments, **options):
    return load(folders.get(name, name), *arguments, **options)


@pytest.fixture
def world(stand_in, tmp_path, monkeypatch):
    """The namespace that the blocks begin with; the current folder and the hub are set up as described above."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFIXKV_HOME", str(tmp_path / "kept"))
    (tmp_path / "models").symlink_to(ROOT / "models")
    shutil.copy(bundled_dir("profiles") / "llava-1.5-7b.safetensors", "my-profile.safetensors")
    for kind in (transformers.AutoConfig, transformers.AutoProcessor, transformers.AutoModelForImageTextToText):
        real = kind.from_pretrained
        local = partial(_load_locally, real, dict.fromkeys(HUB, stand_in))
        monkeypatch.setattr(kind, "from_pretrained", local)
    hub = tmp_path / "the-hub"

    def upload(self, *, path_or_fileobj, path_in_repo, repo_id, **kwargs):
        (hub / repo_id).mkdir(parents=True, exist_ok=True)
        (hub / repo_id / path_in_repo).write_bytes(path_or_fileobj)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **kwargs: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_file", upload)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, **kwargs: str(hub / repo / file))

    model, processor = load_model(HUB[0], device="cpu")
    image = Image.effect_noise((40, 36), 80).convert("RGB")
    image.save("cat.png")
    inputs = prepare(processor, [("what is there ?", [image])])
    prompt = "<bos><user><image> what is there ?<assistant>"
    given = {"model": model, "processor": processor, "image": image, "prompt": prompt}
    more = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -4:]], dim=1)
    given |= {
        "context_inputs": inputs,
        "inputs_with_more": {"input_ids": more, "attention_mask": torch.ones_like(more)},
    }
    return given | {"inputs": inputs, "samples": [dict(inputs)] * 2}


def test_the_pages_that_show_python_are_found():
    assert {"README.md", "docs/index.md", "docs/report.md", "docs/profiles.md"} <= set(map(name, WITH_PYTHON))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_python_of_a_page_runs(page, world):
    ran = 0
    if any("quantize=" in text for _, text in blocks(page, "python")):
        pytest.importorskip("optimum.quanto", reason="needs optimum-quanto: pip install -e '.[quantize]'")
    for line, text in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), world)
        ran += 1
    # Every block that a reader sees as Python was run, however its fence is written.
    fences = re.findall(r"^ *``` *(?:python|py)\b", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert ran == len(fences) > 0


def test_the_readme_is_short_and_its_first_example_is_silent(world, capfd):
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 120 and text.count("![") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(blocks(README, "python")[0][1], world)
    assert capfd.readouterr() == ("", "")


def commands(page):
    """The `prefixkv` command lines of a page."""
    for line, text in blocks(page, "(?:bash|sh|console)"):
        for command in text.replace("\\\n", " ").splitlines():
            if command.strip().startswith("prefixkv "):
                yield line, shlex.split(command, comments=True)[1:]


def test_the_commands_of_the_pages_are_commands(capsys):
    found = [(name(page), *command) for page in PAGES for command in commands(page)]
    assert len(found) >= 8
    for page, line, words in found:
        try:
            make_parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"{page}, block at line {line}: {shlex.join(words)}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != DIARY], ids=name)
def test_what_a_page_names_is_there(page):
    """Files of the repository, their options in command lines, targets of make, extras of pip."""
    text = page.read_text(encoding="utf-8")
    for file in re.findall(r"(?<![\w/.-])(?:benchmarks|docs|examples|scripts|src|tests)/[\w./-]*\w", text):
        assert (ROOT / file).exists(), file
    for file in re.findall(r"`((?:cache|calibration|methods|profiles|rules|tools)/[\w/]+\.py)", text):
        assert (ROOT / "src" / "prefixkv_cache" / file).exists(), file
    code = "\n".join(found for _, found in blocks(page, "bash")).replace("\\\n", " ")
    for script, options in re.findall(r"^python ([\w/]+\.py)(.*)", code, re.MULTILINE):
        for option in re.findall(r"(?<= )--[a-z-]+", options.split("#")[0]):
            assert f'"{option}"' in (ROOT / script).read_text(encoding="utf-8"), f"{script} {option}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), f"make {target}"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"pip install (?:-e )?'(?:\.|prefixkv-cache)\[([\w-]+)\]'", text):
        assert f"\n{extra} = [" in project, extra


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    """On the code host, and in the site, which holds nothing but docs/."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|#|mailto:", target):
            continue
        path = (page.parent / target.split("#")[0]).resolve()
        assert path.exists(), target
        assert page.parent.name != "docs" or path.is_relative_to(ROOT / "docs"), f"{target} is not part of the site"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site is built by mkdocs, of the docs extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    site = {path.name for path in (tmp_path / "site").glob("*.html")}
    assert {page.with_suffix(".html").name for page in DOCS if page.name != DIARY} <= site
    assert "notes.html" not in site
    outside = re.compile(r'<(?:script|link rel="(?:stylesheet|icon|preconnect)"|img)[^>]*(?:src|href)="https?://')
    for page in (tmp_path / "site").glob("*.html"):  # read without a network, it must still be whole
        assert not outside.search(page.read_text(encoding="utf-8")), page.name


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = [page for entry in nav for page in entry.values()]
    assert sorted([*listed, DIARY]) == sorted(page.name for page in DOCS)
