"""Routing: which experts each token visits, and how much each of them counts."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tfm_ref.validation import check_choice, check_size, check_tokens

SCORES = {"softmax": partial(torch.softmax, dim=-1), "sigmoid": torch.sigmoid}
"""The functions from the logits of all experts to their scores, by name."""


class Routing(NamedTuple):
    """Say where each token goes, and all that was thought of on the way.

    Args:
        indices: the experts chosen for each token, best first.
        weights: what the output of each chosen expert is multiplied by.
        scores: of all experts, between 0 and 1; what a loss for their balance looks at.
        logits: of all experts, before they became scores.
        kept: False where an expert was chosen but is full, so that the token is dropped there; all
            are kept if not given.
    """

    indices: Int[Tensor, "b n c"]
    weights: Float[Tensor, "b n c"]
    scores: Float[Tensor, "b n e"]
    logits: Float[Tensor, "b n e"]
    kept: Bool[Tensor, "b n c"] | None = None


def expert_capacity(
    n_tokens: int, *, n_experts: int, top_k: int, capacity_factor: float = 1.0
) -> int:
    """Say how many tokens of a sequence one expert has room for.

    ``⌈capacity_factor · top_k · n_tokens / n_experts⌉``, and at most n_tokens: with a factor of 1
    all choices fit exactly, if they are spread evenly.

    Args:
        n_tokens: number of tokens in the sequence.
        n_experts: number of experts.
        top_k: number of experts chosen for each token.
        capacity_factor: room per choice, if they are spread evenly.

    Returns:
        The number of tokens.

    Reference:
        Fedus et al. 2021, "Switch Transformers: Scaling to Trillion Parameter Models with Simple
        and Efficient Sparsity", equation (3), for top_k = 1; Lepikhin et al. 2020, "GShard:
        Scaling Giant Models with Conditional Computation and Automatic Sharding", section 2.2,
        for top_k = 2. They count the tokens of a group, which is here a sequence.

    Example:
        >>> expert_capacity(100, n_experts=8, top_k=1, capacity_factor=1.25)
        16
    """
    room = round(capacity_factor * top_k * n_tokens / n_experts, 9)  # 1.1 · 100 / 10 is 11
    return min(n_tokens, math.ceil(room))


def _logits(proj: nn.Linear, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
    """Compute the logits of all experts in float32 at least, also under autocast."""
    check_tokens("x", x, proj.weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(*(None if t is None else t.to(wide) for t in (x, proj.weight, proj.bias)))


class Router(nn.Module):
    """Choose the experts for each token, and weigh them.

    ``scores = softmax(x W + bias)``; the ``top_k`` experts with the highest
    ``scores + choice_bias`` are chosen; ``weights = scale * scores / sum(scores)`` over the chosen.

    Args:
        d_model: width of the tokens.
        n_experts: number of experts to choose from.
        top_k: number of experts chosen for each token.
        score: how logits become scores: "softmax" (experts compete) or "sigmoid" (each by itself).
        normalise: divide the scores of the chosen by their sum.
        bias: add a bias to the logits.
        choice_bias: add to the scores, for the choice and not for the weights, numbers that no
            gradient sets: the buffer ``choice_bias``, 0 at first, with which a training keeps
            the experts equally busy.
        n_groups: number of equal groups of neighbouring experts.
        top_k_groups: number of groups that one token may choose from.
        top_k_in_group: a group is as good as the sum of its so many best experts.
        scale: factor of all weights.
        noise: in training, what the router sees of each number is that number times one drawn
            between 1 - noise and 1 + noise.
        capacity_factor: lets an expert take at most :func:`expert_capacity` tokens of a sequence:
            those whose first choice it is in their order, then those whose second choice it is,
            and so on. The other choices are dropped. All are taken if not given.
        capacity: the same for a number of tokens that does not depend on the sequence; instead of
            capacity_factor.

    Raises:
        ValueError: if a size is not an integer of at least 1, top_k exceeds n_experts, n_groups
            does not divide n_experts, top_k_groups exceeds n_groups, top_k_in_group exceeds the
            experts of a group, the kept groups have fewer than top_k experts, the score is
            unknown, a single weight is normalised, noise does not lie in 0 ≤ noise < 1,
            capacity_factor is not finite and above 0, or capacity, too, is given.

    Reference:
        Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated
        Mixture-of-Experts Layer", section 2.1, equations (3) and (5), without noise: a softmax
        over the chosen logits, which is the softmax over all, normalised. So do Mixtral, Qwen3
        and gpt-oss (``bias``). Not normalised: Switch (Fedus et al. 2021, equations (1) and
        (2)), with top_k = 1; Llama 4, with top_k = 1 and "sigmoid"; DeepSeek-V2 (section 2.2),
        whose groups are as good as their best expert. DeepSeek-V3 (section 2.1.2, equations (13)
        to (16)): "sigmoid", ``choice_bias``, and top_k_in_group = top_k / top_k_groups, 2 in its
        code.
        Logits, too, are computed in float32 at least, also under autocast, as in Switch
        (section 2.4) and DeepSeek-V3; Mixtral and its kin compute them in the dtype of the model.
        ``noise``: Switch, section 2.4, where it is 0.01. ``capacity_factor``: Switch, section 2.2;
        the order of the choices is GShard's (Lepikhin et al. 2020, Algorithm 1), which takes
        second choices at random. Who is dropped depends on the other tokens of the sequence, with
        top_k > 1 on later ones too, and so does the capacity on their number: what a causal model
        computes with a cache can then differ. Padding takes room like any token; on the right
        it takes none from a real token's choice of the same rank.

    Example:
        >>> router = Router(d_model=512, n_experts=8, top_k=2)
        >>> routing = router(torch.randn(4, 100, 512))
        >>> routing.indices.shape, routing.scores.shape
        (torch.Size([4, 100, 2]), torch.Size([4, 100, 8]))
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_experts: int,
        top_k: int,
        score: str = "softmax",
        normalise: bool = True,
        bias: bool = False,
        choice_bias: bool = False,
        n_groups: int = 1,
        top_k_groups: int = 1,
        top_k_in_group: int = 1,
        scale: float = 1.0,
        noise: float = 0.0,
        capacity_factor: float | None = None,
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        check_size("d_model", d_model)
        check_size("n_experts", n_experts)
        check_size("top_k", top_k, most=n_experts)
        check_size("n_groups", n_groups)
        check_size("top_k_groups", top_k_groups, most=n_groups)
        if n_experts % n_groups:
            raise ValueError(f"n_experts ({n_experts}) must be divisible by n_groups ({n_groups})")
        in_group = n_experts // n_groups
        check_size("top_k_in_group", top_k_in_group, most=in_group)
        if top_k > top_k_groups * in_group:
            raise ValueError(
                f"top_k ({top_k}) must not exceed the experts in the top_k_groups kept groups "
                f"({top_k_groups} of {in_group})"
            )
        check_choice("score", score, SCORES)
        if normalise and top_k == 1:
            raise ValueError(
                "normalise with top_k = 1 makes every weight 1, whatever the score, and gives the "
                "router no gradient; set normalise=False"
            )
        if not 0 <= noise < 1:
            raise ValueError(f"noise must lie in 0 <= noise < 1; got {noise}")
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(f"capacity_factor must be finite and above 0; got {capacity_factor}")
        if capacity is not None:
            check_size("capacity", capacity)
            if capacity_factor is not None:
                raise ValueError(
                    "of capacity and capacity_factor, one must not be given; "
                    f"got {capacity} and {capacity_factor}"
                )
        self.d_model, self.n_experts, self.top_k = d_model, n_experts, top_k
        self.score, self.normalise, self.scale = score, normalise, scale
        self.noise, self.capacity_factor, self.capacity = noise, capacity_factor, capacity
        self.n_groups, self.top_k_groups = n_groups, top_k_groups
        self.top_k_in_group = top_k_in_group
        self.proj = nn.Linear(d_model, n_experts, bias=bias)
        self.register_buffer(
            "choice_bias", torch.zeros(n_experts, dtype=torch.float32) if choice_bias else None
        )

    def forward(self, x: Float[Tensor, "b n d"]) -> Routing:
        """Send the tokens to their experts.

        Args:
            x: tokens.

        Returns:
            Indices and weights of shape (batch, length, top_k), scores and logits of shape
            (batch, length, n_experts), weights, scores and logits in float32 at least; and with
            a capacity or its factor, what is kept.

        Raises:
            ValueError: if x has not the shape (batch, length, d_model), is empty, or has not the
                device or (autocast apart) the dtype of the router.

        Example:
            >>> router = Router(d_model=8, n_experts=4, top_k=2)
            >>> weights = router(torch.randn(1, 3, 8)).weights
            >>> torch.allclose(weights.sum(-1), torch.ones(1, 3))
            True
        """
        if self.training and self.noise:
            x = x * torch.empty_like(x).uniform_(1 - self.noise, 1 + self.noise)
        logits = _logits(self.proj, x)
        scores = SCORES[self.score](logits)
        indices = self._choose(scores)
        weights = scores.gather(-1, indices)
        if self.normalise:
            # Sigmoids can all be 0 in float32; a softmax does not see the 1e-20.
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        unlimited = self.capacity_factor is None and self.capacity is None
        kept = None if unlimited else self._keep(indices)
        return Routing(indices, self.scale * weights, scores, logits, kept)

    def _choose(self, scores: Float[Tensor, "b n e"]) -> Int[Tensor, "b n c"]:
        """Take the best experts of the best groups."""
        if self.choice_bias is not None:
            scores = scores + self.choice_bias
        if self.top_k_groups < self.n_groups:
            groups = scores.unflatten(-1, (self.n_groups, -1))
            of_group = groups.topk(self.top_k_in_group).values.sum(-1)
            kept = of_group.topk(self.top_k_groups).indices
            dropped = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, kept, False)
            scores = groups.masked_fill(dropped[..., None], -torch.inf).flatten(-2)
        return scores.topk(self.top_k).indices

    def _keep(self, indices: Int[Tensor, "b n c"]) -> Bool[Tensor, "b n c"]:
        """Keep what an expert has room for: first choices in their order, then second ones."""
        sizes = {"n_experts": self.n_experts, "top_k": self.top_k}
        room = self.capacity or expert_capacity(
            indices.shape[1], **sizes, capacity_factor=self.capacity_factor
        )
        in_turn = indices.mT.flatten(1)
        before = F.one_hot(in_turn, self.n_experts).cumsum(1).gather(-1, in_turn[..., None])
        return (before <= room).view(indices.mT.shape).mT

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Move or cast the router, but leave ``choice_bias`` in float32.

        A training moves it by steps that bfloat16 would round away.
        """
        before = self.choice_bias
        super()._apply(fn, recurse)
        if before is not None and self.choice_bias.dtype != before.dtype:
            self.choice_bias = before.to(self.choice_bias.device)
        return self

    def extra_repr(self) -> str:
        """Name what the shape of the projection does not show."""
        names = "top_k", "score", "normalise", "n_groups", "top_k_groups", "top_k_in_group", "scale"
        names += "noise", "capacity_factor", "capacity"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class ExpertChoiceRouter(nn.Module):
    """Let each expert choose its tokens, instead of each token its experts.

    ``scores = softmax(x W)``; of each sequence, an expert takes the ``top_k · length / n_experts``
    tokens (rounded up) with the highest score for it, and weighs them by that score. All experts
    are equally busy, without any loss; a token may be taken by many or by none.

    Whether a token is taken depends on later tokens: not for a causal model.

    Args:
        d_model: width of the tokens.
        n_experts: number of experts that choose.
        top_k: number of experts that visit a token on average.

    Raises:
        ValueError: if a size is not an integer of at least 1, or top_k exceeds n_experts.

    Reference:
        Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2, equations
        (1) and (2), where top_k is the capacity factor c. They choose from all tokens of a batch;
        here from those of one sequence, so that sequences do not depend on each other. In the
        :class:`Routing`, every token asks all experts, and kept says who takes it.

    Example:
        It takes the place of a layer's own router.

        >>> from tfm_ref import MoELayer
        >>> layer = MoELayer(d_model=8, d_ff=16, n_experts=4, top_k=2)
        >>> layer.router = ExpertChoiceRouter(d_model=8, n_experts=4, top_k=2)
        >>> x = torch.randn(1, 6, 8)
        >>> layer(x).shape, layer.router(x).kept.sum(1)
        (torch.Size([1, 6, 8]), tensor([[3, 3, 3, 3]]))
    """

    def __init__(self, *, d_model: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        check_size("d_model", d_model)
        check_size("n_experts", n_experts)
        check_size("top_k", top_k, most=n_experts)
        self.d_model, self.n_experts, self.top_k = d_model, n_experts, top_k
        self.proj = nn.Linear(d_model, n_experts, bias=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Routing:
        """Let the experts choose.

        Args:
            x: tokens.

        Returns:
            Indices of all experts for every token, their scores, which are the weights too, and
            which of them are kept, all of shape (batch, length, n_experts).

        Raises:
            ValueError: as :meth:`Router.forward`.
        """
        logits = _logits(self.proj, x)
        scores = logits.softmax(-1)
        room = expert_capacity(x.shape[1], n_experts=self.n_experts, top_k=self.top_k)
        taken = scores.topk(room, dim=1).indices
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, taken, True)
        indices = torch.arange(self.n_experts, device=x.device).expand(scores.shape)
        return Routing(indices, scores, scores, logits, kept)

    def extra_repr(self) -> str:
        """Name what the shape of the projection does not show."""
        return f"top_k={self.top_k}"
