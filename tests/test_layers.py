"""Norms, feed-forwards and blocks against PyTorch's and Llama's, and what they refuse."""

import copy
import math
import re
import subprocess
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import draw, redraw, values_and_gradients
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tfm_ref import (
    Block,
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositions,
    causal_mask,
    padding_mask,
    sliding_window_mask,
)
from tfm_ref.layers import ACTIVATIONS

B, N, M, H, D, FF = 3, 5, 7, 2, 8, 12


# --- RMSNorm


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0)
    assert_close(norm(torch.tensor([[1.0, 7.0]])), torch.tensor([[0.2, 1.4]]))
    norm.weight.data = torch.tensor([1.0, -2.0])
    assert_close(norm(torch.tensor([[1.0, 7.0]])), torch.tensor([[0.2, -2.8]]))


def test_eps_is_inside_the_root():
    """A root mean square of 3 with eps 16 gives √(9 + 16) = 5."""
    assert_close(RMSNorm(1, eps=16.0)(torch.tensor([3.0])), torch.tensor([0.6]))
    assert torch.equal(RMSNorm(4)(torch.zeros(4)), torch.zeros(4))
    assert RMSNorm(4).eps == 1e-6


def test_rms_norm_without_a_gain():
    """Nothing to learn, nothing to store; and it may stand before or after a rotation."""
    norm, x = RMSNorm(D, eps=0.1, gain=False), draw(B, H, N, D)
    assert not norm.state_dict()
    assert torch.equal(norm(x), RMSNorm(D, eps=0.1)(x))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert "RMSNorm(8, eps=0.1, gain=False)" in repr(norm)
    turn = RotaryPositions(head_dim=D).rotation(torch.arange(N)[None])
    assert_close(turn(norm(x)), norm(turn(x)))
    with_gain = redraw(RMSNorm(D, eps=0.1))
    assert not torch.allclose(turn(with_gain(x)), with_gain(turn(x)), atol=0.1)


@pytest.mark.parametrize("shape", [(D,), (N, D), (B, N, D), (B, H, N, D)])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm_equals_torch_and_llama(shape, eps, device):
    ours = redraw(RMSNorm(D, eps=eps)).to(device)
    double, theirs = copy.deepcopy(ours).double(), nn.RMSNorm(D, eps=eps).to(device).double()
    llama = LlamaRMSNorm(D, eps=eps).to(device)
    theirs.load_state_dict(ours.state_dict())
    llama.load_state_dict(ours.state_dict())
    x = draw(*shape, seed=9).to(device)
    assert_close(
        values_and_gradients(double, double, x.double()),
        values_and_gradients(theirs, theirs, x.double()),
    )
    assert torch.equal(ours(x), llama(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_in_half_precision(dtype, device):
    """Bit for bit Llama's; the squares, which float16 cannot hold, are summed in float32."""
    ours, llama = redraw(RMSNorm(D)).to(device, dtype), LlamaRMSNorm(D).to(device, dtype)
    llama.load_state_dict(ours.state_dict())
    x = 300 * draw(100, D, seed=9).to(device, dtype)
    assert ours(x).dtype == dtype
    assert torch.equal(ours(x), llama(x))
    assert_close(ours(x).float(), ours.float()(x.float()), rtol=0.02, atol=1e-3)


def test_gain_after_the_cast():
    """Where the casts lie is seen in the last bit: nn.RMSNorm multiplies before it casts."""
    ours, theirs = RMSNorm(D).bfloat16(), nn.RMSNorm(D, eps=1e-6).bfloat16()
    x = draw(1000, D).bfloat16()
    assert torch.equal(ours(x), theirs(x))  # with a gain of 1 there is nothing to see
    ours.weight.data.fill_(1.3)
    theirs.weight.data.fill_(1.3)
    cast_first = ours.weight * RMSNorm(D)(x.float()).bfloat16()
    assert torch.equal(ours(x), cast_first)
    assert not torch.equal(ours(x), theirs(x))


@given(st.integers(1, 40), st.integers(0, 100), st.floats(0.1, 10))
def test_rms_norm_is_layer_norm_of_centred_tokens(d, seed, scale):
    """And it does not see the scale of a token."""
    x = draw(4, d, seed=seed).double()
    centred = x - x.mean(-1, keepdim=True)
    rms, layer = RMSNorm(d, eps=1e-30).double(), nn.LayerNorm(d, eps=1e-30).double()
    assert_close(rms(centred), layer(x))
    assert_close(rms(scale * x), rms(x))
    assert_close(rms(x).square().mean(-1), torch.ones(4).double())


# --- FeedForward


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu", lambda x: max(x, 0.0)),
        ("gelu", lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        ("gelu_tanh", lambda x: x * (1 + math.tanh(0.79788456 * (x + 0.044715 * x**3))) / 2),
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("swiglu_clamped", lambda x: min(x, 7) / (1 + math.exp(-1.702 * min(x, 7)))),
    ],
)
def test_activations_by_formula(name, formula):
    x = torch.linspace(-9, 9, 37)
    assert_close(ACTIVATIONS[name](x), torch.tensor([formula(v) for v in x.tolist()]))


def test_every_activation_is_tested_and_documented():
    assert set(ACTIVATIONS) == {"relu", "gelu", "gelu_tanh", "silu", "swiglu_clamped"}
    assert all(f'"{name}"' in FeedForward.__doc__ for name in ACTIVATIONS)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_is_two_layers(activation, bias, device):
    ours = redraw(FeedForward(d_model=D, d_ff=FF, activation=activation, bias=bias)).to(device)
    theirs = [getattr(ours, f"{name}_proj") for name in ("up", "down")]
    x = draw(B, N, D, seed=9).to(device)
    assert_close(ours(x), theirs[1](ACTIVATIONS[activation](theirs[0](x))))
    assert_close(ours.hidden(x), ACTIVATIONS[activation](theirs[0](x)))
    assert ours.gate_proj is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("activation", "act"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")]
)
def test_gated_feed_forward_equals_llama(activation, act, bias, device):
    settings = {"activation": activation, "gated": True, "bias": bias}
    ours = redraw(FeedForward(d_model=D, d_ff=FF, **settings)).double().to(device)
    sizes = {"hidden_size": D, "intermediate_size": FF, "num_attention_heads": H}
    config = LlamaConfig(**sizes, hidden_act=act, mlp_bias=bias)
    theirs = LlamaMLP(config).double().to(device)
    theirs.load_state_dict(ours.state_dict())
    x = draw(B, N, D, seed=9).double().to(device)
    assert_close(values_and_gradients(ours, ours, x), values_and_gradients(theirs, theirs, x))


def test_clamped_swiglu_written_out():
    """What is multiplied by the gate is held between -7 and 7, and then 1 more."""
    settings = {"activation": "swiglu_clamped", "gated": True}
    feed_forward = redraw(FeedForward(d_model=D, d_ff=FF, **settings))
    x = 5 * draw(B, N, D, seed=9)
    gate, up = feed_forward.gate_proj(x), feed_forward.up_proj(x)
    assert min(up.max(), -up.min(), gate.max()) > 7
    expected = ACTIVATIONS["swiglu_clamped"](gate) * (up.clamp(-7, 7) + 1)
    assert_close(feed_forward.hidden(x), expected)
    assert_close(feed_forward(x), feed_forward.down_proj(expected))


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 2 * D * FF + D + FF),
        ({"bias": False}, 2 * D * FF),
        ({"gated": True}, 3 * D * FF + D + 2 * FF),
        ({"gated": True, "bias": False}, 3 * D * FF),
    ],
)
def test_parameter_count(settings, count):
    feed_forward = FeedForward(d_model=D, d_ff=FF, **settings)
    assert sum(p.numel() for p in feed_forward.parameters()) == count
    assert (feed_forward.d_model, feed_forward.d_ff) == (D, FF)


@pytest.mark.parametrize("gated", [True, False])
def test_every_token_by_itself(gated):
    feed_forward, x = FeedForward(d_model=D, d_ff=FF, gated=gated), draw(B, N, D)
    changed = x.clone()
    changed[1, 2] += 1
    moved = (feed_forward(changed) != feed_forward(x)).any(-1)
    assert moved.nonzero().tolist() == [[1, 2]]
    order = torch.randperm(N)
    assert_close(feed_forward(x[:, order]), feed_forward(x)[:, order])


def test_dropout_between_the_projections():
    """Projections of the unit matrix show it: each number is 0 or divided by 1 - p."""
    feed_forward = FeedForward(d_model=D, d_ff=D, bias=False, dropout=0.25)
    with torch.no_grad():
        feed_forward.up_proj.weight.copy_(torch.eye(D))
        feed_forward.down_proj.weight.copy_(torch.eye(D))
    x = draw(1000, N, D).abs() + 0.1
    y = feed_forward(x)
    kept = y > 0
    assert_close(y, kept * x / 0.75)
    assert 0.24 < (~kept).float().mean() < 0.26
    assert_close(feed_forward.hidden(x), x)
    assert_close(feed_forward.eval()(x), x)


# --- Block against PyTorch's layers


def attention_state(name, theirs):
    """Their names and ours of an attention's parameters: queries, keys and values are stacked."""
    return {
        f"{theirs}.in_proj_": [f"{name}.{p}_proj." for p in "qkv"],
        f"{theirs}.out_proj.": [f"{name}.o_proj."],
    }


ENCODER = {
    **attention_state("attention", "self_attn"),
    "linear1.": ["feed_forward.up_proj."],
    "linear2.": ["feed_forward.down_proj."],
    "norm1.": ["attention_norm."],
    "norm2.": ["feed_forward_norm."],
}
DECODER = {
    **ENCODER,
    **attention_state("cross_attention", "multihead_attn"),
    "norm2.": ["cross_attention_norm."],
    "norm3.": ["feed_forward_norm."],
}


def in_their_names(of_ours, names):
    return {
        theirs + kind: torch.cat([of_ours[name + kind] for name in ours])
        for theirs, ours in names.items()
        for kind in ("weight", "bias")
    }


def build(*, cross=False, activation="relu", dropout=0.0, backend="sdpa", **settings):
    def attend():
        return MultiHeadAttention(d_model=D, n_heads=H, bias=True, dropout=dropout, backend=backend)

    return Block(
        attention=attend(),
        feed_forward=FeedForward(d_model=D, d_ff=FF, activation=activation, dropout=dropout),
        cross_attention=attend() if cross else None,
        dropout=dropout,
        **settings,
    )


def twins(device, *, cross=False, activation="relu", norm_placement="pre", dropout=0.0):
    """Build our block and PyTorch's layer with the same parameters."""
    ours = redraw(
        build(cross=cross, activation=activation, norm_placement=norm_placement, dropout=dropout)
    )
    layer = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    theirs = layer(
        D,
        H,
        FF,
        dropout,
        activation=activation,
        batch_first=True,
        norm_first=norm_placement == "pre",
    )
    theirs.load_state_dict(in_their_names(ours.state_dict(), DECODER if cross else ENCODER))
    return ours.double().to(device), theirs.double().to(device)


PADDING = padding_mask(torch.tensor([N, 2, 4]), N)
CONTEXT_PADDING = padding_mask(torch.tensor([M, 1, 4]), M)
BIAS = draw(1, 1, N, N, seed=3).double()
MODES = {  # what we are given, and what PyTorch's encoder layer is
    "nothing": ({}, {}),
    "padding": ({"mask": PADDING}, {"src_key_padding_mask": ~PADDING[:, 0, 0]}),
    "causal": ({"is_causal": True}, {"src_mask": ~causal_mask(N)[0, 0]}),
    "causal and padding": (
        {"is_causal": True, "mask": PADDING},
        {"src_mask": ~causal_mask(N)[0, 0], "src_key_padding_mask": ~PADDING[:, 0, 0]},
    ),
    "bias": ({"bias": BIAS}, {"src_mask": BIAS[0, 0]}),
}


def on(device, terms):
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in terms.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equals_torch_encoder_layer(activation, norm_placement, mode, device):
    """Output and all gradients agree, in training and on its fast path."""
    ours, theirs = twins(device, activation=activation, norm_placement=norm_placement)
    our_terms, their_terms = (on(device, terms) for terms in MODES[mode])
    x = draw(B, N, D, seed=9).double().to(device)
    y, gradients, named = values_and_gradients(partial(ours, **our_terms), ours, x)
    expected = values_and_gradients(partial(theirs, **their_terms), theirs, x)
    assert_close((y, gradients, in_their_names(named, ENCODER)), expected)
    if mode == "nothing":
        with torch.no_grad():
            assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equals_torch_decoder_layer(activation, norm_placement, device):
    """Cross-attention between the two others, with a mask of its own."""
    ours, theirs = twins(device, cross=True, activation=activation, norm_placement=norm_placement)
    x, context = draw(B, N, D, seed=9).double(), draw(B, M, D, seed=8).double()
    x, context = x.to(device), context.to(device)
    our_terms = {"mask": PADDING, "is_causal": True, "context_mask": CONTEXT_PADDING}
    their_terms = {
        "tgt_mask": ~causal_mask(N)[0, 0],
        "tgt_key_padding_mask": ~PADDING[:, 0, 0],
        "memory_key_padding_mask": ~CONTEXT_PADDING[:, 0, 0],
    }
    run, run_theirs = (
        partial(ours, **on(device, our_terms)),
        partial(theirs, **on(device, their_terms)),
    )
    y, gradients, named = values_and_gradients(run, ours, x, context)
    expected = values_and_gradients(run_theirs, theirs, x, context)
    assert_close((y, gradients, in_their_names(named, DECODER)), expected)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_dropout_as_torch_does(norm_placement, cross, device):
    """The same places, the same probability: mean and spread over many draws agree."""
    ours, theirs = twins(device, cross=cross, norm_placement=norm_placement, dropout=0.3)
    x = draw(1, N, D, seed=9).double().to(device).expand(20_000, -1, -1)
    tokens = (x, x) if cross else (x,)
    with torch.no_grad():
        y, expected = ours(*tokens), theirs(*tokens)
        off = (y.mean(0) - expected.mean(0)) / expected.std(0)
        assert off.abs().max() < 0.05
        assert_close(y.std(0), expected.std(0), rtol=0.05, atol=0)
        assert torch.equal(ours.eval()(*tokens), ours(*tokens))
    assert not torch.equal(ours.train()(*tokens), ours(*tokens))


def test_dropout_of_what_a_sublayer_returns():
    """Where the sub-layers return ones, a token gains 0, 1/(1 - p) or 2/(1 - p)."""

    class Ones(nn.Module):
        d_model, o_proj = D, nn.Linear(D, D)

        def forward(self, x, **terms):
            return torch.ones_like(x)

    block = Block(attention=Ones(), feed_forward=Ones(), norm=nn.Identity, dropout=0.25)
    gained, counts = block(torch.zeros(1000, N, D)).unique(return_counts=True)
    assert_close(gained, torch.tensor([0, 4 / 3, 8 / 3]))
    assert_close(counts / counts.sum(), torch.tensor([1, 6, 9]) / 16, rtol=0, atol=0.01)


# --- Block by its definition


@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm, partial(nn.LayerNorm, eps=0.1)])
def test_pre_norm_and_post_norm_written_out(norm):
    pre = redraw(build(norm=norm))
    post = build(norm=norm, norm_placement="post")
    post.load_state_dict(pre.state_dict())
    x = draw(B, N, D, seed=9)
    attend, think = pre.attention, pre.feed_forward
    norm_1, norm_2 = pre.attention_norm, pre.feed_forward_norm
    y = x + attend(norm_1(x), is_causal=True)
    assert_close(pre(x, is_causal=True), y + think(norm_2(y)))
    y = norm_1(x + attend(x, is_causal=True))
    assert_close(post(x, is_causal=True), norm_2(y + think(y)))


def test_each_sublayer_has_a_norm_of_its_own():
    names = "attention", "cross_attention", "feed_forward"
    block = build(cross=True, norm=RMSNorm)
    norms = [getattr(block, f"{name}_norm") for name in names]
    assert len(set(norms)) == 3
    assert all(isinstance(norm, RMSNorm) and norm.d_model == D for norm in norms)
    assert build().cross_attention_norm is None
    assert build().norm_placement == "pre"


def test_norms_on_both_sides_by_hand():
    block, x = redraw(build(cross=True, norm_placement="both")), draw(B, N, D)
    context = draw(B, M, D, seed=1)
    y = x + block.attention_output_norm(block.attention(block.attention_norm(x)))
    found = block.cross_attention(block.cross_attention_norm(y), context)
    y = y + block.cross_attention_output_norm(found)
    y = y + block.feed_forward_output_norm(block.feed_forward(block.feed_forward_norm(y)))
    assert_close(block(x, context), y)
    for norm_placement in "pre", "post":
        names = [name for name, _ in build(norm_placement=norm_placement).named_modules()]
        assert not any("output_norm" in name for name in names)


def test_parallel_by_hand():
    """Attention and feed-forward read the same normalised tokens; there is one norm."""
    block, x = redraw(build(parallel=True)), draw(B, N, D)
    normed = block.attention_norm(x)
    attended = block.attention(normed, is_causal=True)
    assert_close(block(x, is_causal=True), x + attended + block.feed_forward(normed))
    assert block.feed_forward_norm is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_placement": "mid"}, "norm_placement must be one of pre, post, both"),
        ({"parallel": True, "norm_placement": "post"}, 'and no cross_attention; got "post" and n'),
        ({"parallel": True, "cross": True}, 'and no cross_attention; got "pre" and one'),
    ],
)
def test_placements_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**settings)


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_rotation_reaches_the_attention_and_no_other(norm_placement):
    """Queries and keys among the tokens are turned, those of the cross-attention are not."""
    block = redraw(build(cross=True, norm_placement=norm_placement))
    scheme = RotaryPositions(head_dim=D // H)
    near, far = (scheme.rotation(torch.arange(N)[None] * step) for step in (1, 10))
    x, context = draw(B, N, D, seed=9), draw(B, M, D, seed=8)
    seen = []
    block.attention.register_forward_hook(
        lambda module, args, kwargs, y: seen.append(kwargs["rotation"]), with_kwargs=True
    )
    outputs = [block(x, context, rotation=rotation) for rotation in (None, near, far)]
    assert seen == [None, near, far]  # and the other, given one, would fail: M > N keys
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(outputs))


def test_query_scale_reaches_the_attention_and_no_other():
    block, x, context = redraw(build(cross=True)), draw(B, N, D, seed=9), draw(B, M, D, seed=8)
    seen = {}
    for name in "attention", "cross_attention":
        getattr(block, name).register_forward_hook(
            lambda module, args, kwargs, y, name=name: seen.update({name: kwargs}),
            with_kwargs=True,
        )
    scale = draw(1, N)
    y = block(x, context, query_scale=scale)
    assert seen["attention"]["query_scale"] is scale
    assert "query_scale" not in seen["cross_attention"]
    assert not torch.allclose(y, block(x, context), atol=1e-3)


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_causal(norm_placement):
    block, x = redraw(build(norm_placement=norm_placement)), draw(B, N, D)
    for j in range(N):
        changed = x.clone()
        changed[:, j, 0] += 1  # a shift of the whole token LayerNorm would not see
        moved = (block(changed, is_causal=True) - block(x, is_causal=True)).abs().amax((0, 2))
        assert (moved > 1e-5).tolist() == [i >= j for i in range(N)]


def test_any_feed_forward_of_tokens():
    """A module that does not say how wide its tokens are is taken at its word."""
    block = Block(attention=MultiHeadAttention(d_model=D, n_heads=H), feed_forward=nn.Identity())
    assert block(draw(B, N, D)).shape == (B, N, D)


def test_settings_can_be_read():
    block = build(norm_placement="post", activation="gelu", norm=RMSNorm)
    assert "norm_placement='post', parallel=False, dropout=0.0" in repr(block)
    assert "activation='gelu', dropout=0.0" in repr(block)
    assert "RMSNorm(8, eps=1e-06)" in repr(block)
    assert block.d_model == D


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm])
def test_autocast(norm, norm_placement, device):
    """Under autocast it stays near to what float32 gives."""
    block = build(norm=norm, norm_placement=norm_placement, cross=True).to(device)
    tokens = draw(B, N, D).to(device), draw(B, M, D, seed=1).to(device)
    with torch.autocast(device, torch.bfloat16):
        y = block(*tokens)
    assert_close(y.float(), block(*tokens), rtol=0.05, atol=0.05)


def test_bfloat16_is_kept():
    block = build(norm=RMSNorm).bfloat16()
    assert block(draw(B, N, D).bfloat16()).dtype == torch.bfloat16


def test_compiles_whole():
    """No graph break: in a Python of its own, where annotations are not enforced."""
    program = """
import torch
from tfm_ref import Block, FeedForward, MultiHeadAttention, RMSNorm
attention, other = (MultiHeadAttention(d_model=8, n_heads=4) for _ in range(2))
feed_forward = FeedForward(d_model=8, d_ff=12, activation="silu", gated=True)
parts = {"attention": attention, "cross_attention": other, "feed_forward": feed_forward}
block = Block(**parts, norm=RMSNorm)
x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
compiled = torch.compile(block, fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(x, context, is_causal=True), block(x, context, is_causal=True))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_meta_device():
    with torch.device("meta"):
        attention = MultiHeadAttention(d_model=4096, n_heads=32)
        feed_forward = FeedForward(d_model=4096, d_ff=11_008, activation="silu", gated=True)
        block = Block(attention=attention, feed_forward=feed_forward, norm=RMSNorm)
        y = block(torch.empty(1, 100, 4096), is_causal=True)
    assert (y.shape, y.device.type) == ((1, 100, 4096), "meta")


# --- what is refused

SIZES = {name: f"{name} must be an integer of at least 1; got 0" for name in ("d_model", "d_ff")}


def refused(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


@pytest.mark.usefixtures("no_shape_checks")
def test_rms_norm_settings_refused():
    with refused(SIZES["d_model"]):
        RMSNorm(0)
    for eps in -1.0, math.nan:
        with refused(f"eps must be at least 0; got {eps}"):
            RMSNorm(4, eps=eps)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("shape", [(), (1,), (8, 7), (8, 1)])
def test_rms_norm_refuses_another_width(shape):
    with refused(f"the last axis of x must have size d_model = 8; got {shape}"):
        RMSNorm(8)(torch.zeros(shape))


@pytest.mark.usefixtures("no_shape_checks")
def test_rms_norm_refuses_another_dtype():
    """Half a model in another precision would change the precision of the rest in silence."""
    kind = "the layer and x must have the same dtype and device"
    with refused(f"{kind}; got torch.float32 on cpu and torch.bfloat16 on cpu"):
        RMSNorm(8)(torch.zeros(8).bfloat16())


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 0}, SIZES["d_model"]),
        ({"d_ff": 0}, SIZES["d_ff"]),
        ({"dropout": 1.0}, "dropout must lie in 0 <= dropout < 1; got 1.0"),
        (
            {"activation": "swiglu"},
            'activation must be one of relu, gelu, gelu_tanh, silu, swiglu_clamped; got "swiglu"',
        ),
    ],
)
def test_feed_forward_settings_refused(settings, message):
    with refused(message):
        FeedForward(**{"d_model": D, "d_ff": FF, **settings})


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("part", ["feed_forward", "cross_attention"])
def test_parts_that_do_not_fit_are_refused(part):
    other = {
        "feed_forward": FeedForward(d_model=6, d_ff=FF),
        "cross_attention": MultiHeadAttention(d_model=6, n_heads=H),
    }[part]
    parts = {"attention": MultiHeadAttention(d_model=D, n_heads=H), "feed_forward": nn.Identity()}
    with refused(f"attention and {part} must have the same d_model; got 8 and 6"):
        Block(**{**parts, part: other})


@pytest.mark.usefixtures("no_shape_checks")
def test_block_dropout_refused():
    with refused("dropout must lie in 0 <= dropout < 1; got -0.1"):
        Block(attention=LAYERS["pre-norm"].attention, feed_forward=nn.Identity(), dropout=-0.1)


FITS = "must have shape (batch, length, d_model = 8) and not be empty; got"
KIND = "must have the same dtype and device; got torch.float32 on cpu and"
LAYERS = {
    "feed-forward": FeedForward(d_model=D, d_ff=FF),
    "pre-norm": build(),
    "post-norm": build(norm_placement="post"),
}


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (draw(5, 8), f"x {FITS} (5, 8)"),
        (draw(3, 5, 7), f"x {FITS} (3, 5, 7)"),
        (draw(3, 0, 8), f"x {FITS} (3, 0, 8)"),
        (draw(3, 5, 8).double(), f"the layer and x {KIND} torch.float64 on cpu"),
    ],
)
def test_tokens_refused(layer, x, message):
    with refused(message):
        layer(x)


@pytest.mark.usefixtures("no_shape_checks")
def test_context_refused():
    x = draw(B, N, D)
    with refused("a block with cross_attention needs a context; got None"):
        build(cross=True)(x)
    for extra in {"context": x}, {"context_mask": sliding_window_mask(N, window=2)}:
        with refused("a block without cross_attention takes no context or context_mask"):
            build()(x, **extra)
    with refused(f"context {FITS} (3, 7, 6)"):
        build(cross=True)(x, draw(3, 7, 6))


@pytest.mark.usefixtures("no_shape_checks")
def test_masks_of_the_block_refused():
    x, flat = draw(B, N, D), torch.ones(N, N).bool()
    with pytest.raises(ValueError, match="mask must have 4 axes"):
        build()(x, mask=flat)
    with pytest.raises(ValueError, match="mask must have 4 axes"):
        build(cross=True)(x, x, context_mask=flat)
    with pytest.raises(ValueError, match="bias must be floating point"):
        build()(x, bias=flat[None, None])
