"""Every model type that transformers knows is pruned, partly pruned, or refused with one error; none goes wrong.

docs/models.md, which scripts/make_model_table.py wrote, is held against what `measure` finds here: where they differ,
either the library or the file has drifted. With another transformers than the file's, a type may be what it likes,
except wrong.
"""

import re
from pathlib import Path

import pytest
import transformers

import zoo
from zoo_laws import measure

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}
NOTES = {text: int(number) for number, text in re.findall(r"^\[\^(\d+)\]: (.*)", PAGE, re.MULTILINE)}
CELLS = {model_type: line.split(" | ") for model_type, line in ROWS.items()}
SAME_VERSION = f"transformers {transformers.__version__};" in PAGE
NAMED = zoo.names("""
    llava llava_next llava_onevision vipllava qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 internvl gemma3 gemma3n
    gemma3n_text gemma4_text paligemma idefics2 idefics3 smolvlm mistral3 pixtral llama4 mllama glm4v aya_vision
    cohere2_vision aria lfm2_vl got_ocr2 blip-2 llama qwen2 qwen3 mistral gemma2 phi3
""")
LATENT = zoo.names("deepseek_v2 deepseek_v3 kimi_k25 mistral4")
OWN_BUGS = {"4.57.6": zoo.names("evolla kosmos-2.5"), "5.4.0": ["evolla"]}
"""Models whose logits differ with and without transformers' own cache, or whose second turn fails with it."""


@pytest.mark.parametrize("model_type", zoo.ALL_TYPES)
@pytest.mark.filterwarnings("ignore")
def test_type_is_what_the_table_says(model_type):
    if model_type in OWN_BUGS.get(transformers.__version__, ()):
        pytest.skip("fails with transformers' own cache, too")
    found = measure(model_type)
    assert found.verdict != "wrong", found.remarks
    assert not SAME_VERSION or found.row(dict(NOTES)) == ROWS[model_type]


@pytest.mark.skipif(not SAME_VERSION, reason="the table was measured with another transformers")
def test_table_has_every_type_once_and_sorted():
    assert list(ROWS) == zoo.ALL_TYPES
    assert PAGE.count("\n| `") == len(ROWS)


@pytest.mark.parametrize("model_type", NAMED)
def test_named_types_are_pruned_by_head(model_type):
    assert CELLS[model_type][1] in ("pruned", "partly")
    assert CELLS[model_type][2] == "head"


@pytest.mark.parametrize("model_type", LATENT)
def test_latent_attention_has_one_length_a_layer(model_type):
    assert CELLS[model_type][1:3] == ["pruned", "layer"]
