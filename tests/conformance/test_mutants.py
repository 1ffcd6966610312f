"""Break the package in one place at a time: each defect is caught, and each check catches one."""

import inspect
import itertools
import sys
from collections.abc import Callable, Iterable
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import pytest
from conformance.checks import CHECKS, checks_for
from conformance.implementations import MODULES, Implementation, implementations

import tfm_ref


class Mutant(NamedTuple):
    """A defect, the check that must catch it, and the edit that makes it."""

    defect: str
    check: str
    old: str
    new: str


SOFTMAX = "return scores.softmax(-1)\n"
FILL = "scores.masked_fill(~mask, -torch.inf).masked_fill(blind, 0.0)"
ZERO = "_normalise(scores, sinks).masked_fill(~mask, 0.0)"
WEIGH = 'einsum(weights, _share(v, q.shape[1]), "b h n m, b h m v -> b h n v")'
SCALE = "q.shape[-1] ** -0.5 if scale is None else scale"
CAUSAL = "(j <= i)[None, None]"
ASKED = "if is_causal:"
JOIN = "mask & causal"
CAP = "        scores = softcap * (scores / softcap).tanh()\n"
BIAS = "scores = scores + bias"
CHECK = "check_mask(mask, scores)\n"
KV = "self.k_proj(x), self.v_proj(x)"
JOINED = "y.transpose(1, 2).flatten(2)"
TURNED = "(k if rotation is None else rotation(k)), v"
SPLIT = "n_heads, -1).transpose(1, 2)"
ROOT = "(head_dim + rope_head_dim) ** -0.5 if scale is None else scale\n"
UP = 'y, self._up()[1].flip(0), "b h n l, h v l'
HEADS = "(self.n_heads, sum(widths))).transpose(1, 2)"
ADDED = "allowed if bias is None else bias.masked_fill(~allowed, -torch.inf)"

MUTANTS = [
    Mutant(defect, f"check_{check}", old, new)
    for defect, check, old, new in [
        ("scale missing", "equation", SCALE, "1.0 if scale is None else scale"),
        ("scale by d, not by its root", "equation", "** -0.5", "** -1"),
        ("keys taken for values", "equation", WEIGH, WEIGH.replace("v,", "k,")),
        ("k and v swapped", "equation", KV, "self.v_proj(x), self.k_proj(x)"),
        ("query heads share keys in turn", "equation", "b g m k -> b (g r)", "b g m k -> b (r g)"),
        ("heads split with a stride", "equation", SPLIT, "-1, n_heads).movedim(-1, 1)"),
        ("heads joined with a stride", "equation", JOINED, "y.movedim(1, -1).flatten(2)"),
        ("only queries turned", "equation", TURNED, "(k), v"),
        ("values turned, too", "equation", TURNED, TURNED.replace("v", "rotation(v)")),
        ("the latent not normalised", "equation", "self.kv_a_norm(latent)", "latent"),
        ("the shared key not turned", "equation", "rotation(k_rope)", "k_rope"),
        ("scaled as if nothing turned", "equation", "self.scale}", "self.head_dim**-0.5}"),
        ("scaled by the width of the latents", "equation", ROOT, "scale\n"),
        (
            "the average of latents is of values",
            "equation",
            'y, self._up()[1], "b h n l, h v l',
            UP,
        ),
        ("latent heads with a stride", "equation", HEADS, "(-1, self.n_heads)).movedim(-1, 1)"),
        ("pairings mixed", "equation", "interleaved: bool = False", "interleaved: bool = True"),
        ("one query takes the first angle", "chunks", "[:, None, -t.", "[:, None, : t."),
        ("slopes of a geometric row", "equation", "2.0 ** (-8 *", "2.0 ** (-4 *"),
        (
            "distance of the key alone",
            "equation",
            "- q_positions.long()[:, :, None]",
            "+ 0 * q_positions.long()[:, :, None]",
        ),
        ("buckets as in an encoder", "equation", "(-relative).clamp(min=0)", "relative.abs()"),
        ("context ignored", "equation", "x if context is None else context, r", "x, r"),
        ("fused, a bias is lost beside a mask", "equation", ADDED, "allowed"),
        ("fused, the scale is lost", "equation", "scale=scale,\n        enable", "enable"),
        (
            "tiled, a new maximum leaves the sum",
            "equation",
            "total = decay * so_far",
            "total = so_far",
        ),
        (
            "tiled, a new maximum leaves the output",
            "equation",
            "decay * so_far.mixed",
            "so_far.mixed",
        ),
        ("tiled, only the last tile counts", "equation", "decay * so_far.total +", "0 *"),
        ("tiled, the sink is lost", "equation", "total=torch.ones_like", "total=torch.zeros_like"),
        ("tiled, no gradient of the sink", "equation", "-((sinks", "0 * ((sinks"),
        ("tiled, the bias is lost", "equation", "tile + self.cut(bias", "tile + 0 * self.cut(bias"),
        ("tiled, the scale is lost on the way back", "equation", "dqs * grid.scale", "dqs"),
        ("tiled, softcap straight on the way back", "equation", "(1 - (bent", "(1 - 0 * (bent"),
        ("tiled, weights move on their own", "equation", "values.mT - ds", "values.mT"),
        (
            "tiled, keys learn of the last queries",
            "equation",
            "dk[:, :, keys] +=",
            "dk[:, :, keys] =",
        ),
        (
            "tiled, values learn of the last queries",
            "equation",
            "dv[:, :, keys] +=",
            "dv[:, :, keys] =",
        ),
        ("no gradient through weights", "gradients", WEIGH, WEIGH.replace("s,", "s.detach(),")),
        ("softmax over queries", "weights", SOFTMAX, SOFTMAX.replace("-1", "-2")),
        ("weights not normalised", "weights", SOFTMAX, "return scores.exp()\n"),
        ("the sink is lost", "equation", "if sinks is None:\n", "if True:\n"),
        ("the sink takes all", "equation", "softmax(-1)[..., :-1]", "softmax(-1)[..., 1:]"),
        ("fused, the sink gives keys", "equation", "(0, 0, 0, 1))\n", "(0, 0, 0, 1), value=1)\n"),
        ("softcap after the bias", "equation", CAP, ""),
        ("softcap without its size", "equation", "= softcap * (scores", "= (scores"),
        ("queries without norm", "equation", "else self.q_norm(q)", "else q"),
        ("one norm for both", "equation", "self.k_norm(k)", "self.q_norm(k)"),
        ("bias subtracted", "bias", BIAS, "scores = scores - bias"),
        ("bias scaled", "bias", BIAS, "scores = scores + bias * q.shape[-1] ** -0.5"),
        ("scale 0 taken for absent", "scale", SCALE, "scale or q.shape[-1] ** -0.5"),
        ("always causal", "permutation", ASKED, "if True:"),
        ("never causal", "permutation", ASKED, "if False:"),
        ("causal sees one token ahead", "causality", CAUSAL, "(j <= i + 1)[None, None]"),
        ("tiled, the diagonal is not cut", "causality", "(j > i) |", "(j > len(j)) |"),
        ("causal is blind to itself", "causality", CAUSAL, "(j < i)[None, None]"),
        ("causal sees the future only", "causality", CAUSAL, "(j >= i)[None, None]"),
        (
            "gradient leaks from the future",
            "causality_of_gradients",
            f"return {ZERO}",
            f"return {ZERO} + (k - k.detach()).sum()",
        ),
        ("mask inverted", "mask_meaning", FILL, FILL.replace("~", "")),
        ("mask transposed", "mask_meaning", FILL, FILL.replace("~mask", "~mask.mT")),
        (
            "mask added",
            "mask_meaning",
            f"{FILL}\n    return {ZERO}",
            "(scores + mask)\n    return _normalise(scores, sinks)",
        ),
        (
            "mask ignored where lengths differ",
            "mask_meaning_across",
            CHECK,
            CHECK.replace("\n", "; mask = mask | (q.shape[2] != k.shape[2])\n"),
        ),
        ("or instead of and", "causal_and_mask", JOIN, "mask | causal"),
        ("mask dropped if causal", "causal_and_mask", JOIN, "causal"),
        ("blind query takes the mean", "nothing_to_see", ZERO, "_normalise(scores, sinks)"),
        ("tiled, it gives NaN", "nothing_to_see", "total.clamp(min=1)", "total"),
        ("tiled, it passes a NaN back", "nothing_to_see", "-torch.inf, torch.inf)[", "-9, -9)["),
        ("fused, it takes the mean", "nothing_to_see", "y.masked_fill(blind, 0.0)", "y"),
        (
            "blind query gives NaN",
            "nothing_to_see",
            f"{FILL}\n    return {ZERO}",
            "scores.masked_fill(~mask, -torch.inf)\n    return _normalise(scores, sinks)",
        ),
        ("blind query passes a NaN back", "nothing_to_see", ".masked_fill(blind, 0.0)", ""),
        (
            "the lowest number for -inf",
            "lowest_scores",
            "scores.masked_fill(~mask, -torch.inf)",
            "scores.masked_fill(~mask, torch.finfo(scores.dtype).min)",
        ),
        ("padding hides queries", "padding", "real[:, None, None, :]", "real[:, None, :, None]"),
        ("padding on the other side", "padding", 'if side == "right"', 'if side == "left"'),
        (
            "padding one token too long",
            "padding",
            "j < lengths[:, None]",
            "j < lengths[:, None] - 1",
        ),
        ("aligned at the top left", "rectangles", "[:, None] + (len_k - len_q)", "[:, None]"),
        (
            "tiled, aligned at the top left",
            "rectangles",
            "past = self.len_k - self.len_q",
            "past = 0",
        ),
        ("fused, aligned at the top left", "rectangles", " and n == m)", ")"),
        ("second chunk sees all", "chunks", ASKED, "if is_causal and q.shape[2] == k.shape[2]:"),
        ("a cache begins anew", "chunks", "(-2, self.length, n)", "(-2, 0, n)"),
        ("a cache counts calls", "chunks", "self.length += n", "self.length += 1"),
        ("nothing is remembered", "chunks", "cache.append(*kept)", "kept"),
        (
            "one mask for the whole batch",
            "batch",
            CHECK,
            CHECK.replace("\n", "; mask = mask.any(0, keepdim=True)\n"),
        ),
        (
            "softmax overflows",
            "large_scores",
            SOFTMAX,
            "return scores.exp() / scores.exp().sum(-1, keepdim=True)\n",
        ),
        ("output in float32", "dtype_and_device", WEIGH, f"{WEIGH}.float()"),
        ("scores in bfloat16", "low_precision", FILL, f"{FILL}.bfloat16().to(q.dtype)"),
        (
            "a buffer in the state",
            "state",
            "self.d_model =",
            "self.register_buffer('size', torch.ones(1)); self.d_model =",
        ),
        (
            "contiguous tokens needed",
            "strides",
            "self.q_proj(x)",
            "self.q_proj(x.view(-1).view(x.shape))",
        ),
        ("weights after dropout", "repeatable", WEIGH, f"nn.functional.dropout({WEIGH}, 0.5)"),
        ("mask changed in place", "inputs_untouched", JOIN, "mask.logical_and_(causal)"),
        ("integers accepted", "wrong_masks_refused", "mask.dtype != torch.bool", "False"),
        ("any shape accepted", "wrong_masks_refused", 'check_axes("mask", mask, scores)', "pass"),
        ("bias not checked", "wrong_bias_refused", "    check_bias(bias, scores)\n", "    pass\n"),
        ("empty input accepted", "empty_refused", "if not t.numel():", "if False:"),
    ]
]


def broken(old: str = "", new: str = "") -> list[Implementation]:
    """List the implementations of the package after one edit, annotations not enforced."""
    sources = {name: inspect.getsource(getattr(tfm_ref, name)) for name in MODULES}
    assert any(old in source for source in sources.values()), f"nowhere: {old}"
    copies = {name: ModuleType(f"tfm_ref.{name}") for name in MODULES}
    with patch.dict(sys.modules, {copy.__name__: copy for copy in copies.values()}):
        for name, copy in copies.items():  # each imports those before it
            source = sources[name].replace(old, new) if old else sources[name]
            exec(compile(source, f"<copy of {name}>", "exec"), vars(copy))
    suite = implementations(SimpleNamespace(**copies))
    return [a for a in suite if not a.refuses]  # Triton's kernels are slow here, and not copied


def failures(suite: list[Implementation], checks: Iterable[Callable] = CHECKS) -> dict[str, str]:
    """Run the checks that apply: name those that fail for any implementation, and how."""
    failed = {}
    for check, implementation in itertools.product(checks, suite):
        if check.__name__ not in failed and check in checks_for(implementation):
            try:
                check(implementation)
            except Exception as error:
                failed.setdefault(check.__name__, f"{implementation}: {error!r}")
    return failed


def test_the_unbroken_source_passes():
    assert failures(broken()) == {}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.defect}-{m.check}")
def test_mutant_is_caught(mutant):
    suite = broken(mutant.old, mutant.new)
    if not failures(suite, [check for check in CHECKS if check.__name__ == mutant.check]):
        raise AssertionError(f"{mutant.check} lets it pass; others: {failures(suite)}")


def test_every_check_catches_a_mutant():
    assert {mutant.check for mutant in MUTANTS} == {check.__name__ for check in CHECKS}
