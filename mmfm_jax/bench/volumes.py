"""Synthetic volumes for benchmarks: noise in a body with air around it, which compresses about as CT does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mmfm_jax.data.study import Image, ImageSpec, Schema, Study

SCHEMA = Schema(images={"image": ImageSpec(dtype="int16", shape=None)}, texts={"report": "of the scan"})


def ct_studies(slices: Sequence[int], splits: Sequence[str], seed: int = 0) -> Iterator[Study]:
    """A study for each of `slices`, of so many slices of 512 x 512 voxels (HU), with a report of 40 sentences."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:512j, -1:1:512j]
    body = (x / 0.9) ** 2 + (y / 0.7) ** 2 < 1
    for number, (depth, split) in enumerate(zip(slices, splits)):
        noise = rng.normal(40, 25, (32, 512, 512)).astype(np.int16)
        voxels = np.where(body, noise[np.arange(depth) % 32], -1000).astype(np.int16)
        text = " ".join(f"Finding {word}." for word in rng.integers(100, 999, 40))
        image = Image(voxels[..., None], (1.0, 0.7, 0.7))
        yield Study(f"patient{number}", split, {"image": image}, {"report": (text,)})
