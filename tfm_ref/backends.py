"""The ways to compute one and the same attention, by name, and what each of them lacks."""

from tfm_ref.attention import scaled_dot_product_attention
from tfm_ref.flash import tiled_attention
from tfm_ref.flash_triton import triton_attention
from tfm_ref.fused import fused_attention
from tfm_ref.validation import check_choice

BACKENDS = {
    "naive": scaled_dot_product_attention,
    "tiled": tiled_attention,
    "sdpa": fused_attention,
    "triton": triton_attention,
}
"""The ways to compute one and the same attention, by name."""

LACKS = {"tiled": {"dropout"}, "sdpa": {"softcap"}, "triton": {"dropout", "softcap"}}
"""What a way to compute cannot do."""


def check_backend(backend: str, *, dropout: float = 0.0, softcap: float | None = None) -> None:
    """Refuse a way to compute that is unknown, or that lacks what the layer asks for.

    Args:
        backend: its name.
        dropout: probability with which a weight is set to 0.
        softcap: what bounds the scores, if anything.

    Raises:
        ValueError: if there is no such backend, or if dropout is above 0 or softcap given and it
            has none.

    Example:
        >>> check_backend("sdpa", softcap=50.0)
        Traceback (most recent call last):
        ValueError: softcap (50.0) needs backend "naive" or "tiled"; got "sdpa"
    """
    check_choice("backend", backend, BACKENDS)
    asked = {"dropout": dropout or None, "softcap": softcap}
    for what in sorted(LACKS.get(backend, ())):
        if asked[what] is not None:
            able = " or ".join(f'"{name}"' for name in BACKENDS if what not in LACKS.get(name, ()))
            raise ValueError(f'{what} ({asked[what]}) needs backend {able}; got "{backend}"')
