"""check, refute and attempt: what they print, when they raise, and what is no evidence."""

import re

import numpy as np
import pytest
import torch

from tfm_ref import attempt, check, refute

TRUE = [True, torch.tensor(1) == 1, torch.ones(3).bool().all(), np.bool_(True), np.ones(2).all()]
FALSE = [False, torch.tensor(1) == 2, np.bool_(False), np.array(False)]


@pytest.mark.parametrize("evidence", TRUE, ids=repr)
def test_what_holds_is_printed(evidence, capsys):
    assert check("one is one", evidence) is None
    assert refute("one is two", evidence) is None
    assert capsys.readouterr() == ("✓ one is one\n✗ not so: one is two\n", "")


@pytest.mark.parametrize("evidence", FALSE, ids=repr)
def test_what_fails_raises_and_prints_nothing(evidence, capsys):
    with pytest.raises(AssertionError, match=r"^one is two$"):
        check("one is two", evidence)
    with pytest.raises(AssertionError, match=r"^no evidence against: one is one$"):
        refute("one is one", evidence)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("claim", [check, refute])
@pytest.mark.parametrize(
    ("evidence", "message"),
    [
        *[
            (wrong, f"evidence must be true or false; got {wrong!r}")
            for wrong in (None, 1, 0, "yes", [True], torch.tensor(1), torch.ones(2), np.int64(1))
        ],
        *[
            (wrong, f"evidence must be one truth value; got shape {shape}: say .all() or .any()")
            for wrong, shape in (
                (torch.ones(2, 3) > 0, (2, 3)),
                (torch.ones(1) > 0, (1,)),
                (np.ones(2) > 0, (2,)),
                (np.ones(0) > 0, (0,)),
            )
        ],
    ],
)
def test_what_is_no_single_truth_value_is_refused(claim, evidence, message, capsys):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        claim("something", evidence)
    assert capsys.readouterr() == ("", "")


def must_double(answer):
    if answer(3) != 6:
        raise AssertionError(f"must give 6; got {answer(3)}")


def must_not_give_five(answer):
    if answer(3) == 5:
        raise AssertionError


@pytest.mark.parametrize(
    ("answer", "test", "printed"),
    [
        (lambda x: 2 * x, must_double, "☑ solved\n"),
        (lambda x: x + 2, must_double, "☐ not yet: must give 6; got 5\n"),
        (lambda x: x + 2, must_not_give_five, "☐ not yet: AssertionError\n"),
        (lambda x: x.y, must_double, "☐ not yet: 'int' object has no attribute 'y'\n"),
    ],
)
def test_an_attempt_says_how_it_stands(answer, test, printed, capsys):
    attempt(answer, test)
    assert capsys.readouterr() == (printed, "")


def test_an_attempt_can_be_interrupted():
    """Only the reader's mistakes are caught."""

    def interrupted(answer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(len, interrupted)
