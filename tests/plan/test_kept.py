"""Every configuration that a document sends to a pod fits it, by a plan of the configuration as it stands."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from mmfm_jax.plan.chips import CHIPS, GIB
from mmfm_jax.plan.kept import KEPT, Pair, digest, named

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*")]
ROWS = {(row["config"], row["topology"], row["slices"]): row for row in json.loads((ROOT / KEPT).read_text())}


def test_pairs_of_the_documents_and_all_pod_configurations_are_planned():
    pairs = set().union(*(named(document.read_text()) for document in DOCUMENTS if document.is_file()))
    assert Pair("configs/pod.yaml", "v5e:16x16") in pairs
    assert {(pair.config, pair.topology, pair.slices) for pair in pairs} <= set(ROWS)
    configs = {str(path.relative_to(ROOT)) for path in [ROOT / "configs/pod.yaml", *ROOT.glob("configs/pod/*.yaml")]}
    assert configs == {config for config, _, _ in ROWS}


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: f"{row['config']} on {row['topology']}")
def test_a_kept_plan_is_of_the_configuration_as_it_stands_and_fits(row):
    pair = Pair(row["config"], row["topology"], row["slices"])
    raw = yaml.safe_load((ROOT / pair.config).read_text())
    assert row["digest"] == digest(raw, pair.devices), f"{pair.config} changed: make pods, or benchmarks/pods.py --only"
    limit = CHIPS[pair.topology.partition(":")[0]].hbm_bytes / GIB
    assert row["fits"] and row["hbm_gib"] < limit == row["hbm_limit_gib"]


def test_a_digest_is_of_what_the_step_is_compiled_from():
    raw = yaml.safe_load((ROOT / "configs/pod.yaml").read_text())
    first = digest(raw, 256)
    for section, name, value in (
        ("model", "dtype", "float32"), ("train", "batch_size", 2048), ("data", "augment", {"flip": 0}),
        ("optimizer", "kind", "muon"), ("mesh", "tensor", 2), ("tasks", "masked", None), ("inputs", "columns", []),
    ):  # fmt: skip
        changed = copy.deepcopy(raw)
        changed[section][name] = value
        assert digest(changed, 256) != first, section
    same = copy.deepcopy(raw)
    same["mesh"] |= {"data": -1}
    same["data"]["store"], same["train"]["steps"], same["optimizer"]["learning_rate"] = "elsewhere", 1, 1.0
    assert digest(same, 256) == first != digest(same, 512)


def test_a_document_names_pods_with_and_without_slices():
    text = "`mmfm plan configs/a.yaml --topology v5e:4x4 --price 1`\n"
    text += "mmfm plan configs/b.yaml --topology v4:2x2x2 --slices 2"
    assert named(text) == {Pair("configs/a.yaml", "v5e:4x4"), Pair("configs/b.yaml", "v4:2x2x2", 2)}
    assert Pair("", "tpu7x:2x2x2", 2).devices == 32
