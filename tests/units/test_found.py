"""What random sequences, interruptions and damaged files found once, each as small as it can be."""

import pytest
import torch
from transformers import AttentionInterface

import compat
from prefixkv_cache import PrefixKVCache, PrefixProfile, ProfileError, attention
from prefixkv_cache.rules.importance import attention_importance


@pytest.mark.parametrize("max_bytes", [2**26, 2**9], ids=["at_once", "in_pieces"])
@pytest.mark.parametrize("lengths", [(0, 0, 4), (4, 1, 2), (1, 5, 0)], ids=str)
@pytest.mark.parametrize("window", [1, 3])
def test_a_window_under_a_mask_of_keys_alone(lengths, window, max_bytes):
    """Flash attention's [batch, keys] mask: each row's window ends where the row says, not where the first row does."""
    rows, n_queries, n_keys = len(lengths), 6, 9
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(rows, 2, n, 4, generator=random) for n in (n_queries, n_keys))
    real = torch.arange(n_queries) < torch.tensor(lengths)[:, None]
    mask = torch.cat([torch.ones(rows, n_keys - n_queries, dtype=torch.bool), real], 1)
    received = attention_importance(query, key, mask.long(), queries=window, real=real, max_bytes=max_bytes)
    for row, length in enumerate(lengths):
        wanted = torch.zeros(n_keys)
        for at in range(max(0, length - window), length):
            sees = n_keys - n_queries + at + 1
            scores = query[row, :, at, None] @ key[row, :, :sees].mT / 2
            wanted[:sees] += scores.softmax(-1).mean(0)[0]
        torch.testing.assert_close(received[row], wanted)


def test_an_interruption_while_the_door_opens(monkeypatch):
    """Ctrl-C right then: the door opens for the next cache, and closes behind the last."""
    closed = getattr(AttentionInterface, compat.DOOR)
    keys = torch.zeros(1, 1, 2, 2)

    def interrupted(*_):
        raise KeyboardInterrupt

    for name in ("setattr", "_wrap"):
        cache = PrefixKVCache()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(attention, name, interrupted, raising=False)
            cache.update(keys, keys, 0)
        assert getattr(AttentionInterface, compat.DOOR) is closed
        cache.update(keys, keys, 0)
        assert getattr(AttentionInterface, compat.DOOR) is not closed
        del cache
        assert getattr(AttentionInterface, compat.DOOR) is closed


def test_a_long_value_in_a_profile_makes_no_long_error():
    with pytest.raises(ProfileError) as caught:
        PrefixProfile([0.5], [[0.5]], {"queries": "x" * 100_000 + "\n"})
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()
