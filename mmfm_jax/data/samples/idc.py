"""The built-in sample of a million rows: every DICOM series of the NCI Imaging Data Commons, without its images.

Read from the wheel of `idc-index-data` 25.0.5 (https://github.com/ImagingDataCommons/idc-index-data, MIT), which holds
the index of IDC version 25: 1,044,191 series of 86,362 patients in 179 collections (Fedorov et al. 2023,
doi:10.1148/rg.230180). Only the Parquet file is read; the package is never imported.

A series is a study here: descriptions are texts, what header and collection say are columns, modality and body part
labels. **There is no image, and half of the series are derived (segmentations, measurements), many of them with
descriptions of one pattern:** it is there to show what a million rows cost and to try text and tables at size, and
says nothing of patients. A label can often be read off the description.

Each series has the licence of its collection, kept as a column: 97% are CC BY, 3% CC BY-NC, which bars commercial use.
Patients go by IDC's public pseudonyms, which are hashed as everyone's identifiers are.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from mmfm_jax.data.split import FRACTIONS, fingerprint, pseudonym, split_of
from mmfm_jax.data.store.format import open_kvstore, read_store_file
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, LabelSpec, Schema, Study
from mmfm_jax.errors import UserError
from mmfm_jax.screen import counted, make_console

LEAST_OF_A_KIND = 1000
"""Series that a maker or a body part needs, to be in the vocabulary or a class."""
_BATCH = 16_384
_TEXTS = {
    "series": ("SeriesDescription", "Series description, as the scanner or the software wrote it."),
    "study": ("StudyDescription", "Study description, as the scanner or the site wrote it."),
}
_CATEGORIES = {
    "sex": ("PatientSex", "As in the header: female, male or other."),
    "manufacturer": ("Manufacturer", "Of the scanner or of the software that derived the series."),
    "collection": ("collection_id", "Collection of IDC."),
    "license": ("license_short_name", "Under which the series may be used."),
    "pixels": ("PhotometricInterpretation", "How pixels are coloured."),
}
_NUMBERS = {
    "age_years": ("PatientAge", "years", "As in the header; many collections leave it out or say 0."),
    "instances": ("instanceCount", "", "DICOM files of the series."),
    "size_mb": ("series_size_MB", "MB", "Of all its files."),
}
_LABELS = {
    "modality": ("Modality", "DICOM modality."),
    "body_part": ("BodyPartExamined", "Body part examined, in capitals; parts of few series have no label."),
}
_SEXES = {"F": "female", "M": "male", "O": "other"}
_AGE = re.compile(r"(\d{3})([DWMY])")
_YEARS = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}  # of these in a year
_FEW = {"manufacturer", "body_part"}
_NAMED = {name: spec[0] for name, spec in (_CATEGORIES | _LABELS).items()}
_COLUMNS = [
    "PatientID",
    *(spec[0] for spec in (_TEXTS | _CATEGORIES | _LABELS).values()),
    *(n[0] for n in _NUMBERS.values()),
]


def build_idc(out: str, split_key: str, console: Console | None = None) -> bool:
    """Builds the store at `out` (a path or TensorStore URL) and returns True, or False when it is already there.

    Memory: a part of 65,536 rows, whatever the number of series.
    Raises UserError when idc-index-data is not installed, or when `out` holds something else.
    """
    console = console or make_console(stderr=True)
    path = _index()
    source = {
        "sample": "idc",
        "data": "idc-index-data 25.0.5, the index of NCI Imaging Data Commons version 25",
        "split_key_fingerprint": fingerprint(split_key),
        "fractions": " ".join(f"{name} {share}" for name, share in FRACTIONS.items()),
    }
    counts = {name: _counts(path, column) for name, column in _NAMED.items()}
    schema, licences = _schema(counts), ", ".join(f"{n:,} {name}" for name, n in counts["license"].most_common())
    there = read_store_file(open_kvstore(out), out)
    if there is not None:
        if there.source != source or there.declared != schema:
            raise UserError(
                f"{out}: already holds a store with another source, split key or schema; give another place or "
                "remove it"
            )
        return False
    total = pq.read_metadata(path).num_rows
    studies = counted(_studies(path, schema, split_key), "Writing series", console, total)
    description = (
        "DICOM series of the NCI Imaging Data Commons: descriptions, numbers and categories without any image. "
        f"Licences of the series: {licences}."
    )
    write_store(out, schema, studies, description=description, source=source)
    console.print(f"{total:,} series. Licences, a column of each: {licences}.", highlight=False)
    return True


def _index() -> Path:
    """The Parquet file in the installed package, found without importing it."""
    spec = importlib.util.find_spec("idc_index_data")
    path = Path(spec.origin if spec and spec.origin else "nowhere").with_name("idc_index.parquet")
    if not path.is_file():
        raise UserError(
            "idc-index-data 25.0.5, whose wheel (79 MB) holds the index of IDC, is not installed; "
            "run `pip install idc-index-data==25.0.5`"
        )
    return path


def _counts(path: Path, column: str) -> Counter[str]:
    """How many series have each value of a column, as it is named here."""
    found = Counter()
    for one in pq.read_table(path, columns=[column]).column(0).value_counts().to_pylist():
        if (value := _named(column, one["values"])) is not None:
            found[value] += one["counts"]
    return found


def _named(column: str, value: str | None) -> str | None:
    """A value as the store names it; None where there is none."""
    if column == "PatientSex":
        return _SEXES.get(value or "")
    value = " ".join((value or "").split())
    return (value.upper() if column == "BodyPartExamined" else value) or None


def _schema(counts: dict[str, Counter[str]]) -> Schema:
    held = {
        name: tuple(sorted(value for value, n in of.items() if name not in _FEW or n >= LEAST_OF_A_KIND))
        for name, of in counts.items()
    }
    numbers = {n: ColumnSpec(kind="number", unit=unit, description=said) for n, (_, unit, said) in _NUMBERS.items()}
    categories = {
        name: ColumnSpec(kind="category", vocabulary=held[name], description=said)
        for name, (_, said) in _CATEGORIES.items()
    }
    return Schema(
        texts={name: said for name, (_, said) in _TEXTS.items()},
        columns=numbers | categories,
        labels={name: LabelSpec(classes=held[name], description=said) for name, (_, said) in _LABELS.items()},
    )


def _studies(path: Path, schema: Schema, key: str) -> Iterator[Study]:
    """Series by series, in the order of the file."""
    who = functools.lru_cache(100_000)(lambda patient: (pseudonym(patient, key), split_of(patient, key)))
    categories = {name: (_CATEGORIES[name][0], set(schema.columns[name].vocabulary)) for name in _CATEGORIES}
    classes = {
        name: (_LABELS[name][0], {value: i for i, value in enumerate(label.classes)})
        for name, label in schema.labels.items()
    }
    named = functools.lru_cache(10_000)(_named)
    for batch in pq.ParquetFile(path).iter_batches(_BATCH, columns=_COLUMNS):
        held = {name: batch.column(name).to_pylist() for name in _COLUMNS}
        for i in range(len(batch)):
            row: dict[str, Any] = {
                "age_years": _age(held["PatientAge"][i]),
                "instances": held["instanceCount"][i],
                "size_mb": held["series_size_MB"][i],
            }
            for name, (column, vocabulary) in categories.items():
                value = named(column, held[column][i])
                row[name] = value if value in vocabulary else None
            labels = {
                name: codes.get(named(column, held[column][i]) or "") for name, (column, codes) in classes.items()
            }
            patient, split = who(held["PatientID"][i])
            yield Study(
                patient,
                split,
                texts={name: (text,) for name, (column, _) in _TEXTS.items() if (text := held[column][i])},
                row={name: value for name, value in row.items() if value is not None},
                labels={name: code for name, code in labels.items() if code is not None},
            )


def _age(text: str | None) -> float | None:
    """Years of a DICOM age (VR AS), such as 066Y or 180M."""
    found = _AGE.fullmatch(text or "")
    return int(found[1]) / _YEARS[found[2]] if found else None
