"""Tensor parallelism: two gloo processes hold half of the heads each, and keep what one process with all heads keeps.

Run by itself with a rank in the environment, this file is the worker: it generates and saves what it got.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version
from transformers import LlamaConfig, LlamaForCausalLM

from prefixkv_cache import PrefixKVCache

LAYERS = 4


def make_model(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=100, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.25)
    model.save_pretrained(folder)


def generate(folder, **options):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    ids = torch.randint(5, 95, (2, 48), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    cache = PrefixKVCache(budget=0.4, distance=5)
    output = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False,
        return_dict_in_generate=True, output_logits=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return {
        "logits": torch.stack(output.logits),
        "kept": [cache.kept_positions(layer) for layer in range(LAYERS)],
        "heads": cache.layers[0].keys.shape[1],
    }


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.17"), reason="tp_plan before 5.17 is not what we test"
)
def test_ranks_with_half_of_the_heads_keep_what_all_heads_together_keep(tmp_path):
    make_model(tmp_path / "model")
    alone = generate(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PREFIXKV_TEST_FOLDER": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    for rank in ("0", "1"):
        part = torch.load(tmp_path / f"{rank}.pt")
        assert part["heads"] == alone["heads"] // 2
        assert all(torch.equal(one, two) for one, two in zip(alone["kept"], part["kept"], strict=True))
        torch.testing.assert_close(part["logits"], alone["logits"], atol=1e-4, rtol=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    results = Path(os.environ["PREFIXKV_TEST_FOLDER"])
    torch.save(generate(results / "model", tp_plan="auto"), results / f"{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
