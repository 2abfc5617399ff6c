"""Tensor parallelism: two gloo processes hold half of the heads each, and keep what one process with all heads keeps.

Run by itself with a rank in the environment, this file is the worker: it generates and saves what it got.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version
from transformers import LlamaConfig, LlamaForCausalLM

from prefixkv_cache import PAPER, PrefixKVCache, calibrate

LAYERS = 4
RANKING = ("queries", "average", "heads", "pooling", "value_norm", "diversity", "novelty")
# By name: key heads, and arguments of the cache. The values of a key, all heads together, are 32 numbers or 64; of more
# than 32 novelty compares a sketch.
WAYS = {
    "default": (4, {"distance": 5, "slack": 0}),
    "wide": (8, {"distance": 5, "slack": 0}),
    "paper": (4, {**PAPER, "distance": 5}),
    "single heads": (8, {"heads": "max", "pooling": 3, "value_norm": True, "slack": 0}),
}


def make_model(folder, kv_heads):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=kv_heads, vocab_size=100, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.25)
    model.save_pretrained(folder)


def generate(folder, way, **options):
    kv_heads, arguments = WAYS[way]
    model = LlamaForCausalLM.from_pretrained(folder / str(kv_heads), dtype=torch.float32, **options).eval()
    ids = torch.randint(5, 95, (2, 48), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    cache = PrefixKVCache(budget=0.4, **arguments)
    ranking = {field: value for field, value in arguments.items() if field in RANKING}
    samples = [{"input_ids": ids, "attention_mask": mask}]
    rankings = [ranking, {**ranking, "heads": "each"}]
    profiles = [calibrate(model, samples, budgets=[0.4], **each).keep for each in rankings]
    output = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False,
        return_dict_in_generate=True, output_logits=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return {
        "logits": torch.stack(output.logits),
        "kept": [cache.kept_positions(layer) for layer in range(LAYERS)],
        "heads": cache.layers[0].keys.shape[1],
        "profiles": profiles,
    }


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.17"), reason="tp_plan before 5.17 is not what we test"
)
def test_ranks_with_half_of_the_heads_keep_what_all_heads_together_keep(tmp_path):
    for kv_heads in (4, 8):
        make_model(tmp_path / str(kv_heads), kv_heads)
    by_way = {way: generate(tmp_path, way) for way in WAYS}
    kept = [torch.cat(alone["kept"], 1).tolist() for alone in by_way.values()]
    assert all(one != two for one, two in itertools.combinations(kept, 2)), "two ways keep the same"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PREFIXKV_TEST_FOLDER": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    for rank, (way, alone) in itertools.product(("0", "1"), by_way.items()):
        part = torch.load(tmp_path / f"{rank}.pt")[way]
        assert part["heads"] == alone["heads"] // 2
        assert all(torch.equal(one, two) for one, two in zip(alone["kept"], part["kept"], strict=True)), way
        torch.testing.assert_close(part["logits"], alone["logits"], atol=1e-4, rtol=0)
        for profile, wanted in zip(part["profiles"], alone["profiles"], strict=True):
            assert (profile - wanted).abs().max() < 1.5 / 38 / 2, way  # at most a pair of the shorter row


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    results = Path(os.environ["PREFIXKV_TEST_FOLDER"])
    made = {way: generate(results, way, tp_plan="auto") for way in WAYS}
    torch.save(made, results / f"{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
