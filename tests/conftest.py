"""Strict and small: one seed, one thread, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def short_descent(monkeypatch):
    """Lengths are improved with one look at each sample; the descent's own laws are in units/test_measure.py."""
    monkeypatch.setattr("prefixkv_cache.calibration.plan.EACH", 1)
