"""Expert parallelism: each process holds some experts of a mixture, and tokens travel to them."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from tfm_ref.moe import MoELayer, run_expert
from tfm_ref.validation import check_size

STACKS = "gate_proj", "up_proj", "down_proj", "gate_bias", "up_bias", "down_bias"
"""The parameters of a :class:`~tfm_ref.moe.MoELayer` that hold one matrix or bias per expert."""


def _share(n_experts: int, world: int) -> int:
    """Give the number of experts in each process."""
    check_size("the number of processes", world)
    if n_experts % world:
        raise ValueError(
            f"n_experts ({n_experts}) must be divisible by the number of processes ({world})"
        )
    return n_experts // world


def _all_to_all(
    x: Tensor, sent: Sequence[int], got: Sequence[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Send rows to each process, so many in turn, and give those that come, in the same order."""
    y = x.new_empty(sum(got), *x.shape[1:])
    try:
        dist.all_to_all_single(y, x.contiguous(), [*got], [*sent], group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"process {dist.get_rank(group)} of {dist.get_world_size(group)} could not exchange "
            "tokens: another has ended, or did not come before the timeout of the group"
        ) from error
    return y


class Exchange(torch.autograd.Function):
    """Send rows to the processes that want them; gradients travel back the same way.

    ``Exchange.apply(x, sent, got, group)``, where sent and got say how many rows go to each
    process of the group and how many come from it.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Float[Tensor, "... d"],
        sent: Sequence[int],
        got: Sequence[int],
        group: dist.ProcessGroup | None,
    ) -> Float[Tensor, "... d"]:
        """Exchange the rows."""
        ctx.way_back = got, sent, group
        return _all_to_all(x, sent, got, group)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Float[Tensor, "... d"]
    ) -> tuple[Float[Tensor, "... d"], None, None, None]:
        """Exchange their gradients in the other direction."""
        return Exchange.apply(gradient, *ctx.way_back), None, None, None


class ExpertParallel(nn.Module):
    """Run a mixture of experts over several processes, each of which holds its share of them.

    Of E experts and P processes, process p holds the experts from ``p E / P`` up to
    ``(p + 1) E / P``; router and shared experts are everywhere. Each process has tokens of its
    own, and gets for them what the whole layer would give:

    1. Sort the pairs of token and expert, those that are kept, by expert: those for one process
       lie side by side.
    2. Exchange counts: how many tokens come from where, for which expert.
    3. Exchange tokens.
    4. Run the experts that are here on what has come.
    5. Exchange the outputs: each goes back to where its token came from.
    6. Weigh them, and sum those of each token.

    Every process must call the layer as often as the others, forward and backward, with a token
    at least: the exchanges wait for all. ``loss.backward()``, called in all processes, gives
    gradients of the sum of their losses: whole in the experts, which have seen the tokens of all;
    elsewhere, as ever, each process has its own part, and an all-reduce must sum these parts.
    :func:`expert_shares` names the parameters to leave out of that;
    :func:`~tfm_ref.training.fit` does.

    Args:
        layer: the whole layer, the same in all processes. It is not changed; router and shared
            experts are those of the layer, the share of the experts is a copy. A layer on the
            meta device takes no memory: ``to_empty`` and ``load_state_dict`` then fill the share.
        group: the processes, joined by ``torch.distributed.init_process_group``; all of them if
            not given. On CUDA its backend is NCCL, elsewhere gloo.

    Raises:
        RuntimeError: if the processes are not joined; in the exchange, if one has ended, or does
            not come before the timeout of the group (where NCCL does not end the process itself).
        ValueError: if the number of processes does not divide n_experts, or this process is not
            one of the group.

    Reference:
        Lepikhin et al. 2020, "GShard: Scaling Giant Models with Conditional Computation and
        Automatic Sharding", section 3: experts are sharded, all else is replicated, and
        all-to-all brings tokens to experts and back. Fedus et al. 2021, "Switch Transformers:
        Scaling to Trillion Parameter Models with Simple and Efficient Sparsity", section 5.4.
        Both send each expert a fixed number of tokens; here counts are exchanged. DeepSeek-AI
        2024, "DeepSeek-V3 Technical Report", section 3.2.2: a token that several experts of one
        machine want is sent there once; here, once for each of them.

    Example:
        With ``torchrun --nproc-per-node=4``, each process would hold two of the eight experts.

        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> whole = MoELayer(d_model=16, d_ff=32, n_experts=8, top_k=2)
        >>> layer = ExpertParallel(whole)
        >>> x = torch.randn(4, 100, 16)
        >>> torch.allclose(layer(x), whole(x), atol=1e-6)
        True
        >>> dist.destroy_process_group()
    """

    def __init__(self, layer: MoELayer, *, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if not dist.is_initialized():
            raise RuntimeError(
                "ExpertParallel needs processes that are joined: start the script by torchrun, "
                "and call torch.distributed.init_process_group first"
            )
        self.group, self.world = group, dist.get_world_size(group)
        share = _share(layer.router.n_experts, self.world)
        self.experts = slice(share * dist.get_rank(group), share * (dist.get_rank(group) + 1))
        self.activation, self.scale_input = layer.activation, layer.scale_input
        self.router, self.shared = layer.router, layer.shared
        for name in STACKS:
            stack = getattr(layer, name)
            if stack is not None:
                mine = stack.detach()[self.experts].clone()
                stack = nn.Parameter(mine, stack.requires_grad)
            self.register_parameter(name, stack)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Change the tokens of this process.

        Args:
            x: tokens of this process; how many, may differ between processes.

        Returns:
            The changed tokens, shaped like x and in its dtype.

        Raises:
            ValueError: if x has not the shape (batch, length, d_model), is empty, or has not the
                device or (autocast apart) the dtype of the layer.
            RuntimeError: if another process has ended, or does not come.
        """
        routing, flat = self.router(x), x.flatten(0, 1)
        expert, weights = routing.indices.flatten(), routing.weights.flatten()
        token = torch.arange(len(expert), device=x.device) // routing.indices.shape[-1]
        if routing.kept is not None:
            token, expert, weights = (t[routing.kept.flatten()] for t in (token, expert, weights))
        order = expert.argsort()
        token, weights = token[order], weights[order, None]
        tokens = flat[token]
        if self.scale_input:
            tokens = (weights * tokens).to(x.dtype)

        n_here = len(self.up_proj)
        go = expert.bincount(minlength=self.router.n_experts)  # from here, to each expert
        come = _all_to_all(go, [n_here] * self.world, [n_here] * self.world, self.group)
        sent, got = (counts.view(self.world, -1).sum(1).tolist() for counts in (go, come))
        tokens = Exchange.apply(tokens, sent, got, self.group)

        # They have come by process, those of each by expert. An expert wants its own together.
        expert = torch.arange(len(come), device=x.device) % n_here
        by_expert = expert.repeat_interleave(come).argsort()
        runs = tokens[by_expert].split(come.view(self.world, -1).sum(0).tolist())
        # An expert runs if only on no token: backward, too, all processes must take part.
        each = zip(self.each(), runs, strict=True)
        y = torch.cat([run_expert(self.activation, *pair) for pair in each])[by_expert.argsort()]

        y = Exchange.apply(y, got, sent, self.group).to(weights.dtype)
        y = y if self.scale_input else weights * y
        y = torch.zeros_like(flat, dtype=y.dtype).index_add(0, token, y).view(x.shape)
        return (y if self.shared is None else y + self.shared(x)).to(x.dtype)

    stacks, each = MoELayer.stacks, MoELayer.each

    def own(self, t: Tensor) -> Tensor:
        """Take what belongs to the share of this process from what belongs to all experts.

        What does not count the experts, such as a share itself or the number of a step, stays.
        """
        return t[self.experts] if t.ndim and len(t) == self.router.n_experts else t

    def whole(self, share: Tensor) -> Tensor:
        """Join what belongs to the shares of all processes, which must all call it."""
        shares = [torch.empty_like(share) for _ in range(self.world)]
        dist.all_gather(shares, share.detach().contiguous(), group=self.group)
        return torch.cat(shares)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        """Take the share of this process from the stacks of a whole layer."""
        for name in STACKS:
            if prefix + name in state_dict:
                state_dict[prefix + name] = self.own(state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Name what the parts do not show."""
        return (
            f"experts={self.experts.start}:{self.experts.stop}, activation={self.activation!r}, "
            f"scale_input={self.scale_input!r}"
        )


def _shares(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ExpertParallel]]:
    for prefix, layer in model.named_modules():
        if isinstance(layer, ExpertParallel):
            for name, share in layer.named_parameters(prefix, recurse=False):
                yield name, share, layer


def expert_shares(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name the parameters of which each process has others: its share of the experts.

    Their gradients are whole, so that no all-reduce may sum them; a broadcast must not touch them.
    A norm of all gradients needs the squares of all processes.

    Args:
        model: a model with :class:`ExpertParallel` in it, or one itself.
    """
    return {name: share for name, share, _ in _shares(model)}


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Give the state dict that the model would have in one process.

    All processes must call it, and all get it. ``load_state_dict`` takes it in any number of
    processes, and so does the model in one process.

    Args:
        model: a model with :class:`ExpertParallel` in it, or one itself.
    """
    whole = {name: layer.whole(share) for name, share, layer in _shares(model)}
    return {**model.state_dict(), **whole}


def own_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take from whole tensors what this process holds: :func:`whole_state_dict` turned round.

    Args:
        model: a model with :class:`ExpertParallel` in it, or one itself.
        tensors: its parameters and buffers by name, as one process would have them.
    """
    layers = {name: layer for name, _, layer in _shares(model)}
    return {n: layers[n].own(t) if n in layers else t for n, t in tensors.items()}


def _holders(model: nn.Module, optimizer: Optimizer) -> dict[int, ExpertParallel]:
    """Say of which parameters of an optimizer, by number, there is but a share, and where."""
    layers = {share: layer for _, share, layer in _shares(model)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: layers[p] for i, p in enumerate(parameters) if p in layers}


def whole_moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Give the state that the optimizer would have in one process.

    All processes must call it, and all get it.

    Args:
        model: a model with :class:`ExpertParallel` in it, or any other.
        optimizer: its optimizer, whose moments are tensors, each shaped like its parameter or a
            single number.

    Returns:
        The moments, by the number of the parameter and the name: ``"0.exp_avg"``.
    """
    layers = _holders(model, optimizer)
    return {
        f"{i}.{name}": layers[i].whole(t) if i in layers and t.ndim else t
        for i, state in sorted(optimizer.state_dict()["state"].items())
        for name, t in state.items()
    }


def own_moments(
    model: nn.Module, optimizer: Optimizer, moments: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Take from whole moments those of this process: :func:`whole_moments` turned round."""
    layers = _holders(model, optimizer)
    holder = {name: layers.get(int(name.partition(".")[0])) for name in moments}
    return {n: t if holder[n] is None else holder[n].own(t) for n, t in moments.items()}


def bytes_sent(
    indices: Sequence[Int[Tensor, "..."]], *, n_experts: int, d_model: int, dtype: torch.dtype
) -> Int[Tensor, "u u"]:
    """Count what the processes send each other in one forward of :class:`ExpertParallel`.

    Process p sends process q the tokens for its experts, and the outputs for the tokens of q: so
    many times ``d_model`` numbers; and 8 bytes for each expert of q, the counts. Backward, all but
    the counts travels once more.

    Args:
        indices: for each process, the experts chosen for its tokens, as in
            :class:`~tfm_ref.routing.Routing`; only those that are kept, where some are not.
        n_experts: number of experts, of which each process holds as many.
        d_model: width of the tokens.
        dtype: of the tokens.

    Returns:
        The bytes from each process (row) to each (column); on the diagonal, those that stay.

    Raises:
        ValueError: if there are no processes, their number does not divide n_experts, or an index
            is none of an expert.

    Example:
        Two processes, with four experts. Each has one token, which visits two of them.

        >>> indices = [torch.tensor([0, 1]), torch.tensor([1, 3])]
        >>> bytes_sent(indices, n_experts=4, d_model=100, dtype=torch.bfloat16)
        tensor([[816, 216],
                [216, 416]])
    """
    world = len(indices)
    share = _share(n_experts, world)
    for t in indices:
        if t.numel() and not 0 <= t.min() <= t.max() < n_experts:
            raise ValueError(
                f"indices must lie in 0 <= index < n_experts ({n_experts}); "
                f"got {t.min()} to {t.max()}"
            )
    chosen = [t.flatten().bincount(minlength=n_experts) for t in indices]
    pairs = torch.stack(chosen).view(world, world, -1).sum(-1)
    return share * torch.int64.itemsize + (pairs + pairs.T) * d_model * dtype.itemsize
