"""Random studies of a schema that has every kind of part, and a store of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmfm_jax.data.store.masks import POSITIONS
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, LabelSpec, MaskSpec, Schema, Study

SCHEMA = Schema(
    images={
        "nodule": ImageSpec(dtype="uint8", shape=(6, 5, 4)),
        "photo": ImageSpec(dtype="uint8", shape=(1, 8, 7), channels=3),
        "ct": ImageSpec(dtype="int16", shape=None),
    },
    texts={"report": "what was seen", "history": "what came before"},
    columns={
        "age": ColumnSpec(kind="number", unit="years"),
        "sex": ColumnSpec(kind="category", vocabulary=("female", "male")),
    },
    labels={"malignancy": LabelSpec(classes=("benign", "malignant"))},
    masks={
        "parts": MaskSpec(image="nodule", classes=("core", "rim")),
        "organs": MaskSpec(image="ct", classes=("liver", "spleen", "vessel")),
        "lesions": MaskSpec(image="ct", classes=("lesion",)),
    },
)


@pytest.fixture(scope="session")
def schema() -> Schema:
    return SCHEMA


@pytest.fixture(scope="session")
def make_studies() -> Callable[..., list[Study]]:
    """`make_studies(n, seed, present)`: random studies, each part of which is there with chance `present`."""

    def make(n: int, seed: int = 0, present: float = 0.6) -> list[Study]:
        rng = np.random.default_rng(seed)

        def some(held: dict) -> dict:
            return {name: value for name, value in held.items() if rng.random() < present}

        def image(spec: ImageSpec) -> Image:
            z, y, x = spec.shape or rng.integers(1, 70, 3)
            dtype = np.iinfo(spec.dtype)
            voxels = rng.integers(dtype.min, dtype.max, (z, y, x, spec.channels), spec.dtype, endpoint=True)
            z_mm, y_mm, x_mm = rng.uniform(0.5, 3, 3).tolist()
            return Image(voxels, (z_mm, y_mm, x_mm))

        def masks(images: dict[str, Image]) -> dict[str, np.ndarray]:
            """Of some classes only, and some of them empty."""
            held = some({name: spec for name, spec in SCHEMA.masks.items() if spec.image in images})
            return {
                name: rng.choice([0, *rng.integers(0, len(spec.classes) + 1, 2)], images[spec.image].voxels.shape[:3])
                .astype(np.uint8)
                for name, spec in held.items()
            }  # fmt: skip

        drawn = [{role: image(spec) for role, spec in some(SCHEMA.images).items()} for _ in range(n)]
        return [
            Study(
                patient=f"patient{i // 2}",
                split=("train", "train", "test")[i // 2 % 3],
                images=drawn[i],
                masks=masks(drawn[i]),
                texts=some({f: tuple(f"Seen {k}. Naïve «{i}».\n" for k in range(i % 3 + 1)) for f in SCHEMA.texts}),
                row=some({"age": rng.normal(60, 10), "sex": str(rng.choice(["female", "male"]))}),
                labels=some({"malignancy": int(rng.integers(2))}),
            )
            for i in range(n)
        ]

    return make


@pytest.fixture(scope="session")
def assert_holds() -> Callable[[StudyStore, list[Study]], None]:
    """Fails unless a store gives back exactly these studies."""

    def check(store: StudyStore, studies: list[Study]) -> None:
        assert len(store) == len(studies)
        assert store.patients(np.arange(len(studies))).tolist() == [study.patient for study in studies]
        for row, study in enumerate(studies):
            assert row in store.rows(study.split)
            assert store.table(row) == (study.texts, study.row, study.labels)
            for role in SCHEMA.images:
                info = store.volume_info(role, row)
                if role not in study.images:
                    assert info is None
                    continue
                assert info is not None
                image = study.images[role]
                assert info == (image.voxels.shape[:3], image.spacing_mm)
                voxels = store.crop(role, row, (0, 0, 0), info[0])
                assert voxels.dtype == image.voxels.dtype
                np.testing.assert_array_equal(voxels, image.voxels)
            for name, spec in SCHEMA.masks.items():
                voxels = store.mask_voxels(name, row)
                if name not in study.masks:
                    assert voxels is None and not any(len(store.mask_positions(name, row, 0)) for _ in spec.classes)
                    continue
                mask = study.masks[name]
                np.testing.assert_array_equal(store.mask_crop(name, row, (0, 0, 0), mask.shape), mask)
                for index in range(len(spec.classes)):
                    assert voxels is not None and voxels[index] == (mask == index + 1).sum()
                    z, y, x = store.mask_positions(name, row, index).T
                    assert len(z) == min(POSITIONS, voxels[index]) and (mask[z, y, x] == index + 1).all()
                    assert len(np.unique(np.ravel_multi_index((z, y, x), mask.shape))) == len(z)

    return check


@pytest.fixture(scope="session")
def studies(make_studies) -> list[Study]:
    return make_studies(40)


@pytest.fixture
def store(tmp_path, studies) -> StudyStore:
    url = str(tmp_path / "store")
    write_store(url, SCHEMA, studies)
    return StudyStore.open(url)


@pytest.fixture(scope="session")
def write_dicom() -> Callable[..., list[Path]]:
    """`write_dicom(folder, voxels, affine, names, **tags)`: one file a slice, in an order that the names do not tell.

    `voxels`: int16 [k, j, i]; `affine`: float [4, 4] from (i, j, k, 1) to RAS mm, its third column along the normal.
    """
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    def write(folder: Path, voxels: np.ndarray, affine: np.ndarray, seed: int = 0, **tags) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        names = rng.permutation(len(voxels))
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        i_mm, j_mm = np.linalg.norm(lps[:3, 0]), np.linalg.norm(lps[:3, 1])
        common = {
            "SOPClassUID": CTImageStorage,
            "StudyInstanceUID": generate_uid(),
            "SeriesInstanceUID": generate_uid(),
            "PatientID": "P1",
            "Modality": "CT",
            "BodyPartExamined": "CHEST",
            "RescaleSlope": "1",
            "RescaleIntercept": "0",
            "SliceThickness": "1",
        } | tags
        paths = []
        for k, plane in enumerate(voxels):
            meta = FileMetaDataset()
            meta.MediaStorageSOPClassUID = CTImageStorage
            meta.MediaStorageSOPInstanceUID = generate_uid()
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            path = folder / f"{names[k]:04d}.dcm"
            ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
            ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
            ds.InstanceNumber = int(rng.integers(10**6))
            ds.Rows, ds.Columns = plane.shape[:2]
            ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
            ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
            ds.PixelRepresentation = int(plane.dtype.kind == "i")
            position = (lps @ np.array([0, 0, k, 1.0]))[:3]
            axes = np.concatenate([lps[:3, 0] / i_mm, lps[:3, 1] / j_mm])
            ds.ImagePositionPatient = [f"{v:.10g}"[:16] for v in position]
            ds.ImageOrientationPatient = [f"{v:.10g}"[:16] for v in axes]
            ds.PixelSpacing = [f"{j_mm:.10g}", f"{i_mm:.10g}"]
            ds.PixelData = np.ascontiguousarray(plane).astype(plane.dtype.newbyteorder("<")).tobytes()
            for keyword, value in common.items():
                setattr(ds, keyword, value)
            pydicom.dcmwrite(path, ds, enforce_file_format=True)
            paths.append(path)
        return paths

    return write


@pytest.fixture(scope="session")
def random_affine() -> Callable[..., np.ndarray]:
    """`random_affine(rng)`: float64 [4, 4] to RAS mm, turned at will, right-angled, of right-handed axes."""

    def make(rng: np.random.Generator) -> np.ndarray:
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        if np.linalg.det(turn) < 0:  # DICOM's normal is the cross product of its axes
            turn[:, 0] *= -1
        affine = np.eye(4)
        affine[:3, :3] = turn * rng.uniform(0.4, 3, 3)
        affine[:3, 3] = rng.uniform(-200, 200, 3)
        return affine

    return make


@pytest.fixture(scope="session")
def write_seg() -> Callable[..., Path]:
    """`write_seg(path, images, mask, labels, kind)`: a SEG object of a series, by highdicom.

    `images`: the series' files, slice by slice; `mask`: [k, j, i] of 1, 2, ..., or bool [k, j, i, segment].
    """
    hd = pytest.importorskip("highdicom")
    import pydicom
    from pydicom.sr.codedict import codes

    def write(path: Path, images: list[Path], mask: np.ndarray, labels: list[str], kind: str = "BINARY") -> Path:
        described = [
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=label,
                segmented_property_category=codes.SCT.Organ,
                segmented_property_type=codes.SCT.Liver,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
            )
            for number, label in enumerate(labels, 1)
        ]
        sources = [pydicom.dcmread(image) for image in images]
        for ds in sources:
            for keyword in (
                "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
                "AccessionNumber", "ReferringPhysicianName",
            ):  # fmt: skip
                if keyword not in ds:
                    setattr(ds, keyword, None)
            ds.FrameOfReferenceUID = "1.2.3"
        seg = hd.seg.Segmentation(
            source_images=sources,
            pixel_array=mask.astype(np.uint8),
            segmentation_type=kind,
            segment_descriptions=described,
            series_instance_uid=hd.UID(),
            series_number=9,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="none",
            manufacturer_model_name="none",
            software_versions="1",
            device_serial_number="1",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        seg.save_as(path)
        return path

    return write


@pytest.fixture(scope="session")
def write_rtstruct() -> Callable[..., Path]:
    """`write_rtstruct(path, image, affine, structures, refer)`: contours of one series.

    `image`: a file of the series; `structures`: by name, contours as float [points, 3] of i j k on a grid of `affine`
    to RAS mm; `refer` False leaves the reference to the series out.
    """
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    def write(path: Path, image: Path, affine: np.ndarray, structures: dict, refer: bool = True, **tags) -> Path:
        source = pydicom.dcmread(image, stop_before_pixels=True)
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.481.3", generate_uid()
        ds.Modality, ds.SeriesInstanceUID = "RTSTRUCT", generate_uid()
        ds.PatientID, ds.StudyInstanceUID = source.PatientID, source.StudyInstanceUID
        ds.AccessionNumber = source.get("AccessionNumber", "")
        if refer:
            series, study, frame = Dataset(), Dataset(), Dataset()
            series.SeriesInstanceUID = source.SeriesInstanceUID
            study.RTReferencedSeriesSequence = [series]
            frame.RTReferencedStudySequence = [study]
            ds.ReferencedFrameOfReferenceSequence = [frame]
        ds.StructureSetROISequence, ds.ROIContourSequence = [], []
        for number, (name, contours) in enumerate(structures.items(), 1):
            roi, held = Dataset(), Dataset()
            roi.ROINumber, roi.ROIName = number, name
            held.ReferencedROINumber, held.ContourSequence = number, []
            for points in contours:
                contour = Dataset()
                ras = points @ affine[:3, :3].T + affine[:3, 3]
                contour.ContourGeometricType = "CLOSED_PLANAR"
                contour.NumberOfContourPoints = len(points)
                contour.ContourData = [f"{v:.10g}"[:16] for v in (ras * [-1, -1, 1]).ravel()]
                held.ContourSequence.append(contour)
            ds.StructureSetROISequence.append(roi)
            ds.ROIContourSequence.append(held)
        for keyword, value in tags.items():
            setattr(ds, keyword, value)
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path.parent.mkdir(parents=True, exist_ok=True)
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
        return path

    return write
