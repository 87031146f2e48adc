"""Text of others on the terminal is the text that it is."""

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from mmfm_jax.screen import make_console, plain, printable


@given(st.text())
def test_nothing_is_left_that_a_terminal_obeys(text):
    shown = printable(text)
    assert shown.isprintable() and not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in shown)
    assert printable(shown) == shown


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E)))
def test_plain_text_stays(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\u202eb", r"a\u202eb"),
        ("a\nb\tc", "a b c"),
        ("Größe µg", "Größe µg"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["[degF]", "[/mL]", "[bold red]x[/]", ":bug:", r"\[x]", "[link=http://x]y[/link]"])
def test_markup_is_text_to_our_console_and_in_our_tables(text):
    screen = io.StringIO()
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console = make_console(file=screen, width=200)
    console.print(table)
    console.print(text)
    assert screen.getvalue().count(text) == 4
    screen = io.StringIO()
    Console(file=screen, width=200).print(plain(text))
    assert screen.getvalue() == text + "\n"


def test_our_console_writes_control_characters_out():
    screen = io.StringIO()
    make_console(file=screen).print("a\x1b]0;title\x07b\nc")
    assert screen.getvalue() == "a\\x1b]0;title\\x07b\nc\n"
