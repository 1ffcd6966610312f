"""Multi-head latent attention: the keys and values of all heads, from a few numbers per token."""

from collections.abc import Callable

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from tfm_ref.attention_layer import AttentionLayer
from tfm_ref.backends import check_backend
from tfm_ref.layers import RMSNorm
from tfm_ref.validation import check_dropout, check_size


class LatentAttention(AttentionLayer):
    """Let every head make its keys and values from one latent, a few numbers per token (MLA).

    ``l = norm(c W_DKV)``, ``key_i = [l W_UK[i], rotate(c W_KR)]``, ``value_i = l W_UV[i]``,
    ``query_i = [u W_UQ[i], rotate(u W_QR[i])]`` with ``u = norm(x W_DQ)`` or, without q_lora_rank,
    ``u = x``; ``output = [head_1, ..., head_h] W_O``. The context c is x itself in self-attention.

    All heads share the part of the key that turns, ``rotate(c W_KR)``. So a cache holds
    kv_lora_rank + rope_head_dim numbers per token, whatever n_heads is: l and that part. A
    ``rotation`` turns that part alone: ``RotaryPositions(head_dim=rope_head_dim,
    interleaved=True).rotation`` makes it.

    The same scores and outputs come without keys and values, since ``q · l W_UK[i]`` is
    ``q W_UK[i]ᵀ · l``, and the average of ``l W_UV[i]`` is the average of l, times W_UV[i]: the
    absorbed form, in which the heads share one key and one value (MQA), and these are what the
    cache holds. With k = head_dim, r = rope_head_dim, v = v_head_dim and l = kv_lora_rank, each
    head of n queries over m tokens multiplies

    - ``m l (k + v) + n m (k + r + v)`` times, if it makes keys and values of the latents;
    - ``n l (k + v) + n m (2 l + r)`` times, if they are absorbed.

    Args:
        d_model: width of the tokens.
        n_heads: number of heads.
        head_dim: width of that part of one query and one key which does not turn.
        rope_head_dim: width of the part that turns.
        v_head_dim: width of one value.
        kv_lora_rank: width of the latent of keys and values.
        q_lora_rank: width of the latent of queries; queries come straight from x if not given.
        bias: add a bias to the projections from d_model to a latent, and to that of the output.
        scale: factor of the dot products; 1/√(head_dim + rope_head_dim) if not given.
        norm_eps: eps of the norms of the latents.
        dropout: probability with which a weight is set to 0 in training; not with "tiled".
        absorbed: take the absorbed form, or never; where it multiplies less, if not given. In
            DeepSeek-V3 that is up to 170 queries, if the context is long.
        backend: how to compute, "sdpa" (PyTorch's fused kernels), "tiled" (FlashAttention in plain
            PyTorch) or "naive" (as it is written in the equation); the result is the same.

    Raises:
        ValueError: if a size is not an integer of at least 1, norm_eps is negative, dropout does
            not lie in 0 ≤ dropout < 1, or the backend is unknown or lacks the dropout asked for.

    Reference:
        DeepSeek-AI 2024, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts
        Language Model", sections 2.1.2 and 2.1.3, equations (9) to (19); "DeepSeek-V3 Technical
        Report", section 2.1.1. The absorbed form is that of V2's section 2.1.2, whose text puts
        W_UV into W_O; here it stands by itself, with fewer operations. The norms are those of V2's
        section 3.1.2, without the further factors named there, which the public models lack.
        Weights are split as in those models: kv_a_proj makes [c W_DKV, c W_KR]; q_b_proj (or
        q_proj) and kv_b_proj make, head after head, the query and [l W_UK[i], l W_UV[i]]. With
        YaRN, and ``m(a) = 0.1 a ln(factor) + 1``, those models multiply the turned part of the
        scores by m(mscale)² and the other by m(mscale_all_dim)². Here that is
        ``YaRNScaling(..., temperature=m(mscale) / m(mscale_all_dim))``, so 1.0 where the two are
        equal, and ``scale=m(mscale_all_dim)**2 / √(head_dim + rope_head_dim)``.

    Example:
        >>> sizes = dict(head_dim=128, rope_head_dim=64, v_head_dim=128, kv_lora_rank=512)
        >>> attention = LatentAttention(d_model=256, n_heads=4, **sizes)
        >>> attention(torch.randn(2, 50, 256)).shape, attention.cache_width
        (torch.Size([2, 50, 256]), 576)

        >>> from tfm_ref import RotaryPositions
        >>> turn = RotaryPositions(head_dim=64, interleaved=True).rotation(torch.arange(5)[None])
        >>> x = torch.randn(1, 5, 256)
        >>> newest = attention(x[:, 4:], x, rotation=turn)
        >>> torch.allclose(newest, attention(x, rotation=turn)[:, 4:], atol=1e-6)
        True
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        head_dim: int,
        rope_head_dim: int,
        v_head_dim: int,
        kv_lora_rank: int,
        q_lora_rank: int | None = None,
        bias: bool = False,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        absorbed: bool | None = None,
        backend: str = "sdpa",
    ) -> None:
        super().__init__()
        self.d_model, self.n_heads = d_model, n_heads
        self.head_dim, self.rope_head_dim, self.v_head_dim = head_dim, rope_head_dim, v_head_dim
        self.kv_lora_rank, self.q_lora_rank = kv_lora_rank, q_lora_rank
        for name in "d_model", "n_heads", "head_dim", "rope_head_dim", "v_head_dim", "kv_lora_rank":
            check_size(name, getattr(self, name))
        if q_lora_rank is not None:
            check_size("q_lora_rank", q_lora_rank)
        check_dropout(dropout)
        check_backend(backend, dropout=dropout)
        if absorbed not in (True, False, None):
            raise ValueError(f"absorbed must be True, False or None; got {absorbed!r}")
        self.scale = (head_dim + rope_head_dim) ** -0.5 if scale is None else scale
        self.dropout, self.absorbed, self.backend = dropout, absorbed, backend

        q_width, kv_width = n_heads * (head_dim + rope_head_dim), n_heads * (head_dim + v_head_dim)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(d_model, q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(d_model, q_lora_rank, bias=bias)
            self.q_a_norm = RMSNorm(q_lora_rank, norm_eps)
            self.q_b_proj = nn.Linear(q_lora_rank, q_width, bias=False)
        self.kv_a_proj = nn.Linear(d_model, kv_lora_rank + rope_head_dim, bias=bias)
        self.kv_a_norm = RMSNorm(kv_lora_rank, norm_eps)
        self.kv_b_proj = nn.Linear(kv_lora_rank, kv_width, bias=False)
        self.o_proj = nn.Linear(n_heads * v_head_dim, d_model, bias=bias)

    @property
    def cache_width(self) -> int:
        """Count the numbers that a cache keeps of each token: its latent and its turned part."""
        return self.kv_lora_rank + self.rope_head_dim

    def _queries(
        self, x: Float[Tensor, "b n d"], rotation: Callable[[Tensor], Tensor] | None
    ) -> Float[Tensor, "b h n k"]:
        """Make each head's queries; k counts both parts."""
        if self.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q, q_rope = self._heads(q, self.head_dim, self.rope_head_dim)
        return torch.cat([q, q_rope if rotation is None else rotation(q_rope)], -1)

    def _kept(
        self, context: Float[Tensor, "b m d"], rotation: Callable[[Tensor], Tensor] | None
    ) -> tuple[Float[Tensor, "b 1 m k"]]:
        """Make the latent of each token and, behind it, the part of its key that turns."""
        latent, k_rope = self._parts(self.kv_a_proj(context)[:, None])
        k_rope = k_rope if rotation is None else rotation(k_rope)
        return (torch.cat([self.kv_a_norm(latent), k_rope], -1),)

    def _parts(self, kept: Tensor) -> tuple[Float[Tensor, "b 1 m l"], Float[Tensor, "b 1 m k"]]:
        """Tell the latent of each token from the part of its key that turns."""
        return kept.split([self.kv_lora_rank, self.rope_head_dim], -1)

    def _terms(self, q: Float[Tensor, "b h n k"], kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make each head's keys and values of the latents, or queries that the latents answer."""
        latent, k_rope = self._parts(kept)
        if self._absorbs(q.shape[2], kept.shape[2]):
            q, q_rope = q.split([self.head_dim, self.rope_head_dim], -1)
            q = einsum(q, self._up()[0], "b h n k, h k l -> b h n l")
            return torch.cat([q, q_rope], -1), kept, latent
        k, v = self._heads(self.kv_b_proj(latent[:, 0]), self.head_dim, self.v_head_dim)
        k_rope = repeat(k_rope, "b 1 m k -> b h m k", h=self.n_heads)
        return q, torch.cat([k, k_rope], -1), v

    def _output(self, y: Tensor, len_k: int) -> Float[Tensor, "b h n v"]:
        """Make each head's values, of averages of latents if they are absorbed."""
        if not self._absorbs(y.shape[2], len_k):
            return y
        return einsum(y, self._up()[1], "b h n l, h v l -> b h n v")

    def _absorbs(self, n: int, m: int) -> bool:
        """Say whether n queries over m tokens take the absorbed form."""
        if self.absorbed is not None:
            return self.absorbed
        latent, turned = self.kv_lora_rank, self.rope_head_dim
        both = self.head_dim + self.v_head_dim
        naive = m * latent * both + n * m * (both + turned)
        return n * latent * both + n * m * (2 * latent + turned) < naive

    def _up(self) -> tuple[Float[Tensor, "h k l"], Float[Tensor, "h v l"]]:
        """Give the matrices W_UK and W_UV of each head, transposed."""
        up = rearrange(self.kv_b_proj.weight, "(h k) l -> h k l", h=self.n_heads)
        return up.split([self.head_dim, self.v_head_dim], 1)

    def _heads(self, t: Tensor, *widths: int) -> tuple[Tensor, Tensor]:
        """Give each head its numbers, in two parts of these widths."""
        return t.unflatten(-1, (self.n_heads, sum(widths))).transpose(1, 2).split(widths, -1)

    def extra_repr(self) -> str:
        """Name what the shapes of the projections do not show."""
        form = f"scale={self.scale}, absorbed={self.absorbed}"
        return f"n_heads={self.n_heads}, {form}, backend={self.backend!r}"
