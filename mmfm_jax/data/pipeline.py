"""Studies of a store as batches, in an order that is a function of (data config, seed, step) alone.

Element i of the endless training order is the same on every host, thread and restart, and any element can be read
without the ones before it. So each process reads only its own rows of a global batch, and a run resumes from a step
number.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, cast

import grain
import jax
import numpy as np

from mmfm_jax.config import Inputs, TextInput
from mmfm_jax.data.batch import Batch, ImagePart, ImageShape, InputSpec, LabelPart, NumberStats, TablePart, TextPart
from mmfm_jax.data.stats import Stats
from mmfm_jax.data.store import StudyStore
from mmfm_jax.data.study import Schema
from mmfm_jax.data.tokenizer import PAD, Tokenizer
from mmfm_jax.errors import UserError

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_ABSENT = -1  # in the place of a study's row


def make_spec(inputs: Inputs, schema: Schema, stats: Stats, tokenizer: Tokenizer) -> InputSpec:
    """What a model for `inputs` is built for. Raises UserError that names an input which the store lacks.

    Every label of the store is in it, whether a task uses it or not.
    """
    _check_held("images", inputs.images, schema.images)
    _check_held("texts", inputs.texts, schema.texts)
    _check_held("columns", inputs.columns, schema.columns)
    columns = {name: schema.columns[name] for name in inputs.columns}
    return InputSpec(
        images={
            role: ImageShape(
                size=image.size, patch=image.patch, channels=schema.images[role].channels, window=image.window
            )
            for role, image in inputs.images.items()
        },
        texts={field: text.length for field, text in inputs.texts.items()},
        vocabulary_size=tokenizer.vocabulary_size,
        mask_token=tokenizer.mask_token,
        # A column that never varies has sd 0; it is then only centred.
        numbers={
            name: NumberStats(mean=stats.numbers[name].mean, sd=stats.numbers[name].sd or 1.0)
            for name, column in columns.items()
            if column.kind == "number"
        },
        categories={name: column.vocabulary for name, column in columns.items() if column.kind == "category"},
        labels={name: label.classes for name, label in schema.labels.items()},
    )


def _check_held(kind: str, wanted: Iterable[str], held: dict[str, Any]) -> None:
    for name in wanted:
        if name not in held:
            raise UserError(
                f"inputs.{kind}: the store has no {name}; it has {', '.join(held) or 'none'} "
                "(`mmfm inspect STORE` describes them)"
            )


# ---------------------------------------------------------------- one study


class Samples:
    """Studies of a store as unbatched `Batch`es: cropped, tokenized and indexed, values still raw."""

    def __init__(self, store: StudyStore, inputs: Inputs, spec: InputSpec, tokenizer: Tokenizer):
        self.store, self.inputs, self.spec, self.tokenizer = store, inputs, spec, tokenizer
        self._codes: dict[str, dict[Any, int]] = {
            name: {value: i for i, value in enumerate(vocabulary)} for name, vocabulary in spec.categories.items()
        }

    def read(self, row: int, rng: np.random.Generator | None) -> Batch:
        """The study at `row`; random crops and texts come from `rng` alone.

        Without `rng`: crops in the centre, and the first text of each field, whole. Raises UserError when a file of
        the store is damaged.
        """
        row = int(row)
        texts, values, labels = self.store.table(row)
        return Batch(
            study=np.asarray(row, np.int32),
            images={role: self._image(role, row, rng) for role in self.spec.images},
            texts={field: self._text(field, texts.get(field, ()), rng) for field in self.spec.texts},
            table=self._table(values),
            labels={name: _label(labels.get(name)) for name in self.spec.labels},
        )

    def readings(self, row: int) -> list[dict[str, str]]:
        """The words of the study at `row`, by field: first the first text of each field, then the second, and so on."""
        texts = self.store.table(int(row))[0]
        held = {field: texts.get(field, ()) for field in self.spec.texts}
        most = max(map(len, held.values()), default=0)
        return [{field: of[i] for field, of in held.items() if i < len(of)} for i in range(most)]

    def absent(self) -> Batch:
        """A study of which everything is missing, to fill up a batch."""
        return Batch(
            study=np.asarray(_ABSENT, np.int32),
            images={role: self._no_image(role) for role in self.spec.images},
            texts={field: self._text(field, (), None) for field in self.spec.texts},
            table=self._table({}),
            labels={name: _label(None) for name in self.spec.labels},
        )

    def _image(self, role: str, row: int, rng: np.random.Generator | None) -> ImagePart:
        info = self.store.volume_info(role, row)
        if info is None:
            return self._no_image(role)
        held, spacing_mm = info
        size = self.spec.images[role].size
        z, y, x = ((h - s) // 2 for h, s in zip(held, size))  # negative where the crop is larger: padded on both sides
        if rng is not None and self.inputs.images[role].crop == "random":
            z, y, x = (int(rng.integers(h - s + 1)) if h > s else centre for h, s, centre in zip(held, size, (z, y, x)))
        voxels = self.store.crop(role, row, (z, y, x), size, fill=self._fill(role))
        return ImagePart(voxels, np.asarray(spacing_mm, np.float32), np.asarray(True))

    def _fill(self, role: str) -> float:
        """Raw value of padding: the one nearest to the low end of the window, so it is 0 once windowed."""
        low, dtype = self.spec.images[role].window[0], np.dtype(self.store.schema.images[role].dtype)
        if dtype.kind not in "iu":
            return low
        return min(max(round(low), np.iinfo(dtype).min), np.iinfo(dtype).max)

    def _no_image(self, role: str) -> ImagePart:
        shape = self.spec.images[role]
        voxels = np.zeros((*shape.size, shape.channels), self.store.schema.images[role].dtype)
        return ImagePart(voxels, np.zeros(3, np.float32), np.asarray(False))

    def _text(self, field: str, texts: Sequence[str], rng: np.random.Generator | None) -> TextPart:
        length = self.spec.texts[field]
        if not texts:
            return TextPart(np.full(length, PAD, np.int32), np.asarray(False))
        text = texts[0] if rng is None else _drawn(texts, self.inputs.texts[field], rng)
        tokens = self.tokenizer.encode(text, length)
        # A foreign tokenizer may have no start token; then an empty text has nothing to attend to and counts as absent.
        return TextPart(tokens, np.asarray((tokens != PAD).any()))

    def _table(self, values: dict[str, float | str]) -> TablePart:
        numbers = [values.get(name) for name in self.spec.numbers]
        # A value outside the vocabulary that the model was built with is as good as missing.
        codes = [self._codes[name].get(values.get(name)) for name in self.spec.categories]
        return TablePart(
            numbers=np.array([0 if v is None else v for v in numbers], np.float32),
            number_present=np.array([v is not None for v in numbers], bool),
            categories=np.array([c or 0 for c in codes], np.int32),
            category_present=np.array([c is not None for c in codes], bool),
        )


def _label(value: int | None) -> LabelPart:
    return LabelPart(np.asarray(value or 0, np.int32), np.asarray(value is not None))


def _drawn(texts: Sequence[str], config: TextInput, rng: np.random.Generator) -> str:
    """One of the texts; with `sentence_keep` below 1 some of its sentences, at least one, in random order."""
    text = texts[int(rng.integers(len(texts)))]
    if config.sentence_keep == 1:
        return text
    sentences = _SENTENCE_END.split(text.strip())
    kept = rng.random(len(sentences)) < config.sentence_keep
    kept[rng.integers(len(sentences))] |= not kept.any()
    return " ".join(sentences[i] for i in rng.permutation(np.flatnonzero(kept)))


# ---------------------------------------------------------------- many studies


def training_rows(samples: Samples, split: str, seed: int) -> grain.MapDataset[Batch]:
    """The endless training order: element i is the study at global position i, drawn with a generator of (seed, i).

    Each epoch holds every study of the split once, in an order of its own. The order is a block cipher on the index
    (grain's index_shuffle), not a permutation in memory: the split takes 4 bytes a study.
    Raises UserError when the split has no patients.
    """
    rows = samples.store.rows(split).astype(np.uint32)
    # Hashed, because epoch e is shuffled with (order + e): neighbouring seeds would repeat each other's epochs.
    order, draws = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    return (
        grain.MapDataset.source(cast(Sequence[int], rows)).shuffle(order).repeat().random_map(samples.read, seed=draws)
    )


def local_batches(
    dataset: grain.MapDataset[Batch],
    batch_size: int,
    local_rows: np.ndarray,
    start_step: int,
    threads: int,
    prefetch: int,
) -> Generator[Batch, None, None]:
    """The rows `local_rows` (of `range(batch_size)`) of each global batch from `start_step` on, without end.

    `threads` read up to `prefetch` batches ahead; neither changes the batches. Closing the generator stops them.
    What a reader raises is raised here.
    """
    rows = np.asarray(local_rows)

    def read(index: int) -> Batch:
        step, i = divmod(index, len(rows))
        return cast(Batch, dataset[(start_step + step) * batch_size + int(rows[i])])

    return _read_ahead(_Studies(sys.maxsize, read), len(rows), threads, prefetch)


def evaluation_batches(
    samples: Samples,
    split: str,
    batch_size: int,
    local_rows: np.ndarray,
    limit: int | None = None,
    threads: int = 8,
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """Every study of the split once (the first `limit` of them), in store order, read without randomness.

    The last batch is filled with absent studies (`study` -1), so all processes yield equally many batches of one
    shape. Raises UserError when the split has no patients.
    """
    rows = samples.store.rows(split)[:limit]
    padded = np.full(-(-len(rows) // batch_size) * batch_size, _ABSENT)
    padded[: len(rows)] = rows
    local = padded.reshape(-1, batch_size)[:, local_rows].reshape(-1)

    def read(index: int) -> Batch:
        row = int(local[index])
        return samples.absent() if row == _ABSENT else samples.read(row, None)

    return _read_ahead(_Studies(len(local), read), len(local_rows), threads, prefetch)


def batch_checksum(batch: Batch) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all leaves, for comparing batches between runs and hosts."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class _Studies:
    """The studies that a process reads, one after another."""

    def __init__(self, length: int, read: Callable[[int], Batch]):
        self._length, self._read = length, read

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        return self._read(index)


def _read_ahead(studies: _Studies, size: int, threads: int, prefetch: int) -> Generator[Batch, None, None]:
    """`studies` in batches of `size`. Threads read single studies, so the first batch comes as soon as it can."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch * size))
    elements = grain.MapDataset.source(studies).to_iter_dataset(options)
    batches = iter(elements.batch(size, batch_fn=_stack))
    try:
        yield from batches
    finally:
        batches.close()


def _stack(studies: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *studies)
