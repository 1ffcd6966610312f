"""Every implementation passes every check that applies to it."""

import inspect
from dataclasses import replace

import pytest
from conformance import checks
from conformance.implementations import DTYPES, TRAITS, implementations, of_the_zoo

import tfm_ref

IMPLEMENTATIONS = implementations(tfm_ref) + of_the_zoo()


@pytest.mark.parametrize(
    ("implementation", "check"),
    [
        pytest.param(a, check, id=f"{a}-{check.__name__}")
        for a in IMPLEMENTATIONS
        for check in checks.checks_for(a)
    ],
)
def test_conformance(implementation, check, device):
    check(replace(implementation, device=device))


def test_every_check_is_in_the_suite():
    written = {f for name, f in vars(checks).items() if name.startswith("check_")}
    assert written == checks.CHECKS.keys()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_only_what_is_not_offered_is_left_out(implementation):
    """What an implementation is said to lack must be missing from its signature."""
    model = implementation.model()
    offered = set(inspect.signature(model.forward).parameters)
    offered |= inspect.signature(getattr(model, "attend", model.forward)).parameters.keys()
    names = {"cross": "context", "mask": "mask", "bias": "bias", "scale": "scale"}
    lacks = {trait for trait, name in names.items() if name not in offered}
    if not hasattr(model, "attention_weights"):
        lacks.add("weights")
    assert implementation.lacks <= TRAITS
    assert implementation.lacks - {"unordered", "whole", *DTYPES} == lacks | implementation.refuses
