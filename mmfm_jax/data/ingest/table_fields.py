"""`dataset.yaml`, the part of tables: files of rows, and FHIR resources that are read as rows."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, field_validator, model_validator

from mmfm_jax.config.base import Config


def below_root(patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        parts = PurePosixPath(pattern).parts
        if not parts or pattern.startswith("/") or ".." in parts or "\\" in pattern:
            raise ValueError(f"the pattern {pattern!r} leaves the root; give one below it, without ..")
    return patterns


Patterns = Annotated[tuple[str, ...], AfterValidator(below_root)]
"""Patterns of files below the root, with / between folders; ** stands for any number of folders."""
FHIR_COLUMNS = {
    "Patient": ("patient", "birth_date", "gender", "deceased"),
    "DiagnosticReport": ("patient", "study", "time", "code", "text", "conclusion"),
}
"""Columns of a table of FHIR resources."""


class Table(Config):
    """A CSV, JSONL or Parquet file with rows that belong to patients, or FHIR resources of one type as rows."""

    file: str = ""
    """Below the root; .csv, .tsv, .jsonl or .parquet."""
    resource: Literal["", "Patient", "DiagnosticReport"] = ""
    """Instead of a file: the FHIR resources that are rows. A Patient has the columns patient, birth_date, gender and
    deceased; a DiagnosticReport has patient, study, time, code, text (its attachments of plain text) and conclusion."""
    files: Patterns = ()
    """Patterns of FHIR files: .json (bundles or single resources) and .ndjson."""
    patient_system: str = ""
    """System of the patient's FHIR identifier that other sources use; without it, the id of the Patient resource."""
    study_system: str = ""
    """System of the DiagnosticReport's identifier that other sources use for the study, such as that of accession
    numbers; without it, each report is a study of its own."""
    patient: str = ""
    """Column of the patient's identifier."""
    study: str = ""
    """Column of the study's identifier; without it a row holds for every study of its patient."""
    identifiers: tuple[str, ...] = ()
    """Columns of names, addresses, phones and the like: only searched for in report text, to remove them."""
    missing: tuple[str, ...] = ("", "NA", "N/A", "NaN", "nan", "null", "None")
    """Cells that stand for a missing value."""
    encoding: str = "utf-8-sig"
    """Of the characters of CSV, TSV and JSONL, by Python's name of it."""

    @model_validator(mode="before")
    @classmethod
    def _of_resource(cls, raw: Any) -> Any:
        """Who a resource is of is known from its type."""
        if not isinstance(raw, dict) or not raw.get("resource"):
            return raw
        owners = {"patient": "patient"} | ({"study": "study"} if raw["resource"] == "DiagnosticReport" else {})
        return owners | raw

    @model_validator(mode="after")
    def _one_place(self):
        if bool(self.file) == bool(self.resource):
            raise ValueError("needs either file, or resource and files")
        if bool(self.resource) != bool(self.files):
            raise ValueError("resource and files go together")
        if not self.patient:
            raise ValueError("needs the column of the patient")
        if (self.resource and self.patient != "patient") or (self.resource == "Patient" and self.study):
            raise ValueError("a table of FHIR resources has columns of its own for patient and study")
        if (self.study_system and self.resource != "DiagnosticReport") or (self.patient_system and not self.resource):
            raise ValueError("patient_system and study_system are of FHIR resources")
        return self

    @field_validator("file")
    @classmethod
    def _below_root(cls, value: str) -> str:
        if not value:
            return value
        if value.startswith("/") or ".." in PurePosixPath(value).parts:
            raise ValueError("leaves the root; give a path below it, without ..")
        if PurePosixPath(value).suffix.lower() not in {".csv", ".tsv", ".jsonl", ".parquet"}:
            raise ValueError("is not a table; give a .csv, .tsv, .jsonl or .parquet file")
        return value


class FromTable(Config):
    table: str = ""
    """Name of the table; may be left out when there is one."""
    column: str = ""
    """Column in the table; the field's own name when left out."""

    @property
    def from_table(self) -> bool:
        """Whether a table's column is what it is read from."""
        return True
