"""The letters of annotations and einsums are those of the page "Notation", and no others."""

import ast
import re
from pathlib import Path

import pytest
import torch

import tfm_ref
from tfm_ref.notation import AXES, SYMBOLS, Axis

MODULES = sorted(Path(tfm_ref.__file__).parent.rglob("*.py"))
PATTERNS = {"einsum", "rearrange", "reduce", "repeat"}


def letters(source: str) -> set[str]:
    """Collect the axes named in jaxtyping annotations and einops patterns."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(slice=ast.Tuple([ast.Name("Tensor"), ast.Constant(str(axes))])):
                texts.append(axes)
            case ast.Call(ast.Name(name) | ast.Attribute(attr=name), args) if name in PATTERNS:
                texts += [arg.value for arg in args if isinstance(arg, ast.Constant)]
    return set(re.findall(r"[^\W\d]\w*", " ".join(texts)))


def test_letters_are_found():
    source = 'def f(x: Float[Tensor, "#b 1 n"]) -> Int[Tensor, " w"]: torch.einsum(x, "q r -> q")'
    assert letters(source) == set("bnwqr")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_every_letter_used_is_declared(module):
    assert letters(module.read_text(encoding="utf-8")) <= AXES.keys()


def test_every_letter_declared_is_used():
    assert set().union(*(letters(m.read_text(encoding="utf-8")) for m in MODULES)) == AXES.keys()


@pytest.mark.parametrize("field", Axis._fields)
def test_no_two_letters_share_a_name(field):
    values = [getattr(axis, field) for axis in AXES.values()]
    assert all(values)
    assert len(set(values)) == len(values)


def test_symbols_fit_the_formulas():
    """With a size of its own for each letter, every product in the table has the stated shape."""
    size = {letter: 100 + i for i, letter in enumerate(AXES)}
    t = {tex: torch.ones([size[letter] for letter in s.axes.split()]) for tex, s in SYMBOLS.items()}
    context = torch.ones(size["m"], size["d"])
    shapes = {
        "Q": t["X"] @ t["W_Q"],
        "K": context @ t["W_K"],
        "V": context @ t["W_V"],
        "S": t["Q"] @ t["K"].T,
        "A": t["S"].softmax(-1),
        "O": t["A"] @ t["V"],
        "Y": t["O"] @ t["W_O"],
    }
    assert all(t[tex].shape == result.shape for tex, result in shapes.items())
    assert t["Y"].shape == t["X"].shape  # layers can be stacked
