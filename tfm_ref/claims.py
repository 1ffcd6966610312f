"""Claims that a reader can check: each is printed only if its evidence holds."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def check(statement: str, evidence: Any) -> None:
    """Print ``✓ statement`` if the evidence holds.

    Args:
        statement: what is claimed, in one sentence.
        evidence: the condition that the claim needs, computed beside it. A tensor or an array
            must be boolean and have no axes: say ``.all()`` or ``.any()``.

    Raises:
        AssertionError: if the evidence is false; the message is the statement.
        TypeError: if the evidence is not a single truth value.

    Example:
        >>> check("softmax sums to 1", abs(torch.ones(3).softmax(0).sum() - 1) < 1e-6)
        ✓ softmax sums to 1
    """
    _require(statement, evidence)
    print(f"✓ {statement}")


def refute(statement: str, evidence: Any) -> None:
    """Print ``✗ not so: statement`` if the evidence against it holds.

    Args:
        statement: what is commonly said and is not so.
        evidence: the condition that speaks against it, as for :func:`check`.

    Raises:
        AssertionError: if the evidence is false; the message is the statement.
        TypeError: if the evidence is not a single truth value.

    Example:
        >>> refute("softmax of zeros is zero", torch.zeros(2).softmax(0).sum() > 0)
        ✗ not so: softmax of zeros is zero
    """
    _require(f"no evidence against: {statement}", evidence)
    print(f"✗ not so: {statement}")


def attempt(answer: Callable, test: Callable[[Callable], None]) -> None:
    """Try an exercise: run its test on the reader's answer and say how it stands.

    Unlike a claim, an unsolved exercise does not stop the notebook.

    Args:
        answer: what the reader wrote.
        test: takes the answer and asserts what it must do.

    Example:
        >>> def test(double):
        ...     assert double(3) == 6, f"double(3) must be 6; got {double(3)}"
        >>> attempt(lambda x: x + 2, test)
        ☐ not yet: double(3) must be 6; got 5
        >>> attempt(lambda x: 2 * x, test)
        ☑ solved
    """
    try:
        test(answer)
    except Exception as error:
        print(f"☐ not yet: {str(error) or type(error).__name__}")
    else:
        print("☑ solved")


def _require(statement: str, evidence: Any) -> None:
    """Raise unless the evidence is one true value."""
    if not isinstance(evidence, bool):
        if getattr(evidence, "dtype", None) not in (torch.bool, np.bool_):
            raise TypeError(f"evidence must be true or false; got {evidence!r}")
        if evidence.ndim:
            raise TypeError(
                f"evidence must be one truth value; got shape {tuple(evidence.shape)}: "
                "say .all() or .any()"
            )
    if not evidence:
        raise AssertionError(statement)
