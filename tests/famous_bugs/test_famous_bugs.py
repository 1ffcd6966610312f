"""Each famous bug is caught by its test, which passes with the right code."""

import inspect
import re

import pytest
import torch
from famous_bugs.bug import PARTS, bugs_of

BUGS = [bug for part in PARTS for bug in bugs_of(part)]


@pytest.fixture(params=BUGS, ids=lambda bug: bug.__name__)
def bug(request):
    return request.param


def test_the_wrong_code_is_caught(bug):
    with pytest.raises(AssertionError):
        bug.test(bug.wrong)


@pytest.mark.parametrize("code", ["right", "ours"])
def test_the_right_code_passes(bug, code):
    if getattr(bug, code):
        bug.test(getattr(bug, code))


def test_the_numbers_differ(bug):
    torch.manual_seed(0)
    wrong = float(bug.measure(bug.wrong))
    torch.manual_seed(0)
    right = float(bug.measure(bug.right))
    assert wrong != right


def test_it_is_told_in_few_lines(bug):
    for code in (bug.wrong, bug.right, bug.ours, bug.test):
        lines = inspect.getsource(code).splitlines() if code else [""]
        assert len(lines) <= 20
        assert max(map(len, lines)) <= 80
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", thread) for thread in bug.seen)
    title, blank, *story = inspect.getdoc(bug).splitlines()
    assert title
    assert not blank
    assert story
