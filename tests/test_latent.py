"""Latent attention against DeepSeek's public code, by hand, and what it refuses."""

import math
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from oracles import draw, redraw, values_and_gradients
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from tfm_ref import (
    Block,
    FeedForward,
    KVCache,
    LatentAttention,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositions,
    YaRNScaling,
    causal_mask,
    padding_mask,
)
from tfm_ref.backends import BACKENDS
from tfm_ref.rotary import Rotation

B, N, M, H, D = 3, 5, 7, 2, 16
PARTS = {"head_dim": 4, "rope_head_dim": 8, "v_head_dim": 3}
SIZES = {"d_model": D, "n_heads": H, **PARTS, "kv_lora_rank": 6}


# --- against the public implementation

THEIRS = {
    "V2": (DeepseekV2Config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding),
    "V3": (DeepseekV3Config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding),
}
FACTOR, ORIGINAL, LENGTH = 8.0, 16, 40
NAMES = {
    "kv_a_proj.": "kv_a_proj_with_mqa.",
    "q_a_norm.": "q_a_layernorm.",
    "kv_a_norm.": "kv_a_layernorm.",
}


def in_their_names(of_ours):
    for ours, theirs in NAMES.items():
        of_ours = {name.replace(ours, theirs): t for name, t in of_ours.items()}
    return of_ours


def m(a):
    return 0.1 * a * math.log(FACTOR) + 1


def yarn(mscale, mscale_all_dim):
    """Give what DeepSeek's YaRN is here: how to stretch, and the scale of the scores."""
    return (
        YaRNScaling(
            factor=FACTOR,
            original_length=ORIGINAL,
            beta_fast=4,
            temperature=m(mscale) / m(mscale_all_dim),
        ),
        m(mscale_all_dim) ** 2 / math.sqrt(4 + 8),
    )


def twins(version, q_lora_rank, mscales=None, interleaved=True, **choices):
    """Build our layer and theirs with the same parameters, and both rotary schemes."""
    stretch, scale = (None, None) if mscales is None else yarn(*mscales)
    rope = {"rope_type": "default"}
    if mscales is not None:
        rope = {"rope_type": "yarn", "factor": FACTOR, "beta_fast": 4, "beta_slow": 1}
        rope |= {"original_max_position_embeddings": ORIGINAL}
        rope |= dict(zip(("mscale", "mscale_all_dim"), mscales, strict=True))
    config, attention, rotary = THEIRS[version]
    config = config(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=H,
        qk_nope_head_dim=4,
        qk_rope_head_dim=8,
        v_head_dim=3,
        kv_lora_rank=6,
        q_lora_rank=q_lora_rank,
        max_position_embeddings=int(FACTOR) * ORIGINAL,
        rope_parameters={"rope_theta": 100.0, **rope},
        attention_bias=True,
        attn_implementation="eager",
        **({} if version == "V2" else {"rope_interleave": interleaved}),
    )
    settings = {"q_lora_rank": q_lora_rank, "bias": True, "scale": scale, **choices}
    ours, theirs = redraw(LatentAttention(**SIZES, **settings)), attention(config, layer_idx=0)
    theirs.load_state_dict(in_their_names(ours.state_dict()))
    scheme = RotaryPositions(head_dim=8, theta=100.0, interleaved=interleaved, scaling=stretch)
    return ours, theirs, scheme, rotary(config)


class Wide(TorchFunctionMode):
    """Compute in float64 where a public implementation asks for float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(t):
            return torch.float64 if t is torch.float32 else t

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{name: widen(t) for name, t in (kwargs or {}).items()})


def assert_equal_layers(ours, theirs, rotation, angles, x, tolerance):
    """Compare output, weights and all gradients, causal and not."""
    length = x.shape[1]
    for is_causal in True, False:
        added = torch.zeros(1, 1, length, length, dtype=x.dtype)
        added = added.masked_fill(~causal_mask(length), -torch.inf) if is_causal else None
        terms = {"is_causal": is_causal, "rotation": rotation}
        run = partial(theirs, position_embeddings=angles, attention_mask=added)
        y, gradients, named = values_and_gradients(partial(ours, **terms), ours, x)
        expected = values_and_gradients(lambda x, run=run: run(x)[0], theirs, x)
        close = partial(assert_close, rtol=tolerance, atol=tolerance)
        close((y, gradients, in_their_names(named)), expected)
        close(ours.attention_weights(x, **terms), run(x)[1])


VARIANTS = {
    "V2": {"version": "V2"},
    "V2, YaRN": {"version": "V2", "mscales": (0.707, 0.707)},
    "V3": {"version": "V3"},
    "V3, halves": {"version": "V3", "interleaved": False},
    "V3, YaRN": {"version": "V3", "mscales": (1.0, 1.0)},
    "V3, YaRN, mscales differ": {"version": "V3", "mscales": (1.0, 0.5), "interleaved": False},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
with_and_without = pytest.mark.parametrize("q_lora_rank", [None, 5])
each_backend = pytest.mark.parametrize("backend", ["naive", "tiled", "sdpa"])
both_forms = pytest.mark.parametrize("absorbed", [False, True])


@every_variant
@with_and_without
@each_backend
def test_equals_the_public_implementation(backend, q_lora_rank, variant):
    """Angles are theirs, and go beyond the original length."""
    settings = {**VARIANTS[variant], "backend": backend}
    ours, theirs, scheme, rotary = twins(q_lora_rank=q_lora_rank, **settings)
    x, positions = draw(B, LENGTH, D, seed=9), torch.arange(3, 3 + LENGTH)[None]
    angles = rotary(x, positions)
    assert_equal_layers(ours, theirs, scheme.rotation(positions), angles, x, 3e-5)


@every_variant
@with_and_without
@each_backend
@both_forms
def test_equals_the_public_implementation_in_double_precision(
    absorbed, backend, q_lora_rank, variant
):
    """Angles, in float32 by definition, are ours; what else they compute in float32 is widened."""
    settings = {**VARIANTS[variant], "backend": backend, "absorbed": absorbed}
    ours, theirs, scheme, _ = twins(q_lora_rank=q_lora_rank, **settings)
    x, positions = draw(B, LENGTH, D, seed=9).double(), torch.arange(LENGTH)[None]
    rotation = scheme.rotation(positions)
    cos, sin = (torch.cat([t, t], -1).double() for t in (rotation.cos, rotation.sin))
    angles = torch.complex(rotation.cos, rotation.sin) if "V2" in variant else (cos, sin)
    with Wide():
        assert_equal_layers(ours.double(), theirs.double(), rotation, angles, x, 1e-10)


@every_variant
@torch.no_grad()
def test_decodes_as_the_public_implementation(variant):
    """Token by token, absorbed as it is by itself, from the cache."""
    ours, theirs, scheme, rotary = twins(q_lora_rank=5, **VARIANTS[variant])
    x, cache, steps = draw(B, LENGTH, D, seed=9), KVCache(LENGTH), []
    for position, token in enumerate(x.split(1, 1)):
        rotation = scheme.rotation(torch.tensor([[position]]))
        steps.append(ours(token, is_causal=True, rotation=rotation, cache=cache))
    future = torch.zeros(LENGTH, LENGTH).masked_fill(~causal_mask(LENGTH)[0, 0], -torch.inf)
    angles = rotary(x, torch.arange(LENGTH)[None])
    expected = theirs(x, position_embeddings=angles, attention_mask=future[None, None])[0]
    assert_close(torch.cat(steps, 1), expected, rtol=3e-5, atol=3e-5)
    assert cache.n_bytes == B * LENGTH * (6 + 8) * 4


# --- the absorbed form


@each_backend
@with_and_without
def test_the_absorbed_form_is_the_naive_one(q_lora_rank, backend):
    """Values, weights and all gradients; in itself, across, and with all terms at once."""
    x, context = draw(B, N, D).double(), draw(B, M, D, seed=1).double()
    turn = RotaryPositions(head_dim=8).rotation(torch.arange(M)[None])
    mask = padding_mask(torch.tensor([M, 4, 0]), M)
    bias = draw(1, H, N, M).double()
    across = {"mask": mask, "bias": bias, "is_causal": True, "rotation": turn}
    for tokens, terms in ((x,), {}), ((x,), {"is_causal": True}), ((x, context), across):
        outcomes = []
        for absorbed in False, True:
            settings = {"q_lora_rank": q_lora_rank, "backend": backend, "absorbed": absorbed}
            attention = redraw(LatentAttention(**SIZES, **settings)).double()
            run = partial(attention, **terms)
            weights = attention.attention_weights(*tokens, **terms)
            outcomes.append((weights, values_and_gradients(run, attention, *tokens)))
        assert_close(*outcomes, atol=1e-10, rtol=1e-10)


@both_forms
@torch.no_grad()
def test_absorbed_keys_and_values_are_what_the_cache_holds(absorbed):
    """No copy of it, and one head; the naive form has as many as there are queries."""
    attention, cache = redraw(LatentAttention(**SIZES, absorbed=absorbed)), KVCache(N)
    _, k, v = attention._project(draw(B, N, D), None, None, None, cache)
    if not absorbed:
        assert (k.shape, v.shape) == ((B, H, N, 12), (B, H, N, 3))
        return
    assert (k.shape, v.shape) == ((B, 1, N, 14), (B, 1, N, 6))
    assert k.data_ptr() == v.data_ptr() == cache.tensors[0].data_ptr()


def multiplications(attention, n, m):
    """Count those that depend on the form, for one sequence, in the products themselves."""
    x, context = torch.empty(1, n, attention.d_model), torch.empty(1, m, attention.d_model)
    with FlopCounterMode(display=False) as counter:
        attention(x.to("meta"), context.to("meta"))
    return counter.get_total_flops() // 2


def test_the_form_is_the_one_that_multiplies_less():
    """Counted by PyTorch: DeepSeek's decoding is absorbed, 170 queries are, 171 are not."""
    large = {"head_dim": 128, "rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
    for parts, yes, no in (
        (large, [(1, 2), (1, 10**6), (170, 10**6)], [(1, 1), (171, 10**6), (4096, 4096)]),
        (PARTS | {"kv_lora_rank": 2}, [(1, 1), (5, 5), (7, 5)], []),
        (PARTS | {"kv_lora_rank": 6}, [(1, 5), (2, 5)], [(5, 5), (4, 5)]),
    ):
        counts, cells = {}, yes + no
        for absorbed in None, False, True:
            with torch.device("meta"):
                attention = LatentAttention(
                    d_model=2, n_heads=1, **parts, absorbed=absorbed, backend="naive"
                )
            counts[absorbed] = [multiplications(attention, n, m) for n, m in cells]
        pairs = list(zip(counts[False], counts[True], strict=True))
        assert counts[None] == [min(pair) for pair in pairs]
        absorbs = [absorbed < naive for naive, absorbed in pairs]
        assert absorbs == [True] * len(yes) + [False] * len(no)


# --- by hand


def by_hand(**weights):
    """Build one head with two numbers to turn, and a latent that is the token, normalised."""
    parts = {"head_dim": 1, "rope_head_dim": 2, "v_head_dim": 1, "kv_lora_rank": 2}
    attention = LatentAttention(d_model=2, n_heads=1, **parts, norm_eps=0.0)
    weights = {
        "q_proj": torch.zeros(3, 2),
        "kv_a_proj": torch.cat([torch.eye(2), torch.zeros(2, 2)]),
        "kv_b_proj": torch.eye(2),
        "o_proj": torch.tensor([[1.0], [0.0]]),
        **weights,
    }
    with torch.no_grad():
        for name, weight in weights.items():
            getattr(attention, name).weight.copy_(weight)
    return attention


TOKENS = torch.tensor([[[1.0, 7.0], [7.0, 1.0]]])  # root mean square 5


def test_content_by_hand():
    """Latents (1, 7)/5 and (7, 1)/5: the first number is the key, the second the value."""
    asks = 3**0.5 / 1.2 * math.log(3) / 8  # scores differ by ln 3, both divided by √(1 + 2)
    attention = by_hand(q_proj=torch.tensor([[asks, asks], [0.0, 0.0], [0.0, 0.0]]))
    weights = torch.tensor([0.25, 0.75]).expand(1, 1, 2, 2)
    assert_close(attention.attention_weights(TOKENS), weights)
    y = torch.tensor([[0.25 * 1.4 + 0.75 * 0.2, 0.0]] * 2)[None]
    assert_close(attention(TOKENS), y)


def test_turned_part_by_hand():
    """A quarter turn apart, keys of (1, 0) score 0; the shared key is not normalised."""
    turned = torch.tensor([[0.0, 0.0], [0.125, 0.125], [0.0, 0.0]])
    asks = 3**0.5 * math.log(3) * turned
    answers = torch.cat([torch.eye(2), turned[1:]])
    attention = by_hand(q_proj=asks, kv_a_proj=answers)
    quarter = Rotation(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [1.0]]]))
    weights = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    assert_close(attention.attention_weights(TOKENS, rotation=quarter)[0, 0], weights)
    assert_close(attention.attention_weights(TOKENS)[0, 0], torch.full((2, 2), 0.5))
    values = torch.tensor([1.4, 0.2])
    assert_close(attention(TOKENS, rotation=quarter)[0, :, 0], weights @ values)
    newest = attention(TOKENS[:, 1:], TOKENS, rotation=quarter)
    assert_close(newest[0, :, 0], weights[1:] @ values)


# --- what must hold


def test_only_distances_count():
    attention, x = redraw(LatentAttention(**SIZES, q_lora_rank=5)), draw(B, N, D)
    turn = RotaryPositions(head_dim=8, interleaved=True).rotation
    near, far = (turn(torch.arange(N)[None] + start) for start in (0, 100))
    assert_close(attention(x, rotation=far), attention(x, rotation=near), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(attention(x, rotation=near), attention(x), atol=0.01)


def test_the_length_of_a_latent_does_not_count():
    attention, x = redraw(LatentAttention(**SIZES, norm_eps=1e-30)).double(), draw(B, N, D).double()
    y = attention(x)
    with torch.no_grad():
        attention.kv_a_proj.weight[:6] *= 3
    assert_close(attention(x), y)
    with torch.no_grad():
        attention.kv_a_proj.weight[6:] *= 3
    assert not torch.allclose(attention(x), y)


def test_the_cached_numbers_say_all_of_a_token():
    """What the cached numbers do not see of a token of the context, no output sees."""
    attention = redraw(LatentAttention(**SIZES | {"rope_head_dim": 2})).double()
    x, context = draw(B, N, D).double(), draw(B, M, D, seed=1).double()
    seen = attention.kv_a_proj.weight
    unseen = torch.linalg.svd(seen).Vh[attention.cache_width :]
    assert (len(seen), len(unseen)) == (6 + 2, D - 8)
    other = context + draw(B, M, len(unseen), seed=2).double() @ unseen
    assert_close(attention(x, other), attention(x, context))
    assert not torch.allclose(attention(x, context + 0.1), attention(x, context))


def test_cache_width_of_the_public_models():
    """DeepSeek-V2 keeps 9/2 head_dim numbers per token; all keys and values are 2 · 128."""
    with torch.device("meta"):
        parts = {"head_dim": 128, "rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
        latent = LatentAttention(d_model=5120, n_heads=128, **parts)
        full = MultiHeadAttention(d_model=5120, n_heads=128, head_dim=128)
    assert latent.cache_width == 9 * 128 // 2
    assert full.cache_width == 2 * 128 * 128


@each_backend
def test_scale(backend):
    """A scale of 0 weighs all alike; the default is 1 over the root of both parts of the width."""
    x, settings = draw(B, N, D), {**SIZES, "backend": backend}
    build = [LatentAttention(**settings, scale=scale) for scale in (None, 12**-0.5, 0.0)]
    default, given, zero = (redraw(attention) for attention in build)
    assert_close(given(x), default(x))
    assert_close(given.attention_weights(x), default.attention_weights(x))
    assert_close(zero.attention_weights(x), torch.full((B, H, N, N), 1 / N))
    assert_close(zero(x), zero(x).mean(1, keepdim=True).expand(-1, N, -1))
    assert not torch.allclose(default(x), zero(x), atol=0.01)


def test_eps_of_the_norms():
    for settings, eps in ({}, 1e-6), ({"norm_eps": 0.5}, 0.5):
        attention = LatentAttention(**SIZES, q_lora_rank=5, **settings)
        assert attention.q_a_norm.eps == attention.kv_a_norm.eps == eps


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
def test_dropout_in_training_only_and_not_in_the_weights(backend):
    attention, x = LatentAttention(**SIZES, dropout=0.5, backend=backend), draw(B, N, D)
    assert not torch.equal(attention(x), attention(x))
    weights = attention.attention_weights(x)
    assert_close(weights.sum(-1), torch.ones(B, H, N))
    attention.eval()
    assert torch.equal(attention(x), attention(x))
    assert torch.equal(weights, attention.attention_weights(x))


def test_backends_agree_on_all_terms(device):
    """Across, with mask, bias and rotation at once."""
    x, context = draw(B, N, D).to(device), draw(B, M, D, seed=1).to(device)
    turn = RotaryPositions(head_dim=8).rotation(torch.arange(M, device=device)[None])
    mask = padding_mask(torch.tensor([M, 4, 0], device=device), M)
    terms = {"mask": mask, "bias": draw(1, H, N, M).to(device), "is_causal": True, "rotation": turn}
    outcomes = []
    for backend in "naive", "tiled", "sdpa":
        attention = redraw(LatentAttention(**SIZES, q_lora_rank=5, backend=backend)).to(device)
        outcomes.append(values_and_gradients(partial(attention, **terms), attention, x, context))
    for outcome in outcomes[1:]:
        assert_close(outcome, outcomes[0])


@each_backend
def test_the_backend_is_the_one_named(backend, monkeypatch):
    monkeypatch.setitem(BACKENDS, backend, lambda q, k, v, **terms: torch.zeros_like(v))
    x = draw(B, N, D)
    assert torch.equal(LatentAttention(**SIZES, backend=backend)(x), torch.zeros(B, N, D))


# --- in PyTorch's world


@pytest.mark.parametrize("q_lora_rank", [None, 5])
def test_in_a_block(q_lora_rank):
    attention, feed_forward = (
        LatentAttention(**SIZES, q_lora_rank=q_lora_rank),
        FeedForward(d_model=D, d_ff=4 * D),
    )
    block = redraw(Block(attention=attention, feed_forward=feed_forward, norm=RMSNorm))
    x, turn = draw(B, N, D), RotaryPositions(head_dim=8).rotation(torch.arange(N)[None])
    terms = {"is_causal": True, "rotation": turn}
    y = x + attention(block.attention_norm(x), **terms)
    assert_close(block(x, **terms), y + block.feed_forward(block.feed_forward_norm(y)))


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, D * H * 12 + D * 14 + 6 + 6 * H * 7 + H * 3 * D),
        ({"bias": True}, D * H * 12 + D * 14 + 14 + 6 + 6 * H * 7 + H * 3 * D + D),
        ({"q_lora_rank": 5}, D * 5 + 5 + 5 * H * 12 + D * 14 + 6 + 6 * H * 7 + H * 3 * D),
    ],
)
def test_parameter_count(settings, count):
    attention = LatentAttention(**SIZES, **settings)
    assert sum(p.numel() for p in attention.parameters()) == count


@with_and_without
def test_biases_are_where_deepseek_has_them(q_lora_rank):
    attention = LatentAttention(**SIZES, q_lora_rank=q_lora_rank, bias=True)
    biased = {name for name, _ in attention.named_parameters() if name.endswith("bias")}
    names = ["kv_a_proj", "o_proj"] if q_lora_rank is None else ["q_a_proj", "kv_a_proj", "o_proj"]
    assert biased == {f"{name}.bias" for name in names}


def test_its_settings_can_be_read():
    attention = LatentAttention(**SIZES, q_lora_rank=5, scale=0.5)
    assert "n_heads=2, scale=0.5, absorbed=None, backend='sdpa'" in repr(attention)
    settings = {**SIZES, "q_lora_rank": 5, "scale": 0.5, "dropout": 0.0, "cache_width": 14}
    assert {name: getattr(attention, name) for name in settings} == settings


@each_backend
def test_autocast(backend, device):
    """Under autocast it computes in bfloat16, near to what float32 gives."""
    attention = LatentAttention(**SIZES, q_lora_rank=5, backend=backend).to(device)
    x = draw(2, N, D).to(device)
    turn = RotaryPositions(head_dim=8).rotation(torch.arange(N, device=device)[None])
    terms = {"mask": padding_mask(torch.tensor([5, 0], device=device), N), "rotation": turn}
    with torch.autocast(device, torch.bfloat16):
        y = attention(x, **terms)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), attention(x, **terms), rtol=0.05, atol=0.02)


def test_compiles_whole():
    """No graph break: in a Python of its own, where annotations are not enforced."""
    program = """
import torch, tfm_ref
sizes = dict(head_dim=4, rope_head_dim=2, v_head_dim=3, kv_lora_rank=6, q_lora_rank=5)
attention = tfm_ref.LatentAttention(d_model=8, n_heads=2, **sizes)
turn = tfm_ref.RotaryPositions(head_dim=2, interleaved=True).rotation(torch.arange(7)[None])
x, context = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
compiled = torch.compile(attention, fullgraph=True, backend="eager")
for tokens in (x,), (x, context):
    terms = {"rotation": turn, "is_causal": True}
    torch.testing.assert_close(compiled(*tokens, **terms), attention(*tokens, **terms))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, "dropout must lie in 0 <= dropout < 1; got 1.0"),
        ({"absorbed": "yes"}, "absorbed must be True, False or None; got 'yes'"),
        ({"backend": "fast"}, 'backend must be one of naive, tiled, sdpa, triton; got "fast"'),
        ({"norm_eps": -1.0}, "eps must be at least 0; got -1.0"),
        *[
            ({name: size}, f"{name} must be an integer of at least 1; got {size}")
            for name in [*SIZES, "q_lora_rank"]
            for size in (0, 1.5)
        ],
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_settings_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LatentAttention(**{**SIZES, **settings})


FITS = "must have shape (batch, length, d_model = 16) and not be empty; got"
KIND = "must have the same dtype and device; got torch.float32 on cpu and"


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("method", ["forward", "attention_weights"])
@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        (draw(3, D), None, f"x {FITS} (3, 16)"),
        (draw(3, 5, 7), None, f"x {FITS} (3, 5, 7)"),
        (draw(3, 5, D), draw(3, 0, D), f"context {FITS} (3, 0, 16)"),
        (draw(3, 5, D), draw(5, D), f"context {FITS} (5, 16)"),
        (draw(3, 5, D), draw(1, 5, D), "q and k must have the same batch; got 3 and 1"),
        (draw(3, 5, D).double(), None, f"the layer and x {KIND} torch.float64 on cpu"),
        (draw(3, 5, D), draw(3, 5, D).half(), f"the layer and context {KIND} torch.float16 on cpu"),
    ],
)
def test_tokens_refused(method, x, context, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(LatentAttention(**SIZES), method)(x, context)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("method", ["forward", "attention_weights"])
@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"mask": torch.ones(N, N).bool()}, "mask must have 4 axes"),
        ({"bias": torch.ones(N, N)}, "bias must have 4 axes"),
        (
            {"rotation": RotaryPositions(head_dim=12).rotation(torch.arange(N)[None])},
            "at least 12 numbers; got (3, 2, 5, 8)",
        ),
        (
            {"rotation": RotaryPositions(head_dim=8).rotation(torch.arange(N - 1)[None])},
            "a rotation for batch 1, 4 positions and 4 pairs",
        ),
    ],
)
def test_terms_refused(method, terms, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(LatentAttention(**SIZES), method)(draw(B, N, D), **terms)
