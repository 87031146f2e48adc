"""Text of others on the terminal is the text that it is."""

import io
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from mmfm_jax.data.inspect.summary import summary
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Schema, Study
from mmfm_jax.screen import counted, make_console, plain, printable

ROOT = Path(__file__).parents[1]
TEXT = "of mmfm_jax[tpu], /runs/[bold]/a [HU] :100: [/]"


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


def printed(what) -> str:
    file = io.StringIO()
    make_console(file=file, width=200).print(what)
    return file.getvalue()


def test_a_bar_counts_all_and_prints_its_words(capsys):
    file = io.StringIO()
    assert list(counted(iter("abc"), TEXT, make_console(file=file, width=200, force_terminal=True), 3)) == [
        "a",
        "b",
        "c",
    ]
    assert TEXT in file.getvalue() and "3/3" in file.getvalue()


def test_a_summary_prints_units_and_values_of_the_store_as_they_are(tmp_path):
    schema = Schema(columns={"dose[1]": ColumnSpec(kind="number", unit="[iU]")})
    url = str(tmp_path / "[red]store")
    write_store(url, schema, [Study("a" * 32, "train", row={"dose[1]": 1.0})], description="[b]")
    said = printed(summary(StudyStore.open(url)))
    assert "[red]store" in said and "dose[1]" in said and "[iU]" in said and "[b]" in said


def test_nobody_makes_a_console_or_a_column_that_reads_markup():
    for path in [*ROOT.glob("mmfm_jax/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        if path.name != "screen.py":
            found = re.findall(r"\b(?:Console|TextColumn)\(|import track\b|\brich\.print", path.read_text())
            assert not found, f"{path}: {found[0]} reads markup; use mmfm_jax/screen.py"
