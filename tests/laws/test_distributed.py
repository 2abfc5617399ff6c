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

from prefixkv_cache import PrefixKVCache, calibrate
from prefixkv_cache.methods import Method
from watch import kept_by_head, make_profile

LAYERS = 4
# By name: key heads, the method, and whether there is a profile by head.
WAYS = {
    "default": (4, "default:score=attention;headroom=0", False),
    "paper": (4, "prefixkv:distance=5", False),
    "single heads": (8, "prefixkv:queries=32;heads=max;pooling=3;value_norm=true", False),
    "by head": (8, "prefixkv:distance=5", True),
    "heavy hitters": (8, "h2o", True),
    "pool": (4, "snapkv:queries=8;recent=4;lengths=pool", False),
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
    kv_heads, method, by_head = WAYS[way]
    model = LlamaForCausalLM.from_pretrained(folder / str(kv_heads), dtype=torch.float64, **options).eval()
    ids = torch.randint(5, 95, (2, 48), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    samples = [{"input_ids": ids, "attention_mask": mask}]
    if by_head:
        cache = PrefixKVCache(make_profile(LAYERS, kv_heads, method), 0.4, config=model.config)
    else:
        cache = PrefixKVCache(None, 0.4, method=method, config=model.config)
    profiles = [calibrate(model, samples, method=Method.parse(method), budgets=[0.4, 1.0], by="mass").keep]
    output = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False,
        return_dict_in_generate=True, output_logits=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return {
        "logits": torch.stack(output.logits),
        "kept": [kept_by_head(cache, layer, kv_heads // (2 if options else 1)) for layer in range(LAYERS)],
        "profiles": profiles,
    }


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.17"), reason="tp_plan before 5.17 is not what we test"
)
def test_ranks_with_half_of_the_heads_keep_what_all_heads_together_keep(tmp_path):
    for kv_heads in (4, 8):
        make_model(tmp_path / str(kv_heads), kv_heads)
    by_way = {way: generate(tmp_path, way) for way in WAYS}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PREFIXKV_TEST_FOLDER": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[run.stderr.find("Traceback") :][:9000]
    for rank, (way, alone) in itertools.product(("0", "1"), by_way.items()):
        part = torch.load(tmp_path / f"{rank}.pt")[way]
        first = int(rank) * (n_heads := WAYS[way][0] // 2)
        for own, of_all in zip(part["kept"], alone["kept"], strict=True):
            assert own == [heads[first : first + n_heads] for heads in of_all], way
        assert (part["logits"] - alone["logits"]).abs().max() < 1e-4, way  # transformers reduces and returns float32
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
