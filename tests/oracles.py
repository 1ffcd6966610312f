"""What tests against other implementations share: parameters that matter, all gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def redraw(module: nn.Module) -> nn.Module:
    """Give every parameter a value that matters, gains and biases among them."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed) / 2)
    return module


def values_and_gradients(
    run: Callable, module: nn.Module, *tokens: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
    """Give the output, and the gradients of tokens and parameters, by name."""
    tokens = [t.clone().requires_grad_() for t in tokens]
    parameters = dict(module.named_parameters())
    y = run(*tokens)
    gradients = torch.autograd.grad(y.square().sum(), (*tokens, *parameters.values()))
    named = dict(zip(parameters, gradients[len(tokens) :], strict=True))
    return y, gradients[: len(tokens)], named
