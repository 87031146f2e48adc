"""`dataset.yaml`: where raw exports lie, whose they are and what of them may enter a store.

It is an allow-list. A column, text, label or DICOM tag that is not declared here stays outside, and so does every
identifier: those that are named serve to join and to find names in reports, and are replaced by keyed hashes.
"""

from __future__ import annotations

from math import isclose
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from mmfm_jax.config.base import Config
from mmfm_jax.data.ingest.event_fields import EventSource, FromEvents
from mmfm_jax.data.ingest.patterns import compiles
from mmfm_jax.data.ingest.table_fields import FHIR_COLUMNS, FromTable, Patterns, Table
from mmfm_jax.data.split import FRACTIONS

Spacing = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Shape = tuple[PositiveInt, PositiveInt, PositiveInt]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
SplitName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,32}$")]
_DTYPES = Literal["uint8", "int8", "uint16", "int16", "int32", "float32"]


class Files(Config):
    """Files below the root and how their paths tell whose they are."""

    files: Patterns = ()
    """Patterns below the root, with / between folders: `ct/**/*.dcm`; ** stands for any number of folders."""
    path: str = ""
    """Regular expression that the whole path below the root must match, with a group `patient` and, where a patient
    has several studies, a group `study`: `(?P<patient>[^/]+)/(?P<study>[^/]+)/.*`. DICOM files need none: their headers
    say."""

    @field_validator("path")
    @classmethod
    def _has_patient(cls, value: str) -> str:
        if value and "patient" not in compiles(value).groupindex:
            raise ValueError("has no group for the patient; write (?P<patient>...) around it")
        return value


class ImageRole(Files):
    """Which images of a study play a role, and in what form they are stored."""

    table: str = ""
    """Table with a column of paths, instead of `files`."""
    column: str = ""
    """That column: a file or a folder of one DICOM series, below the root."""
    modality: str = ""
    """DICOM modality (CT, MR, PT, CR, DX, MG, US ...). DICOM series of another are not of this role; other formats,
    which do not say, are taken to be of it."""
    series_description: str = ""
    """Regular expression found somewhere in the DICOM series description."""
    study_tag: Literal["StudyInstanceUID", "AccessionNumber", "StudyID"] = "StudyInstanceUID"
    """DICOM identifier that tells one study of a patient from another; the one that tables use."""
    body_part: str = ""
    """What is shown, where the file does not say: CHEST, ABDOMEN, HEAD ... A head has a face."""
    several: Literal["refuse", "largest"] = "refuse"
    """When several series of one study fit: refuse all, or take the one of most voxels and refuse the others."""
    dtype: _DTYPES = "int16"
    """Type in the store. Values that it cannot hold are refused, never clipped."""
    channels: PositiveInt = 1
    """3 for colour; more for a fourth axis such as time or echo."""
    frame: Annotated[int, Field(ge=0)] | None = None
    """Takes one frame of a fourth axis."""
    spacing_mm: Spacing | None = None
    """Millimetres between voxels along z y x to resample to; null keeps each image's own."""
    shape: Shape | None = None
    """Voxels z y x when every image of the role has this shape, which packs them in one array; others are refused."""
    unknown_spacing_mm: Spacing | None = None
    """Spacing z y x of files that do not tell theirs (PNG, JPEG, TIFF, some radiographs)."""
    allow: tuple[Literal["burned_in_text", "face"], ...] = ()
    """Suspicions that were looked into: images that may show text, or a recognisable face, are refused otherwise."""
    description: str = ""
    """For whoever reads the store."""

    @field_validator("series_description")
    @classmethod
    def _regular(cls, value: str) -> str:
        compiles(value)
        return value

    @model_validator(mode="after")
    def _one_place(self):
        if bool(self.files) == bool(self.table and self.column):
            raise ValueError("needs either files, or table and column")
        if self.frame is not None and self.channels != 1:
            raise ValueError("frame takes a single channel; leave channels at 1")
        return self


class Mask(Files):
    """Segmentations of an image role: a DICOM SEG or RTSTRUCT object, or a volume of class numbers on the image's grid.

    DICOM objects belong to the series that they refer to; volumes to the image of their study, by `path` or table. A
    group `segment` in `path` says that each file holds one segment, of that name: `(?P<segment>[^/]+)\\.nii\\.gz`.
    """

    image: str
    """Image role."""
    table: str = ""
    """Table with a column of paths, instead of `files`."""
    column: str = ""
    """That column: a file below the root."""
    classes: Annotated[tuple[str, ...], Field(min_length=1, max_length=255)]
    """In the store they are 1, 2, ... in this order, and 0 is background. Structures that overlap need masks of their
    own, which may be of the same files."""
    values: dict[str, str] = Field(default_factory=dict)
    """Segment labels, names of structures or numbers of voxels in the source, and the class that they mean. A class's
    own name needs no entry; without any number here, voxels are 1, 2, ... as in the store."""
    others: Literal["refuse", "background"] = "refuse"
    """What becomes of a mask with segments of no declared class: refused, or they count as background."""
    description: str = ""
    """For whoever reads the store."""

    @model_validator(mode="after")
    def _whole(self):
        if bool(self.files) == bool(self.table and self.column):
            raise ValueError("needs either files, or table and column")
        if len(set(self.classes)) < len(self.classes) or set(self.values.values()) - set(self.classes):
            raise ValueError("classes must differ, and values must lead to them")
        return self


class Text(Files):
    """A field of text: a table's column or a folder of .txt files, whole or one section of it."""

    table: str = ""
    """Table that holds it."""
    column: str = ""
    """That column; by default the one of this name."""
    section: str = ""
    """Heading whose part is taken (findings, impression, indication, technique, comparison, or one of yours)."""
    scrub: bool = True
    """Whether names, dates, numbers and the like are removed; false only for text that is known to hold none."""
    presidio: str = ""
    """Adds Presidio to the rules: `patterns` for what needs no language model, or the name (or folder) of an installed
    spaCy model, such as en_core_web_lg, which finds names and places in running text too."""
    description: str = ""
    """For whoever reads the store."""

    @model_validator(mode="after")
    def _one_place(self):
        if self.files and (self.table or self.column):
            raise ValueError("needs either files, or table and column, not both")
        if self.files and not self.path:
            raise ValueError("text files do not say whose they are; give `path` with a group for the patient")
        if self.presidio and not self.scrub:
            raise ValueError("presidio adds to scrub, which is off")
        return self


class Column(FromTable, FromEvents):
    """A typed column of the store, from a table's column, a declared tag of a DICOM series, or events."""

    kind: Literal["number", "category", "date"]
    """What it holds: a number, a word of `vocabulary`, or a date."""
    unit: str = ""
    """Of a number. In years, months, weeks or days it counts as an age and is capped at 90 years."""
    vocabulary: tuple[str, ...] = ()
    """Of a category, in full: other values are refused."""
    values: dict[str, str] = Field(default_factory=dict)
    """Spellings in the source and the word of the vocabulary that they mean."""
    date_format: str = ""
    """strptime format of a date; ISO 8601 and DICOM's YYYYMMDD are read without."""
    relative_to: str = ""
    """Another date column of the same table: the date is stored as days after it. Without, a date is stored as days
    since 1970 after the patient's secret shift, so only differences within a patient mean something."""
    image: str = ""
    """Image role whose DICOM series carries `tag`."""
    tag: str = ""
    """DICOM keyword, such as KVP, PatientAge, ConvolutionKernel."""
    description: str = ""
    """For whoever reads the store."""

    @model_validator(mode="after")
    def _fits_kind(self):
        if bool(self.image) != bool(self.tag) or (self.tag and (self.table or self.column)):
            raise ValueError("needs either image and tag, or a table's column")
        if (self.kind == "category") != bool(self.vocabulary):
            raise ValueError("a category, and nothing else, has a vocabulary")
        if (self.kind != "category" and self.values) or set(self.values.values()) - set(self.vocabulary):
            raise ValueError("values must lead to words of the vocabulary")
        if self.kind != "date" and (self.date_format or self.relative_to):
            raise ValueError("date_format and relative_to are of dates")
        if self.kind != "number" and self.unit:
            raise ValueError("only a number has a unit")
        if self.codes and (self.table or self.column or self.tag):
            raise ValueError("needs either codes of events, image and tag, or a table's column")
        self.check_events(self.kind, self.unit, self.vocabulary)
        return self

    @property
    def from_table(self) -> bool:
        return not (self.tag or self.codes)


class Label(FromTable, FromEvents):
    """A class label, from a table's column or from events."""

    classes: tuple[str, ...]
    """In the store they are 0, 1, ... in this order."""
    values: dict[str, str] = Field(default_factory=dict)
    """Spellings in the source and the class that they mean."""
    description: str = ""
    """For whoever reads the store."""
    from_text: str = ""
    """The text that it was read out of, or that states it: a task that learns it is not shown that modality."""

    @model_validator(mode="after")
    def _lead_to_classes(self):
        if len(self.classes) < 2 or set(self.values.values()) - set(self.classes):
            raise ValueError("needs at least two classes, and values must lead to them")
        if self.codes and (self.table or self.column):
            raise ValueError("needs either codes of events, or a table's column")
        self.check_events("category", "", self.classes)
        return self

    @property
    def from_table(self) -> bool:
        return not self.codes


class Split(FromTable):
    """How patients are dealt to splits: by chance in fixed shares, or as a column says."""

    fractions: dict[SplitName, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=lambda: dict(FRACTIONS))
    """Shares, dealt by keyed hash of the patient, so that patients keep their split when others are added."""

    @model_validator(mode="after")
    def _whole(self):
        if not isclose(sum(self.fractions.values()), 1, abs_tol=1e-9):
            raise ValueError(f"fractions sum to {sum(self.fractions.values()):g}; make them sum to 1")
        return self


class Key(Config):
    """Where the secret is that hashes identifiers. It is read, used and never stored: keep it, and keep it apart."""

    env: str = ""
    """Environment variable that holds it."""
    file: str = ""
    """File that holds it; relative to the description."""

    @model_validator(mode="after")
    def _one(self):
        if bool(self.env) == bool(self.file):
            raise ValueError("needs either env or file")
        return self


class Dataset(Config):
    """A data set to ingest."""

    description: str = ""
    """Of the whole, for whoever reads the store."""
    root: str = "."
    """Folder that all inputs are below; relative to this file."""
    key: Key = Key(env="MMFM_KEY")
    """Where the secret is that hashes identifiers."""
    tables: dict[Name, Table] = Field(default_factory=dict)
    """Tables, and resources of FHIR that are read as tables."""
    events: dict[Name, EventSource] = Field(default_factory=dict)
    """Records with a code and a time, of which columns and labels are made."""
    images: dict[Name, ImageRole] = Field(default_factory=dict)
    """Image roles: which images of a study play each."""
    masks: dict[Name, Mask] = Field(default_factory=dict)
    """Segmentations of image roles."""
    texts: dict[Name, Text] = Field(default_factory=dict)
    """Fields of text."""
    columns: dict[Name, Column] = Field(default_factory=dict)
    """Numbers, categories and dates."""
    labels: dict[Name, Label] = Field(default_factory=dict)
    """Classes to learn or to measure."""
    split: Split = Split()
    """How patients are dealt to splits."""

    @model_validator(mode="after")
    def _joined(self):
        if not (self.images or self.texts or self.columns):
            raise ValueError("declares no images, texts or columns; nothing would enter the store")
        for part, held in (("columns", self.columns), ("labels", self.labels)):
            for name, field in held.items():
                if field.codes:
                    self._check_events(f"{part}.{name}", field)
                elif field.from_table:
                    self._check_source(f"{part}.{name}", *self.source(name, field))
        for name, text in self.texts.items():
            if not text.files:
                self._check_source(f"texts.{name}", *self.source(name, text))
        for name, role in [*self.images.items(), *self.masks.items()]:
            if role.table:
                part = "images" if isinstance(role, ImageRole) else "masks"
                self._check_source(f"{part}.{name}", role.table, role.column, may_identify=True)
        for name, label in self.labels.items():
            if label.from_text and label.from_text not in self.texts:
                raise ValueError(f"labels.{name}.from_text: there is no text {label.from_text}")
        for name, mask in self.masks.items():
            if mask.image not in self.images:
                raise ValueError(f"masks.{name}: there is no image role {mask.image}")
            if name in self.images:
                raise ValueError(f"masks.{name}: an image role has this name; give the mask another")
        for name, column in self.columns.items():
            if column.image and column.image not in self.images:
                raise ValueError(f"columns.{name}: there is no image role {column.image}")
            if column.relative_to:
                other = self.columns.get(column.relative_to)
                if other is None or other.kind != "date" or other.tag or column.tag or other.relative_to:
                    raise ValueError(f"columns.{name}: relative_to must name a date column that is not itself relative")
                if self.source(column.relative_to, other)[0] != self.source(name, column)[0]:
                    raise ValueError(f"columns.{name}: relative_to must be of the same table")
        if self.split.column:
            self._check_source("split", *self.source("split", self.split))
        for name, source in self.events.items():
            when = source.study_time
            if when is not None and when.column:
                self._check_source(f"events.{name}.study_time", *self.source("", when), may_identify=True)
            elif when is not None and when.image not in self.images:
                raise ValueError(f"events.{name}.study_time: there is no image role {when.image}")
        return self

    def event_source(self, field: FromEvents) -> str:
        """Name of the events that a field is made of."""
        return field.events or (next(iter(self.events)) if len(self.events) == 1 else "")

    def of_events(self) -> dict[str, Column | Label]:
        """Columns and labels that are made of events, by `columns.NAME` and `labels.NAME`."""
        parts = {"columns": self.columns, "labels": self.labels}
        return {f"{part}.{name}": f for part, held in parts.items() for name, f in held.items() if f.codes}

    def _check_events(self, where: str, field: FromEvents) -> None:
        source = self.events.get(self.event_source(field))
        if source is None:
            raise ValueError(f"{where}: there are no events {field.events or '(name them)'}; declare them under events")
        if source.study_time is None and not field.static:
            raise ValueError(f"{where}: its events have no study_time to measure window_days from; declare it there")

    def _check_source(self, where: str, table: str, column: str, may_identify: bool = False) -> None:
        if table not in self.tables:
            raise ValueError(f"{where}: there is no table {table or '(name one)'}; declare it under tables")
        held = self.tables[table]
        if held.resource and column not in FHIR_COLUMNS[held.resource]:
            known = ", ".join(FHIR_COLUMNS[held.resource])
            raise ValueError(f"{where}: a {held.resource} has no column {column}; it has {known}")
        if column in (held.patient, held.study, *held.identifiers) and not may_identify:
            raise ValueError(f"{where}: the column {column} identifies patients and cannot enter the store")

    def source(self, name: str, field: Any) -> tuple[str, str]:
        """Table and column that a field is read from."""
        table = field.table or (next(iter(self.tables)) if len(self.tables) == 1 else "")
        return table, field.column or name
