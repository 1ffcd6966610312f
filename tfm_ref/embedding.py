"""The entrance and the exit of a model: tokens become vectors, and vectors scores of tokens."""

import math

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from tfm_ref.config import TransformerConfig
from tfm_ref.layers import ACTIVATIONS
from tfm_ref.validation import check_token_ids


class Embedding(nn.Module):
    """Look up a vector for each token, and for the part of the input in which it stands.

    ``x = √d_model · tokens[t] + segments[s]``, the factor only with ``scale_embeddings``.

    Args:
        config: the choices.

    Example:
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=2, d_ff=16)
        >>> Embedding(config)(torch.tensor([[3, 1, 4]])).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c = config
        self.scale = math.sqrt(c.d_model) if c.scale_embeddings else 1.0
        self.tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.segments = nn.Embedding(c.n_segments, c.d_model) if c.n_segments else None
        for table in self.children():
            nn.init.normal_(table.weight, std=c.d_model**-0.5)

    def forward(
        self, tokens: Integer[Tensor, "b n"], segments: Integer[Tensor, "#b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Look the tokens up.

        Args:
            tokens: numbers of the tokens.
            segments: number of the part in which each stands; all 0 if not given.

        Raises:
            ValueError: if tokens or segments are not int64 or int32 of shape (batch, length), are
                empty, or are no numbers of the tables; or if there are segments without a table.
        """
        check_token_ids("tokens", tokens, self.tokens.num_embeddings)
        x = self.tokens(tokens)
        x = x if self.scale == 1 else self.scale * x
        if self.segments is None:
            if segments is not None:
                raise ValueError("segments need n_segments of at least 1; got 0")
            return x
        if segments is None:
            segments = torch.zeros_like(tokens[:1])
        check_token_ids("segments", segments, self.segments.num_embeddings)
        return x + self.segments(segments)


class Head(nn.Module):
    """Score every token of the vocabulary as the next, or the missing, one.

    ``logits = x W``, with a projection, an activation and a norm before it if the config says
    ``head_transform``.

    Args:
        config: the choices.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.transform = nn.Linear(c.d_model, c.d_model) if c.head_transform else None
        self.norm = c.new_norm(c.d_model) if c.head_transform else None
        self.proj = nn.Linear(c.d_model, c.vocab_size, bias=c.head_bias)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n w"]:
        """Give the logits."""
        c = self.config
        if self.transform is not None:
            x = self.norm(ACTIVATIONS[c.activation](self.transform(x)))
        logits = self.proj(x / math.sqrt(c.d_model) if c.scale_logits else x)
        if c.logit_softcap is not None:
            logits = c.logit_softcap * (logits / c.logit_softcap).tanh()
        return logits
