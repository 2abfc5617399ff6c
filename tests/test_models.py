"""Every model type that transformers knows is pruned, partly pruned, or refused with one error; none goes wrong.

The measuring is done in make_model_table.py. docs/models.md, which it wrote, is held against what is measured here:
where they differ, either the library or the file has drifted. With another transformers than the file's, a type may
be what it likes, except wrong.
"""

from pathlib import Path

import pytest
import transformers
from transformers.modeling_utils import AttentionInterface

import zoo
from make_model_table import measure

pytestmark = pytest.mark.skipif(
    not hasattr(AttentionInterface, "get_interface"), reason="the reference needs AttentionInterface.get_interface"
)

PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}
SAME_VERSION = f"transformers {transformers.__version__};" in PAGE
NAMED = zoo.names("""
    llava llava_next llava_onevision vipllava qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 internvl gemma3 gemma3n
    gemma3n_text gemma4_text paligemma idefics2 idefics3 smolvlm mistral3 pixtral llama4 mllama glm4v aya_vision
    cohere2_vision aria lfm2_vl got_ocr2 blip-2 llama qwen2 qwen3 mistral gemma2 phi3 deepseek_v3
""")


@pytest.mark.parametrize("model_type", zoo.ALL_TYPES)
@pytest.mark.filterwarnings("ignore")
def test_type_is_what_the_table_says(model_type):
    found = measure(model_type)
    assert found.verdict != "wrong", found.remarks
    assert not SAME_VERSION or found.row() == ROWS[model_type]


@pytest.mark.skipif(not SAME_VERSION, reason="the table was measured with another transformers")
def test_table_has_every_type_once_and_sorted():
    assert [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")] == zoo.ALL_TYPES


def test_named_types_work():
    verdicts = {model_type: line.split(" | ")[1] for model_type, line in ROWS.items()}
    assert {each: verdicts[each] for each in NAMED if verdicts[each] not in ("pruned", "partly")} == {}
    assert sum(verdict in ("pruned", "partly") for verdict in verdicts.values()) >= 40
