"""Keep the experts of a mixture equally busy: losses, a bias without a loss, and statistics."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tfm_ref.routing import ExpertChoiceRouter, Router, Routing
from tfm_ref.validation import check_size


@contextmanager
def routings(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Collect what every router in a model says while the model runs.

    Args:
        model: any module with routers of this package inside.

    Returns:
        A context whose value holds, after a run, the routing of each router by the name of the
        router, in the order of the run; after several, those of the last. Gradients reach the
        routers through it.

    Example:
        What a training adds for balance, it adds layer by layer.

        >>> from tfm_ref import MoELayer
        >>> sizes = {"d_model": 8, "d_ff": 16, "n_experts": 4, "top_k": 2}
        >>> model = nn.Sequential(MoELayer(**sizes), MoELayer(**sizes))
        >>> with routings(model) as found:
        ...     y = model(torch.randn(2, 5, 8))
        >>> loss = y.square().mean() + 0.01 * sum(switch_loss(r) for r in found.values())
        >>> list(found)
        ['0.router', '1.router']
    """
    found: dict[str, Routing] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, Router | ExpertChoiceRouter):

                def record(module: nn.Module, args: tuple, routing: Routing, name=name) -> None:
                    found[name] = routing

                hooks.callback(module.register_forward_hook(record).remove)
        yield found


def _real(routing: Routing, mask: Tensor | None) -> Float[Tensor, "b n"]:
    """Say 1 for the tokens that count, and 0 for padding."""
    shape = routing.scores.shape[:2]
    if mask is None:
        return routing.scores.new_ones(shape)
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"mask must be boolean (True = a token that counts) of shape (batch, length) = "
            f"{tuple(shape)}; got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return mask.to(routing.scores.dtype)


def _over_tokens(t: Float[Tensor, "b n e"], real: Float[Tensor, "b n"]) -> Float[Tensor, "b e"]:
    """Sum over the tokens that count, sequence by sequence."""
    return torch.einsum("b n e, b n -> b e", t, real)


def _choices(routing: Routing, top_k: int | None = None) -> Float[Tensor, "b n e"]:
    """Say 1 for the experts chosen for each token, kept or not, and 0 for the others."""
    chosen = routing.indices[..., :top_k]
    return torch.zeros_like(routing.scores).scatter(-1, chosen, 1.0)


def _probabilities(routing: Routing) -> Float[Tensor, "b n e"]:
    """Divide the scores of each token by their sum, which is 1 already for a softmax."""
    return routing.scores / routing.scores.sum(-1, keepdim=True).clamp(min=1e-20)


def _product(f: Float[Tensor, "... e"], p: Float[Tensor, "... e"]) -> Float[Tensor, "..."]:
    """Compute ``E Σ f p``, f and p divided by their sums; 0 where nothing counts."""
    f, p = (t / t.sum(-1, keepdim=True).clamp(min=1e-20) for t in (f, p))
    return f.shape[-1] * (f * p).sum(-1)


def switch_loss(routing: Routing, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
    """Punish experts that are chosen often and believed to be good, over all tokens of a batch.

    ``E Σ f_i P_i``, where f_i is the share of the choices that fall on expert i, and P_i its mean
    probability. It is 1 if either is uniform, E for a router that is sure of one expert (top_k =
    1). It can fall a little below 1, where experts that are chosen often are chosen narrowly.

    The gradient comes through P alone, since f counts: where f is uniform there is none.

    Args:
        routing: what a router said. A choice counts, whether its expert had room or not.
        mask: True = a token that counts; all do if not given.

    Returns:
        The loss; 0 if no token counts.

    Raises:
        ValueError: if the mask is not boolean of shape (batch, length).

    Reference:
        Fedus et al. 2021, "Switch Transformers: Scaling to Trillion Parameter Models with Simple
        and Efficient Sparsity", equations (4) to (6), with α = 0.01, for top_k = 1. For top_k > 1
        f is the share of all choices, so that a balanced router still has 1: 1/top_k of
        :func:`pooled_loss` for one layer. Scores that are no softmax are divided by their sum.

    Example:
        >>> scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2]]])
        >>> routing = Routing(scores.argmax(-1, keepdim=True), scores, scores, scores.log())
        >>> switch_loss(routing)
        tensor(1.7000)
    """
    real = _real(routing, mask)
    counted = _choices(routing), _probabilities(routing)
    return _product(*(_over_tokens(t, real).sum(0) for t in counted))


def pooled_loss(
    found: Iterable[Routing], mask: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, ""]:
    """Compute the loss of the public library's Mixtral: the tokens of all layers are one heap.

    ``k E Σ f_i P_i``, f and P as in :func:`switch_loss` but over the tokens of all layers together.
    A balanced router has k = top_k, not 1. So have two layers that send everything to one
    half of the experts each, if it is not the same half: the heap does not see the layers.

    Args:
        found: what the routers of the layers said, all with the same n_experts and top_k.
        mask: True = a token that counts; all do if not given.

    Returns:
        The loss; 0 if no token counts.

    Raises:
        ValueError: if there are no layers, or the mask is not boolean of shape (batch, length).

    Reference:
        ``load_balancing_loss_func`` of ``transformers.models.mixtral``.
    """
    found = list(found)
    check_size("the number of layers", len(found))
    heap = [
        sum(_over_tokens(count(r), _real(r, mask)).sum(0) for r in found)
        for count in (_choices, _probabilities)
    ]
    return found[0].indices.shape[-1] * _product(*heap)


def sequence_loss(routing: Routing, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
    """Compute :func:`switch_loss` in every sequence by itself, and take the mean.

    A batch can be balanced while each of its sequences goes to few experts; this loss sees it.
    It is 1 if each sequence is balanced.

    Args:
        routing: what a router said.
        mask: True = a token that counts; all do if not given.

    Returns:
        The loss; sequences without a token that counts are left out.

    Raises:
        ValueError: if the mask is not boolean of shape (batch, length).

    Reference:
        DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", equations (17) to (20), with α = 0.0001.
        Equation (18) counts the experts of the best scores; here as in Switch those that are
        chosen, with ``choice_bias`` and groups.
    """
    real = _real(routing, mask)
    counted = _choices(routing), _probabilities(routing)
    return _mean(_product(*(_over_tokens(t, real) for t in counted)), real)


def _mean(losses: Float[Tensor, " b"], real: Float[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Take the mean over the sequences that have a token that counts."""
    there = real.any(1)
    return (losses * there).sum() / there.sum().clamp(min=1)


def gshard_loss(routing: Routing, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
    """Compute the mean over groups of ``Σ (c_i / S) m_i / E``: first choices only.

    c_i of the S tokens have expert i as their first choice, and m_i is its mean probability. A
    group is here a sequence. It is 1/E² if first choices are balanced, whatever becomes
    of the second ones: the loss of Switch, divided by E².

    Args:
        routing: what a router said.
        mask: True = a token that counts; all do if not given.

    Returns:
        The loss; sequences without a token that counts are left out.

    Raises:
        ValueError: if the mask is not boolean of shape (batch, length).

    Reference:
        Lepikhin et al. 2020, "GShard: Scaling Giant Models with Conditional Computation and
        Automatic Sharding", section 2.2 and Algorithm 1.
    """
    real, n_experts = _real(routing, mask), routing.scores.shape[-1]
    counted = _choices(routing, 1), _probabilities(routing)
    return _mean(_product(*(_over_tokens(t, real) for t in counted)), real) / n_experts**2


def importance_loss(routing: Routing, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
    """Punish experts of unequal importance, which is the sum of the weights they are given.

    ``CV(importance)²``, the variance divided by the square of the mean: 0 if all are as important,
    E - 1 if all weight goes to one. Who is chosen seldom with large weights is as important as
    who is chosen often with small ones, so that the load can stay unequal.

    Args:
        routing: what a router said.
        mask: True = a token that counts; all do if not given.

    Returns:
        The loss; 0 if no token counts.

    Raises:
        ValueError: if the mask is not boolean of shape (batch, length).

    Reference:
        Shazeer et al. 2017, "Outrageously Large Neural Networks: The Sparsely-Gated
        Mixture-of-Experts Layer", section 4, equations (6) and (7); the variance divides by E.
    """
    weights = torch.zeros_like(routing.scores).scatter(-1, routing.indices, routing.weights)
    importance = _over_tokens(weights, _real(routing, mask)).sum(0)
    variance = importance.var(unbiased=False)
    return variance / importance.mean().square().clamp(min=1e-20)


def z_loss(routing: Routing, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
    """Punish large logits, in which rounding is coarse: the mean of ``(log Σ exp(logits))²``.

    Its minimum is 0, with logits that are all -log E; it balances nothing.

    Args:
        routing: what a router said.
        mask: True = a token that counts; all do if not given.

    Returns:
        The loss; 0 if no token counts.

    Raises:
        ValueError: if the mask is not boolean of shape (batch, length).

    Reference:
        Zoph et al. 2022, "ST-MoE: Designing Stable and Transferable Sparse Expert Models",
        equation (5), with a factor of 0.001.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0]]])  # whose sum of exponentials is 2
        >>> z_loss(Routing(torch.tensor([[[0]]]), logits[..., :1], logits, logits))
        tensor(0.4805)
    """
    real = _real(routing, mask)
    return (routing.logits.logsumexp(-1).square() * real).sum() / real.sum().clamp(min=1)


class BiasController:
    """Balance by a bias for the choice, which no gradient sets: no loss disturbs the training.

    After each step, ``choice_bias += rate · sign(mean load - load)``, where the load of an expert
    is how often it was chosen in the step, in all processes together.

    Args:
        model: a model with routers that have a ``choice_bias``.
        rate: by how much a bias moves in one step.

    Raises:
        ValueError: if no router has a choice_bias, or rate is not above 0.

    Reference:
        Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
        Algorithm 1; DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", sections 2.1.2 and 4.2,
        with a rate of 0.001, and of 0 at the end of training.

    Example:
        >>> from tfm_ref import MoELayer
        >>> sizes = {"d_model": 8, "d_ff": 16, "n_experts": 4, "top_k": 1, "normalise": False}
        >>> model = MoELayer(**sizes, choice_bias=True)
        >>> controller = BiasController(model, rate=0.01)
        >>> with routings(model) as found:
        ...     y = model(torch.ones(2, 5, 8))
        >>> controller.observe(found)
        >>> controller.step()
        >>> model.router.choice_bias.sort().values
        tensor([-0.0100,  0.0100,  0.0100,  0.0100])
    """

    def __init__(self, model: nn.Module, *, rate: float = 0.001) -> None:
        if not rate > 0:
            raise ValueError(f"rate must be above 0; got {rate}")
        self.rate = rate
        self.routers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, Router) and module.choice_bias is not None
        }
        if not self.routers:
            raise ValueError("the model must have a Router with choice_bias=True; it has none")
        self.counts = dict.fromkeys(self.routers, 0.0)

    def observe(
        self, found: Mapping[str, Routing], mask: Bool[Tensor, "b n"] | None = None
    ) -> None:
        """Count the choices of one run; there may be several in a step.

        Args:
            found: the routings by the names of the routers, as :func:`routings` gives them.
            mask: True = a token that counts; all do if not given.

        Raises:
            ValueError: if the mask is not boolean of shape (batch, length).
        """
        for name in self.routers.keys() & found.keys():
            routing = found[name]
            counts = _over_tokens(_choices(routing), _real(routing, mask)).sum(0)
            self.counts[name] = self.counts[name] + counts

    def step(self) -> None:
        """Move the biases, and begin to count anew.

        In training by :func:`~tfm_ref.training.fit`, it follows each step of the optimizer after
        ``optimizer.register_step_post_hook(lambda *_: controller.step())``.
        """
        for name, router in self.routers.items():
            counts = torch.zeros_like(router.choice_bias) + self.counts[name]
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            router.choice_bias += self.rate * (counts.mean() - counts).sign()
            self.counts[name] = 0.0


class Balance(NamedTuple):
    """Say how the work is spread over the experts, and how sure the router is.

    Args:
        load: share of each expert in the visits, those that are dropped left out.
        peak: load of the busiest expert, divided by the mean: 1 if all are equally busy, at worst
            E. Wang et al. 2024 write peak - 1, "MaxVio".
        entropy: of the load, in nats: at best log E.
        doubt: mean entropy of the probabilities of a token, in nats: 0 for a router that is sure,
            log E for one that does not know.
        dropped: share of the choices that found their expert full.
        passed: share of the tokens that no expert takes.
    """

    load: Float[Tensor, " e"]
    peak: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    doubt: Float[Tensor, ""]
    dropped: Float[Tensor, ""]
    passed: Float[Tensor, ""]


@torch.no_grad()
def balance_of(routing: Routing, mask: Bool[Tensor, "b n"] | None = None) -> Balance:
    """Measure how the work is spread.

    Args:
        routing: what a router said.
        mask: True = a token that counts; all do if not given.

    Returns:
        The numbers, on the device of the routing; all 0 if no token counts.

    Raises:
        ValueError: if the mask is not boolean of shape (batch, length).

    Example:
        >>> scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.3, 0.7]]])
        >>> routing = Routing(scores.argmax(-1, keepdim=True), scores, scores, scores.log())
        >>> balance_of(routing).load, balance_of(routing).peak
        (tensor([0.7500, 0.2500]), tensor(1.5000))
    """
    real = _real(routing, mask)
    kept = torch.ones_like(routing.indices) if routing.kept is None else routing.kept
    kept = kept.to(real.dtype)
    visits = torch.zeros_like(routing.scores).scatter(-1, routing.indices, kept)
    counts, n_real = _over_tokens(visits, real).sum(0), real.sum().clamp(min=1)
    load = counts / counts.sum().clamp(min=1)
    doubt = torch.special.entr(_probabilities(routing)).sum(-1)
    return Balance(
        load=load,
        peak=load.max() * len(load),
        entropy=torch.special.entr(load).sum(),
        doubt=(doubt * real).sum() / n_real,
        dropped=((1 - kept).mean(-1) * real).sum() / n_real,
        passed=((visits.sum(-1) == 0) * real).sum() / n_real,
    )
