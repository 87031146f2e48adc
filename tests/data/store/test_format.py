"""What lies on disk follows zarr v3 and OME-NGFF 0.5."""

import json
from math import prod
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mmfm_jax.data.store.format import array_metadata, chunk_shape, stacked_studies_per_shard
from mmfm_jax.data.study import ImageSpec

extents = st.tuples(*[st.integers(1, 600)] * 3)


def test_groups_are_ome_ngff_0_5(store, studies):
    """The rules of https://ngff.openmicroscopy.org/0.5/ for multiscales, by hand."""
    volumes = Path(store.url) / "volumes"
    row = next(i for i, s in enumerate(studies) if "ct" in s.images)
    for group in (volumes / "nodule", volumes / "photo", volumes / f"ct/{row:08d}", *volumes.glob("**/labels/*/")):
        metadata = json.loads((group / "zarr.json").read_text())
        assert (metadata["zarr_format"], metadata["node_type"]) == (3, "group")
        assert metadata["attributes"]["ome"]["version"] == "0.5"
        (multiscale,) = metadata["attributes"]["ome"]["multiscales"]
        array = json.loads((group / "0/zarr.json").read_text())
        names = [axis["name"] for axis in multiscale["axes"]]
        assert names == array["dimension_names"] and len(set(names)) == len(names)
        assert [axis.get("type") for axis in multiscale["axes"][1:]] == ["space"] * 3
        assert multiscale["axes"][0].get("type") in (None, "channel")
        ((scale,),) = [dataset["coordinateTransformations"] for dataset in multiscale["datasets"]]
        assert scale["type"] == "scale" and len(scale["scale"]) == len(names) == len(array["shape"])
        if group.parent.name == "ct":
            assert scale["scale"] == [1.0, *studies[row].images["ct"].spacing_mm]
            assert {axis["unit"] for axis in multiscale["axes"][1:]} == {"millimeter"}
    for group in volumes.glob("**/labels"):
        names = json.loads((group / "zarr.json").read_text())["attributes"]["ome"]["labels"]
        assert sorted(names) == sorted(child.name for child in group.iterdir() if child.is_dir())
        for name in names:
            ome = json.loads((group / name / "zarr.json").read_text())["attributes"]["ome"]
            named = {one["label-value"]: one["name"] for one in ome["image-label"]["properties"]}
            assert tuple(named.values()) == store.schema.masks[name].classes and list(named) == [
                *range(1, len(named) + 1)
            ]
            assert (group / name / ome["image-label"]["source"]["image"]).resolve() == group.parent
            theirs = json.loads((group.parent / "zarr.json").read_text())["attributes"]["ome"]["multiscales"][0]
            assert ome["multiscales"][0]["datasets"] == theirs["datasets"]
    plain = json.loads((volumes / "ct/zarr.json").read_text())
    assert plain["node_type"] == "group" and "attributes" not in plain


@given(shape=extents, limit=st.integers(1, 64**3))
def test_a_chunk_is_within_its_limit_and_not_wastefully_small(shape, limit):
    chunk = chunk_shape(shape, limit)
    assert all(1 <= c <= s for c, s in zip(chunk, shape))
    assert prod(chunk) <= limit
    assert prod(chunk) * 4 > min(limit, prod(shape)) or prod(chunk) == 1


@given(shape=extents, channels=st.integers(1, 4), stacked=st.booleans())
def test_shards_are_whole_numbers_of_chunks(shape, channels, stacked):
    spec = ImageSpec(dtype="int16", shape=shape if stacked else None, channels=channels)
    metadata = array_metadata(spec, shape, stacked_studies_per_shard(spec, 2) if stacked else None)
    shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    chunk = metadata["codecs"][0]["configuration"]["chunk_shape"]
    assert all(s % c == 0 for s, c in zip(shard, chunk))
    if stacked:  # a study is in one shard
        assert shard[0] % channels == 0 and all(s >= n for s, n in zip(shard[1:], shape))
