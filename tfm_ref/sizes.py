"""How large a model is: its parameters, and the keys and values that it remembers."""

from typing import NamedTuple

from tfm_ref.models import DecoderLM, EncoderDecoder, Model
from tfm_ref.moe import MoELayer
from tfm_ref.validation import check_size


class ParameterCount(NamedTuple):
    """Numbers of parameters; one that serves in two places counts once.

    Args:
        total: all.
        active: those that one token uses: of the experts, only the chosen.
        embedding: those of the table that is looked up at the entrance.
        head: those of the matrix that makes the logits; 0 if it is that table.
    """

    total: int
    active: int
    embedding: int
    head: int

    @property
    def without_embeddings(self) -> int:
        """Leave out the table, and the matrix of the logits."""
        return self.total - self.embedding - self.head

    @property
    def active_without_lookup(self) -> int:
        """Leave out of the active ones a table that is only looked up, never multiplied."""
        return self.active - (self.embedding if self.head else 0)


def count_parameters(model: Model) -> ParameterCount:
    """Count the parameters of a model that was built.

    Args:
        model: the model, on any device, the meta device too.

    Returns:
        The counts.

    Example:
        >>> from tfm_ref import full_size
        >>> count = count_parameters(full_size("Llama-2-7B"))
        >>> count.total, count.without_embeddings
        (6738415616, 6476271616)
    """
    total = sum(p.numel() for p in model.parameters())
    mixtures = [module for module in model.modules() if isinstance(module, MoELayer)]
    idle = sum(
        sum(p.numel() for p in mixture.parameters()) - mixture.active_parameters
        for mixture in mixtures
    )
    table, matrix = model.embedding.tokens.weight, model.head.proj.weight
    return ParameterCount(
        total, total - idle, table.numel(), 0 if matrix is table else matrix.numel()
    )


def kv_cache_bytes(
    model: DecoderLM | EncoderDecoder,
    length: int = 1,
    *,
    source_length: int = 0,
    bytes_per_number: int = 2,
) -> int:
    """Say how many bytes the keys and values of one sequence take, in all layers.

    Args:
        model: the model, on any device, the meta device too.
        length: tokens of the sequence; layers with a window remember no more than that, and
            the first tokens that stay in sight.
        source_length: tokens of the source that a cross-attention looks at.
        bytes_per_number: 2 for bfloat16.

    Returns:
        Bytes for one sequence; with length 1, bytes per token.

    Raises:
        ValueError: if a length is negative or bytes_per_number is not an integer of at least 1.

    Example:
        >>> from tfm_ref import full_size
        >>> kv_cache_bytes(full_size("Llama-3-8B")) // 1024
        128
    """
    check_size("length", length, least=0)
    check_size("source_length", source_length, least=0)
    check_size("bytes_per_number", bytes_per_number)
    stack = getattr(model, "decoder", None) or model.stack
    config, numbers = stack.config, 0
    for layer, block in enumerate(stack.blocks):
        limit = config.window + config.n_first if config.is_local(layer) else length
        numbers += min(length, limit) * block.attention.cache_width
        if block.cross_attention is not None:
            numbers += source_length * block.cross_attention.cache_width
    return numbers * bytes_per_number
