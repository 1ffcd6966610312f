"""PyTorch's kernels: what they store, what they are shown, and that they give the same."""

import pytest
import torch
import torch.nn.functional as F
from oracles import draw
from torch.testing import assert_close

from tfm_ref import causal_mask, padding_mask
from tfm_ref.attention import scaled_dot_product_attention
from tfm_ref.fused import fused_attention


def weights_kept(attend, q, k, v, **terms):
    """Say whether autograd keeps as many numbers as there are weights of all heads."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(q.requires_grad_(), k, v, **terms)
    return max(sizes) >= q.shape[1] * q.shape[2] * k.shape[2]


@pytest.mark.parametrize(
    ("stored", "v_head_dim", "terms"),
    [
        (False, 8, {}),
        (False, 8, {"is_causal": True}),
        (False, 8, {"mask": padding_mask(torch.tensor([200]), 256)}),
        (False, 8, {"mask": causal_mask(256), "bias": draw(1, 1, 256, 256)}),
        (True, 4, {}),
        (True, 8, {"dropout": 0.1}),
        (True, 8, {"bias": draw(1, 1, 256, 256).requires_grad_()}),
    ],
)
def test_when_the_weights_are_stored(stored, v_head_dim, terms):
    """The docstring of fused_attention says when, on the CPU; the naive form stores them always."""
    q, k, v = draw(1, 4, 256, 8), draw(1, 2, 256, 8), draw(1, 2, 256, v_head_dim)
    assert weights_kept(scaled_dot_product_attention, q, k, v, **terms)
    assert weights_kept(fused_attention, q, k, v, **terms) == stored


def test_fused_equals_torch_where_torch_agrees(device):
    """Square and causal, PyTorch's function is called as it is."""
    q, k, v = draw(3, 2, 2, 5, 4).to(device)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(fused_attention(q, k, v, is_causal=True), expected)


# --- a group of queries folded into one head


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_folded_queries_give_the_same(is_causal, with_mask, with_bias, n):
    """Few queries over shared keys: masks of every shape, a bias, a query that sees nothing."""
    q, k, v = draw(2, 6, n, 4), draw(2, 2, 9, 4, seed=1), draw(2, 2, 9, 4, seed=2)
    for shape in (2, 6, n, 9), (2, 1, 1, 9), (1, 1, n, 9), (1, 6, 1, 9), (1, 1, 1, 1):
        mask = draw(*shape, seed=3) > 0
        terms = {"is_causal": is_causal, "mask": mask if with_mask else None}
        terms["bias"] = draw(*shape, seed=4) if with_bias else None
        terms["sinks"] = draw(6, seed=5) if with_bias else None
        expected = scaled_dot_product_attention(q, k, v, **terms)
        assert_close(fused_attention(q, k, v, **terms), expected)


@pytest.mark.parametrize(("n", "folds"), [(1, True), (3, True), (4, False)])
def test_few_queries_are_folded(n, folds, monkeypatch):
    """Up to as many as there are keys; what the kernel gets is no copy of these."""
    seen = []
    kernel = F.scaled_dot_product_attention

    def spy(q, k, v, **terms):
        seen.append((q.shape, k.data_ptr(), terms["enable_gqa"]))
        return kernel(q, k, v, **terms)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, (k, v) = draw(1, 6, n, 4), draw(2, 1, 2, 9, 4)
    fused_attention(q, k, v)
    shape = (1, 2, 3 * n, 4) if folds else (1, 6, n, 4)
    assert seen == [(shape, k.data_ptr(), not folds)]
