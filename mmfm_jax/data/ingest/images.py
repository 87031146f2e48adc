"""Voxels on their way: converted in workers, kept under keyed hashes, and read again when the store is written."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from mmfm_jax.data import parquet
from mmfm_jax.data.deid.identifiers import Hider
from mmfm_jax.data.ingest.convert import Conversion, Converted, MaskOf, convert, converted
from mmfm_jax.data.ingest.dataset import Dataset
from mmfm_jax.data.ingest.ledger import Ledger
from mmfm_jax.data.ingest.masks import StudyMask
from mmfm_jax.data.ingest.pool import Runner
from mmfm_jax.data.ingest.progress import shown
from mmfm_jax.data.ingest.series import Owner
from mmfm_jax.data.ingest.studies import Joined
from mmfm_jax.data.readers.legend import Legend
from mmfm_jax.data.readers.masks import MaskSource
from mmfm_jax.data.refuse import Refused
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.study import Image, Study
from mmfm_jax.errors import UserError

VERSION = 2
"""Of what ingest makes of the same input: raise it when readers or rules change, so that nothing old is kept."""


_SERIES = pa.schema([("row", pa.int64()), ("role", pa.string()), ("series", pa.string())])
_MOST_BYTES = 4 * 2**30


class Images:
    """Converted voxels by keyed hash of role and files: in the work folder, or in the store that is added to."""

    def __init__(self, dataset: Dataset, hider: Hider, root: Path, work: Path, old: StudyStore | None):
        self._dataset, self._hider, self._root, self._work, self._old = dataset, hider, root, work, old
        self._old_rows = _old_series(old) if old is not None else {}
        self._digests: dict[tuple[Owner, str], str] = {}
        self._lost: set[tuple[Owner, str]] = set()
        """Images of which a mask was refused."""

    def digest(self, study: Joined, role: str) -> str:
        """Of an image with the masks that are asked of it; masks refused since then count."""
        unit = (study.owner, role)
        if unit not in self._digests:
            series = study.images[role]
            said = [str(VERSION), role, self._dataset.images[role].model_dump_json()]
            said += [one.state for one in series.inputs]
            for mask in self._masks(study, role):
                said += [mask.name, self._dataset.masks[mask.name].model_dump_json()]
                said += [file.input.state for file in mask.files]
            self._digests[unit] = self._hider.state("\0".join(said))
        return self._digests[unit]

    def _masks(self, study: Joined, role: str) -> list[StudyMask]:
        return [
            study.masks[name]
            for name, mask in self._dataset.masks.items()
            if name in study.masks and mask.image == role
        ]

    def convert(self, joined: list[Joined], ledger: Ledger, pool: Runner, progress: Progress) -> None:
        """Converts what is not there yet; a series or mask that is refused leaves its study."""
        wanted = [(study, role) for study in joined for role in study.images]
        left = [
            (study, role)
            for study, role in wanted
            if self.digest(study, role) not in self._old_rows and self._converted(study, role) is None
        ]
        tasks = [self._conversion(study, role, pool) for study, role in left]
        again: list[tuple[int, Refused]] = []
        for index, result in shown(progress, "Converting images", convert, tasks, pool):
            if isinstance(result, Refused):
                again.append((index, result)) if tasks[index].masks else self._refuse(*left[index], result, ledger)
        # A mask that spoils its image is left out: without any of them the image may be taken.
        alone = [
            replace(
                tasks[index], masks=(), refused={mask.name: (why.reason, why.detail) for mask in tasks[index].masks}
            )
            for index, why in again
        ]
        for index, result in pool.run(convert, alone):
            if isinstance(result, Refused):
                self._refuse(*left[again[index][0]], result, ledger)
        for study, role in wanted:
            if role in study.images and (held := self._converted(study, role)) is not None:
                for name, why in held.refused.items():
                    study.masks.pop(name).refuse(ledger, why)
                    self._lost.add((study.owner, role))

    def _conversion(self, study: Joined, role: str, pool: Runner) -> Conversion:
        series = study.images[role]
        return Conversion(
            series.kind,
            tuple(self._root / one.path for one in series.inputs),
            self._dataset.images[role],
            self._work / self.digest(study, role),
            pool.limits.voxels,
            tuple(MaskOf(mask.name, self._sources(mask), self._legend(mask.name)) for mask in self._masks(study, role)),
        )

    def _sources(self, mask: StudyMask) -> tuple[MaskSource, ...]:
        return tuple(MaskSource(file.kind, self._root / file.input.path, file.segment) for file in mask.files)

    def _legend(self, name: str) -> Legend:
        mask = self._dataset.masks[name]
        return Legend(mask.classes, mask.values, mask.others == "background")

    def _refuse(self, study: Joined, role: str, why: Refused, ledger: Ledger) -> None:
        study.images.pop(role).refuse(ledger, why)
        for mask in self._masks(study, role):
            study.masks.pop(mask.name).refuse(ledger, Refused("image_missing", "its image was refused"))

    def _converted(self, study: Joined, role: str) -> Converted | None:
        return converted(self._work / self.digest(study, role))

    def load(self, study: Joined, role: str) -> tuple[Image, dict[str, np.ndarray]]:
        """An image and its masks."""
        digest = self.digest(study, role)
        if digest in self._old_rows:
            assert self._old is not None
            row = self._old_rows[digest]
            info = self._old.volume_info(role, row)
            assert info is not None
            masks = {
                one.name: self._old.mask_crop(one.name, row, (0, 0, 0), info[0]) for one in self._masks(study, role)
            }
            return Image(self._old.crop(role, row, (0, 0, 0), info[0]), info[1]), masks
        held = converted(self._work / digest)
        if held is None:
            raise UserError(f"{self._work}: lost what was converted; run the same command again")
        return held.image, held.masks

    def study(self, joined: Joined, texts: Mapping[str, tuple[str, ...]], hider: Hider) -> Study:
        """The study as the store holds it; its voxels are read when they are written."""
        loaded = {role: self.load(joined, role) for role in joined.images}
        return Study(
            patient=hider.patient(joined.owner[0]),
            split=joined.split,
            images={role: image for role, (image, _) in loaded.items()},
            masks={name: mask for _, masks in loaded.values() for name, mask in masks.items()},
            texts=dict(texts),
            row={name: value for name, value in joined.values.items() if isinstance(value, (str, float))},
            labels=dict(joined.labels),
        )

    def table(self, studies: list[Joined]) -> bytes:
        """`series.parquet`: which row and role holds which files, by keyed hash, so that they are not converted again.

        An image that lost a mask is left out: whoever adds to the store must say again why it was refused.
        """
        held = [
            {"row": row, "role": role, "series": self.digest(study, role)}
            for row, study in enumerate(studies)
            for role in study.images
            if (study.owner, role) not in self._lost
        ]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(held, schema=_SERIES), sink, compression="zstd")
        return sink.getvalue()


def _old_series(store: StudyStore) -> dict[str, int]:
    """Rows by keyed hash."""
    data = store.beside("series.parquet")
    try:
        rows = parquet.read(data, _SERIES, most=_MOST_BYTES).to_pylist() if data else []
    except ValueError as error:
        raise UserError(f"{store.url}/series.parquet: is damaged; build the store again at another place") from error
    return {row["series"]: row["row"] for row in rows}
