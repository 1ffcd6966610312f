"""ALiBi and T5's buckets against the public libraries, and by hand."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tfm_ref import ALiBi, T5Bias, alibi_slopes
from tfm_ref.position_biases import t5_bucket

H = 4


# --- ALiBi


@pytest.mark.parametrize("n_heads", range(1, 71))
def test_slopes_are_those_of_bloom(n_heads):
    """Any number of heads: with one key, BLOOM's bias is slope times position."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 3), n_heads, torch.float32)[:, 0, 2] / 2
    assert_close(alibi_slopes(n_heads), theirs)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 5, 8, 12, 16, 20, 112])
def test_slopes_are_those_of_mpt(n_heads):
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    theirs = build_mpt_alibi_tensor(n_heads, 3)[:, 0, 1] * -1
    assert_close(alibi_slopes(n_heads), theirs)


def test_slopes_by_hand():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]
    with pytest.raises(ValueError, match="n_heads must be an integer of at least 1; got 0"):
        ALiBi(n_heads=0)


# --- T5


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20), (64, 1000), (4, 3)])
def test_buckets_are_those_of_t5(n_buckets, max_distance, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = torch.arange(-1500, 1500)[None, None]
    settings = dict(bidirectional=bidirectional, max_distance=max_distance)
    theirs = T5Attention._relative_position_bucket(relative, num_buckets=n_buckets, **settings)
    ours = t5_bucket(relative, n_buckets=n_buckets, **settings)
    assert torch.equal(ours, theirs)
    unused = {n_buckets // 2} if bidirectional else set()  # a later key is never at distance 0
    assert set(ours.flatten().tolist()) == set(range(n_buckets)) - unused


def test_t5_bias_is_that_of_t5():
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=16, num_heads=H, d_kv=4, is_decoder=False)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = T5Bias(n_heads=H, bidirectional=True)
    with torch.no_grad():
        ours.table.copy_(nn.init.normal_(theirs.relative_attention_bias.weight))
    positions = torch.arange(200)[None]
    assert_close(ours.bias(positions, positions), theirs.compute_bias(200, 200))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(n_heads=0), "n_heads must be an integer of at least 1; got 0"),
        (dict(n_heads=2, n_buckets=1), "n_buckets must be an integer of at least 2; got 1"),
        (
            dict(n_heads=2, n_buckets=2, bidirectional=True),
            "n_buckets must be an integer of at least 4; got 2",
        ),
        (dict(n_heads=2, n_buckets=5, bidirectional=True), "must be even; got 5"),
        (
            dict(n_heads=2, max_distance=16),
            "max_distance must be an integer of at least 17; got 16",
        ),
    ],
)
def test_t5_bias_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        T5Bias(**settings)
