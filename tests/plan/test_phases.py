"""What a plan says of itself while it compiles."""

import io

import pytest
from rich.console import Console

from mmfm_jax.plan.phases import Phases


def said(terminal: bool) -> str:
    written = io.StringIO()
    with Phases(Console(file=written, force_terminal=terminal, width=80)) as phase:
        phase("trace")
        phase("compile")
        if terminal:
            phase._progress.refresh()
    return written.getvalue()


def test_without_a_terminal_each_phase_is_a_line_and_the_last_says_how_long_they_took():
    *lines, last = said(terminal=False).splitlines()
    assert lines == ["plan: trace ...", "plan: compile ..."]
    assert last.startswith("plan: seconds of each: trace 0.") and ", compile 0." in last


def test_on_a_terminal_one_line_has_the_phase_and_the_time():
    written = said(terminal=True)
    assert "compile ..." in written and "0:00:0" in written and "plan: trace ..." not in written


def test_after_an_error_nothing_is_summed_up():
    written = io.StringIO()
    with pytest.raises(ValueError), Phases(Console(file=written)) as phase:
        phase("trace")
        raise ValueError
    assert written.getvalue() == "plan: trace ...\n"
