"""A mixture of experts: many feed-forwards, of which each token visits the few chosen for it."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
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
    is one :func:`grouped_linear`. Arguments and returns are the same.
    """
    order = expert.argsort()
    token, weight = token[order], weight.index_select(0, order)[:, None]
    linear = partial(grouped_linear, counts=expert.bincount(minlength=len(layer.up_proj)))
    y = layer.run(layer.stacks, x.index_select(0, token), weight, linear)
    return torch.zeros_like(x, dtype=y.dtype).index_add_(0, token, y)


BACKENDS = {"naive": each_expert, "sorted": sorted_by_expert}
"""The ways to compute one and the same mixture, by name."""


def grouped_linear(
    x: Float[Tensor, "a d"],
    weight: Float[Tensor, "e f d"],
    bias: Float[Tensor, "e f"] | None = None,
    *,
    counts: Int[Tensor, " e"],
) -> Float[Tensor, "a f"]:
    """Give each group of neighbouring rows its own linear layer.

    Where PyTorch's grouped product takes the numbers, it is one call, and nobody has to wait for
    the counts; elsewhere it is one product per group that has rows.

    Args:
        x: rows, those of a group side by side.
        weight: matrix of each group, as ``nn.Linear`` stores it.
        bias: bias of each group.
        counts: number of rows of each group; their sum is that of all rows.

    Returns:
        ``x W + bias``, row by row with the matrix and the bias of its group.

    Reference:
        ``torch.nn.functional.grouped_mm``: of float32, bfloat16 and float16, with rows of a
        multiple of 16 bytes, on the CPU and on CUDA from compute capability 8.0 on. Autocast does
        not know it, and is obeyed here.

    Example:
        >>> x, weight = torch.ones(3, 4), torch.tensor([1.0, 5.0])[:, None, None].expand(2, 1, 4)
        >>> grouped_linear(x, weight, counts=torch.tensor([1, 2]))[:, 0]
        tensor([ 4., 20., 20.])
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    if _can_group(x, weight):
        y = F.grouped_mm(x, weight.mT, offs=counts.cumsum(0, dtype=torch.int32))
        return y if bias is None else y + bias.repeat_interleave(counts, 0, output_size=len(y))
    biases = [None] * len(weight) if bias is None else bias.unbind()
    groups = zip(x.split(counts.tolist()), weight.unbind(), biases, strict=True)
    return torch.cat([F.linear(rows, w, b) for rows, w, b in groups if len(rows)])


def _can_group(x: Tensor, weight: Tensor) -> bool:
    """Say whether PyTorch's grouped product takes these numbers."""
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    aligned = all(width * x.itemsize % 16 == 0 for width in weight.shape[1:])
    if x.device.type == "cuda":
        known = known and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return known and aligned and weight.is_contiguous() and x.device.type in ("cpu", "cuda")


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
        **settings: the other settings of the :class:`Router`. Another router can take its
            place: see :class:`ExpertChoiceRouter`.

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
