"""The space of choices: a config is one point in it, and says how each part of a model is made."""

from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import nn

from tfm_ref.cache import KVCache, RollingCache
from tfm_ref.latent import LatentAttention
from tfm_ref.layers import ACTIVATIONS, NORM_PLACEMENTS, Block, FeedForward, RMSNorm
from tfm_ref.moe import MoELayer
from tfm_ref.multi_head import MultiHeadAttention
from tfm_ref.position_biases import ALiBi, T5Bias
from tfm_ref.position_embeddings import LearnedPositions, SinusoidalPositions
from tfm_ref.positions import PositionScheme, QueryScaling
from tfm_ref.rotary import RopeScaling, RotaryPositions
from tfm_ref.rules import check_rules
from tfm_ref.validation import check_choice, check_size

NORMS = {
    "layer_norm": nn.LayerNorm,
    "layer_norm_no_bias": partial(nn.LayerNorm, bias=False),
    "rms_norm": RMSNorm,
    "rms_norm_no_gain": partial(RMSNorm, gain=False),
}
"""The norms, by name; each is made from a width and eps."""

POSITIONS = {
    "none": lambda c: PositionScheme(),
    "learned": lambda c: LearnedPositions(
        max_seq_len=c.first_position + c.max_seq_len, d_model=c.d_model
    ),
    "sinusoidal": lambda c: SinusoidalPositions(d_model=c.d_model, halves=c.sinusoid_halves),
    "rope": lambda c: RotaryPositions(
        head_dim=c.turned,
        theta=c.rope_theta,
        interleaved=c.rope_interleaved,
        scaling=c.rope_scaling,
    ),
    "alibi": lambda c: ALiBi(n_heads=c.n_heads),
    "t5": lambda c: T5Bias(
        n_heads=c.n_heads,
        n_buckets=c.t5_buckets,
        max_distance=c.t5_max_distance,
        bidirectional=not c.is_causal,
    ),
}
"""The schemes of positions, by name; each is made from a config."""


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Say that attention is latent: :class:`~tfm_ref.latent.LatentAttention` has the arguments."""

    kv_lora_rank: int
    rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Say that feed-forwards are mixtures: :class:`~tfm_ref.moe.MoELayer` has the arguments.

    Two are its own: the first ``n_dense_layers`` layers keep a plain feed-forward; of the others,
    every ``every``-th has a mixture, the first of them among these.
    """

    d_ff: int
    n_experts: int
    top_k: int
    n_shared: int = 0
    n_dense_layers: int = 0
    every: int = 1
    score: str = "softmax"
    normalise: bool = True
    router_bias: bool = False
    choice_bias: bool = False
    n_groups: int = 1
    top_k_groups: int = 1
    top_k_in_group: int = 1
    scale: float = 1.0
    scale_input: bool = False
    noise: float = 0.0
    capacity_factor: float | None = None
    capacity: int | None = None


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Describe a Transformer: one point in the space of choices.

    A choice that is not named is that of the paper of 2017, so that what is named is what a model
    does otherwise. Every field stands for itself: none names a model.

    Args:
        vocab_size: number of tokens in the vocabulary.
        d_model: width of the tokens.
        n_layers: number of blocks; of an encoder-decoder, of its decoder.
        n_heads: number of query heads.
        d_ff: width between the projections of a plain feed-forward.
        n_encoder_layers: number of blocks of the encoder in an encoder-decoder; 0 for a model
            of one stack.
        is_causal: let a token see no later one (decoder), or all (encoder).
        max_seq_len: longest sequence in training; with learned positions, the longest there is.
        n_segments: number of learned vectors that tell the parts of an input apart.
        scale_embeddings: multiply the embeddings by √d_model.
        embedding_norm: normalise the tokens before the first block.
        tied_embeddings: let the head share its matrix with the embedding.
        head_transform: put a projection, the activation and a norm before the head.
        head_bias: add a bias to the logits.
        scale_logits: divide what the head gets by √d_model.
        logit_softcap: bends the logits into (-logit_softcap, logit_softcap).
        pooler: give an encoder a projection of its first token, tanh after it.
        positions: "none", "learned", "sinusoidal", "rope", "alibi" or "t5".
        first_position: number of the first position, with "learned".
        sinusoid_halves: put all sines before all cosines.
        rope_theta: base of the wavelengths, with "rope".
        rope_dim: numbers of a head to turn; all if not given.
        rope_interleaved: pair neighbours instead of halves.
        rope_scaling: how to stretch beyond the training length.
        t5_buckets: number of buckets, with "t5".
        t5_max_distance: the distance from which on all share one bucket.
        norm: "layer_norm", "layer_norm_no_bias", "rms_norm" or "rms_norm_no_gain".
        norm_eps: what is added to the variance or the mean square before its root.
        norm_placement: "pre", "post" or "both", as in :class:`~tfm_ref.layers.Block`.
        parallel: let attention and feed-forward read the same tokens.
        n_kv_heads: number of key and value heads; n_heads if not given.
        head_dim: width of a query and a key; d_model / n_heads if not given. With latent
            attention, of their part without positions.
        attention_bias: biases of the attention: True, False or letters of "qkvo".
        qk_norm: normalises queries and keys over head_dim, by a norm of that name; they are not
            normalised if not given.
        attention_scale: factor of the dot products; 1/√head_dim if not given.
        query_scaling: multiplies late queries, in layers without a window.
        attention_softcap: bends the scaled scores.
        sinks: learn a score per head that takes its share of each softmax.
        window: number of keys in sight of a query; all if not given.
        n_first: number of first tokens that a sliding window keeps in sight.
        chunked: cut the sequence into windows that do not overlap, instead of sliding one.
        global_every: every how many-th layer has no window; none if not given.
        global_positions: let those layers know the positions.
        global_qk_norm: let those layers, too, have qk_norm.
        local_rope_theta: base in the layers with a window, there without rope_scaling;
            rope_theta, with it, if not given.
        latent: makes the attention latent (MLA).
        activation: of the feed-forward, a name in :data:`tfm_ref.layers.ACTIVATIONS`.
        gated: gate the feed-forward.
        feed_forward_bias: add biases to its projections.
        experts: makes the feed-forwards mixtures of experts.
        dropout: probability with which a number is set to 0 in training: of the tokens before
            the first block, and of what each sub-layer returns.
        attention_dropout: the same for the weights of attention.

    Raises:
        ValueError: if a size is not an integer of at least 1, a name is unknown, or two choices
            contradict each other; the message states the rule.

    Reference:
        Vaswani et al. 2017, "Attention Is All You Need". For each other choice, the class that
        makes it names its source.

    Example:
        GPT-2, by what it does unlike the paper of 2017.

        >>> config = TransformerConfig(
        ...     vocab_size=50257, d_model=768, n_layers=12, n_heads=12, d_ff=3072,
        ...     positions="learned", max_seq_len=1024, scale_embeddings=False,
        ...     norm_placement="pre", attention_bias=True, activation="gelu_tanh",
        ... )
        >>> config.new_block(0).attention
        MultiHeadAttention(...)
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int | None = None
    n_encoder_layers: int = 0
    is_causal: bool = True
    max_seq_len: int | None = None
    # the entrance and the exit
    n_segments: int = 0
    scale_embeddings: bool = True
    embedding_norm: bool = False
    tied_embeddings: bool = True
    head_transform: bool = False
    head_bias: bool = False
    scale_logits: bool = False
    logit_softcap: float | None = None
    pooler: bool = False
    # positions
    positions: str = "sinusoidal"
    first_position: int = 0
    sinusoid_halves: bool = False
    rope_theta: float = 10_000.0
    rope_dim: int | None = None
    rope_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    t5_buckets: int = 32
    t5_max_distance: int = 128
    # the block
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    norm_placement: str = "post"
    parallel: bool = False
    # attention
    n_kv_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool | str = False
    qk_norm: str | None = None
    attention_scale: float | None = None
    query_scaling: QueryScaling | None = None
    attention_softcap: float | None = None
    sinks: bool = False
    window: int | None = None
    n_first: int = 0
    chunked: bool = False
    global_every: int | None = None
    global_positions: bool = True
    global_qk_norm: bool = True
    local_rope_theta: float | None = None
    latent: Latent | None = None
    # the feed-forward
    activation: str = "relu"
    gated: bool = False
    feed_forward_bias: bool = True
    experts: Experts | None = None
    # training
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be True or False; got {value!r}")
        check_rules(vars(self), {field.name: field.default for field in fields(self)})
        for name, known in {
            "positions": POSITIONS,
            "norm": NORMS,
            "norm_placement": NORM_PLACEMENTS,
            "activation": ACTIVATIONS,
        }.items():
            check_choice(name, getattr(self, name), known)
        if self.qk_norm is not None:
            check_choice("qk_norm", self.qk_norm, NORMS)
        n_dense = sum(not self.has_experts(layer) for layer in range(self.n_layers))
        if (self.d_ff is None) != (n_dense == 0):
            raise ValueError(
                "d_ff must be given if and only if some layer has a plain feed-forward; "
                f"got d_ff {self.d_ff} and {n_dense} such layers"
            )
        with torch.device("meta"):  # what a layer refuses is refused here
            for layer in {0, self.n_layers - 1}:
                attention = self.new_block(layer).attention
        if self.rope_dim is not None:
            check_size("rope_dim", self.rope_dim, least=2, most=attention.head_dim)
        if self.positions != "learned":  # whose table can be large
            for is_local in False, True:
                self.new_positions(is_local=is_local)
        if self.n_encoder_layers:
            _ = self.encoder  # which is checked as it is made

    @property
    def turned(self) -> int:
        """Say how many numbers of a head RoPE turns."""
        if self.latent is not None:
            return self.latent.rope_head_dim
        return self.rope_dim or self.head_dim or self.d_model // self.n_heads

    @property
    def encoder(self) -> "TransformerConfig":
        """Give the config of the encoder in an encoder-decoder."""
        return replace(self, n_layers=self.n_encoder_layers, n_encoder_layers=0, is_causal=False)

    def is_local(self, layer: int) -> bool:
        """Say whether a layer has a window."""
        if self.window is None:
            return False
        return self.global_every is None or (layer + 1) % self.global_every != 0

    def has_experts(self, layer: int) -> bool:
        """Say whether the feed-forward of a layer is a mixture."""
        if self.experts is None:
            return False
        after = layer - self.experts.n_dense_layers
        return after >= 0 and after % self.experts.every == 0

    def new_positions(self, *, is_local: bool = False) -> PositionScheme:
        """Make the scheme of positions; of layers with a window, it may have its own base."""
        if is_local and self.local_rope_theta is not None:
            own = {"rope_theta": self.local_rope_theta, "local_rope_theta": None}
            return replace(self, **own, rope_scaling=None).new_positions()
        return POSITIONS[self.positions](self)

    def new_norm(self, width: int) -> nn.Module:
        """Make a norm."""
        return NORMS[self.norm](width, eps=self.norm_eps)

    def new_attention(self, layer: int = 0) -> nn.Module:
        """Make the attention of a layer."""
        shared = {
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "head_dim": self.head_dim,
            "bias": self.attention_bias,
            "scale": self.attention_scale,
            "dropout": self.attention_dropout,
        }
        if self.latent is not None:
            return LatentAttention(**shared, **vars(self.latent))
        has_norm = self.qk_norm is not None and (self.global_qk_norm or self.is_local(layer))
        return MultiHeadAttention(
            **shared,
            n_kv_heads=self.n_kv_heads,
            qk_norm=partial(NORMS[self.qk_norm], eps=self.norm_eps) if has_norm else None,
            softcap=self.attention_softcap,
            sinks=self.sinks,
        )

    def new_feed_forward(self, layer: int) -> nn.Module:
        """Make the feed-forward of a layer."""
        shared = {
            "d_model": self.d_model,
            "activation": self.activation,
            "gated": self.gated,
            "bias": self.feed_forward_bias,
        }
        if not self.has_experts(layer):
            return FeedForward(**shared, d_ff=self.d_ff, dropout=0.0)
        settings = dict(vars(self.experts))
        del settings["n_dense_layers"], settings["every"]
        return MoELayer(**shared, **settings)

    def new_cache(self, layer: int, max_len: int) -> KVCache:
        """Make what the attention of a layer remembers with; with a window, it rolls."""
        if self.is_local(layer):
            return RollingCache(self.window, n_first=self.n_first, max_len=max_len)
        return KVCache(max_len)

    def new_block(self, layer: int) -> Block:
        """Make a block."""
        return Block(
            attention=self.new_attention(layer),
            feed_forward=self.new_feed_forward(layer),
            cross_attention=self.new_attention(layer) if self.n_encoder_layers else None,
            norm=self.new_norm,
            norm_placement=self.norm_placement,
            parallel=self.parallel,
            dropout=self.dropout,
        )
