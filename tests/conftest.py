"""Tests run on the CPU with 8 virtual devices, so that sharding is tested on any machine."""

import copy
import dataclasses
import gc
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import settings

from mmfm_jax.data.batch import Batch, InputSpec
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, LabelSpec, Schema, Study
from mmfm_jax.experiment import Experiment, validate
from mmfm_jax.parallel.compiled import VARIABLE, processor
from mmfm_jax.parallel.processes import split_cpu
from mmfm_jax.plan.chips import pod
from mmfm_jax.plan.environment import compile_without_devices

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the processes that tests start
FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
    "--xla_cpu_parallel_codegen_split_count=1",  # the other core has a worker of its own
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",  # 8 devices on 2 busy cores may wait for each other
)
if jax.__version_info__ < (0, 11):  # XLA ends the process at a flag that it does not know
    FLAGS += ("--xla_cpu_use_fusion_emitters=false",)  # half the time and memory of a compilation
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
split_cpu(int(os.environ.get("MMFM_TEST_DEVICES", "8")))

# Compiled programs are kept for the other workers, for the processes that tests start and for the next run.
os.environ.setdefault(VARIABLE, str(Path(__file__).parents[1] / ".pytest_cache" / "compiled" / processor()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_compilation_cache_dir", os.environ[VARIABLE] or None)
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)

LONGEST = ("end_to_end", "notebooks", "test_mesh", "tasks/test_packing", "test_step", "plan/", "tasks/", "train/")
"""Parts of the names of files; those come first, so that no worker is left alone with a long one."""


def pytest_collection_modifyitems(items) -> None:
    """The longest files first."""
    items.sort(key=lambda item: next((i for i, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST)))


@pytest.fixture(autouse=True, scope="session")
def hear_ctrl_c():
    """A shell starts what runs in its background with SIGINT ignored, and so are its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Frees what a file compiled where that is much: the next file has programs of its own."""
    yield
    if resident_bytes() > ROOM_BYTES:
        jax.clear_caches()
        gc.collect()


def resident_bytes() -> int:
    """Of this process; where the system does not say, more than there is room for."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 2 * ROOM_BYTES


settings.register_profile("mmfm", deadline=None)  # the first example of a test pays for compiling
settings.load_profile("mmfm")
ROOM_BYTES = 3 * 2**29


SMALL = {
    "name": "small",
    "seed": 1,
    "inputs": {
        "images": {"ct": {"size": [4, 8, 8], "patch": [2, 4, 4], "window": [0, 255]}},
        "texts": {"report": {"length": 12, "sentence_keep": 0.5, "readings": 2}},
        "columns": ["age", "size_mm", "sex"],
    },
    "data": {
        "store": "",
        "vocabulary_size": 300,
        "augment": {"flip": 0.5, "flip_with_text": True, "shift_mm": 1},
        "reader_threads": 2,
    },
    "model": {
        "vision": {"width": 24, "depth": 2, "heads": 2, "registers": 2},
        "text": {"width": 16, "depth": 2, "heads": 2, "gated": True},
        "table": {"width": 16, "depth": 1, "heads": 2, "frequencies": 4},
        "fusion": {"width": 16, "depth": 1, "heads": 2, "latents": 4, "drop": 0.2},
        "dtype": "float32",
    },
    "tasks": {
        "image_text": {"kind": "contrastive", "between": ["image", "text"], "width": 16, "mask_duplicates": True},
        "image_table": {"kind": "contrastive", "between": ["image", "table"], "loss": "softmax", "width": 16},
        "masked": {"kind": "masked", "depth": 1},
        "disease": {"kind": "classification", "label": "disease"},
    },
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 4},
    "train": {"steps": 12, "batch_size": 16, "log_every": 1, "validate_every": 6, "validate_batches": 1},
    "checkpoint": {"every": 4},
}


CAPTION = {"kind": "caption", "field": "report", "decoder": {"width": 16, "depth": 1, "heads": 2}}
"""One more task, for tests of single steps; runs from end to end compile faster without it."""

SCHEMA = Schema(
    images={"ct": ImageSpec(dtype="uint8", shape=(4, 8, 8))},
    texts={"report": "what a reader saw"},
    columns={
        "age": ColumnSpec(kind="number", unit="years"),
        "size_mm": ColumnSpec(kind="number", unit="mm"),
        "sex": ColumnSpec(kind="category", vocabulary=("female", "male")),
    },
    labels={"disease": LabelSpec(classes=("absent", "present"))},
)


def small_studies(n: int) -> list[Study]:
    """Studies in which image, text and table say the same of a disease; any of them may be missing."""
    rng = np.random.default_rng(0)
    studies = []
    for i in range(n):
        sick = int(rng.integers(2))
        voxels = rng.integers(0, 80, (4, 8, 8, 1)) + 150 * sick * (rng.random((4, 8, 8, 1)) < 0.5)
        held = {
            "images": {"ct": Image(voxels.astype(np.uint8), (2.0, 1.0, 1.0))},
            "texts": {"report": tuple(f"The lesion is {('small', 'large')[sick]}. Reader {r}." for r in range(2))},
            "row": {"age": float(rng.normal(60, 9)), "size_mm": 5 + 9 * sick + float(rng.normal()), "sex": "female"},
            "labels": {"disease": sick},
        }
        kept = {name: part if rng.random() < 0.85 else {} for name, part in held.items()}
        studies.append(Study(f"patient{i:03d}", ("train", "train", "validation", "test")[i % 4], **kept))
    return studies


@pytest.fixture(scope="session")
def make_small_store(tmp_path_factory):
    """`make_small_store(studies, splits)`: the folder of a store of the small studies of these splits."""

    def make(studies: int, splits=("train", "validation", "test")) -> str:
        url = str(tmp_path_factory.mktemp("small") / "store")
        write_store(url, SCHEMA, [study for study in small_studies(studies) if study.split in splits])
        return url

    return make


@pytest.fixture(scope="session")
def small_store(make_small_store) -> str:
    return make_small_store(120)


@pytest.fixture(scope="session")
def make_experiment(small_store):
    """`make_experiment({"train.steps": 3, ...})`: the small experiment with fields changed."""

    def make(changes: dict | None = None) -> Experiment:
        raw = copy.deepcopy(SMALL)
        for field, value in {"data.store": small_store, **(changes or {})}.items():
            *path, last = field.split(".")
            place = raw
            for name in path:
                place = place.setdefault(name, {})
            place[last] = value
        return validate(raw, "the test")

    return make


@dataclasses.dataclass(frozen=True)
class Material:
    """What a small experiment works on."""

    experiment: Experiment
    samples: Samples
    spec: InputSpec
    batch: Batch
    """The raw global batch of the first step, on the host."""


@pytest.fixture(scope="session")
def material(make_experiment) -> Material:
    experiment = make_experiment({"tasks.caption": CAPTION, "tasks.numbers": {"kind": "image_numbers"}})
    store = StudyStore.open(experiment.data.store)
    tokenizer = Tokenizer.train(store.texts(store.rows("train")), experiment.data.vocabulary_size)
    spec = make_spec(experiment.inputs, store.schema, store.stats, tokenizer)
    samples = Samples(store, experiment.inputs, spec, tokenizer)
    size = experiment.train.batch_size
    batches = local_batches(training_rows(samples, "train", 0), size, np.arange(size), 0, 2, 1)
    batch = next(batches)
    batches.close()
    return Material(experiment, samples, spec, batch)


@pytest.fixture(scope="session")
def make_pod():
    """`make_pod("v5e:2x2")`: its devices; the test is skipped where libtpu is not installed."""
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (pip install 'mmfm_jax[tpu]')")
    before = dict(os.environ)
    compile_without_devices()
    yield pod
    os.environ.clear()
    os.environ.update(before)
