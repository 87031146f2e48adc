"""Text is printed as it is: no bracket of a path, a unit or an extra is taken for markup."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Group
from rich.table import Table

from mmfm_jax.data.inspect.summary import summary
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Schema, Study
from mmfm_jax.screen import counted, screen

ROOT = Path(__file__).parents[1]
TEXT = "of mmfm_jax[tpu], /runs/[bold]/a [HU] :100: [/]"


def printed(what) -> str:
    file = io.StringIO()
    screen(file=file, width=200).print(what)
    return file.getvalue()


def table() -> Table:
    made = Table(title=TEXT, caption=TEXT)
    made.add_column(TEXT)
    made.add_row(TEXT)
    return made


@pytest.mark.parametrize(
    "what, times", [(TEXT, 1), (Group(TEXT, TEXT), 2), (table(), 4)], ids=["text", "group", "table"]
)
def test_brackets_and_colons_are_printed(what, times):
    assert printed(what).count(TEXT) == times


def test_a_bar_counts_all_and_prints_its_words(capsys):
    file = io.StringIO()
    assert list(counted(iter("abc"), TEXT, screen(file=file, width=200, force_terminal=True), 3)) == ["a", "b", "c"]
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
