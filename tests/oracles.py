"""What tests share: parameters that matter, gradients, every model made tiny, sentences."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from tfm_ref.config import TransformerConfig


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


def tiny(config: TransformerConfig) -> TransformerConfig:
    """Keep all that a model does, and make it small."""
    ratio = 1 if config.n_kv_heads is None else config.n_heads // config.n_kv_heads
    least = {"vocab_size": 13, "d_model": 24, "n_heads": 4, "head_dim": 8}
    kept = {
        "n_kv_heads": None if config.n_kv_heads is None else max(1, 4 // ratio),
        "n_layers": config.global_every or 2,
        "n_encoder_layers": min(config.n_encoder_layers, 2),
        "d_ff": None if config.d_ff is None else 10,
        "max_seq_len": 16,
        "window": None if config.window is None else 3,
    }
    if config.query_scaling is not None:
        kept["query_scaling"] = replace(config.query_scaling, length=2)
    if config.latent is not None:
        ranks = {"kv_lora_rank": 7, "q_lora_rank": 5, "rope_head_dim": 4, "v_head_dim": 6}
        kept["latent"] = replace(config.latent, **ranks)
    if config.experts is not None:
        experts = config.experts
        dense = min(experts.n_dense_layers, 1)
        few = {"d_ff": 6, "n_experts": 16, "n_dense_layers": dense}
        kept["experts"] = replace(experts, **few, top_k=min(experts.top_k, 3))
        kept["d_ff"] = 10 if dense else None
    return replace(config, **least, **kept)


SAMPLE = {
    "en": """A woman carries a basket of bread across the square.
Two boys jump from a wooden pier into the lake.
An old man is reading a newspaper on a bench.
A brown dog sleeps in front of a bakery.
Three girls in yellow raincoats wait for the tram.
A man repairs the roof of a small hut.
Children fly a kite on a windy beach.
A cyclist rides through a puddle.
A cook is cutting onions in a narrow kitchen.
People stand in line before a museum.
""",
    "de": """Eine Frau trägt einen Korb mit Brot über den Platz.
Zwei Jungen springen von einem Holzsteg in den See.
Ein alter Mann liest auf einer Bank eine Zeitung.
Ein brauner Hund schläft vor einer Bäckerei.
Drei Mädchen in gelben Regenmänteln warten auf die Straßenbahn.
Ein Mann repariert das Dach einer kleinen Hütte.
Kinder lassen an einem windigen Strand einen Drachen steigen.
Ein Radfahrer fährt durch eine Pfütze.
Ein Koch schneidet in einer engen Küche Zwiebeln.
Menschen stehen vor einem Museum Schlange.
""",
}
"""Sentences in the format of Multi30k, by language."""
