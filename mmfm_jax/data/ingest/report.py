"""What `mmfm ingest` says at its end, and what `mmfm rejects` says to who holds the key and the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from mmfm_jax.data.deid.identifiers import Hider
from mmfm_jax.data.ingest.inputs import Files, root_of
from mmfm_jax.data.ingest.ledger import Counts, by_reason
from mmfm_jax.data.ingest.load import load_dataset, read_key
from mmfm_jax.data.ingest.run import Outcome
from mmfm_jax.data.refuse import from_parquet
from mmfm_jax.data.split import fingerprint
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.errors import UserError
from mmfm_jax.screen import plain, printable


def summary(outcome: Outcome) -> RenderableType:
    """Tables of inputs by source and of refusals by reason."""
    inputs = Table(box=None, pad_edge=False)
    inputs.add_column("Inputs")
    for column in ("found", "taken", "refused"):
        inputs.add_column(column, justify="right")
    for source, counts in outcome.counts.items():
        inputs.add_row(plain(source), *_numbers(counts))
    every = outcome.counts.values()
    total = Counts(sum(c.inputs for c in every), sum(c.taken for c in every), sum(c.refused for c in every))
    inputs.add_row("together", *_numbers(total), style="bold")
    if not outcome.rejects:
        return inputs
    reasons = Table(box=None, pad_edge=False)
    for column in ("Left out", "reason", "mend"):
        reasons.add_column(column)
    reasons.add_column("how many", justify="right")
    for reject, count in by_reason(outcome.rejects):
        what = f"{reject.source}: {reject.part}" if reject.part else reject.source
        reasons.add_row(plain(what), reject.reason, reject.mend, f"{count:,}")
    return Group(inputs, "", reasons, "", "`mmfm rejects STORE DATASET` names the files.")


def held(outcome: Outcome, store: StudyStore) -> str:
    """A line of what the store holds."""
    patients = sum(counts.patients for counts in store.counts.values())
    state = "" if outcome.built else ", as it was: all inputs are in it already"
    return f"{store.url}: {len(store):,} studies of {patients:,} patients{state}"


def _numbers(counts: Counts) -> list[str]:
    return [f"{n:,}" for n in (counts.inputs, counts.taken, counts.refused)]


def named(store_url: str, described_in: Path) -> Iterator[str]:
    """A line for every reject of a store with the path of its file, found again by hashing the paths below the root.

    Paths may identify: this is for the terminal of who holds key and files anyway. Raises UserError when the key is not
    the store's.
    """
    store = StudyStore.open(store_url)
    dataset = load_dataset(described_in)
    key = read_key(dataset, described_in)
    data = store.beside("rejects.parquet")
    if data is None:
        raise UserError(f"{store_url}: was not built by `mmfm ingest`, so it lists no rejects")
    if store.file.source.get("split_key_fingerprint") != fingerprint(key):
        raise UserError(f"{store_url}: was made with another key; give the key that it was made with")
    hider = Hider(key)
    paths = {hider.file(path): path for path in Files(root_of(dataset, described_in)).by_path}
    paths |= {hider.file(table.file): table.file for table in dataset.tables.values()}
    try:
        rejects = from_parquet(data)
    except ValueError as error:
        raise UserError(f"{store_url}/rejects.parquet: is damaged; copy the store again or build it again") from error
    for reject in rejects:
        path = ascii(paths.get(reject.file, "(a file that is not there any more)"))[1:-1]
        row = f" row {reject.row}" if reject.row else ""
        part = f" {reject.part}" if reject.part else ""
        yield printable(f"{path}{row}:{part} {reject.reason}: {reject.detail}; {reject.mend}")
