"""Sizes, settings and experts of the mixtures that several tests share."""

import re

import pytest
from oracles import draw, redraw

from tfm_ref import FeedForward

B, N, D, FF, E, K = 3, 5, 8, 16, 8, 3  # rows of 16 bytes, which the grouped product wants
TOKENS = 20
SIZES = {"d_model": D, "d_ff": FF, "n_experts": E, "top_k": K}
ROUTER = {"d_model": D, "n_experts": E, "top_k": K}


def settle(module):
    """Give parameters and correction biases values that matter."""
    for name, buffer in redraw(module).named_buffers():
        assert name.endswith("choice_bias")
        buffer.copy_(draw(*buffer.shape, seed=99) / 4)
    return module


def feed_forwards(layer):
    """Give every expert of a layer as a FeedForward with copies of its numbers."""
    form = {"activation": layer.activation, "gated": layer.gate_proj is not None}
    for i in range(layer.router.n_experts):
        expert = FeedForward(
            d_model=layer.d_model, d_ff=layer.d_ff, bias=layer.up_bias is not None, **form
        )
        for name in "gate", "up", "down":
            for kind, theirs in ("proj", "weight"), ("bias", "bias"):
                stack = getattr(layer, f"{name}_{kind}")
                if stack is not None:
                    getattr(getattr(expert, f"{name}_proj"), theirs).data = stack[i].detach()
        yield expert


# --- what is refused


def refused(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")
