"""What a famous bug is: wrong code, right code, a number and the test that tells them apart.

The page "Famous bugs" shows each as it stands here.
"""

from collections.abc import Callable
from importlib import import_module
from typing import ClassVar

PARTS = ("attention", "depth", "models", "scale")


class Bug:
    """A bug that was shipped. Its docstring: a name, a blank line, what goes wrong and why.

    A subclass holds, beside what is declared here, the functions or classes ``wrong`` and
    ``right``; ``measure``, whose docstring says what number it gives for either; and ``test``,
    which passes with ``right`` and not with ``wrong``. What has a third name and stands between
    them is shown, too.
    """

    chapter: ClassVar[str] = ""
    """The section that tells more, if there is one: ``"01_self_attention#when-it-goes-wrong"``."""

    seen: ClassVar[tuple[str, ...]] = ()
    """Public threads, such as ``"pytorch/pytorch#103963"``."""

    ours: ClassVar[Callable | None] = None
    """What ``tfm_ref`` has for it, if that can take the same test."""


def bugs_of(part: str) -> list[type[Bug]]:
    """Give the bugs of one part of the book, in their order."""
    module = import_module(f"famous_bugs.{part}")
    members = [member for member in vars(module).values() if isinstance(member, type)]
    return [bug for bug in members if issubclass(bug, Bug) and bug is not Bug]
