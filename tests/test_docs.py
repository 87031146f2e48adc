"""What the documents tell a reader to type is what the commands take: verbs, options, files, targets.

Nothing is run here: `make demo`, the notebooks and `tests/launch` run the way through, and pods are not to be had.
"""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from mmfm_jax.cli import EXAMPLES, parser
from mmfm_jax.config.examples import examples
from mmfm_jax.experiment import load_experiment

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(path for path in ROOT.glob("launch/*") if path.is_file()),
    *sorted(ROOT.glob("configs/**/*.yaml")),
    *sorted(ROOT.glob("notebooks/*.ipynb")),
]
FOLDERS = "benchmarks|configs|docs|launch|mmfm_jax|notebooks|tests"
TARGETS = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
VERBS = next(one for one in parser()._actions if isinstance(one, argparse._SubParsersAction)).choices
TAKE_FIELDS = {"train", "plan", "bench"}


def lines(document: Path) -> list[str]:
    """Lines of a shell: indented or commented ones that begin with a command."""
    return [
        line.strip("# ")
        for line in document.read_text().splitlines()
        if re.match(r"(    |#     )(mmfm|make|pip|launch/\S+|python3?) ", line)
    ]


def spans(document: Path) -> list[str]:
    """What stands in code quotes and begins with a command."""
    text = document.read_text().replace("\\`", "`")  # as a shell script quotes it
    return re.findall(r"`((?:mmfm|make|pip|launch/\S+|sbatch|python3?) [^`]*)`", text)


def words(command: str) -> list[str]:
    """Of the first command of a line, without what the shell itself takes."""
    return shlex.split(re.split(r" (?:[|>&;])", command)[0], comments=True)


def options(verb: str) -> set[str]:
    return {option for action in VERBS[verb]._actions for option in action.option_strings}


COMMANDS = [(document.relative_to(ROOT), line) for document in DOCUMENTS for line in lines(document)]
COMMANDS += [(Path("mmfm_jax/cli.py"), one) for text in EXAMPLES.values() for one in text.split(", or: ")]
SPANS = [(document.relative_to(ROOT), span) for document in DOCUMENTS for span in spans(document)]


def test_there_are_commands_to_look_at():
    assert len(COMMANDS) > 60 and len(SPANS) > 60, (len(COMMANDS), len(SPANS))
    assert {words(line)[1] for _, line in COMMANDS if line.startswith("mmfm ")} == set(VERBS)


@pytest.mark.parametrize("document, line", COMMANDS, ids=lambda value: str(value)[:60])
def test_a_line_to_type_is_taken(document, line):
    first, *rest = words(line)
    if first == "make":
        assert {word for word in rest if re.fullmatch("[a-z-]+", word)} <= TARGETS
    if first != "mmfm":
        return
    args, fields = parser().parse_known_args(rest)
    assert not fields or args.verb in TAKE_FIELDS, f"{document}: {fields}"
    given = getattr(args, "config", None) or getattr(args, "dataset", None)
    if given is None or "." not in str(given):
        return
    path = ROOT / given if str(given).startswith("configs/") else examples().get(Path(given).stem)
    if path is None:
        assert str(given) in ("dataset.yaml", "experiment.yaml"), f"{document}: {given} is nowhere"  # the reader's own
        return
    path = path if isinstance(path, Path) else path.path
    assert path.exists(), f"{document}: {given}"
    if fields:
        load_experiment(path, fields)


@pytest.mark.parametrize("document", sorted({document for document, _ in SPANS}), ids=str)
def test_verbs_options_and_targets_in_a_sentence_are_known(document):
    for named, span in SPANS:
        if named != document:
            continue
        first, *rest = words(span)
        if first == "make":
            assert {word for word in rest if re.fullmatch("[a-z-]+", word)} <= TARGETS, span
        if first == "mmfm" and not rest[0].startswith("--"):
            assert rest[0] in VERBS, span
            unknown = {word for word in rest if word.startswith("--")} - options(rest[0])
            assert not unknown or (rest[0] in TAKE_FIELDS and all("." in word for word in unknown)), span


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_document_names_are_there(document):
    named = re.findall(rf"(?<![\w/.~$}}-])((?:{FOLDERS})/[\w./-]*\w)", document.read_text())
    made = {"configs/data/key.txt"}  # by the command beside it
    assert not {name for name in named if not (ROOT / name).exists() and "NAME" not in name} - made
