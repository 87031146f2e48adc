"""Every field of what a user writes says what it means, and stands on a page."""

import pytest

from mmfm_jax.config.markdown import markdown
from mmfm_jax.data.ingest.dataset import Dataset
from mmfm_jax.experiment import experiment_type

SCHEMAS = {"experiment": experiment_type().model_json_schema(), "dataset": Dataset.model_json_schema()}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_field_and_part_has_a_meaning(name):
    schema = SCHEMAS[name]
    parts = {"": schema, **schema["$defs"]}
    assert not [part for part, of in parts.items() if not of.get("description")]
    fields = [(part, field, of) for part, held in parts.items() for field, of in held["properties"].items()]
    assert len(fields) > 90
    assert not [f"{part}.{field}" for part, field, of in fields if not of.get("description")]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_page_has_every_part_with_its_fields_in_order(name):
    schema = SCHEMAS[name]
    sections = markdown("All", "mmfm", schema).split("\n## ")
    assert len(sections) == 1 + len(schema["$defs"])
    found = [[line.split("**")[1] for line in of.splitlines() if line.startswith("- **")] for of in sections]
    wanted = [list(of["properties"]) for of in (schema, *schema["$defs"].values())]
    assert found[0] == wanted[0] and sorted(found) == sorted(wanted)


def test_types_limits_defaults_and_places_are_told_in_words():
    page = markdown("All", "mmfm", SCHEMAS["experiment"])
    for line in (
        "- **seed** (integer at least 0, default `0`): ",
        "- **steps** (integer above 0, required): ",
        "- **recall_at** (list of integer above 0, default `[1, 5, 10]`): ",
        "- **shift_mm** (number at least 0, default `0.0`): ",
        "- **normalise** (fields of its own or `zscore` or `zscore_foreground` or null, default `null`): ",
        "- **images** (by name, each with fields of its own): ",
        "- **groups** (list, each with fields of its own): ",
        "- **positive** (list of string, one or more, required): ",
        "Stands at `model.text`, `tasks.NAME.decoder`.",
        "## `tasks.NAME (kind: masked)`",
    ):
        assert line in page, line
