"""The built-in sample of a brain template: blocks of MNI152 with grey- and white-matter masks.

Read from the wheel of `nilearn` 0.14.1 (https://nilearn.github.io, BSD-3-Clause), which holds the T1-weighted average
of 152 adults, ICBM 152 non-linear asymmetric 2009a at 1 mm, without its skull, and the probabilities of grey and white
matter (Fonov et al. 2011, doi:10.1016/j.neuroimage.2010.07.033; copyright 1993-2004 Louis Collins, McConnell Brain
Imaging Centre, Montreal Neurological Institute, McGill University). Only the files are read; the package is never
imported.

There is one brain, of nobody. Its blocks stand for studies so that images, masks, texts and tables of true anatomy are
at hand; **no figure on them says anything of other brains.** A block and its mirror image across the midline count as
one patient, so they are in one split. Texts and volumes are derived from coordinates and maps; nobody wrote them.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from mmfm_jax.data.samples.build import Sample, build_sample, write_nifti
from mmfm_jax.errors import UserError
from mmfm_jax.extras import pip_install
from mmfm_jax.screen import counted

BLOCK = 32
"""Voxels of 1 mm along each side."""
LEAST_BRAIN = 0.25
"""Share of a block that grey and white matter must fill."""
_FIRST_Y, _FIRST_Z = 20, 0  # below and behind the brain, so that blocks reach over all of it

DATASET = {
    "description": "Blocks of the MNI152 T1 template, an average of 152 brains, with masks of grey and white matter. "
    "There is one brain: figures on it say nothing of others. Texts and volumes are derived.",
    "tables": {
        "blocks": {"file": "blocks.csv", "patient": "region", "study": "side"},
        "words": {"file": "words.jsonl", "patient": "region", "study": "side"},
    },
    "images": {
        "t1": {
            "files": ["t1/**"],
            "path": r"t1/(?P<patient>[^/]+)/(?P<study>[^/]+)\.nii\.gz",
            "modality": "MR",
            "body_part": "BRAIN",
            "allow": ["face"],  # the template has no skull
            "dtype": "uint8",
            "shape": [BLOCK, BLOCK, BLOCK],
            "description": "T1-weighted template at 1 mm.",
        }
    },
    "masks": {
        "tissue": {
            "image": "t1",
            "files": ["tissue/**"],
            "path": r"tissue/(?P<patient>[^/]+)/(?P<study>[^/]+)\.nii\.gz",
            "classes": ["grey_matter", "white_matter"],
            "description": "The likelier of both where together they are more likely than not.",
        }
    },
    "texts": {
        "description": {
            "table": "words",
            "scrub": False,
            "description": "Derived from coordinates and tissue maps: side, place and tissue in plain words.",
        }
    },
    "columns": {
        name: {"kind": "number", "unit": "mL", "table": "blocks", "description": "Sum of the probability map."}
        for name in ("grey_matter_ml", "white_matter_ml")
    },
}
SOURCE = {
    "sample": "mni152",
    "data": "MNI152 2009a from nilearn (copyright 1993-2004 Louis Collins, McConnell Brain Imaging Centre, McGill)",
}


def build_mni152(out: str, split_key: str, console: Console | None = None) -> bool:
    """Builds the store at `out` (a path or TensorStore URL) and returns True, or False when it is already there.

    Raises UserError when nilearn is not installed, or when `out` holds something else.
    """
    return build_sample(Sample(DATASET, SOURCE, _write), out, split_key, console)


@dataclass(frozen=True)
class Template:
    """Volumes uint8 [z, y, x] in RAS: brightness, and 255 times the probabilities of both tissues."""

    t1: np.ndarray
    grey: np.ndarray
    white: np.ndarray
    affine: np.ndarray
    """From (x, y, z, 1) to MNI mm."""


@dataclass(frozen=True)
class Block:
    """A cube of the template."""

    start: tuple[int, int, int]
    """First voxel z y x."""
    region: str
    """The same for both sides of the midline."""
    side: str

    def of(self, volume: np.ndarray) -> np.ndarray:
        z, y, x = self.start
        return volume[z : z + BLOCK, y : y + BLOCK, x : x + BLOCK]

    def affine(self, template: Template) -> np.ndarray:
        out = template.affine.copy()
        out[:3, 3] += template.affine[:3, :3] @ np.array(self.start[::-1])
        return out


def read_template() -> Template:
    """The template in the installed nilearn, found without importing it. Raises UserError when there is none."""
    spec = importlib.util.find_spec("nilearn")
    folder = Path(spec.origin).with_name("datasets") / "data" if spec and spec.origin else Path("nowhere")
    paths = [folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz" for name in ("t1", "gm", "wm")]
    if not all(path.is_file() for path in paths):
        raise UserError(
            f"nilearn 0.14, whose wheel holds the MNI152 template, is not installed; {pip_install('samples')}"
        )
    import nibabel as nib

    t1, grey, white = (nib.as_closest_canonical(nib.load(path)) for path in paths)
    volumes = (np.asanyarray(image.dataobj).T for image in (t1, grey, white))
    return Template(*volumes, affine=t1.affine)


def tissue(grey: np.ndarray, white: np.ndarray) -> np.ndarray:
    """1 for grey matter and 2 for white where the two together are likelier than not, else 0; uint8."""
    likely = grey.astype(np.int32) + white > 127
    return np.where(likely, 1 + (white > grey), 0).astype(np.uint8)


def blocks(template: Template) -> Iterator[Block]:
    """Cubes side by side that are brain enough, in mirrored pairs about the midline, which is in none."""
    depth, height, width = template.t1.shape
    middle = int(np.rint(np.linalg.inv(template.affine)[0, 3]))
    brain = tissue(template.grey, template.white) > 0
    for z in range(_FIRST_Z, depth - BLOCK + 1, BLOCK):
        for y in range(_FIRST_Y, height - BLOCK + 1, BLOCK):
            for out in range(1, width - middle - BLOCK + 1, BLOCK):
                for side, x in (("left", middle - out - BLOCK + 1), ("right", middle + out)):
                    block = Block((z, y, x), f"{z}-{y}-{out}", side)
                    if x >= 0 and block.of(brain).mean() >= LEAST_BRAIN:
                        yield block


def words(block: Block, template: Template) -> str:
    """What an atlas would say of a block from its coordinates and its tissue."""
    x, y, z = (block.affine(template) @ [*[(BLOCK - 1) / 2] * 3, 1])[:3]
    grey, white = (block.of(volume).sum(dtype=np.int64) for volume in (template.grey, template.white))
    most = "grey matter" if grey > 1.5 * white else "white matter" if white > 1.5 * grey else "grey and white matter"
    place = f"{'in front of' if y > 0 else 'behind'} and {'above' if z > 0 else 'below'} the anterior commissure"
    depth = "next to the midline" if abs(x) < BLOCK else "towards the outer side"
    return f"A block of the {block.side} side of the brain, {depth}, {place}. It is mostly {most}."


def _write(folder: Path, console: Console) -> None:
    template = read_template()
    with (folder / "blocks.csv").open("w", newline="") as table, (folder / "words.jsonl").open("w") as texts:
        rows = csv.writer(table)
        rows.writerow(["region", "side", *DATASET["columns"]])
        for block in counted(list(blocks(template)), "Cutting blocks", console):
            grey, white = block.of(template.grey), block.of(template.white)
            path, affine = f"{block.region}/{block.side}.nii.gz", block.affine(template)
            write_nifti(folder / "t1" / path, block.of(template.t1), affine)
            write_nifti(folder / "tissue" / path, tissue(grey, white), affine)
            rows.writerow([block.region, block.side, *(float(p.sum(dtype=np.int64)) / 255e3 for p in (grey, white))])
            text = {"region": block.region, "side": block.side, "description": words(block, template)}
            texts.write(json.dumps(text) + "\n")
