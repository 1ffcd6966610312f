"""What every attention implementation must do. A check takes an Implementation and asserts."""

import copy
import itertools
from collections.abc import Callable, Iterable
from functools import partial

import jaxtyping
import torch
from conformance.implementations import TRAITS, Implementation
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

CHECKS: dict[Callable[[Implementation], None], frozenset[str]] = {}
"""The checks, each with the traits that it needs."""


def needs(*traits: str) -> Callable:
    """Enter a check into the suite, for all implementations that have the traits."""
    assert TRAITS.issuperset(traits), traits

    def enter(check: Callable) -> Callable:
        CHECKS[check] = frozenset(traits)
        return check

    return enter


def checks_for(a: Implementation) -> list[Callable]:
    """List the checks that apply."""
    return [check for check, traits in CHECKS.items() if not traits & a.lacks]


# --- what it computes


@needs()
def check_equation(a):
    """Output and gradients are those of the equation, whatever joins in, batch = heads, too."""
    close = {} if a.dtypes[0] == torch.float64 else {"rtol": 1e-4, "atol": 3e-4}
    for batch, length in (1, 1), (3, 4), (4, 4):
        shape = batch, a.n_heads, length, length
        options = [{}, {"is_causal": True}]
        if "mask" not in a.lacks:
            shared = itertools.product(*({1, size} for size in shape))
            options += [{"mask": a.mask(*s), "is_causal": c} for s in shared for c in (False, True)]
        if "bias" not in a.lacks:
            options += [{"bias": a.draw(*shape)}, {"bias": a.draw(1, a.n_heads, 1, length)}]
            options += [{**option, "bias": a.draw(*shape)} for option in options[1:3]]
        if "scale" not in a.lacks:
            options += [{"scale": 0.3}]
        if "cross" not in a.lacks:
            options += [{"context": a.tokens(batch, length + 1, seed=3)}]
        model, x = a.model(), a.tokens(batch, length)
        for terms in options:
            expected = values_and_gradients(a.oracle(model), x, **terms)
            assert_close(values_and_gradients(model, x, **terms), expected, **close)


@needs("weights")
def check_weights(a):
    """Weights are at least 0, 0 where masked, and, where whole, sum to 1; the equation's."""
    model, x = a.model(), a.tokens(2, 5)
    for terms in {}, {"is_causal": True}, {"is_causal": True, **a.masked(2, a.n_heads, 5, 5)}:
        allowed = torch.ones(2, a.n_heads, 5, 5, dtype=torch.bool, device=a.device)
        if terms:
            allowed = allowed.tril() & terms.get("mask", True)
        weights = model.attention_weights(x, **terms)
        assert torch.equal(weights > 0, allowed)
        assert torch.equal(weights == 0, ~allowed)
        if "whole" not in a.lacks:
            assert_close(weights.sum(-1), allowed.any(-1).to(weights.dtype))
        assert_close(weights, a.oracle(model).attention_weights(x, **terms))


@needs("bias", "cross", "whole")
def check_bias(a):
    """A bias of log 2 counts a key twice; a bias that is the same for all keys does nothing."""
    model, x, context = a.model(), a.tokens(2, 3), a.tokens(2, 4, seed=3)
    bias = torch.zeros(1, 1, 1, 4, device=a.device, dtype=x.dtype)
    expected = model(x, context=context)
    assert_close(model(x, context=context, bias=bias + 3), expected)
    bias[..., 2] = torch.tensor(2.0).log()
    twice = context[:, [0, 1, 2, 2, 3]]
    assert_close(model(x, context=context, bias=bias), model(x, context=twice))


@needs("scale")
def check_scale(a):
    """A scale of 0 takes the mean of the values; a double scale asks doubled questions."""
    model, x = a.model(), a.tokens(2, 4)
    v = rearrange(model.v_proj(x).mean(1, keepdim=True), "b 1 (g v) -> b 1 g v", g=a.n_kv_heads)
    mean = model.o_proj(repeat(v, "b 1 g v -> b n (g r v)", n=4, r=a.n_heads // a.n_kv_heads))
    assert_close(model(x, scale=0.0), mean)
    y = model(x, scale=0.6)
    with torch.no_grad():
        model.q_proj.weight.mul_(2)
    assert_close(model(x, scale=0.3), y)


@needs("unordered")
def check_permutation(a):
    """Without a mask the order of the tokens does not matter; with the causal mask it does."""
    model, x, order = a.model(), a.tokens(2, 5), [3, 0, 4, 1, 2]
    assert_close(model(x[:, order]), model(x)[:, order])
    causal = model(x[:, order], is_causal=True), model(x, is_causal=True)[:, order]
    assert not torch.allclose(*causal)


# --- who sees whom


@needs()
def check_causality(a):
    """A token changes its own output and the later ones, and not a bit of any other."""
    model, x = a.model(), a.tokens(2, 5)
    assert torch.equal(reach(partial(model, is_causal=True), x), within_sequence(x).tril())
    assert torch.equal(reach(model, x), within_sequence(x))


@needs()
def check_causality_of_gradients(a):
    """No gradient flows from an output to a later token, nor to another sequence."""
    model, x = a.model(), a.tokens(2, 5)
    jacobian = torch.autograd.functional.jacobian(partial(model, is_causal=True), x)
    flows = (jacobian != 0).any(5).any(2).transpose(1, 2)
    assert torch.equal(flows, within_sequence(x).tril())


@needs("mask")
def check_mask_meaning(a):
    """True = may attend: a token changes another's output if and only if the mask lets it."""
    model, x, mask = a.model(), a.tokens(2, 6), a.mask(2, 1, 6, 6)
    seen = reach(partial(model, mask=mask), x)
    others = ~torch.eye(6, dtype=torch.bool, device=a.device)  # a token also changes its query
    assert torch.equal(seen & others, within_sequence(x) & mask & others)


@needs("mask", "cross")
def check_mask_meaning_across(a):
    """In cross-attention, too, a key is seen if and only if the mask is True, whichever it is."""
    for n, m in (4, 6), (6, 4):
        model, x, context, mask = a.model(), a.tokens(2, n), a.tokens(2, m, 3), a.mask(2, 1, n, m)
        seen = reach(partial(model, x, mask=mask), context)
        assert torch.equal(seen, within_sequence(context)[..., :1, :] & mask)


@needs("mask")
def check_causal_and_mask(a):
    """A key is seen if the mask and the causal mask both allow it."""
    model, x, mask = a.model(), a.tokens(2, 5), a.mask(2, a.n_heads, 5, 5)
    assert_close(model(x, mask=mask, is_causal=True), model(x, mask=mask.tril()))


@needs("mask")
def check_nothing_to_see(a):
    """A query that may attend to nothing takes 0; no NaN arises, not even on the way back."""
    model, x = a.model(), a.tokens(2, 4)
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool, device=a.device)
    mask[0, :, 2] = mask[1] = False
    for is_causal in False, True:
        with torch.autograd.set_detect_anomaly(True):
            y, *gradients = values_and_gradients(model, x, mask=mask, is_causal=is_causal)
        dead = ~mask[:, 0].any(-1)
        assert torch.equal(y[dead], nothing(model, y[dead]))
        assert all(gradient.isfinite().all() for gradient in gradients)


@needs("mask")
def check_padding(a):
    """A padded sequence gives what it gives alone: either side, batch = length, batch = heads."""
    options = itertools.product((4, a.n_heads), ("right", "left"), (False, True))
    for batch, side, is_causal in options:
        model, x = a.model(), a.tokens(batch, 4)
        lengths = torch.arange(batch, device=a.device) % 4 + 1
        mask = a.padding_mask(lengths, 4, side=side)
        y = model(x, mask=mask, is_causal=is_causal)
        for b, length in enumerate(lengths.tolist()):
            real = slice(length) if side == "right" else slice(4 - length, 4)
            alone = model(x[b : b + 1, real], is_causal=is_causal)
            assert_close(y[b : b + 1, real], alone, atol=a.far, rtol=a.far)


@needs("cross")
def check_rectangles(a):
    """Causal means that the last query meets the last key: fewer queries, fewer keys, or one."""
    model, x, context = a.model(), a.tokens(2, 5), a.tokens(2, 5, seed=3)
    square = model(x, context=context, is_causal=True)
    for length in 1, 2, 4:
        fewer_queries = model(x[:, -length:], context=context, is_causal=True)
        assert_close(fewer_queries, square[:, -length:])
        fewer_keys = model(x, context=context[:, :length], is_causal=True)
        aligned = model(x[:, -length:], context=context[:, :length], is_causal=True)
        assert_close(fewer_keys[:, -length:], aligned, atol=a.far, rtol=a.far)
        assert torch.equal(fewer_keys[:, :-length], nothing(model, x[:, :-length]))


@needs()
def check_chunks(a):
    """The whole sequence, token by token, and every split into chunks give the same."""
    model, x = a.model(), a.tokens(2, 5)
    whole = model(x, is_causal=True)
    for size in range(5):
        for inner in itertools.combinations(range(1, 5), size):
            for decode in a.decodes:
                assert_close(torch.cat([*decode(model, x, [*inner, 5])], dim=1), whole)


@needs()
def check_batch(a):
    """A sequence gives in a batch what it gives alone, with its own mask."""
    model, x = a.model(), a.tokens(3, 4)
    for terms in {}, a.masked(3, 1, 4, 4):
        alone = [
            model(x[b : b + 1], **{name: mask[b : b + 1] for name, mask in terms.items()})
            for b in range(3)
        ]
        assert_close(model(x, **terms), torch.cat(alone))


# --- numbers


@needs()
def check_large_scores(a):
    """Scores beyond ±10,000 give finite numbers: the largest takes all."""
    for dtype in at_least_one(d for d in a.dtypes if torch.finfo(d).max > 1e6):  # not float16
        model, x = a.model(dtype), (200 * a.tokens(2, 6)).to(dtype)
        for is_causal in False, True:
            y, *gradients = values_and_gradients(model, x, is_causal=is_causal)
            assert all(gradient.isfinite().all() for gradient in gradients)
            if dtype.itemsize > 2:  # scores of 16 bits are too coarse to say who is the largest
                exact = a.oracle(copy.deepcopy(model).double())(x.double(), is_causal=is_causal)
                assert_close(y.double(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


@needs("weights", "mask", "bias", "whole")
def check_lowest_scores(a):
    """Allowed keys share all the weight, even with the lowest scores that there are."""
    model, x, mask = a.model(), a.tokens(2, 4), a.mask(2, a.n_heads, 4, 4)
    bias = mask.to(x.dtype) * torch.finfo(x.dtype).min
    sums = model.attention_weights(x, mask=mask, bias=bias).sum(-1)
    assert_close(sums, mask.any(-1).to(sums.dtype))


@needs("float64")
def check_gradients(a):
    """Gradients of tokens and weights are those of finite differences, blind queries included."""
    model, x = a.model(torch.float64), a.tokens(1, 3).requires_grad_()
    names, parameters = zip(*model.named_parameters(), strict=True)
    mask = torch.tensor([[True, True, False], [False] * 3, [True] * 3], device=a.device)[None, None]
    for terms in {"is_causal": True}, {} if "mask" in a.lacks else {"mask": mask}:

        def run(x, *parameters, terms=terms):
            return functional_call(model, dict(zip(names, parameters, strict=True)), x, terms)

        assert torch.autograd.gradcheck(run, (x, *parameters), raise_exception=False)


@needs()
def check_dtype_and_device(a):
    """Every floating dtype, and the device, come out as they went in."""
    for dtype in a.dtypes:
        model, x = a.model(dtype), a.tokens(2, 4).to(dtype)
        for terms in {}, {"is_causal": True}, a.masked(2, 1, 4, 4):
            outcome = values_and_gradients(model, x, **terms)
            if "weights" not in a.lacks:
                outcome += (model.attention_weights(x, **terms),)
            assert {(t.dtype, t.device) for t in outcome} == {(dtype, x.device)}
            assert outcome[0].shape == x.shape


@needs()
def check_low_precision(a):
    """In 16 bits the error is at most twice that of the naive computation."""
    for dtype in at_least_one(d for d in a.dtypes if d.itemsize == 2):
        model, x = a.model(dtype), a.tokens(4, 24).to(dtype)
        exact = a.oracle(copy.deepcopy(model).double())(x.double(), is_causal=True)
        runs = model, a.oracle(model)
        error, naive_error = ((run(x, is_causal=True) - exact).abs().max() for run in runs)
        assert error <= 2 * naive_error + 1e-6, f"{dtype}: {error} against {naive_error}"


# --- good manners


@needs()
def check_state(a):
    """Its state is its parameters, and gives another instance the same output."""
    model, x = a.model(), a.tokens(2, 4)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    other = a.build().to(x)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))


@needs()
def check_strides(a):
    """How tensors lie in memory does not matter."""
    model, x = a.model(), a.tokens(2, 4)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    assert_close(model(strided), model(x))
    if "mask" not in a.lacks:
        mask = a.mask(1, 1, 4, 4)
        expected = model(x, mask=mask)
        assert_close(model(strided, mask=mask.expand(2, -1, -1, -1)), expected)
        assert_close(model(x, mask=mask.mT.contiguous().mT), expected)


@needs()
def check_repeatable(a):
    """The same input gives the same bits, in training and in evaluation, and draws no number."""
    model, x = a.model(), a.tokens(2, 4)
    before = torch.get_rng_state()
    y = model(x)
    assert torch.equal(model(x), y)
    assert torch.equal(model.eval()(x), y)
    assert torch.equal(torch.get_rng_state(), before)


@needs()
def check_inputs_untouched(a):
    """Nothing that goes in is changed."""
    model, shape = a.model(), (2, a.n_heads, 4, 4)
    terms = {"x": a.tokens(2, 4), "is_causal": True, **a.masked(*shape)}
    if "bias" not in a.lacks:
        terms["bias"] = a.draw(*shape)
    before = copy.deepcopy(terms)
    model(**terms)
    assert_close(terms, before, rtol=0, atol=0)


@needs("mask")
def check_wrong_masks_refused(a):
    """A mask that is not boolean, or could line up with a wrong axis, is refused."""
    model, x, h = a.model(), a.tokens(4, 4), a.n_heads
    for dtype in torch.int64, torch.uint8, x.dtype:
        refused(model, x, mask=torch.ones(1, 1, 4, 4, device=a.device, dtype=dtype))
    missing_axes = (4,), (1, 4), (4, 4), (h, 4, 4), (4, 4, 4)
    for shape in *missing_axes, (4, h, 4, 3), (4, h, 5, 4), (3, h, 4, 4), (4, h + 1, 4, 4):
        refused(model, x, mask=a.mask(*shape))


@needs("bias")
def check_wrong_bias_refused(a):
    """A bias that is boolean, or could line up with a wrong axis, is refused."""
    model, x = a.model(), a.tokens(4, 4)
    refused(model, x, bias=a.mask(1, 1, 4, 4))
    for shape in (4, 4), (4, 4, 4), (4, a.n_heads + 1, 4, 4), (1, 1, 4, 3):
        refused(model, x, bias=a.draw(*shape))


@needs()
def check_empty_refused(a):
    """No token or no sequence is refused."""
    for batch, length in (0, 4), (2, 0):
        refused(a.model(), a.tokens(batch, length))


# --- tools


def values_and_gradients(model: nn.Module, x: Tensor, **terms) -> tuple[Tensor, ...]:
    """Give the output, and the gradients of the sum of its squares for x and all weights."""
    x = x.clone().requires_grad_()
    y = model(x, **terms)
    return y.detach(), *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))


def reach(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Perturb each token in turn: entry (b, c, i, j) tells if x[c, j] changes a bit of y[b, i]."""
    y = run(x)
    seen = torch.zeros(len(y), len(x), y.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
    for c, j in itertools.product(range(len(x)), range(x.shape[1])):
        other = x.clone()
        other[c, j] += 1
        seen[:, c, :, j] = (run(other) != y).any(-1)
    return seen


def within_sequence(x: Tensor) -> Tensor:
    """The reach of full attention: all tokens of the same sequence."""
    batch, length, _ = x.shape
    same = torch.eye(batch, dtype=torch.bool, device=x.device)
    return same[:, :, None, None].expand(-1, -1, length, length)


def at_least_one(dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    """Refuse to check nothing."""
    dtypes = list(dtypes)
    assert dtypes, "no dtype to check"
    return dtypes


def nothing(model: nn.Module, like: Tensor) -> Tensor:
    """What the model makes of attention that took nothing: its last bias, or 0."""
    return model.o_proj(like.new_zeros(*like.shape[:-1], model.o_proj.in_features))


def refused(model: nn.Module, x: Tensor, **terms) -> None:
    """Assert a ValueError from the code itself, with the annotations' checks switched off."""
    enforced = not jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    outcome = "was accepted"
    try:
        model(x, **terms)
    except ValueError:
        return
    except Exception as error:
        outcome = f"raised {error!r}, not ValueError"
    finally:
        jaxtyping.config.update("jaxtyping_disable", not enforced)
    given = {name: (tuple(t.shape), t.dtype) for name, t in {"x": x, **terms}.items()}
    raise AssertionError(f"{given} {outcome}")
