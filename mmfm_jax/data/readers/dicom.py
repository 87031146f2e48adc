"""DICOM headers: what ingest needs to know of a file before its pixels are read, and nothing else.

Identifiers are in a `Header` only to join files to patients and to find names in report text; it lives in memory and is
never written. Everything else of the header stays in the file, but for geometry (`dicom_series.py`) and the tags that
the description of the data set declares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfm_jax.data.deid.scrub import spellings
from mmfm_jax.data.refuse import Refused
from mmfm_jax.errors import UserError
from mmfm_jax.extras import pip_install

if TYPE_CHECKING:
    import pydicom

INSTALL = pip_install("ingest")
SEG, RTSTRUCT = "SEG", "RTSTRUCT"
SEGMENTATIONS = (SEG, RTSTRUCT)
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
NAMING = (
    "PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName", "ReferringPhysicianName",
    "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "PhysiciansOfRecord", "OperatorsName",
    "RequestingPhysician", "ResponsiblePerson", "InstitutionName", "PatientAddress", "PatientTelephoneNumbers",
    "ReferringPhysicianTelephoneNumbers", "PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID",
    "MedicalRecordLocator", "IssuerOfPatientID", "PatientInsurancePlanCodeSequence", "MilitaryRank",
    "DeviceSerialNumber", "StationName",
)  # fmt: skip
_BODY = ("StudyDescription", "SeriesDescription", "ProtocolName", "RequestedProcedureDescription")


@dataclass(frozen=True)
class Header:
    """What one DICOM file says; identifiers included, so never to be printed or stored."""

    patient: str
    studies: dict[str, str]
    """Identifiers of the study by keyword: StudyInstanceUID, AccessionNumber, StudyID."""
    series: str
    modality: str
    description: str
    body_part: str
    """BodyPartExamined, else empty."""
    body_words: str
    """Descriptions of study, series and protocol, for signs of a head."""
    burned_in: str
    """YES, NO or empty."""
    recognisable: str
    """RecognizableVisualFeatures: YES, NO or empty."""
    secondary: bool
    """A capture of a screen or of film."""
    projection: bool
    """Without a position in the patient: a radiograph, not a slice."""
    voxels: int
    """Packed bits count as bytes."""
    tags: dict[str, str] = field(default_factory=dict)
    """Declared tags by keyword; a missing one has no key."""
    names: frozenset[str] = frozenset()
    """Identifiers that report text may repeat."""
    instance: str = ""
    refers: frozenset[str] = frozenset()
    """Of a segmentation: the series that it is of, or where it names none the instances."""

    @property
    def segments(self) -> bool:
        """Whether it is a segmentation or a structure set, and no image."""
        return self.modality in SEGMENTATIONS


def load() -> Any:
    """The pydicom module, set not to warn about what a file holds. Raises UserError when it is not installed."""
    try:
        import pydicom
        import pydicom.config
    except ImportError as error:
        raise UserError(f"pydicom, which reads DICOM, is not installed; {INSTALL}") from error
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom


def read_header(path: Path, tags: Iterable[str] = ()) -> Header:
    """The header of a DICOM file. Raises Refused when it is none, is damaged, or holds no pixels."""
    pydicom = load()
    try:
        ds = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        if "DirectoryRecordSequence" in ds:
            raise Refused("no_image", "it is a DICOM directory")
        if "SOPClassUID" not in ds and "Rows" not in ds:
            raise Refused("unknown_format", "it is not DICOM, or not of an object that it names")
        if not (ds.get("Rows") and ds.get("Columns")) and ds.get("Modality") != RTSTRUCT:
            raise Refused("no_image", "it is a DICOM object without an image")
        return _header(ds, tags)
    except (Refused, MemoryError):
        raise
    except Exception as error:  # what pydicom raises on damaged files is open-ended, and its messages quote the file
        raise Refused("damaged", f"its header cannot be read ({type(error).__name__})") from None


def _header(ds: pydicom.Dataset, tags: Iterable[str]) -> Header:
    def text(keyword: str) -> str:
        value = ds.get(keyword)
        return "" if value is None else str(value).strip()

    frames = int(ds.get("NumberOfFrames") or 1)
    voxels = (
        int(ds.get("Rows") or 0) * int(ds.get("Columns") or 0) * max(1, frames) * int(ds.get("SamplesPerPixel") or 1)
    )
    if ds.get("BitsAllocated") == 1:
        voxels //= 8
    image_type = [str(part).upper() for part in ds.get("ImageType") or ()]
    modality = text("Modality").upper()
    positioned = "ImageOrientationPatient" in ds or "PerFrameFunctionalGroupsSequence" in ds
    return Header(
        patient=text("PatientID"),
        studies={keyword: text(keyword) for keyword in ("StudyInstanceUID", "AccessionNumber", "StudyID")},
        series=text("SeriesInstanceUID") or text("SOPInstanceUID"),
        modality=modality,
        description=text("SeriesDescription"),
        body_part=text("BodyPartExamined").upper(),
        body_words=" ".join(text(keyword) for keyword in _BODY),
        burned_in=text("BurnedInAnnotation").upper(),
        recognisable=text("RecognizableVisualFeatures").upper(),
        secondary="ConversionType" in ds
        or text("SOPClassUID").startswith("1.2.840.10008.5.1.4.1.1.7")
        or any("SCREEN" in part for part in image_type),
        projection=not positioned,
        voxels=voxels,
        tags={tag: text(tag) for tag in tags if text(tag)},
        names=frozenset(name for keyword in NAMING if keyword in ds for name in _spellings(ds[keyword])),
        instance=text("SOPInstanceUID"),
        refers=_refers(ds) if modality in SEGMENTATIONS else frozenset(),
    )


def _refers(ds: pydicom.Dataset) -> frozenset[str]:
    """PS3.3 C.8.20.2 and C.7.6.16.2.6 for a segmentation, C.8.8.5 for a structure set."""
    series = [*(ds.get("ReferencedSeriesSequence") or ())]
    for frame_of_reference in ds.get("ReferencedFrameOfReferenceSequence") or ():
        for study in frame_of_reference.get("RTReferencedStudySequence") or ():
            series += study.get("RTReferencedSeriesSequence") or ()
    named = {str(one.SeriesInstanceUID) for one in series if one.get("SeriesInstanceUID")}
    if not named:
        groups = [
            *(ds.get("SharedFunctionalGroupsSequence") or ()),
            *(ds.get("PerFrameFunctionalGroupsSequence") or ()),
        ]
        for group in groups:
            for derivation in group.get("DerivationImageSequence") or ():
                for source in derivation.get("SourceImageSequence") or ():
                    named.add(str(source.get("ReferencedSOPInstanceUID") or ""))
    return frozenset(named - {""})


def _spellings(element: Any) -> set[str]:
    """How text may repeat the values of an element."""
    if element.VR == "SQ" or element.value is None:
        return set()
    values = element.value if element.VM > 1 else [element.value]
    return {spelling for value in values for spelling in spellings(str(value).replace("=", "^"), element.VR == "PN")}
