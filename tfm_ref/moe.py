"""A mixture of experts: many feed-forwards, of which each token visits the few chosen for it."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tfm_ref.grouped import grouped_linear
from tfm_ref.layers import ACTIVATIONS, FeedForward, activate
from tfm_ref.routing import Router
from tfm_ref.validation import check_choice, check_size


def each_expert(
    layer: "MoELayer",
    x: Float[Tensor, "n d"],
    token: Int[Tensor, " a"],
    expert: Int[Tensor, " a"],
    weight: Float[Tensor, " a"],
) -> Float[Tensor, "n d"]:
    """Ask one expert after another which tokens it has to visit: the equation as a loop.

    Args:
        layer: the experts.
        x: tokens.
        token: number of the token of each assignment.
        expert: number of its expert.
        weight: what the output of the expert is multiplied by.

    Returns:
        For each token the sum of what its experts give, in the dtype of the weights.
    """
    y = torch.zeros_like(x, dtype=weight.dtype)
    for number, matrices in enumerate(layer.each()):
        (here,) = torch.where(expert == number)
        y.index_add_(0, token[here], layer.run(matrices, x[token[here]], weight[here, None]))
    return y


def sorted_by_expert(
    layer: "MoELayer",
    x: Float[Tensor, "n d"],
    token: Int[Tensor, " a"],
    expert: Int[Tensor, " a"],
    weight: Float[Tensor, " a"],
) -> Float[Tensor, "n d"]:
    """Compute :func:`each_expert` with one look at the assignments.

    They are sorted by expert, so that those of one expert lie side by side, and each projection
    is one :func:`~tfm_ref.grouped.grouped_linear`. Arguments and returns are the same.
    """
    order = expert.argsort()
    token, weight = token[order], weight.index_select(0, order)[:, None]
    linear = partial(grouped_linear, counts=expert.bincount(minlength=len(layer.up_proj)))
    y = layer.run(layer.stacks, x.index_select(0, token), weight, linear)
    return torch.zeros_like(x, dtype=y.dtype).index_add_(0, token, y)


BACKENDS = {"naive": each_expert, "sorted": sorted_by_expert}
"""The ways to compute one and the same mixture, by name."""


def run_expert(
    activation: str,
    matrices: tuple[Tensor | None, ...],
    x: Float[Tensor, "a d"],
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> Float[Tensor, "a d"]:
    """Run experts on their tokens, whatever the weights.

    Args:
        activation: a name in :data:`tfm_ref.layers.ACTIVATIONS`.
        matrices: of one expert (an element of :meth:`MoELayer.each`), or of all (``stacks``).
        x: the tokens.
        linear: multiplies tokens by matrices, and adds biases.
    """
    gate_proj, gate_bias, up_proj, up_bias, down_proj, down_bias = matrices
    gate = None if gate_proj is None else linear(x, gate_proj, gate_bias)
    return linear(activate(activation, linear(x, up_proj, up_bias), gate), down_proj, down_bias)


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
        backend: how to compute, "sorted" (all experts at once, on tokens sorted by expert) or
            "naive" (a loop that looks for them); the result is the same.
        **settings: the other settings of the :class:`~tfm_ref.routing.Router`. Another router can
            take its place: see :class:`~tfm_ref.routing.ExpertChoiceRouter`.

    Raises:
        ValueError: if a size is not an integer of at least 1 (n_shared: 0), activation or
            backend is unknown, or a setting of the router is refused.

    Reference:
        Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated
        Mixture-of-Experts Layer", section 2, equation (1); Jiang et al. 2024, "Mixtral of
        Experts", section 2.1: gated experts. Dai et al. 2024, "DeepSeekMoE: Towards Ultimate
        Expert Specialization in Mixture-of-Experts Language Models", section 3.2: shared
        experts. ``scale_input``: Llama 4. A choice that the router's ``capacity_factor`` drops
        adds nothing: in a :class:`~tfm_ref.layers.Block` the token passes by, on the residual.
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
        **settings: bool | float | str | None,
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
            The changed tokens, shaped like x and in its dtype. No token depends on another, if
            none is dropped. What the router thought, :func:`tfm_ref.balance.routings` gives.

        Raises:
            ValueError: if x has not the shape (batch, length, d_model), is empty, or has not the
                device or (autocast apart) the dtype of the layer.
        """
        routing, flat = self.router(x), x.flatten(0, 1)
        expert, weight = routing.indices.flatten(), routing.weights.flatten()
        token = torch.arange(len(expert), device=x.device) // routing.indices.shape[-1]
        if routing.kept is not None:
            kept = routing.kept.flatten()
            token, expert, weight = token[kept], expert[kept], weight[kept]
        y = BACKENDS[self.backend](self, flat, token, expert, weight).view(x.shape)
        return (y if self.shared is None else y + self.shared(x)).to(x.dtype)

    @property
    def stacks(self) -> tuple[Tensor | None, ...]:
        """Give the matrices and biases of all experts, in the order in which they are used."""
        gate, up = (self.gate_proj, self.gate_bias), (self.up_proj, self.up_bias)
        return *gate, *up, self.down_proj, self.down_bias

    def each(self) -> list[tuple[Tensor | None, ...]]:
        """Take the stacks apart, at once: one gradient is then stacked, not one per expert."""
        absent = [None] * len(self.up_proj)
        return list(zip(*(absent if s is None else s.unbind() for s in self.stacks), strict=True))

    def run(
        self,
        matrices: tuple[Tensor | None, ...],
        x: Float[Tensor, "a d"],
        weight: Float[Tensor, "a 1"],
        linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
    ) -> Float[Tensor, "a d"]:
        """Run experts on their tokens, and weigh what goes in or what comes out.

        Args:
            matrices: of one expert (an element of :meth:`each`), or of all (``stacks``).
            x: the tokens.
            weight: of each token.
            linear: multiplies tokens by matrices, and adds biases.

        Returns:
            What the experts give for the tokens, in the dtype of the weights.
        """
        if self.scale_input:
            x = (weight * x).to(x.dtype)
        y = run_expert(self.activation, matrices, x, linear).to(weight.dtype)
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
