"""Attention maps: who looks at whom, in every attention of a model as it runs."""

from collections.abc import Callable
from contextlib import ExitStack

from jaxtyping import Float
from torch import Tensor, nn


def attention_maps(
    model: nn.Module, *args: object, **terms: object
) -> dict[str, Float[Tensor, "b h n m"]]:
    """Run a model, and give the weights of every attention in it.

    Each attention is asked with the very arguments that it got in the run: masks, windows,
    positions and context are those of its layer.

    Args:
        model: any module with attentions of this package inside.
        args: what the model is called with.
        terms: what the model is called with, by name.

    Returns:
        Weights by the name of the module, in the order of the run.

    Example:
        >>> import torch
        >>> from tfm_ref import DecoderLM, TransformerConfig
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=2, n_heads=2, d_ff=16)
        >>> maps = attention_maps(DecoderLM(config), torch.tensor([[3, 1, 4]]))
        >>> list(maps)
        ['stack.blocks.0.attention', 'stack.blocks.1.attention']
        >>> maps["stack.blocks.1.attention"][0, 0].triu(1).any()
        tensor(False)
    """
    maps = {}

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            maps[name] = module.attention_weights(*args, **kwargs)

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if hasattr(module, "attention_weights"):
                handle = module.register_forward_pre_hook(record(name), with_kwargs=True)
                hooks.callback(handle.remove)
        model(*args, **terms)
    return maps
