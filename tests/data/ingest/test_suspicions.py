"""What may show a text or a face is suspect."""

from dataclasses import replace

import pytest

from mmfm_jax.data.ingest.suspicions import suspicions
from mmfm_jax.data.readers.dicom import Header

PLAIN = Header(
    patient="p", studies={}, series="s", modality="CT", description="", body_part="CHEST", body_words="", burned_in="",
    recognisable="", secondary=False, projection=False, voxels=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"burned_in": "YES"}, ["burned_in_text"]),
        ({"secondary": True}, ["burned_in_text"]),
        ({"secondary": True, "burned_in": "NO"}, []),
        ({"modality": "US"}, ["burned_in_text"]),
        ({"body_part": "HEAD"}, ["face"]),
        ({"body_part": ""}, ["face"]),
        ({"body_words": "CT BRAIN W/O"}, ["face"]),
        ({"body_part": "BRAIN", "recognisable": "NO"}, []),
        ({"recognisable": "YES"}, ["face"]),
        ({"modality": "DX", "body_part": "SKULL"}, []),
        ({"modality": "XC"}, ["burned_in_text", "face"]),
        ({"modality": ""}, ["burned_in_text", "face"]),
    ],
)
def test_suspicions_of_dicom(change, expected):
    assert suspicions(replace(PLAIN, **change), "", "") == expected


def test_a_role_fills_in_what_a_file_does_not_say_but_a_head_stays_a_head():
    assert suspicions(replace(PLAIN, body_part=""), "CT", "ABDOMEN") == []
    assert suspicions(replace(PLAIN, body_part="HEAD"), "CT", "ABDOMEN") == ["face"]
    assert suspicions(None, "", "") == ["burned_in_text", "face"]
    assert suspicions(None, "MR", "") == suspicions(None, "MR", "BRAIN") == ["face"]
    assert suspicions(None, "MR", "KNEE") == suspicions(None, "DX", "") == []
