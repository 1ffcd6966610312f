"""Progress is seen by whoever watches, and by nobody else; nothing of it stays."""

import io
import sys

import pytest
from jupyter_client.manager import start_new_kernel

from tfm_ref import progress

CELL = """
import time
from tfm_ref.progress import progress
for i in progress(range(3), "epoch"):
    time.sleep(0.25)
"""


@pytest.mark.parametrize("watched", [True, False])
def test_in_a_notebook(watched):
    manager, client = start_new_kernel()
    try:
        seen = []
        client.execute_interactive(
            CELL,
            allow_stdin=watched,
            stdin_hook=lambda message: None,
            output_hook=lambda message: seen.append((message["msg_type"], message["content"])),
            timeout=60,
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    shown = [c["text"] for kind, c in seen if kind == "stream"]
    cleared = [c["wait"] for kind, c in seen if kind == "clear_output"]
    assert not any(kind == "error" for kind, _ in seen)
    if watched:
        assert shown == ["epoch 1 of 3", "epoch 2 of 3", "epoch 3 of 3"]
        assert cleared == [True, True, True, False]  # the last one clears at once
    else:
        assert shown == cleared == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress([5, 6], "step")) == [5, 6]
    assert sys.stderr.getvalue() == "\r\x1b[Kstep 1 of 2\r\x1b[K"


def test_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress("ab")) == ["a", "b"]
    assert sys.stderr.getvalue() == capsys.readouterr().out == ""


def test_the_line_is_removed_if_the_loop_is_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in progress(range(9)):
        break
    assert sys.stderr.getvalue().endswith("\r\x1b[K")
