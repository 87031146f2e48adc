"""A stranger's store, run and description: nothing of ours is overwritten, text is text, and lies get one sentence."""

import base64
import io
import json
import os
import re
import shutil
import stat
import struct
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from tokenizers import Regex, models, normalizers
from tokenizers import Tokenizer as Foreign

from mmfm_jax.cli import main
from mmfm_jax.data import parquet
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.feed.tokenizer_file import backtracks
from mmfm_jax.data.ingest import patterns
from mmfm_jax.data.ingest.place import work_folder
from mmfm_jax.data.inspect import page as inspect_page
from mmfm_jax.data.inspect.summary import summary
from mmfm_jax.data.inspect.survey import survey
from mmfm_jax.data.refuse import Reject, to_parquet
from mmfm_jax.data.split import fingerprint
from mmfm_jax.data.store import rows
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, LabelSpec, MaskSpec, Schema, Study
from mmfm_jax.errors import UserError
from mmfm_jax.evaluate import evaluate as evaluation
from mmfm_jax.evaluate.report import write_report
from mmfm_jax.metrics.findings import Findings
from mmfm_jax.train.lock import RunLock
from mmfm_jax.train.prolong import set_decay_aside

MINE = "mine, and nobody else's"
STRINGS = (
    "[degF]", "[/mL]", "[bold]x[/bold]", ":bug:", "cost $a_{ per $b", r"\frac{", "<script>alert(1)</script>",
    "x\x1b[2J\x1b]0;owned\x07", "\u202egnp.exe", "a\nb", "_hidden", "'\"&", "%s{0}{x}", "n" * 200,
)  # fmt: skip
"""Names, units and descriptions, each of which one library or terminal takes for a command."""


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A store of four studies, named by hostile strings where a store has names."""
    numbers = {text: ColumnSpec(kind="number", unit=text, description=text) for text in STRINGS}
    schema = Schema(
        images={
            "ct": ImageSpec(dtype="uint8", shape=None, description=STRINGS[6]),
            "x": ImageSpec(dtype="uint8", shape=(1, 4, 4)),
        },
        texts={"report": STRINGS[4], STRINGS[7]: ""},
        columns=numbers | {"sex": ColumnSpec(kind="category", vocabulary=STRINGS)},
        labels={"finding": LabelSpec(classes=STRINGS)},
        masks={"lesion": MaskSpec(image="ct", classes=STRINGS[:2])},
    )

    def study(i: int) -> Study:
        voxels = np.full((1, 4, 4, 1), 9 * i, np.uint8)
        return Study(
            patient=f"{i:032x}",
            split=("train", "test")[i % 2],
            images={"ct": Image(voxels, (1, 1, 1)), "x": Image(voxels, (1, 1, 1))},
            texts={"report": ("seen",), STRINGS[7]: ("more",)},
            row={s: float(i) for s in STRINGS} | {"sex": STRINGS[i]},
            labels={"finding": i},
            masks={"lesion": np.ones((1, 4, 4), np.uint8)},
        )

    place = tmp_path_factory.mktemp("hostile") / "store"
    beside = {"rejects.parquet": to_parquet([]), "inputs.json": b'{"images": {"inputs": 4, "taken": 4, "refused": 0}}'}
    told = {"description": "\n".join(STRINGS), "source": {STRINGS[1]: STRINGS[7]}}
    write_store(str(place), schema, map(study, range(4)), beside=beside, **told)
    return place


@pytest.fixture
def store(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


@pytest.fixture
def victim(tmp_path) -> Path:
    path = tmp_path / "authorized_keys"
    path.write_text(MINE)
    return path


@pytest.fixture
def said(capsys):
    """`said("inspect", store)`: the one sentence with which a command ends."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        told = capsys.readouterr().err
        assert exit.value.code == 2 and told.count("\n") == 1 and told[:-1].isprintable()
        assert told.startswith("mmfm: ") and "Traceback" not in told and len(told) < 2000
        return told

    return run


# ---------------------------------------------------------------- files


def test_inspect_writes_its_page_and_no_other_file(store, victim, monkeypatch, tmp_path):
    for name in (".inspect.html.partial", "inspect.html"):
        (store / name).symlink_to(victim)
    monkeypatch.setattr(inspect_page, "render", lambda _: "page")
    opened = StudyStore.open(str(store))
    assert inspect_page.write_page(opened, None).read_text() == "page"
    assert victim.read_text() == MINE and not (store / "inspect.html").is_symlink()
    assert stat.S_IMODE((store / "inspect.html").stat().st_mode) == 0o600
    (store / "inspect.html").unlink()
    monkeypatch.setattr(inspect_page.os, "geteuid", lambda: 12345)  # the folder is another user's
    monkeypatch.chdir(tmp_path)
    assert inspect_page.write_page(opened, None).resolve() == tmp_path / "inspect.html"
    assert not (store / "inspect.html").exists()


def test_a_report_gives_way_to_no_link_and_is_its_owners(victim, tmp_path):
    for name in (".report.html.partial", "report.html"):
        (tmp_path / name).symlink_to(victim)
    write_report(tmp_path, STRINGS[6], "\n".join(STRINGS), Findings(notes=STRINGS, headlines=STRINGS))
    page = (tmp_path / "report.html").read_text()
    assert victim.read_text() == MINE and stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == 0o600
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page and "[/mL]" in page


@pytest.mark.parametrize("name", ["config.yaml", ".lock", "metrics.jsonl", "stalls", "checkpoints", "tensorboard"])
def test_a_run_folder_with_a_link_is_not_trained_into(said, config, victim, tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(victim)
    assert "is a link" in said("train", config, "--run", run)
    assert victim.read_text() == MINE and [p.name for p in run.iterdir()] == [name]


def test_a_lock_that_is_another_file_is_not_emptied(victim, tmp_path):
    (tmp_path / ".lock").hardlink_to(victim)
    with pytest.raises(UserError, match=r"\.lock: cannot be written"):
        RunLock(tmp_path).take()
    assert victim.read_text() == MINE


def test_what_is_set_aside_of_a_run_is_copied_through_no_link(make_experiment, victim, tmp_path):
    held, asked = make_experiment({"train.steps": 8}), make_experiment({"train.steps": 16})
    (tmp_path / "checkpoints/8").mkdir(parents=True)
    for name in ("tokenizer.json", "inputs.json", "config.yaml"):
        (tmp_path / name).write_text("the run's")
    (tmp_path / "steps-8").mkdir()
    (tmp_path / "steps-8/config.yaml").symlink_to(victim)
    with pytest.raises(UserError, match="is a link"):
        set_decay_aside(tmp_path, held, asked)
    assert victim.read_text() == MINE


def test_a_store_and_what_waits_beside_it_are_their_owners(template, tmp_path, victim):
    assert stat.S_IMODE(template.stat().st_mode) == 0o700
    place = work_folder(str(tmp_path / "out"), None)
    place.chmod(0o755)
    assert stat.S_IMODE(work_folder(str(tmp_path / "out"), None).stat().st_mode) == 0o700
    (tmp_path / ".taken.ingest").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link"):
        work_folder(str(tmp_path / "taken"), None)
    assert (
        work_folder(str(tmp_path / "out"), tmp_path).parent == tmp_path
    )  # of a folder that is given, a part of our own


# ---------------------------------------------------------------- strings


def test_every_name_is_shown_as_the_text_that_it_is(store):
    opened = StudyStore.open(str(store))
    screen = io.StringIO()
    Console(file=screen, width=2000).print(summary(opened))
    shown = screen.getvalue()
    first = ("[degF]", "[/mL]", "[bold]x[/bold]", ":bug:", "cost $a_{ per $b", r"x\x1b[2J\x1b]0;owned\x07")
    for text in (*first, r"\u202egnp.exe"):
        assert shown.count(text) >= 4, text
    assert shown.replace("\n", "").isprintable()
    page = inspect_page.render(opened)
    assert "<script" not in page and page.replace("\n", "").isprintable()
    for data in re.findall('base64,([^"]*)', page):
        drawn = base64.b64decode(data).decode()
        assert "<script" not in drawn and not re.search("[\x00-\x08\x0b-\x1f]", drawn)


# ---------------------------------------------------------------- lies of a store


def lie(change):
    """What `store.json` says after a change."""

    def write(store: Path) -> None:
        raw = json.loads((store / "store.json").read_text())
        change(raw)
        (store / "store.json").write_text(json.dumps(raw))

    return write


def into(*path):
    """`into("schema", "images", value)`: sets a field."""
    *way, last, value = path

    def change(raw: dict) -> None:
        for name in way:
            raw = raw[name]
        raw[last] = value

    return lie(change)


def raw(text: str, name: str = "store.json"):
    return lambda store: (store / name).write_text(text)


def role(**fields):
    return into("schema", "images", "ct", {"dtype": "uint8", "shape": None} | fields)


LIES = {
    "counts below 0": into("counts", "train", "studies", -1),
    "counts of 10^15": into("counts", "train", "studies", 10**15),
    "counts of 4,000 digits": into("counts", "train", "patients", 10**4000),
    "a count of 5,000 digits": raw('{"format_version": 3, "counts": ' + "9" * 5000 + "}"),
    "200,000 brackets": raw("[" * 200_000),
    "brackets in a version": raw('{"format_version": ' + "[" * 200_000),
    "a version of 4,000 digits": into("format_version", 10**4000),
    "version 0": into("format_version", 0),
    "a version that is text": into("format_version", "3\x1b[2J"),
    "a version without end": raw('{"format_version": 1e999}'),
    "a shape of 100,000^3": role(shape=[100_000] * 3),
    "a shape below 0": role(shape=[-1, 4, 4]),
    "channels of 10^9": role(channels=10**9),
    "no channels": role(channels=0),
    "objects as voxels": role(dtype="O"),
    "a type of 10^9 bytes": role(dtype="V1000000000"),
    "a role of two dots": into("schema", "images", "..", {"dtype": "uint8", "shape": None}),
    "a role that is a path": into("schema", "images", "a/../../b", {"dtype": "uint8", "shape": None}),
    "a role with a null": into("schema", "images", "a\0b", {"dtype": "uint8", "shape": None}),
    "a name of nothing": into("schema", "columns", "", {"kind": "number"}),
    "a file above the store": into("files", "../secret", "0" * 64),
    "a file with a null": into("files", "a\0", "0" * 64),
    "a file that TensorStore keeps to itself": into("files", "a.__lock", "0" * 64),
    "no tables": into("files", {}),
    "no splits": into("counts", {}),
    "a column without statistics": into("schema", "columns", "new", {"kind": "number"}),
    "more studies than rows": into("counts", "train", "studies", 3),
    "nested statistics": raw("[" * 200_000, "stats.json"),
    "an account of nothing": raw('{"images": {"inputs": "many"}}', "inputs.json"),
    "an account without end": raw("[" * 200_000, "inputs.json"),
    "rejects that are no table": raw("PAR1", "rejects.parquet"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lie_of_a_store_is_told_in_one_sentence(said, store, name, monkeypatch):
    monkeypatch.setattr(inspect_page, "figures", MagicMock())  # they are tested above
    monkeypatch.setattr(inspect_page, "image", lambda *_: "")
    monkeypatch.setattr(inspect_page, "_montage", lambda _: "")
    LIES[name](store)
    assert str(store) in said("inspect", store)
    assert not list(store.glob("*.html"))


def test_a_split_that_no_study_has_is_told(store):
    lie(lambda raw: raw["counts"].update(other=raw["counts"].pop("train")))(store)
    with pytest.raises(UserError, match=r"index.parquet/00000.parquet: is not what store.json says"):
        StudyStore.open(str(store)).rows("other")


@pytest.mark.parametrize("name", ["store.json", "stats.json"])
@pytest.mark.parametrize("kind", ["pipe", "huge"])
def test_a_file_that_never_ends_is_not_read(said, store, name, kind):
    (store / name).unlink()
    if kind == "pipe":
        os.mkfifo(store / name)
    else:
        with (store / name).open("wb") as file:
            file.truncate(2**40)  # which takes no room
    assert name in said("inspect", store)


def bomb(store: Path, column: str, value: object, **how) -> None:
    """Puts a value into every row of a column of the studies."""
    name = store / rows.part_name("studies", 0)
    table = pq.read_table(name)
    at = table.schema.names.index(column)
    table = table.set_column(at, table.schema.field(at), pa.array([value] * len(table), table.schema.field(at).type))
    pq.write_table(table, name, row_group_size=256, compression="zstd", **how)


@pytest.mark.parametrize(
    "column, value, how",
    [
        ("text/report", ["x" * 30_000] * 200, {}),  # one word, told to repeat
        ("text/report", ["x" * 3_000_000], {"use_dictionary": False}),  # pages of one character
        ("image/ct/shape", [7] * 600_000, {}),  # runs of numbers
    ],
    ids=["dictionary", "page", "runs"],
)
def test_a_table_that_would_fill_the_memory_is_not_decoded(store, column, value, how, monkeypatch):
    assert len(survey(StudyStore.open(str(store))).rows) == 4
    bomb(store, column, value, **how)
    assert (store / rows.part_name("studies", 0)).stat().st_size < 40_000
    monkeypatch.setattr(parquet, "MOST_BYTES", 10 * 2**20)
    with pytest.raises(UserError, match=r"studies.parquet/00000.parquet: is damaged"):
        survey(StudyStore.open(str(store)))
    monkeypatch.setattr(parquet, "MOST_BYTES", 100 * 2**20)
    assert len(survey(StudyStore.open(str(store))).rows) == 4


def test_records_that_lie_are_damaged(store):
    opened = StudyStore.open(str(store))
    path = store / "rows/00000.rows"
    data = bytearray(path.read_bytes())
    starts = list(struct.unpack_from("<5Q", data))
    for lies in ([*starts[:4], 2**61], [starts[0], 2**63, *starts[2:]], [*starts[:2], 0, *starts[3:]]):
        index = struct.pack("<5Q", *lies)
        path.write_bytes(index + crc32(index).to_bytes(8, "little") + data[48:])
        with pytest.raises(UserError, match="damaged or cut"):
            StudyStore.open(str(store)).table(0)
    record = bytes(data[starts[0] + 4 : starts[1]])
    layout = opened._rows._layout  # pyright: ignore[reportAttributeAccessIssue]
    texts = layout._fixed.size
    nested = record[:texts] + b"[" * (len(record) - texts)
    data[starts[0] : starts[1]] = crc32(nested, crc32(struct.pack("<Q", 0))).to_bytes(4, "little") + nested
    path.write_bytes(data)
    with pytest.raises(UserError, match="study 0 is damaged"):
        StudyStore.open(str(store)).table(0)


@pytest.mark.parametrize("change", ["coded otherwise", "a chunk of 10^12 voxels", "more voxels than the store says"])
def test_an_array_that_the_writer_would_not_have_made_is_not_decoded(store, change):
    path = store / "volumes/ct/00000000/0/zarr.json"
    raw = json.loads(path.read_text())
    (sharding,) = raw["codecs"]
    if change == "coded otherwise":
        sharding["configuration"]["codecs"][1] = {"name": "zstd", "configuration": {"level": 1}}
    elif change == "a chunk of 10^12 voxels":
        raw["chunk_grid"]["configuration"]["chunk_shape"] = [1, 10**4, 10**4, 10**4]
        sharding["configuration"]["chunk_shape"] = [1, 10**4, 10**4, 10**4]
    else:
        raw["shape"] = [1, 1, 4, 2]
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="volumes/ct"):
        StudyStore.open(str(store)).crop("ct", 0, (0, 0, 0), (1, 4, 4))


def test_rejects_of_a_stranger_are_refused_or_shown_as_text(said, capsys, store, tmp_path):
    described = tmp_path / "dataset.yaml"
    text = {"files": ["*.txt"], "path": "(?P<patient>.)"}
    described.write_text(yaml.safe_dump({"key": {"file": "key.txt"}, "texts": {"t": text}}))
    (tmp_path / "key.txt").write_text("a key of the tests, long enough")
    into("source", {"split_key_fingerprint": fingerprint("a key of the tests, long enough")})(store)
    reject = Reject("images", "0" * 16, 0, "[/mL]\x1b[2J", "face", "\u202e\nx")
    (store / "rejects.parquet").write_bytes(to_parquet([reject]))
    main(["rejects", str(store), str(described)])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable() and r"[/mL]\x1b[2J" in line
    table = pq.read_table(store / "rejects.parquet")
    pq.write_table(table.set_column(4, "reason", pa.array(["no reason"])), store / "rejects.parquet")
    assert "rejects.parquet: is damaged" in said("rejects", store, described)


# ---------------------------------------------------------------- a stranger's run


def test_an_evaluation_says_where_studies_are_and_goes_nowhere_unasked(make_experiment, monkeypatch, tmp_path):
    def opened(_):
        raise UserError("this far")

    def evaluate(url: str, **more) -> str:
        """What it says and how it ends."""
        run = SimpleNamespace(experiment=make_experiment({"data.store": url}))
        monkeypatch.setattr(evaluation, "load_run", lambda _: run)
        screen = io.StringIO()
        with pytest.raises(UserError) as refused:
            evaluation.evaluate(tmp_path, Console(file=screen, width=200), **more)
        return screen.getvalue() + str(refused.value)

    monkeypatch.setattr(evaluation, "open_data", opened)
    for url in ("http://127.0.0.1:9/store", "https://x.example/[/mL]", "gs://bucket/store", "s3://bucket/store"):
        refused = evaluate(url)
        assert url in refused and "--remote" in refused and "this far" not in refused
        assert evaluate(url, remote=True) == f"Studies are read from {url}.\nthis far"
    assert evaluate("/data/[/mL]") == "this far"


def tokenizer_json(normalizer=None, last: int = 2) -> str:
    made = Foreign(models.WordLevel({"[PAD]": 0, "[MASK]": 1, "a": 2}, "[MASK]"))
    if normalizer is not None:
        made.normalizer = normalizer
    raw = json.loads(made.to_str())
    raw["model"]["vocab"]["a"] = last
    return json.dumps(raw)


GROWS = normalizers.Sequence([normalizers.Replace("a", "aaaa")] * 20)
SEARCHES = normalizers.Replace(Regex("(a+)+b"), "x")


@pytest.mark.parametrize(
    "made, told",
    [((GROWS,), "grow"), ((SEARCHES,), "for ever"), ((None, 2**31), "2,147,483,648")],
    ids=["grows", "searches", "ids"],
)
def test_a_tokenizer_of_others_is_bounded(made, told, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(*made))
    with pytest.raises(UserError, match=told):
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert Tokenizer.from_json(tokenizer_json()).vocabulary_size == 3


FAMILIAR = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # of GPT-4


@pytest.mark.parametrize("pattern", [r"(a+)+", r"(?:a*b?)*", r"([a-z]+){2,}", r"(?:\p{L}+|x)+"])
def test_a_repeat_within_a_repeat_is_seen(pattern):
    assert backtracks(pattern)
    assert not any(map(backtracks, (FAMILIAR, r"(?i:'s|'t)?\s+", r"\(a+\)+")))


# ---------------------------------------------------------------- a stranger's description


def test_a_pattern_that_backtracks_for_ever_ends_ingest_in_one_sentence(said, monkeypatch, tmp_path):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    (tmp_path / "notes").mkdir()
    (tmp_path / f"notes/{'a' * 60}.txt").write_text("well")
    (tmp_path / "key.txt").write_text("a key of the tests, long enough")
    text = {"files": ["notes/*.txt"], "path": r"notes/(?P<patient>(a+)+)b"}
    described = {"key": {"file": "key.txt"}, "texts": {"note": text}}
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(described))
    told = said("ingest", tmp_path / "dataset.yaml", "--out", tmp_path / "out")
    assert "(a+)+" in told and "aaaa" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["(" * 5000, "a{99999999999}", "(?P<patient>", "[z-a]"])
def test_what_is_no_pattern_is_refused(said, tmp_path, pattern):
    text = {"files": ["*.txt"], "path": pattern}
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({"texts": {"note": text}}))
    assert "is not a regular expression" in said("ingest", tmp_path / "dataset.yaml", "--out", tmp_path / "out")
