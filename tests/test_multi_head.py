"""Multi-head attention against PyTorch's module, its own other forms, and what it refuses."""

import copy
import math
import re
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import torch
from einops import rearrange
from oracles import draw, redraw, values_and_gradients
from torch import nn
from torch.testing import assert_close

from tfm_ref import MultiHeadAttention, SelfAttention, causal_mask, padding_mask
from tfm_ref.backends import BACKENDS as ALL_BACKENDS
from tfm_ref.backends import LACKS

B, N, M, H, D = 3, 5, 7, 2, 8
# Those that know masks and biases; for "triton" see tests/test_flash_triton.py.
BACKENDS = {name: attend for name, attend in ALL_BACKENDS.items() if name != "triton"}
DROPPING = [name for name in BACKENDS if "dropout" not in LACKS.get(name, ())]


# --- against nn.MultiheadAttention


def twins(backend, bias, device):
    """Build our layer and PyTorch's with the same parameters, biases that matter among them."""
    ours = MultiHeadAttention(d_model=D, n_heads=H, bias=bias, backend=backend).to(device)
    theirs = nn.MultiheadAttention(D, H, bias=bias, batch_first=True).to(device)
    redraw(ours)
    theirs.load_state_dict(in_their_names(dict(ours.named_parameters())))
    return ours, theirs


def in_their_names(of_ours):
    """Rename what belongs to our parameters, stacking queries, keys and values."""
    kinds = {name.split(".")[1] for name in of_ours}
    return {
        **{
            f"in_proj_{kind}": torch.cat([of_ours[f"{name}_proj.{kind}"] for name in "qkv"])
            for kind in kinds
        },
        **{f"out_proj.{kind}": of_ours[f"o_proj.{kind}"] for kind in kinds},
    }


PADDING = padding_mask(torch.tensor([M, 2, 4]), M)
SHARED = draw(1, 1, N, M, seed=1) > -0.5
SHARED[..., 0] = True  # a query with no key gets NaN from nn.MultiheadAttention
PER_HEAD = draw(B, H, N, M, seed=2) > -0.5
PER_HEAD[..., 0] = True
BIAS = draw(1, 1, N, M, seed=3).double()
MODES = {  # what we are given, and what they are
    "nothing": ({}, {}),
    "padding": ({"mask": PADDING}, {"key_padding_mask": ~PADDING[:, 0, 0]}),
    "mask": ({"mask": SHARED}, {"attn_mask": ~SHARED[0, 0]}),
    "mask per head": ({"mask": PER_HEAD}, {"attn_mask": ~PER_HEAD.flatten(0, 1)}),
    "padding and mask": (
        {"mask": PADDING & PER_HEAD},
        {"key_padding_mask": ~PADDING[:, 0, 0], "attn_mask": ~PER_HEAD.flatten(0, 1)},
    ),
    "bias": ({"bias": BIAS}, {"attn_mask": BIAS[0, 0]}),
    "bias and padding": (
        {"bias": BIAS, "mask": PADDING},
        {
            "attn_mask": BIAS[0, 0],
            "key_padding_mask": torch.zeros(B, M)
            .double()
            .masked_fill(~PADDING[:, 0, 0], -torch.inf),
        },
    ),
}
CAUSAL = {
    "causal": ({"is_causal": True}, {"attn_mask": ~causal_mask(N)[0, 0], "is_causal": True}),
    "causal and padding": (
        {"is_causal": True, "mask": PADDING[..., :N]},
        {"attn_mask": ~causal_mask(N)[0, 0], "key_padding_mask": ~PADDING[:, 0, 0, :N]},
    ),
}


def on(device, terms):
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in terms.items()}


@pytest.mark.parametrize("mode", [*MODES, *CAUSAL])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torch_module(backend, bias, mode, device):
    """Output, all gradients and the weights agree, in training and on its fast path."""
    ours, theirs = (module.double() for module in twins(backend, bias, device))
    our_terms, their_terms = (on(device, terms) for terms in {**MODES, **CAUSAL}[mode])
    tokens = [draw(B, N, D, seed=9).double().to(device)]
    if mode not in CAUSAL:
        tokens.append(draw(B, M, D, seed=8).double().to(device))

    def run_theirs(x, context=None):
        context = x if context is None else context
        return theirs(x, context, context, **their_terms, need_weights=False)[0]

    y, gradients, named = values_and_gradients(partial(ours, **our_terms), ours, *tokens)
    expected = values_and_gradients(run_theirs, theirs, *tokens)
    assert_close((y, gradients, in_their_names(named)), expected)

    x, context = tokens[0], tokens[-1]
    weighed = {**their_terms, "is_causal": False, "average_attn_weights": False}
    expected, weights = theirs(x, context, context, **weighed)
    assert_close(ours(*tokens, **our_terms), expected)
    assert_close(ours.attention_weights(*tokens, **our_terms), weights)
    with torch.no_grad():
        assert_close(ours(*tokens, **our_terms), run_theirs(*tokens))
        assert_close(ours(*tokens, **our_terms), theirs.eval()(x, context, context, **weighed)[0])


def test_dropout_of_weights_as_torch_does(device):
    """Both drop weights, not outputs: the spread over many draws is the same."""
    ours, theirs = twins("naive", False, device)
    ours.dropout = theirs.dropout = 0.5
    x = draw(1, N, D).to(device).expand(20_000, -1, -1)
    for y in ours(x), fused(ours)(x):
        expected = theirs(x, x, x, need_weights=False)[0]
        assert_close(y.mean(0), expected.mean(0), rtol=0, atol=0.05)
        assert_close(y.std(0), expected.std(0), rtol=0.05, atol=0)


# --- its own forms


def fused(module):
    """Copy a layer and let PyTorch's kernels compute it."""
    module = copy.deepcopy(module)
    module.backend = "sdpa"
    return module


def test_one_head_is_self_attention():
    one = SelfAttention(d_model=D, head_dim=3, v_head_dim=5, bias=True)
    several = MultiHeadAttention(d_model=D, n_heads=1, head_dim=3, v_head_dim=5, bias=True)
    several.load_state_dict(one.state_dict())
    x = draw(B, N, D)
    assert_close(several(x, is_causal=True), one(x, is_causal=True))
    assert_close(several.attention_weights(x), one.attention_weights(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_shared_keys_are_copied_keys(n_kv_heads, backend):
    """GQA is MHA whose key and value heads are copies: query heads share them in groups."""
    gqa = MultiHeadAttention(d_model=D, n_heads=4, n_kv_heads=n_kv_heads, backend=backend)
    mha = MultiHeadAttention(d_model=D, n_heads=4, backend=backend)
    state = gqa.state_dict()
    for name in "k_proj.weight", "v_proj.weight":
        heads = rearrange(state[name], "(g k) d -> g k d", g=n_kv_heads)
        state[name] = heads.repeat_interleave(4 // n_kv_heads, 0).flatten(0, 1)
    mha.load_state_dict(state)
    x = draw(B, N, D)
    assert_close(gqa(x, is_causal=True), mha(x, is_causal=True))
    assert_close(gqa.attention_weights(x), mha.attention_weights(x))


@pytest.mark.parametrize("backend", DROPPING)
def test_dropout_zeroes_weights_and_keeps_the_mean(backend, device):
    """Values of the unit matrix show the weights: each is 0 or divided by 1 - p."""
    attend = BACKENDS[backend]
    q, k = draw(2, 1, 2, 4, 8).to(device)
    v = torch.eye(4, device=device).expand(1, 2, 4, 4)
    weights = attend(q, k, v)
    draws = torch.stack([attend(q, k, v, dropout=0.25) for _ in range(2000)])
    kept = draws > 0
    assert_close(draws, kept * weights / 0.75)
    assert 0.24 < (~kept).float().mean() < 0.26
    assert_close(draws.mean(0), weights, rtol=0, atol=0.05)


@pytest.mark.parametrize("backend", DROPPING)
def test_dropout_in_training_only_and_not_in_the_weights(backend):
    attention, x = (
        MultiHeadAttention(d_model=D, n_heads=H, dropout=0.5, backend=backend),
        draw(B, N, D),
    )
    assert not torch.equal(attention(x), attention(x))
    weights = attention.attention_weights(x)
    assert_close(weights.sum(-1), torch.ones(B, H, N))
    attention.eval()
    assert torch.equal(attention(x), attention(x))
    assert torch.equal(weights, attention.attention_weights(x))


# --- in PyTorch's world


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"d_model": 512, "n_heads": 8}, 4 * 512 * 512),
        ({"d_model": 512, "n_heads": 8, "bias": True}, 4 * 512 * 512 + 4 * 512),
        ({"d_model": 512, "n_heads": 8, "n_kv_heads": 2}, 2 * 512 * 512 + 2 * 512 * 128),
        ({"d_model": 10, "n_heads": 3, "head_dim": 4}, 4 * 10 * 12),
        ({"d_model": 10, "n_heads": 3, "head_dim": 4, "v_head_dim": 7}, 2 * 10 * 12 + 2 * 10 * 21),
        ({"d_model": 8, "n_heads": 4, "n_kv_heads": 2, "bias": "kv"}, 2 * 64 + 2 * 32 + 2 * 4),
        ({"d_model": 8, "n_heads": 2, "bias": "qo"}, 4 * 64 + 2 * 8),
    ],
)
def test_parameter_count(settings, count):
    attention = MultiHeadAttention(**settings)
    assert sum(p.numel() for p in attention.parameters()) == count
    biased = {True: "qkvo", False: ""}.get(settings.get("bias", False), settings.get("bias"))
    assert all((getattr(attention, f"{p}_proj").bias is not None) == (p in biased) for p in "qkvo")


def test_its_settings_can_be_read():
    attention = MultiHeadAttention(d_model=8, n_heads=4, n_kv_heads=2)
    assert "n_heads=4, n_kv_heads=2, backend='sdpa'" in repr(attention)
    sizes = attention.d_model, attention.n_heads, attention.n_kv_heads, attention.head_dim
    assert (*sizes, attention.v_head_dim) == (8, 4, 2, 2, 2)


@pytest.mark.parametrize("settings", [{}, {"n_kv_heads": 2}, {"head_dim": 5, "v_head_dim": 3}])
def test_cache_width_counts_keys_and_values(settings):
    attention = MultiHeadAttention(d_model=8, n_heads=4, **settings)
    made = attention.k_proj(draw(1, 8)), attention.v_proj(draw(1, 8))
    assert attention.cache_width == sum(t.numel() for t in made)


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_scale_multiplies_the_scores(backend, batch, device):
    """All scores of a query, that is, and neither its bias nor the keys."""
    model = redraw(MultiHeadAttention(d_model=D, n_heads=H, backend=backend)).to(device).double()
    x, bias, scale = draw(B, N, D).double(), draw(1, H, N, N).double(), draw(batch, N).double()
    x, bias, scale = x.to(device), bias.to(device), scale.to(device)
    q, k, v = (
        rearrange(proj(x), "b n (h k) -> b h n k", h=H)
        for proj in (model.q_proj, model.k_proj, model.v_proj)
    )
    scores = torch.einsum("bhnk,bhmk->bhnm", q, k) / math.sqrt(D // H)
    weights = (scores * scale[:, None, :, None] + bias).softmax(-1)
    terms = {"bias": bias, "query_scale": scale}
    assert_close(model.attention_weights(x, **terms), weights)
    assert_close(model(x, **terms), model.o_proj(rearrange(weights @ v, "b h n v -> b n (h v)")))


def test_a_query_scale_leaves_the_dtype():
    """The factors are in float32; queries that they have multiplied are what they were."""
    model, x = MultiHeadAttention(d_model=D, n_heads=H).bfloat16(), draw(B, N, D).bfloat16()
    assert model(x, query_scale=torch.full((1, N), 2.0)).dtype == torch.bfloat16
    wider = MultiHeadAttention(d_model=D, n_heads=H, scale=2 / math.sqrt(D // H)).bfloat16()
    wider.load_state_dict(model.state_dict())
    assert torch.equal(model(x, query_scale=torch.full((1, N), 2.0)), wider(x))


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("method", ["forward", "attention_weights"])
@pytest.mark.parametrize(
    "scale",
    [
        torch.ones(N),
        torch.ones(1, 1),
        torch.ones(1, N + 1),
        torch.ones(B + 1, N),
        torch.ones(1, N, 1),
        torch.ones(1, N, dtype=torch.long),
        torch.ones(1, N, device="meta"),
    ],
)
def test_a_query_scale_that_does_not_fit(scale, method):
    message = (
        f"query_scale must be floating point of shape (batch or 1, len_q) = ({B} or 1, {N}), on "
        f"cpu; got {scale.dtype} of shape {tuple(scale.shape)} on {scale.device}"
    )
    model = MultiHeadAttention(d_model=D, n_heads=H)
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(model, method)(draw(B, N, D), query_scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, device):
    """Under autocast it computes in bfloat16, near to what float32 gives, with mask and bias."""
    attention = MultiHeadAttention(d_model=16, n_heads=4, n_kv_heads=2, backend=backend).to(device)
    x, bias = draw(2, N, 16).to(device), draw(1, 4, N, N).to(device)
    terms = {"mask": padding_mask(torch.tensor([5, 0], device=device), N), "bias": bias}
    with torch.autocast(device, torch.bfloat16):
        y = attention(x, **terms)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), attention(x, **terms), rtol=0.05, atol=0.02)


def test_gradient_of_the_bias(device):
    """A learned bias gets its gradient from either backend."""
    q, k, v = draw(3, 1, 2, N, 4).to(device)
    gradients = []
    for attend in BACKENDS.values():
        bias = draw(1, 2, N, N, seed=5).to(device).requires_grad_()
        attend(q, k, v, bias=bias, is_causal=True).square().sum().backward()
        gradients.append(bias.grad)
    for gradient in gradients[1:]:
        assert_close(gradient, gradients[0])


def test_compiles_whole():
    """No graph break: in a Python of its own, where annotations are not enforced."""
    program = """
import torch, tfm_ref
attention = tfm_ref.MultiHeadAttention(d_model=8, n_heads=4, n_kv_heads=2)
x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
compiled = torch.compile(attention, fullgraph=True, backend="eager")
for tokens, mask in ((x,), None), ((x, context), tfm_ref.sliding_window_mask(5, 7, window=2)):
    terms = {"mask": mask, "is_causal": True}
    torch.testing.assert_close(compiled(*tokens, **terms), attention(*tokens, **terms))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_meta_device():
    """Shapes can be had without numbers."""
    with torch.device("meta"):
        attention = MultiHeadAttention(d_model=4096, n_heads=32, n_kv_heads=8)
        y = attention(torch.empty(1, 100, 4096), is_causal=True)
    assert (y.shape, y.device.type) == ((1, 100, 4096), "meta")


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_heads": 7}, "d_model (512) must be divisible by n_heads (7), or head_dim be given"),
        ({"n_kv_heads": 3}, "n_heads (8) must be a multiple of n_kv_heads (3)"),
        ({"n_kv_heads": 16}, "n_heads (8) must be a multiple of n_kv_heads (16)"),
        ({"bias": "qx"}, "bias must be True, False or letters of \"qkvo\"; got 'qx'"),
        ({"bias": 2}, 'bias must be True, False or letters of "qkvo"; got 2'),
        ({"bias": ["q"]}, "bias must be True, False or letters of \"qkvo\"; got ['q']"),
        ({"dropout": 1.0}, "dropout must lie in 0 <= dropout < 1; got 1.0"),
        ({"dropout": -0.1}, "dropout must lie in 0 <= dropout < 1; got -0.1"),
        ({"backend": "fast"}, 'backend must be one of naive, tiled, sdpa, triton; got "fast"'),
        *[
            (
                {"dropout": 0.1, "backend": backend},
                f'dropout (0.1) needs backend "naive" or "sdpa"; got "{backend}"',
            )
            for backend in ("tiled", "triton")
        ],
        *[
            ({name: size}, f"{name} must be an integer of at least 1; got {size}")
            for name, size in product(
                ["d_model", "n_heads", "n_kv_heads", "head_dim", "v_head_dim"], [0, -1]
            )
        ],
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_settings_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MultiHeadAttention(**{"d_model": 512, "n_heads": 8, **settings})


FITS = "must have shape (batch, length, d_model = 8) and not be empty; got"
KIND = "must have the same dtype and device; got torch.float32 on cpu and"


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("method", ["forward", "attention_weights"])
@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        (draw(3, 8), None, f"x {FITS} (3, 8)"),
        (draw(3, 5, 7), None, f"x {FITS} (3, 5, 7)"),
        (draw(3, 5, 8), draw(3, 0, 8), f"context {FITS} (3, 0, 8)"),
        (draw(3, 5, 8), draw(5, 8), f"context {FITS} (5, 8)"),
        (draw(3, 5, 8), draw(1, 5, 8), "q and k must have the same batch; got 3 and 1"),
        (draw(3, 5, 8).double(), None, f"the layer and x {KIND} torch.float64 on cpu"),
        (draw(3, 5, 8), draw(3, 5, 8).half(), f"the layer and context {KIND} torch.float16 on cpu"),
    ],
)
def test_tokens_refused(method, x, context, message):
    attention = MultiHeadAttention(d_model=8, n_heads=2)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(attention, method)(x, context)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (4, 3, 4, 4)])
def test_a_mask_of_batch_and_lengths_is_refused(shape):
    """With batch = heads such a mask would act on heads, where the axes are not named."""
    attention, x = MultiHeadAttention(d_model=8, n_heads=4), draw(4, 4, 8)
    with pytest.raises(ValueError, match="mask must have 4 axes"):
        attention(x, mask=torch.ones(shape, dtype=torch.bool))
