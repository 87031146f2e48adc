"""Reads `dataset.yaml` and the key that it names."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from mmfm_jax.config.files import read_yaml
from mmfm_jax.config.mistakes import describe
from mmfm_jax.data.ingest.dataset import Dataset
from mmfm_jax.errors import UserError

_NUMERIC = {"AS", "DS", "FD", "FL", "IS", "SL", "SS", "UL", "US"}
"""Value representations of DICOM that hold numbers (AS: an age)."""


def load_dataset(path: str | Path) -> Dataset:
    """Reads and checks a description. Raises UserError that names the file, the field and the mend."""
    raw = read_yaml(path, "the description of a data set, such as `mmfm init chest_ct` writes")
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds no description; it must be a mapping with images, texts or columns")
    try:
        dataset = Dataset.model_validate(raw)
        _check_tags(dataset)
        return dataset
    except (ValidationError, ValueError) as error:
        if isinstance(error, ValidationError):
            raise UserError(describe(error, str(path), raw, Dataset, "mmfm schema dataset")) from error
        raise UserError(f"{path}: {error}") from error


def _check_tags(dataset: Dataset) -> None:
    """Raises ValueError for a DICOM tag that is none, or whose kind could carry an identifier."""
    declared = {name: column for name, column in dataset.columns.items() if column.tag}
    if not declared:
        return
    from mmfm_jax.data.readers.dicom import NAMING, load

    load()
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    for name, column in declared.items():
        tag = tag_for_keyword(column.tag)
        if tag is None:
            raise ValueError(f"columns.{name}.tag: {column.tag} is not a DICOM keyword; see PS3.6")
        if column.tag in NAMING:
            raise ValueError(
                f"columns.{name}.tag: {column.tag} identifies people or devices and cannot enter the store"
            )
        vr = dictionary_VR(tag)
        fits = {
            "number": vr in _NUMERIC,
            "category": vr in {"CS", "LO", "SH", *_NUMERIC},
            "date": vr in {"DA", "DT"},
        }
        if not fits[column.kind]:
            raise ValueError(f"columns.{name}.tag: {column.tag} has the representation {vr}, which is no {column.kind}")


def read_key(dataset: Dataset, described_in: Path) -> str:
    """The secret, from its file or the environment. Raises UserError when there is none or it is too short."""
    if dataset.key.env:
        where, value = f"the environment variable {dataset.key.env}", os.environ.get(dataset.key.env, "")
    else:
        file = described_in.parent / Path(dataset.key.file).expanduser()
        where = f"{described_in}: key.file"
        try:
            value = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read; write a secret of 16 characters or more there") from error
    if len(value.strip()) < 16:
        raise UserError(
            f"{where} holds no key of 16 characters or more; make one with `openssl rand -hex 32` and keep it, since "
            "patients cannot be added later without it"
        )
    return value.strip()
