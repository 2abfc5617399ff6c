"""Every model type that transformers knows is pruned, partly pruned, or refused with one error; none goes wrong.

The measuring is done in make_model_table.py. docs/models.md, which it wrote, is held against what is measured here:
where they differ, either the library or the file has drifted.
"""

from pathlib import Path

import pytest
import transformers

import zoo
from make_model_table import measure

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
NAMED = zoo.names("""
    llava llava_next llava_onevision vipllava qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 internvl gemma3
    gemma3n_text gemma4_text paligemma idefics2 idefics3 smolvlm mistral3 lighton_ocr llama4 mllama glm4v aya_vision
    cohere2_vision aria lfm2_vl got_ocr2 blip-2 llama qwen2 qwen3 mistral gemma2 phi3 deepseek_v3
""")
"""Types that must work in any case; lighton_ocr is the type whose images Pixtral's vision tower reads."""


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


def rows(page):
    return {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}


@pytest.mark.parametrize("model_type", zoo.ALL_TYPES)
@pytest.mark.filterwarnings("ignore")
def test_type_is_what_the_table_says(model_type, page):
    found = measure(model_type)
    assert found.verdict != "wrong", found.remarks
    if f"transformers {transformers.__version__};" in page:
        assert found.row() == rows(page)[model_type]


def test_table_has_every_type_once_and_sorted(page):
    if f"transformers {transformers.__version__};" in page:
        assert list(rows(page)) == zoo.ALL_TYPES


def test_named_types_work(page):
    verdicts = {model_type: line.split(" | ")[1] for model_type, line in rows(page).items()}
    assert {each: verdicts[each] for each in NAMED if verdicts[each] not in ("pruned", "partly")} == {}
    assert sum(verdict in ("pruned", "partly") for verdict in verdicts.values()) >= 40
