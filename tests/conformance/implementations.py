"""The attention implementations, all behind one door: ``model(x, mask=..., is_causal=...)``.

To put a new class through the suite, add a line to :func:`implementations`.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, wraps
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
from einops import rearrange
from oracles import tiny
from torch import Tensor, nn

from tfm_ref import MODELS, KVCache, TransformerConfig, padding_mask
from tfm_ref.config import POSITIONS

D_MODEL = 6
MODULES = (
    "validation",
    "attention_checks",
    "masks",
    "attention",
    "cache",
    "flash",
    "fused",
    "backends",
    "attention_layer",
    "multi_head",
    "positions",
    "position_biases",
    "rotary",
    "layers",
    "latent",
)
"""The modules of tfm_ref under test, each after those that it imports."""

TILES = {"block_q": 2, "block_k": 3}
"""Tiles so small that sequences of a few tokens have several, the last ones ragged."""

DTYPES = ("float64", "float32", "bfloat16", "float16")
GENERAL = ("naive", "tiled", "sdpa")
"""The backends that know masks and biases."""

TRAITS = {"cross", "mask", "bias", "scale", "weights", "unordered", "whole", *DTYPES}
"""What an implementation may lack; a check names those that it needs."""


class Projected(nn.Module):
    """Attention around a function of q, k, v: x asks, context (x itself if absent) answers."""

    def __init__(
        self,
        attend: Callable,
        weigh: Callable,
        n_heads: int,
        n_kv_heads: int,
        **projections: nn.Linear,
    ):
        super().__init__()
        self.attend, self.weigh = attend, weigh
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        for name, projection in projections.items():
            self.add_module(name, projection)

    def forward(self, x, context=None, *, rotation=None, **terms) -> Tensor:
        y = self.attend(*self._split(x, context, rotation), **terms)
        return self.o_proj(rearrange(y, "b h n v -> b n (h v)"))

    def attention_weights(self, x, context=None, *, rotation=None, **terms) -> Tensor:
        return self.weigh(*self._split(x, context, rotation)[:2], **terms)

    def _split(self, x: Tensor, context: Tensor | None, rotation: Callable | None) -> list[Tensor]:
        context = x if context is None else context
        flat = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        heads = self.n_heads, self.n_kv_heads, self.n_kv_heads
        q, k, v = (
            rearrange(t, "b n (h k) -> b h n k", h=h) for t, h in zip(flat, heads, strict=True)
        )
        return [q, k, v] if rotation is None else [rotation(q), rotation(k), v]


def project(attend: Callable, weigh: Callable) -> Projected:
    """Surround functions of q, k, v with projections: 4 heads, 2 for keys and values."""
    widths = {"q_proj": 4 * 3, "k_proj": 2 * 3, "v_proj": 2 * 5}
    projections = {name: nn.Linear(D_MODEL, width, bias=False) for name, width in widths.items()}
    projections["o_proj"] = nn.Linear(4 * 5, D_MODEL, bias=False)
    return Projected(attend, weigh, 4, 2, **projections)


def naive_weights(
    q, k, *, mask=None, is_causal=False, bias=None, scale=None, softcap=None, sinks=None
):
    """The equation, literally: e^score of each allowed key, over their sum; 0 without any."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril(k.shape[2] - q.shape[2])
    if mask is not None:
        allowed = allowed & mask
    scores = scores.where(allowed, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min).detach()
    if sinks is not None:
        sinks = sinks[:, None, None].to(scores.dtype)
        top = torch.maximum(top, sinks).detach()
        e = (scores - top).exp()
        return e / (e.sum(-1, keepdim=True) + (sinks - top).exp())
    e = (scores - top).exp()
    return e / e.sum(-1, keepdim=True).clamp(min=0.5)  # the sum is at least 1, or 0


def naive(q, k, v, **terms):
    """Weigh the values by :func:`naive_weights`."""
    return naive_weights(q, k, **terms) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def same_projections(model: nn.Module, a: "Implementation") -> nn.Module:
    """Put the naive equation between the model's own projections."""
    projections = {name: getattr(model, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    return Projected(naive, naive_weights, a.n_heads, a.n_kv_heads or a.n_heads, **projections)


def in_small_tiles(layer: type[nn.Module], backends: dict[str, Callable]) -> type[nn.Module]:
    """Make a class of layers that computes in TILES where its backend is "tiled"."""
    small = partial(backends["tiled"], **TILES)

    class InSmallTiles(layer):
        @wraps(layer.forward)
        def forward(self, *args, **terms):
            with patch.dict(backends, tiled=small):
                return super().forward(*args, **terms)

    return InSmallTiles


class PlainModern(nn.Module):
    """Attention literally with what a layer may add: norms of q and k, scale, softcap, sinks."""

    def __init__(self, model: nn.Module, a: "Implementation"):
        super().__init__()
        self.model = model
        self.heads = a.n_heads, a.n_kv_heads or a.n_heads, a.n_kv_heads or a.n_heads
        self.form = {"scale": model.scale, "softcap": model.softcap, "sinks": model.sinks}

    def forward(self, x, context=None, *, rotation=None, **terms) -> Tensor:
        q, k, v = self._heads(x, context, rotation)
        y = naive(q, k, v, **terms, **self.form)
        return self.model.o_proj(torch.cat(y.unbind(1), -1))

    def attention_weights(self, x, context=None, *, rotation=None, **terms) -> Tensor:
        return naive_weights(*self._heads(x, context, rotation)[:2], **terms, **self.form)

    def _heads(self, x: Tensor, context: Tensor | None, rotation: Callable | None) -> list[Tensor]:
        model, context = self.model, x if context is None else context
        flat = model.q_proj(x), model.k_proj(context), model.v_proj(context)
        q, k, v = (torch.stack(t.chunk(h, -1), 1) for t, h in zip(flat, self.heads, strict=True))
        if model.q_norm is not None:
            q, k = plain_norm(model.q_norm, q), plain_norm(model.k_norm, k)
        return [q, k, v] if rotation is None else [rotation(q), rotation(k), v]


class PlainLatent(nn.Module):
    """MLA literally, with a matrix for each letter of the report, and a head after the other."""

    def __init__(self, model: nn.Module, a: "Implementation"):
        super().__init__()
        self.model = model

    def forward(self, x, context=None, *, rotation=None, **terms) -> Tensor:
        q, k, v = self._heads(x, context, rotation)
        return self.model.o_proj(
            torch.cat(naive(q, k, v, **terms, scale=self.model.scale).unbind(1), -1)
        )

    def attention_weights(self, x, context=None, *, rotation=None, **terms) -> Tensor:
        q, k, _ = self._heads(x, context, rotation)
        return naive_weights(q, k, **terms, scale=self.model.scale)

    def _heads(self, x: Tensor, context: Tensor | None, rotation: Callable | None) -> list[Tensor]:
        model, turn = self.model, rotation or (lambda t: t)
        context, content = x if context is None else context, model.head_dim
        rows = slice(model.kv_lora_rank), slice(model.kv_lora_rank, None)
        latent, k_rope = (plain_linear(model.kv_a_proj, context, part) for part in rows)
        latent, k_rope = plain_norm(model.kv_a_norm, latent), turn(k_rope[:, None])
        if model.q_lora_rank is None:
            asked, queries = x, model.q_proj
        else:
            asked = plain_norm(model.q_a_norm, plain_linear(model.q_a_proj, x, slice(None)))
            queries = model.q_b_proj
        heads = []
        for i in range(model.n_heads):
            q, kv = i * (content + model.rope_head_dim), i * (content + model.v_head_dim)
            q_rows = slice(q, q + content), slice(q + content, q + content + model.rope_head_dim)
            kv_rows = slice(kv, kv + content), slice(kv + content, kv + content + model.v_head_dim)
            q, q_rope = (plain_linear(queries, asked, part)[:, None] for part in q_rows)
            k, v = (plain_linear(model.kv_b_proj, latent, part)[:, None] for part in kv_rows)
            heads.append((torch.cat([q, turn(q_rope)], -1), torch.cat([k, k_rope], -1), v))
        return [torch.cat(t, 1) for t in zip(*heads, strict=True)]


def plain_linear(projection: nn.Linear, x: Tensor, rows: slice) -> Tensor:
    """Multiply by a part of a matrix."""
    bias = 0 if projection.bias is None else projection.bias[rows]
    return x @ projection.weight[rows].T + bias


def plain_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm literally."""
    gain = 1 if norm.weight is None else norm.weight
    return gain * x / ((x * x).mean(-1, keepdim=True) + norm.eps).sqrt()


class Positioned(nn.Module):
    """Attention with a scheme of positions: the last token of x stands where the context ends."""

    def __init__(self, attention: nn.Module, scheme: nn.Module):
        super().__init__()
        self.attention, self.scheme = attention, scheme

    @property
    def o_proj(self) -> nn.Linear:
        return self.attention.o_proj

    def forward(self, x, context=None, *, mask=None, is_causal=False, cache=None):
        terms = {"mask": mask, "is_causal": is_causal, **self._place(x, context, cache)}
        if cache is not None:
            terms["cache"] = cache
        return self.attention(x, context, **terms)

    def attention_weights(self, x, context=None, *, mask=None, is_causal=False):
        weigh = self.attention.attention_weights
        return weigh(x, context, mask=mask, is_causal=is_causal, **self._place(x, context))

    def _place(self, x: Tensor, context: Tensor | None, cache: KVCache | None = None) -> dict:
        n, m = x.shape[1], (x if context is None else context).shape[1]
        past = 0 if cache is None else cache.length
        positions = torch.arange(past + max(n, m), device=x.device)[None]
        bias = self.scheme.bias(positions[:, -n:], positions[:, -m - past :])
        rotation = self.scheme.rotation(positions[:, past:])
        return {"rotation": rotation, "bias": None if bias is None else bias.to(x.dtype)}


class PlainRotary(nn.Module):
    """RoPE literally: number i and number i + width/2 are one complex number, turned by e^(ima)."""

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> None:
        return None

    def rotation(self, positions: Tensor) -> Callable[[Tensor], Tensor]:
        def turn(t: Tensor) -> Tensor:
            x, y = t.double().chunk(2, dim=-1)
            pairs = range(x.shape[-1])
            slow = torch.tensor([1e4 ** (-i / len(pairs)) for i in pairs], device=t.device)
            angles = positions[0, -t.shape[2] :, None] * slow  # in float32, as they are defined
            turned = torch.complex(x, y) * torch.complex(angles.cos(), angles.sin())
            return torch.cat([turned.real, turned.imag], dim=-1).to(t.dtype)

        return turn


class PlainBias(nn.Module):
    """A bias literally: ``number(scheme, head, j - i)`` for each head, query i and key j."""

    def __init__(self, scheme: nn.Module, number: Callable[[nn.Module, int, int], Tensor]):
        super().__init__()
        self.scheme, self.number = scheme, number

    def rotation(self, positions: Tensor) -> None:
        return None

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        sizes = range(self.scheme.n_heads), q_positions[0].tolist(), k_positions[0].tolist()
        numbers = [self.number(self.scheme, h, j - i) for h, i, j in itertools.product(*sizes)]
        return torch.stack(numbers).reshape([1, *map(len, sizes)]).to(q_positions.device)


def of_alibi(scheme: nn.Module, h: int, far: int) -> Tensor:
    """Fall by 1/4, 1/16, 1/64, 1/256 per position, as four heads do."""
    return torch.tensor(-abs(far) / 4.0 ** (h + 1))


def of_t5(scheme: nn.Module, h: int, far: int) -> Tensor:
    """Look up the bucket: one each for 0 to 15, then 16 that grow to a distance of 128."""
    near = max(-far, 0)
    return scheme.table[near if near < 16 else 16 + int(16 * math.log(near / 16, 8)), h]


def by_prefix(model: nn.Module, x: Tensor, stops: list[int]) -> Iterator[Tensor]:
    """Decode in chunks that end at the stops: run all tokens so far, keep the newest rows."""
    for start, stop in zip([0, *stops], stops, strict=False):
        yield model(x[:, :stop], is_causal=True)[:, start:]


def by_context(model: nn.Module, x: Tensor, stops: list[int]) -> Iterator[Tensor]:
    """Decode in chunks that end at the stops: only the newest tokens ask, all so far answer."""
    for start, stop in zip([0, *stops], stops, strict=False):
        yield model(x[:, start:stop], context=x[:, :stop], is_causal=True)


def by_cache(
    new_cache: Callable, model: nn.Module, x: Tensor, stops: list[int]
) -> Iterator[Tensor]:
    """Decode in chunks that end at the stops: a cache remembers all that came before."""
    cache = new_cache(max_len=x.shape[1])
    for start, stop in zip([0, *stops], stops, strict=False):
        with torch.no_grad():
            y = model(x[:, start:stop], is_causal=True, cache=cache)
        yield y


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention, and how to ask it.

    ``build`` makes a module that is called with ``x``, in cross-attention also ``context``, and
    with ``mask``, ``is_causal``, ``bias`` and ``scale``; ``lacks`` names what it cannot do, and
    ``refuses`` what of that its signature has all the same.
    ``far`` is how far a shift of all positions may move a number, since angles are float32.
    ``equation`` gives the equation with the module's weights; ``decodes`` are the ways to run a
    sequence in chunks.

    The suite asks of the module that x is (batch, length, D_MODEL), that it attends to
    everything unless a mask or ``is_causal`` says otherwise, and that its projections are called
    q_proj, k_proj, v_proj and o_proj, or that it brings an ``equation`` of its own.
    """

    name: str
    build: Callable[[], nn.Module]
    padding_mask: Callable
    n_heads: int = 1
    n_kv_heads: int | None = None
    lacks: frozenset[str] = frozenset()
    refuses: frozenset[str] = frozenset()
    equation: Callable[[nn.Module, "Implementation"], nn.Module] = same_projections
    decodes: tuple[Callable[[nn.Module, Tensor, list[int]], Iterator[Tensor]], ...] = (by_prefix,)
    far: float = 1e-7
    device: str = "cpu"

    def __str__(self) -> str:
        return self.name

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes that it computes in, most precise first."""
        return [getattr(torch, name) for name in DTYPES if name not in self.lacks]

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        """Draw normal numbers in the most precise dtype."""
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randn(shape, dtype=torch.float64, generator=generator)
        return numbers.to(self.device, self.dtypes[0])

    def tokens(self, batch: int, length: int, seed: int = 1) -> Tensor:
        """Draw sequences of tokens."""
        return self.draw(batch, length, D_MODEL, seed=seed)

    def mask(self, *shape: int, seed: int = 2) -> Tensor:
        """Draw a mask that allows about two keys in three."""
        return self.draw(*shape, seed=seed) > -0.4

    def masked(self, *shape: int) -> dict[str, Tensor]:
        """Give such a mask as a keyword, or nothing if masks are what it lacks."""
        return {} if "mask" in self.lacks else {"mask": self.mask(*shape)}

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Build it with weights, biases too, that make every term matter."""
        model = self.build().to(self.device, self.dtypes[0])
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                parameter.copy_(self.draw(*parameter.shape, seed=10 + seed) / 2)
        return model.to(dtype)

    def oracle(self, model: nn.Module) -> nn.Module:
        """Give the equation with the parameters of the model."""
        return self.equation(model, self)


def implementations(package: ModuleType | SimpleNamespace) -> list[Implementation]:
    """List what the suite tests: the attention of the package, or of mutants of its MODULES."""
    attention, backends = package.attention, package.backends.BACKENDS
    pad, weights = package.masks.padding_mask, attention.attention_weights
    one, several, mla = (
        attention.SelfAttention,
        in_small_tiles(package.multi_head.MultiHeadAttention, backends),
        in_small_tiles(package.latent.LatentAttention, backends),
    )
    alone, free = frozenset({"cross", "bias", "scale"}), {"head_dim": 5, "v_head_dim": 2}

    def heads(name: str, n_heads: int, **settings) -> Implementation:
        return Implementation(
            f"MultiHeadAttention({name})",
            lambda: several(d_model=D_MODEL, n_heads=n_heads, **settings),
            pad,
            n_heads=n_heads,
            n_kv_heads=settings.get("n_kv_heads"),
            lacks=frozenset({"scale"}),
            decodes=(by_context, partial(by_cache, package.cache.KVCache)),
        )

    def modern(name: str, **settings) -> Implementation:
        settings = {"qk_norm": package.layers.RMSNorm, "scale": 0.7, "sinks": True, **settings}
        inner = heads(name, 4, n_kv_heads=2, **free, **settings)
        return replace(inner, lacks=inner.lacks | {"whole"}, equation=PlainModern)

    def triton(name: str, n_heads: int, **settings) -> Implementation:
        """No terms but the causal mask; and in its interpreter, on the CPU, no bfloat16."""
        inner = heads(f"triton, {name}", n_heads, backend="triton", **settings)
        refuses = {"mask", "bias", "float64", "bfloat16"}
        lacks, refused = inner.lacks | refuses, frozenset({"mask", "bias"})
        return replace(inner, lacks=lacks, refuses=refused, far=1e-5)  # far: of float32

    def latent(name: str, n_heads: int, **settings) -> Implementation:
        sizes = {"head_dim": 3, "rope_head_dim": 4, "v_head_dim": 5, "kv_lora_rank": 4, **settings}
        return replace(
            heads(name, n_heads),
            name=f"LatentAttention({name})",
            build=lambda: mla(d_model=D_MODEL, n_heads=n_heads, **sizes),
            equation=PlainLatent,
        )

    def placed(scheme: Callable, plainly: Callable, inner: Implementation) -> Implementation:
        """Put a scheme around several heads, and its formula around the equation."""

        def equation(model: nn.Module, a: Implementation) -> nn.Module:
            return Positioned(inner.equation(model.attention, a), plainly(model.scheme))

        return replace(
            inner,
            name=inner.name.replace("(", f"({scheme.func.__name__}, ").replace(", )", ")"),
            build=lambda: Positioned(inner.build(), scheme()),
            lacks=inner.lacks | {"unordered", "bias"},
            equation=equation,
        )

    rotary = partial(package.rotary.RotaryPositions, head_dim=4)
    alibi, t5 = (
        partial(getattr(package.position_biases, name), n_heads=4) for name in ("ALiBi", "T5Bias")
    )
    return [
        Implementation("SelfAttention", lambda: one(d_model=D_MODEL), pad, lacks=alone),
        Implementation(
            "SelfAttention(head_dim, v_head_dim, bias)",
            lambda: one(d_model=D_MODEL, head_dim=4, v_head_dim=5, bias=True),
            pad,
            lacks=alone,
        ),
        *[
            Implementation(
                attend.__name__,
                lambda attend=attend, sizes=TILES if name == "tiled" else {}: project(
                    partial(attend, **sizes), weights
                ),
                pad,
                n_heads=4,
                n_kv_heads=2,
                decodes=(by_context,),
            )
            for name in GENERAL
            for attend in [backends[name]]
        ],
        *[
            implementation
            for backend in GENERAL
            for implementation in (
                heads(f"{backend}, MHA", 3, backend=backend),
                heads(f"{backend}, GQA, bias", 4, n_kv_heads=2, bias=True, **free, backend=backend),
                heads(f"{backend}, MQA, qkv bias", 2, n_kv_heads=1, bias="qkv", backend=backend),
            )
        ],
        triton("GQA, bias", 4, n_kv_heads=2, bias=True, head_dim=5),
        triton("MQA, qkv bias", 2, n_kv_heads=1, bias="qkv"),
        modern("sdpa, QK-norm, sinks"),
        modern("naive, QK-norm, sinks, softcap", softcap=1.5),
        modern("tiled, QK-norm, sinks, softcap", softcap=1.5, backend="tiled"),
        placed(rotary, lambda scheme: PlainRotary(), heads("", 4, n_kv_heads=2, head_dim=4)),
        placed(alibi, partial(PlainBias, number=of_alibi), heads("", 4, head_dim=3)),
        placed(t5, partial(PlainBias, number=of_t5), heads("", 4, head_dim=3, backend="naive")),
        placed(
            alibi, partial(PlainBias, number=of_alibi), heads("tiled", 4, backend="tiled", **free)
        ),
        placed(t5, partial(PlainBias, number=of_t5), heads("tiled", 4, backend="tiled", **free)),
        *[
            implementation
            for backend in GENERAL
            for implementation in (
                latent(f"{backend}, bias", 2, q_lora_rank=5, bias=True, backend=backend),
                *[
                    placed(
                        rotary,
                        lambda scheme: PlainRotary(),
                        latent(f"{backend}, {name}", 3, **settings, backend=backend),
                    )
                    for name, settings in (
                        ("q_proj", {"absorbed": False}),
                        ("q_lora_rank", {"q_lora_rank": 5}),
                        ("absorbed", {"absorbed": True}),
                    )
                ],
            )
        ],
    ]


def of_the_zoo() -> list[Implementation]:
    """List the attention of the public models, tiny, with their positions, each kind once."""
    kinds = {}
    for name, model in MODELS.items():
        config = replace(tiny(model.config), d_model=D_MODEL)
        latent, sinks = config.latent is not None, config.sinks
        attention = PlainLatent if latent else PlainModern

        def build(config: TransformerConfig = config) -> nn.Module:
            acts = config.positions in ("rope", "alibi", "t5")
            scheme = POSITIONS[config.positions if acts else "none"](config)
            return Positioned(config.new_attention(), scheme)

        def equation(model: nn.Module, a: Implementation, attention=attention) -> nn.Module:
            return Positioned(attention(model.attention, a), model.scheme)

        kind = [getattr(config, field) for field in ATTENTION_FIELDS]
        implementation = Implementation(
            name,
            build,
            padding_mask,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            lacks=frozenset({"scale", "bias", "unordered", *(["whole"] if sinks else [])}),
            equation=equation,
            decodes=(by_context, partial(by_cache, KVCache)),
            far=1e-5,
        )
        kinds.setdefault(repr(kind), implementation)
    return list(kinds.values())


ATTENTION_FIELDS = (
    *("n_heads", "n_kv_heads", "head_dim", "attention_bias", "qk_norm", "attention_scale"),
    *("attention_softcap", "sinks", "latent", "positions", "rope_theta", "rope_dim"),
    *("rope_interleaved", "rope_scaling", "t5_buckets", "t5_max_distance"),
)
"""What of a config the attention and its positions depend on."""
