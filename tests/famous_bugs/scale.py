"""Famous bugs of scale: chapters 11 to 13."""

import torch
import torch.nn.functional as F
from famous_bugs.bug import Bug

from tfm_ref import (
    Experts,
    Router,
    Routing,
    TransformerConfig,
    build,
    count_parameters,
    full_size,
)
from tfm_ref.balance import switch_loss


class RouterWithoutGradient(Bug):
    """One expert, and a weight of 1

    Mixtral divides the weights of the chosen experts by their sum.
    With one expert that is a number divided by itself: 1, whatever the router said.
    The experts learn, the loss falls, and the router stays as it was drawn.
    """

    chapter = "11_mixture_of_experts#one-expert-and-a-weight-of-1"

    def wrong(logits):
        weights, chosen = logits.softmax(-1).topk(1)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    def right(logits):
        weights, chosen = logits.softmax(-1).topk(1)
        return weights, chosen

    def ours(logits):
        sizes = {"d_model": logits.shape[-1], "n_experts": logits.shape[-1]}
        router = Router(**sizes, top_k=1, normalise=False)
        router.proj.weight.data = torch.eye(logits.shape[-1])
        routing = router(logits[None])
        return routing.weights[0], routing.indices[0]

    def measure(route):
        """Largest gradient that reaches the router"""
        logits = torch.randn(10, 8, requires_grad=True)
        weights, _ = route(logits)
        loss = (weights * torch.randn(10, 1)).sum()
        (slopes,) = torch.autograd.grad(loss, logits)
        return round(slopes.abs().max().item(), 6)

    def test(route):
        logits = torch.randn(10, 8, requires_grad=True)
        weights, chosen = route(logits)
        (slopes,) = torch.autograd.grad(weights.sum(), logits)
        assert torch.equal(chosen[:, 0], logits.argmax(-1))
        assert slopes.abs().max() > 1e-3


class ConstantBalance(Bug):
    """The balance loss that is constant

    The mean score of each expert is taken over the tokens.
    Taken over the experts it is 1/E, since scores sum to 1: the loss is 1 and has no gradient.
    It is there in every log, and looks like perfect balance.
    """

    chapter = "11_mixture_of_experts#when-it-goes-wrong"
    seen = (
        "huggingface/transformers#28021",
        "huggingface/transformers#28093",
    )

    def wrong(p):  # scores of shape (tokens, experts), one expert per token
        n_experts = p.shape[1]
        load = F.one_hot(p.argmax(1), n_experts).float().mean(0)
        return n_experts * (load * p.mean(1).mean()).sum()

    def right(p):
        n_experts = p.shape[1]
        load = F.one_hot(p.argmax(1), n_experts).float().mean(0)
        return n_experts * (load * p.mean(0)).sum()

    def ours(p):
        weights, indices = p[None].topk(1)
        return switch_loss(Routing(indices, weights, p[None], p[None].log()))

    def measure(loss):
        """The loss if all tokens go to one of 8 experts, 1 being perfect balance"""
        logits = torch.randn(100, 8)
        logits[:, 0] += 20
        return loss(logits.softmax(1))

    def test(loss):
        logits = 0.001 * torch.randn(100, 8)
        logits[:, 0] += 0.02  # all tokens to expert 0, by a hair
        logits.requires_grad_()
        (slopes,) = torch.autograd.grad(loss(logits.softmax(1)), logits)
        assert slopes.abs().sum() > 0.1


class PooledBalance(Bug):
    """The balance loss that pools all layers

    The tokens of all layers are put into one heap before anything is counted.
    Layers that collapse to different experts then make up for each other.
    Each layer has experts of its own, so each needs a loss of its own.
    """

    chapter = "11_mixture_of_experts#when-it-goes-wrong"
    seen = (
        "huggingface/transformers#28255",
        "huggingface/transformers#31464",
    )

    def wrong(layers):  # of each layer, scores of shape (tokens, experts)
        p = torch.cat(layers)
        load = F.one_hot(p.argmax(1), p.shape[1]).float().mean(0)
        return p.shape[1] * (load * p.mean(0)).sum()

    def right(layers):
        losses = []
        for p in layers:
            load = F.one_hot(p.argmax(1), p.shape[1]).float().mean(0)
            losses.append(p.shape[1] * (load * p.mean(0)).sum())
        return torch.stack(losses).mean()

    def ours(layers):
        # ours, of the bug before this one, is switch_loss for one layer
        return torch.stack([ConstantBalance.ours(p) for p in layers]).mean()

    def measure(loss):
        """The loss of 8 layers that each use one expert of 8, 1 being perfect balance"""
        return loss([F.one_hot(torch.full((9,), i), 8).float() for i in range(8)])

    def test(loss):
        tokens = torch.arange(8) % 4
        halves = [F.one_hot(tokens + first, 8).float() for first in (0, 4)]
        assert loss(halves) > 1.99  # each layer leaves half of its experts idle


class ForgottenBalance(Bug):
    """The balance loss that is never added

    It is computed if a flag asks for what the router said, and the flag is off by default.
    Nothing fails, and the loss of the task looks as it should.
    The load drifts, and experts that were paid for stay idle.
    """

    chapter = "11_mixture_of_experts#when-it-goes-wrong"
    seen = (
        "huggingface/transformers#44242",
        "huggingface/transformers#44284",
    )

    def wrong(task, balance, factor, output_router_logits=False):
        if output_router_logits:
            task = task + factor * balance
        return task

    def right(task, balance, factor):
        return task + factor * balance

    def measure(total):
        """Share of the tokens at the busiest of 8 experts, 60 steps after a collapse"""
        x = torch.cat([torch.randn(64, 8), torch.ones(64, 1)], 1)
        W = torch.zeros(9, 8)
        W[-1, 0] = 3.0  # all tokens go to expert 0
        W.requires_grad_()
        adam = torch.optim.Adam([W], lr=0.1)
        for _ in range(60):
            adam.zero_grad()
            balance = ConstantBalance.right((x @ W).softmax(1))
            total(0.0 * W.sum(), balance, 0.01).backward()
            adam.step()
        return (x @ W).argmax(1).bincount().max() / 64

    def test(total):
        router = torch.randn(8, requires_grad=True)
        task, balance = router.sum(), router.square().sum()
        change = total(task, balance, 0.01) - total(task, balance, 0.0)
        (slopes,) = torch.autograd.grad(change, router)
        assert slopes.abs().max() > 0


class MemoryOfTheActive(Bug):
    """Memory by active parameters

    "22 billion active" says what a token is computed with.
    The next token asks for other experts, so all of them must be there.
    A tool that counted the active ones recommended models that do not load.
    """

    chapter = "11_mixture_of_experts#when-it-goes-wrong"
    seen = ("AlexsJones/llmfit#230",)

    def wrong(model):
        return 2 * count_parameters(model).active  # 16 bits a number

    def right(model):
        return 2 * count_parameters(model).total  # 16 bits a number

    def measure(memory):
        """Gigabytes that Qwen3 235B is said to need"""
        return memory(full_size("Qwen3-235B-A22B")) / 1e9

    def test(memory):
        experts = Experts(d_ff=16, n_experts=8, top_k=2)
        shape = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": None}
        config = TransformerConfig(vocab_size=11, **shape, experts=experts)
        model = build(config).to(torch.bfloat16)
        assert memory(model) >= sum(p.nbytes for p in model.parameters())
