"""Batches are the same bytes however many processes read them, and no end of any process leaves anything behind."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfm_jax.config.data import DataConfig
from mmfm_jax.config.inputs import Inputs
from mmfm_jax.data.feed import workers
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import batch_checksum, evaluation_batches, local_batches
from mmfm_jax.data.feed.reading import Studies, generators
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.mix import open_data
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.data.study import ColumnSpec, Image, ImageSpec, LabelSpec, MaskSpec, Schema, Study
from mmfm_jax.errors import UserError

SIZE = 4
INPUTS = {
    "images": {
        "film": {"size": [1, 6, 6], "patch": [1, 3, 3], "window": [0, 255]},
        "view": {"size": [1, 8, 8], "patch": [1, 4, 4], "window": [[0, 255], [50, 90]]},
        "ct": {"size": [4, 4, 4], "patch": [2, 2, 2], "normalise": "zscore", "crop": "random",
               "foreground": {"share": 0.5, "mask": "organ"}},
        "mr": {"size": [4, 6, 6], "patch": [2, 2, 2], "normalise": {"percentiles": [1, 99]},
               "pack": {"studies": 2, "tokens": 20}},
    },
    "texts": {"report": {"length": 12, "sentence_keep": 0.6}},
    "columns": ["age", "sex"],
}  # fmt: skip


def written(folder: Path, name: str, seed: int) -> str:
    """A store of films of two channels, films with room for shifts, volumes with masks and volumes to be packed."""
    rng, studies = np.random.default_rng(seed), []

    def image(shape, dtype="uint8") -> Image:
        return Image(rng.integers(0, 255, shape).astype(dtype), (1.0, 0.5, 0.5))

    schema = Schema(
        images={
            "film": ImageSpec(dtype="uint8", shape=(1, 6, 6), channels=2),
            "view": ImageSpec(dtype="uint8", shape=(1, 6, 9)),
            "ct": ImageSpec(dtype="int16", shape=None),
            "mr": ImageSpec(dtype="int16", shape=None),
        },
        texts={"report": ""},
        columns={"age": ColumnSpec(kind="number"), "sex": ColumnSpec(kind="category", vocabulary=("f", "m"))},
        labels={"finding": LabelSpec(classes=("no", "yes"))},
        masks={"organ": MaskSpec(image="ct", classes=("liver", "lung"))},
    )
    for i in range(11):
        held = {
            "film": image((1, 6, 6, 2)),
            "view": image((1, 6, 9, 1)),
            "ct": image((9, 8, 7, 1), "int16"),
            "mr": image((int(rng.integers(2, 6)), 6, 5, 1), "int16"),
        }
        kept = {role: of for j, (role, of) in enumerate(held.items()) if (i + j) % 5}
        masks = {"organ": rng.integers(0, 3, (9, 8, 7)).astype(np.uint8)} if "ct" in kept else {}
        texts = {"report": tuple(f"Reader {r}. Study {i}. A third one!" for r in range(1 + i % 2))} if i % 4 else {}
        split = "test" if i % 4 == 3 else "train"
        row = {"age": float(i), "sex": "fm"[i % 2]} if i % 3 else {}
        studies.append(Study(f"{name}{i}", split, kept, texts, row, {"finding": i % 2} if i % 2 else {}, masks))
    url = str(folder / name)
    write_store(url, schema, studies)
    return url


def samples_of(data: dict[str, Any]) -> Samples:
    store, inputs = open_data(DataConfig.model_validate(data)), Inputs.model_validate(INPUTS)
    tokenizer = Tokenizer.train(store.texts(store.rows("train")), 300)
    spec = make_spec(inputs, store.schema, store.stats, tokenizer, store.windows(inputs.images))
    return Samples(store, inputs, spec, tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def samples(folder) -> Samples:
    mix = {name: {"store": written(folder, name, i), "weight": 1 + i} for i, name in enumerate(("left", "right"))}
    return samples_of({"mix": mix})


def training(
    samples: Samples, start: int, count: int, threads: int = 4, prefetch: int = 2, rows: Sequence[int] = range(SIZE)
) -> Any:
    order = training_rows(samples, "train", 3)
    return local_batches(order, SIZE, np.asarray(rows), start, threads, prefetch, samples.packed, count)


def checksums(batches, steps=None) -> list[str]:
    found = [batch_checksum(batch) for batch in islice(batches, steps)]
    batches.close()
    return found


def the_workers(batches) -> Any:
    """Of a generator that has begun."""
    return batches.gi_frame.f_locals["reader"]._workers


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(processes: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, processes))


def test_batches_are_the_same_bytes_for_any_number_of_workers(samples):
    """Packed, on the foreground, of windows of their own, of a mix of stores, on some rows alone, from any step on, and
    of an evaluation."""
    whole = checksums(training(samples, 0, 0, threads=1, prefetch=1), 9)
    some = checksums(training(samples, 4, 0, rows=[2, 3]), 3)
    assert len(set(whole)) == 9
    evaluation = checksums(evaluation_batches(samples, "test", 3, np.arange(3)))
    for count in (1, 2, 3):
        assert checksums(training(samples, 0, count, threads=count), 9) == whole
        assert checksums(training(samples, 5, count), 3) == whole[5:8]
    assert checksums(training(samples, 4, 2, rows=[2, 3]), 3) == some
    held = evaluation_batches(samples, "test", 3, np.arange(3), workers=2)
    assert checksums(held) == evaluation and len(evaluation) == 2


def test_a_worker_that_is_killed_is_replaced_by_one_that_reads_the_same(samples, capfd):
    expected, batches = checksums(training(samples, 0, 0), 8), training(samples, 0, 2)
    got, killed = [], []
    for step in range(8):
        got.append(batch_checksum(next(batches)))
        if step in (1, 2, 5):
            worker = the_workers(batches)[step % 2]
            killed.append(worker._process.pid)
            os.kill(killed[-1], signal.SIGKILL)
    batches.close()
    assert got == expected and len(set(killed)) == 3 and gone(killed)
    lines = capfd.readouterr().err.splitlines()
    assert lines and set(lines) == {"mmfm: a process that reads studies was ended by signal 9 and is replaced"}


class Deadly(Tokenizer):
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (7,)


def test_workers_that_die_time_and_again_end_the_run_in_a_sentence(samples):
    tokenizer = Deadly(samples.tokenizer._tokenizer, samples.tokenizer.mask_token)
    deadly = Samples(samples.store, samples.inputs, samples.spec, tokenizer)
    with pytest.raises(UserError, match=r"data\.workers: .* ended with status 7, 3 times .* lower data\.workers"):
        next(training(deadly, 0, 1))


def test_what_a_worker_raises_is_raised_here_in_the_same_words(folder):
    url = written(folder, "damaged", 5)
    samples = samples_of({"store": url})
    for path in Path(url, "volumes/film/0/c").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:40])
    words = []
    for count in (0, 2):
        with pytest.raises(UserError) as raised:
            list(training(samples, 0, count))
        words.append(str(raised.value))
    assert words[0] == words[1] and "volumes/film/0: a chunk of study" in words[0]
    Path(url, "store.json").unlink()
    with pytest.raises(UserError, match="there is no store here"):
        next(training(samples, 0, 1))


def test_a_store_in_the_memory_of_this_process_is_refused():
    url = "memory://workers-cannot-see-this/"
    write_store(url, Schema(texts={"report": ""}), [Study("p", "train", texts={"report": ("One.",)})])
    store = open_data(DataConfig(store=url))
    inputs, tokenizer = Inputs.model_validate({"texts": {"report": {"length": 4}}}), Tokenizer.train(["One."], 300)
    samples = Samples(store, inputs, make_spec(inputs, store.schema, store.stats, tokenizer), tokenizer)
    with pytest.raises(UserError, match=r"data\.workers: .* memory:// store; give 0"):
        next(training(samples, 0, 1))


def test_workers_know_no_jax_and_end_with_the_generator(samples):
    batches = training(samples, 0, 2)
    for _ in range(2):  # one of each: a worker that has read nothing may still be importing
        next(batches)
    processes = [worker._process.pid for worker in the_workers(batches)]
    for process in processes:
        maps = Path(f"/proc/{process}/maps").read_text()
        assert "tensorstore" in maps and "jaxlib" not in maps
    batches.close()
    assert gone(processes)


def test_memory_is_used_again_once_a_batch_is_let_go_and_never_before(samples, monkeypatch):
    made: list = []

    class Watched(workers._Shared):
        def __init__(self, size):
            super().__init__(size)
            made.append(self)

    monkeypatch.setattr(workers, "_Shared", Watched)
    expected = checksums(training(samples, 0, 0), 30)
    batches = training(samples, 0, 2, prefetch=1)
    assert [batch_checksum(batch) for batch in islice(batches, 20)] == expected[:20]
    assert len(made) <= 4 + 2 * 2  # under way, and one of each worker in the hands of this loop and of the generator
    held = [part.texts["report"].tokens for part in islice(batches, 8)]  # a part keeps its batch
    copies = [tokens.copy() for tokens in held]
    for _ in islice(batches, 2):
        pass
    for tokens, copy in zip(held, copies):
        np.testing.assert_array_equal(tokens, copy)
    most = len(made)
    assert most >= 8
    del tokens
    held.clear()
    gc.collect()
    batches.close()
    open_files = len(os.listdir("/proc/self/fd"))
    del batches
    made.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= open_files - most


PARENT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands down that it is ignored
import numpy as np
import test_workers as t
samples = t.samples_of({"store": sys.argv[1]})
batches = t.training(samples, 0, 2)
next(batches)
print(*(worker._process.pid for worker in t.the_workers(batches)), flush=True)
for _ in batches:
    time.sleep(0.01)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_when_their_parent_does(folder, sent):
    """By a signal to the whole group, as a terminal and Slurm send it, which the workers leave to their parent."""
    url = str(folder / "parent")
    if not Path(url).exists():
        written(folder, "parent", 8)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, url],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    try:
        processes = [int(word) for word in parent.stdout.readline().split()]
        assert len(processes) == 2 and all(map(alive, processes))
        if sent == signal.SIGKILL:
            os.kill(parent.pid, sent)
        else:
            os.killpg(parent.pid, sent)
        _, errors = parent.communicate(timeout=120)  # which waits for whoever has its output
        assert parent.returncode == -sent and gone(processes)
    finally:  # nothing is left to run beside other tests
        parent.kill()
    assert "replaced" not in errors


def test_the_generator_is_that_of_key_and_index_alone():
    def drawn(indices, key=5):
        studies = Studies(np.zeros(len(indices), np.int64), key, np.asarray(indices))
        return [rng.random(3 + i).tolist()[:3] for i, rng in enumerate(generators(studies)) if rng]

    a, b = drawn([7, 8, 2**40, 9]), drawn([9, 2**40, 8, 7])
    assert a == b[::-1] and len({tuple(values) for values in a}) == 4
    assert drawn([7], key=6) != a[:1]
    philox = np.random.Philox(key=5, counter=[0, 0, 8, 0])
    assert a[1] == np.random.Generator(philox).random(3).tolist()
