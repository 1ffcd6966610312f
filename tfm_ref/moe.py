"""A mixture of experts: many feed-forwards, of which each token visits the few chosen for it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tfm_ref.layers import ACTIVATIONS, FeedForward, activate
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
    """

    indices: Int[Tensor, "b n c"]
    weights: Float[Tensor, "b n c"]
    scores: Float[Tensor, "b n e"]
    logits: Float[Tensor, "b n e"]


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

    Raises:
        ValueError: if a size is not an integer of at least 1, top_k exceeds n_experts, n_groups
            does not divide n_experts, top_k_groups exceeds n_groups, top_k_in_group exceeds the
            experts of a group, the kept groups have fewer than top_k experts, the score is
            unknown, or a single weight is normalised.

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

    Example:
        >>> router = Router(d_model=512, n_experts=8, top_k=2)
        >>> indices, weights, scores, logits = router(torch.randn(4, 100, 512))
        >>> indices.shape, scores.shape
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
        self.d_model, self.n_experts, self.top_k = d_model, n_experts, top_k
        self.score, self.normalise, self.scale = score, normalise, scale
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
            (batch, length, n_experts); all but the indices in float32 at least.

        Raises:
            ValueError: if x has not the shape (batch, length, d_model), is empty, or has not the
                device or (autocast apart) the dtype of the router.

        Example:
            >>> router = Router(d_model=8, n_experts=4, top_k=2)
            >>> weights = router(torch.randn(1, 3, 8)).weights
            >>> torch.allclose(weights.sum(-1), torch.ones(1, 3))
            True
        """
        check_tokens("x", x, self.proj.weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            terms = x, self.proj.weight, self.proj.bias
            logits = F.linear(*(None if t is None else t.to(wide) for t in terms))
        scores = SCORES[self.score](logits)
        indices = self._choose(scores)
        weights = scores.gather(-1, indices)
        if self.normalise:
            # Sigmoids can all be 0 in float32; a softmax does not see the 1e-20.
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(indices, self.scale * weights, scores, logits)

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
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def each_expert(
    experts: list[Callable[[Tensor, Tensor], Tensor]],
    x: Float[Tensor, "n d"],
    indices: Int[Tensor, "n c"],
    weights: Float[Tensor, "n c"],
) -> Float[Tensor, "n d"]:
    """Ask one expert after another for which tokens it was chosen: the equation as a loop.

    Args:
        experts: each a function of its tokens (any, d_model) and their weights (any, 1).
        x: tokens.
        indices: the experts chosen for each token.
        weights: what the output of each chosen expert is multiplied by.

    Returns:
        For each token the sum of what its experts give, in the dtype of the weights.
    """
    y = torch.zeros_like(x, dtype=weights.dtype)
    for number, expert in enumerate(experts):
        token, place = torch.where(indices == number)
        y.index_add_(0, token, expert(x[token], weights[token, place, None]))
    return y


def sorted_by_expert(
    experts: list[Callable[[Tensor, Tensor], Tensor]],
    x: Float[Tensor, "n d"],
    indices: Int[Tensor, "n c"],
    weights: Float[Tensor, "n c"],
) -> Float[Tensor, "n d"]:
    """Compute :func:`each_expert` with one look at the indices.

    The pairs of token and expert are sorted by expert, so that those of one expert lie side by
    side; what the experts give is sorted back and summed. Arguments and returns are the same.
    """
    pairs, top_k = indices.flatten(), indices.shape[1]
    order = pairs.argsort()
    counts = pairs.bincount(minlength=len(experts)).tolist()
    tokens = x[order // top_k].split(counts)
    shares = weights.flatten()[order, None].split(counts)
    visits = zip(experts, tokens, shares, counts, strict=True)
    y = torch.cat([expert(token, share) for expert, token, share, count in visits if count])
    return y[order.argsort()].unflatten(0, (-1, top_k)).sum(1)


BACKENDS = {"naive": each_expert, "sorted": sorted_by_expert}
"""The ways to compute one and the same mixture, by name."""


def _stack(*shape: int, fan_in: int | None = None) -> nn.Parameter:
    """Draw the same matrix or bias of every expert, each as ``nn.Linear`` draws its own."""
    bound = (shape[-1] if fan_in is None else fan_in) ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class MoELayer(nn.Module):
    """Change each token by the few of many feed-forwards that a router chooses for it.

    ``y = sum(weights[i] * expert_i(x) for the chosen i) + shared(x)``, where each expert is
    ``(act(x W_gate) * (x W_up)) W_down``. It can take the place of a
    :class:`~tfm_ref.layers.FeedForward` in a :class:`~tfm_ref.layers.Block`.

    Args:
        d_model: width of the tokens.
        d_ff: width between the projections of one expert.
        n_experts: number of experts.
        top_k: number of experts that each token visits.
        n_shared: number of further experts that every token visits, without a weight; side by
            side they are one feed-forward, ``shared``.
        d_ff_shared: width between the projections of one shared expert; d_ff if not given.
        activation: as of :class:`~tfm_ref.layers.FeedForward`.
        gated: as of :class:`~tfm_ref.layers.FeedForward`.
        bias: add a bias to every projection of every expert.
        router_bias: add a bias to the logits of the router.
        scale_input: multiply by the weight what goes into an expert, not what comes out.
        backend: how to compute, "sorted" (each expert runs on its tokens side by side) or
            "naive" (a loop that looks for them); the result is the same.
        **settings: the other settings of the :class:`Router`.

    Raises:
        ValueError: if a size is not an integer of at least 1 (n_shared: 0), activation or
            backend is unknown, or a setting of the router is refused.

    Reference:
        Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated
        Mixture-of-Experts Layer", section 2, equation (1); Jiang et al. 2024, "Mixtral of
        Experts", section 2.1: gated experts. Dai et al. 2024, "DeepSeekMoE: Towards Ultimate
        Expert Specialization in Mixture-of-Experts Language Models", section 3.2: shared
        experts. ``scale_input``: Llama 4. No expert has a capacity, so no token is dropped.
        Outputs are weighted and summed in float32 at least. How many tokens an expert gets depends
        on the data, so that the layer runs neither on the meta device nor in one compiled graph.

    Example:
        Mixtral 8x7B has eight experts in each layer; a token uses the parameters of two.

        >>> sizes = {"d_model": 4096, "d_ff": 14336, "n_experts": 8, "top_k": 2}
        >>> with torch.device("meta"):
        ...     layer = MoELayer(**sizes)
        >>> sum(p.numel() for p in layer.parameters()), layer.active_parameters
        (1409318912, 352354304)
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        n_experts: int,
        top_k: int,
        n_shared: int = 0,
        d_ff_shared: int | None = None,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        router_bias: bool = False,
        scale_input: bool = False,
        backend: str = "sorted",
        **settings: bool | float | str,
    ) -> None:
        super().__init__()
        self.router = Router(
            d_model=d_model, n_experts=n_experts, top_k=top_k, bias=router_bias, **settings
        )
        d_ff_shared = d_ff if d_ff_shared is None else d_ff_shared
        check_size("d_ff", d_ff)
        check_size("n_shared", n_shared, least=0)
        check_size("d_ff_shared", d_ff_shared)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("backend", backend, BACKENDS)
        self.d_model, self.d_ff, self.activation = d_model, d_ff, activation
        self.scale_input, self.backend = scale_input, backend
        self.gate_proj = _stack(n_experts, d_ff, d_model) if gated else None
        self.up_proj = _stack(n_experts, d_ff, d_model)
        self.down_proj = _stack(n_experts, d_model, d_ff)
        self.gate_bias = _stack(n_experts, d_ff, fan_in=d_model) if gated and bias else None
        self.up_bias = _stack(n_experts, d_ff, fan_in=d_model) if bias else None
        self.down_bias = _stack(n_experts, d_model, fan_in=d_ff) if bias else None
        self.shared = None
        if n_shared:
            width, form = n_shared * d_ff_shared, {"activation": activation, "gated": gated}
            self.shared = FeedForward(d_model=d_model, d_ff=width, bias=bias, **form)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Change the tokens.

        Args:
            x: tokens.

        Returns:
            The changed tokens, shaped like x and in its dtype. No token depends on another. What
            the router thought, ``layer.router(x)`` gives, or a forward hook on ``layer.router``.

        Raises:
            ValueError: if x has not the shape (batch, length, d_model), is empty, or has not the
                device or (autocast apart) the dtype of the layer.
        """
        routing = self.router(x)
        flat = (t.flatten(0, 1) for t in (x, routing.indices, routing.weights))
        y = BACKENDS[self.backend](self._experts(), *flat).view(x.shape)
        return (y if self.shared is None else y + self.shared(x)).to(x.dtype)

    def _experts(self) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """Take the stacks apart, at once: one gradient is then stacked, not one per expert."""
        stacks = self.gate_proj, self.gate_bias, self.up_proj, self.up_bias
        stacks += self.down_proj, self.down_bias
        absent = [None] * self.router.n_experts
        each = zip(*(absent if s is None else s.unbind() for s in stacks), strict=True)
        return [partial(self._expert, matrices) for matrices in each]

    def _expert(
        self,
        matrices: tuple[Tensor | None, ...],
        x: Float[Tensor, "n d"],
        weight: Float[Tensor, "n 1"],
    ) -> Float[Tensor, "n d"]:
        """Run one expert on its tokens, and weigh what goes in or what comes out."""
        gate_proj, gate_bias, up_proj, up_bias, down_proj, down_bias = matrices
        if self.scale_input:
            x = (weight * x).to(x.dtype)
        gate = None if gate_proj is None else F.linear(x, gate_proj, gate_bias)
        hidden = activate(self.activation, F.linear(x, up_proj, up_bias), gate)
        y = F.linear(hidden, down_proj, down_bias).to(weight.dtype)
        return y if self.scale_input else weight * y

    @property
    def active_parameters(self) -> int:
        """Count the parameters that one token uses: router, shared experts, top_k experts."""
        everything = sum(p.numel() for p in self.parameters())
        stacked = sum(p.numel() for p in self.parameters(recurse=False))
        return everything - stacked + stacked // self.router.n_experts * self.router.top_k

    def extra_repr(self) -> str:
        """Name what the parts do not show."""
        names = "d_model", "d_ff", "activation", "scale_input", "backend"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
