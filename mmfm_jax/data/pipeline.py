"""Studies of a store as batches, in an order that is a function of (data config, seed, step) alone.

Element i of the endless training order is the same on every host, thread and restart, and any element can be read
without the ones before it. So each process reads only its own rows of a global batch, and a run resumes from a step
number.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import grain
import jax
import numpy as np

from mmfm_jax.config import ImageInput, Inputs, TextInput
from mmfm_jax.data import packing, resample
from mmfm_jax.data.batch import (
    Batch,
    ImagePart,
    ImageShape,
    InputSpec,
    LabelPart,
    NumberStats,
    PackedPart,
    PackedShape,
    TablePart,
    TextPart,
)
from mmfm_jax.data.foreground import centre, check
from mmfm_jax.data.mix import StoreMix, sources
from mmfm_jax.data.stats import Stats
from mmfm_jax.data.store import StudyStore
from mmfm_jax.data.study import Schema
from mmfm_jax.data.tokenizer import PAD, Tokenizer
from mmfm_jax.errors import UserError

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_ABSENT = -1  # in the place of a study's row
_FEW = 1024  # studies of a split whose epochs are permuted in memory


def make_spec(
    inputs: Inputs,
    schema: Schema,
    stats: Stats,
    tokenizer: Tokenizer,
    windows: Mapping[str, tuple[tuple[float, float], ...]] | None = None,
) -> InputSpec:
    """What a model for `inputs` is built for. Raises UserError that names an input which the store lacks.

    Every label of the store is in it, whether a task uses it or not. `windows`: of each store of a mix, by role, where
    they differ.
    """
    _check_held("images", inputs.images, schema.images)
    _check_held("texts", inputs.texts, schema.texts)
    _check_held("columns", inputs.columns, schema.columns)
    columns = {name: schema.columns[name] for name in inputs.columns}
    return InputSpec(
        images={
            role: ImageShape(
                size=image.size,
                patch=image.patch,
                channels=schema.images[role].channels,
                window=image.window,
                windows=(windows or {}).get(role, ()),
                spacing_mm=image.spacing_mm,
                read=image.spacing_mm and _raw_extent(role, image, stats),
                pack=image.pack and PackedShape(studies=image.pack.studies, tokens=image.pack.tokens),
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


def _raw_extent(role: str, image: ImageInput, stats: Stats) -> tuple[int, int, int]:
    """Of the finest training image, the voxels from which a crop of the target spacing is made."""
    finest = stats.images[role].spacing_mm_min
    if image.spacing_mm is None or finest is None:
        raise UserError(
            f"inputs.images.{role}.spacing_mm: the store does not say how fine its finest image of {role} is, as it "
            "was written by an earlier release or holds none for training; build it anew, or leave spacing_mm out"
        )
    return resample.extent(image.size, image.spacing_mm, finest)


def _check_held(kind: str, wanted: Iterable[str], held: dict[str, Any]) -> None:
    for name in wanted:
        if name not in held:
            raise UserError(
                f"inputs.{kind}: the store has no {name}; it has {', '.join(held) or 'none'} "
                "(`mmfm inspect STORE` describes them)"
            )


# ---------------------------------------------------------------- one study


@dataclass(frozen=True)
class Box:
    """Where the crop of an image lies in its volume; `start` is negative where it sticks out."""

    start: tuple[int, int, int]
    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Drawn:
    """A study with everything drawn and all but its voxels read."""

    samples: Samples
    rest: Batch
    """The study without its images."""
    boxes: dict[str, Box]
    """By role, of the images that it has."""

    def read(self) -> Batch:
        """The study with its voxels. Raises UserError when a file of the store is damaged."""
        begun = self.begin({role: voxels[0] for role, voxels in self.samples.voxels(1).items()})
        begun.wait()
        return begun.study

    def begin(self, out: Mapping[str, np.ndarray]) -> Begun:
        """Begins to read voxels into `out` [z, y, x, channel] by role, such as the study's place in a batch."""
        samples, row = self.samples, int(self.rest.study)
        waits = [samples.begin_image(role, row, self.boxes.get(role), voxels) for role, voxels in out.items()]
        parts = {
            role: ImagePart(
                voxels,
                np.asarray(box.spacing_mm if (box := self.boxes.get(role)) else (0, 0, 0), np.float32),
                np.asarray(role in self.boxes),
            )
            for role, voxels in out.items()
        }
        packed = {role: samples.patches(role, row, self.boxes.get(role)) for role in samples.packed}
        return Begun(replace(self.rest, images=parts, packed=packed), waits)


@dataclass(frozen=True)
class Begun:
    """A study whose voxels are on their way."""

    study: Batch
    waits: list[Callable[[], None]]

    def wait(self) -> None:
        """Until the voxels are there. Raises what reading them raises."""
        for wait in self.waits:
            wait()


class Samples:
    """Studies of a store as unbatched `Batch`es: cropped, tokenized and indexed, values still raw.

    An image of a packed role is a grid of patches, as many as it fills: its arrays are [z, y, x, ...].
    """

    def __init__(self, store: StudyStore | StoreMix, inputs: Inputs, spec: InputSpec, tokenizer: Tokenizer):
        self.store, self.inputs, self.spec, self.tokenizer = store, inputs, spec, tokenizer
        for role in spec.images:
            for image in store.image_inputs(role, inputs.images[role]):
                if image.foreground:
                    check(image.foreground, store, role)
        self.packed = {role: shape.pack for role, shape in spec.images.items() if shape.pack is not None}
        """How training packs images, by role."""
        self._codes: dict[str, dict[Any, int]] = {
            name: {value: i for i, value in enumerate(vocabulary)} for name, vocabulary in spec.categories.items()
        }

    def read(self, row: int, rng: np.random.Generator | None) -> Batch:
        """The study at `row`; random crops and texts come from `rng` alone.

        Without `rng`: crops in the centre, and the first text of each field, whole. Raises UserError when a file of
        the store is damaged.
        """
        return self.draw(row, rng).read()

    def draw(self, row: int, rng: np.random.Generator | None) -> Drawn:
        """The study at `row` but for its voxels: where they will be read is drawn, and they are not read yet."""
        row = int(row)
        texts, values, labels = self.store.table(row)
        boxes = {role: box for role in self._unpacked if (box := self._box(role, row, rng))}
        drawn = Batch(
            study=np.asarray(row, np.int32),
            images={},
            texts={field: self._text(field, texts.get(field, ()), rng) for field in self.spec.texts},
            table=self._table(values),
            labels={name: _label(labels.get(name)) for name in self.spec.labels},
            source=self._source(row),
        )
        boxes |= {role: box for role in self.packed if (box := self._box(role, row, rng))}
        return Drawn(self, drawn, boxes)

    def readings(self, row: int) -> list[dict[str, str]]:
        """The words of the study at `row`, by field: first the first text of each field, then the second, and so on."""
        texts = self.store.table(int(row))[0]
        held = {field: texts.get(field, ()) for field in self.spec.texts}
        most = max(map(len, held.values()), default=0)
        return [{field: of[i] for field, of in held.items() if i < len(of)} for i in range(most)]

    def absent(self) -> Drawn:
        """A study of which everything is missing, to fill up a batch."""
        nothing = Batch(
            study=np.asarray(_ABSENT, np.int32),
            images={},
            texts={field: self._text(field, (), None) for field in self.spec.texts},
            table=self._table({}),
            labels={name: _label(None) for name in self.spec.labels},
            source=self._source(0),
        )
        return Drawn(self, nothing, {})

    def voxels(self, studies: int) -> dict[str, np.ndarray]:
        """Room for the images of so many studies, by role, in raw dtype; what stands there is not set."""
        shapes = {role: self.spec.images[role] for role in self._unpacked}
        return {
            role: np.empty((studies, *shape.raw, shape.channels), self._dtype(role)) for role, shape in shapes.items()
        }

    @property
    def whole(self) -> dict[str, PackedShape]:
        """How evaluation packs: a study a row, with room for the largest crop, so none depends on its neighbours."""
        return {role: PackedShape(studies=1, tokens=math.prod(self.spec.images[role].grid)) for role in self.packed}

    @property
    def _unpacked(self) -> list[str]:
        return [role for role in self.spec.images if role not in self.packed]

    def _source(self, row: int) -> np.ndarray | None:
        return np.asarray(self.store.source(row), np.int32) if isinstance(self.store, StoreMix) else None

    def _shape(self, role: str, row: int) -> ImageShape:
        shape = self.spec.images[role]
        return shape.of_source(self.store.source(row)) if isinstance(self.store, StoreMix) else shape

    def _input(self, role: str, row: int) -> ImageInput:
        image = self.inputs.images[role]
        return self.store.image_input(role, image, row) if isinstance(self.store, StoreMix) else image

    def _dtype(self, role: str) -> str:
        return self.store.schema.images[role].dtype

    def _box(self, role: str, row: int, rng: np.random.Generator | None) -> Box | None:
        """Where the crop of an image is; None when the study lacks it. A packed one has whole patches."""
        info, shape = self.store.volume_info(role, row), self.spec.images[role]
        if info is None:
            return None
        held, spacing_mm = info
        size = packing.extent(held, shape) if role in self.packed else shape.size
        if shape.read and shape.spacing_mm:  # no more than the finest training image needs: there is no room for it
            needed = resample.extent(shape.size, shape.spacing_mm, spacing_mm)
            size = cast(tuple[int, int, int], tuple(map(min, needed, shape.read)))
        start = [(h - s) // 2 for h, s in zip(held, size)]  # negative where the crop is larger: padded on both sides
        image = self._input(role, row)
        if rng is not None and image.crop == "random":
            on = image.foreground and centre(image.foreground, self.store, role, row, rng)
            for axis, (h, s) in enumerate(zip(held, size)):
                if h > s:
                    start[axis] = int(rng.integers(h - s + 1) if on is None else np.clip(on[axis] - s // 2, 0, h - s))
        z, y, x = start
        return Box((z, y, x), size, spacing_mm)

    def begin_image(self, role: str, row: int, box: Box | None, out: np.ndarray) -> Callable[[], None]:
        """Begins to read the voxels of a box into `out`, zeros for None; returns what waits for them."""
        if box is None:
            out[...] = 0
            return lambda: None
        fill = self._fill(role, row)
        if box.size != out.shape[:3]:  # in the middle, of one parity with it
            out[...] = fill
            out = out[tuple(slice((room - n) // 2, (room + n) // 2) for room, n in zip(out.shape, box.size))]
        return self.store.begin_crop(out, role, row, box.start, fill=fill)

    def patches(self, role: str, row: int, box: Box | None) -> PackedPart:
        """A grid of as many patches as the image fills, at most those of the largest crop."""
        shape, config = self._shape(role, row), self.inputs.images[role].pack
        if box is None or config is None:
            return packing.nothing(shape, self._dtype(role))
        voxels = self.store.crop(role, row, box.start, box.size, fill=self._fill(role, row))
        return packing.cut(voxels, box.spacing_mm, shape, config.trim)

    def _fill(self, role: str, row: int) -> float:
        """Raw value of padding: the one nearest to the low end of the window, so it is 0 once windowed."""
        low, dtype = self._shape(role, row).window[0], np.dtype(self._dtype(role))
        if dtype.kind not in "iu":
            return low
        return min(max(round(low), np.iinfo(dtype).min), np.iinfo(dtype).max)

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


def training_rows(samples: Samples, split: str, seed: int) -> grain.MapDataset[Drawn]:
    """The endless training order: element i is the study at global position i, drawn with a generator of (seed, i).

    Each epoch holds every study of the split once, in an order of its own. The order is a block cipher on the index
    (grain's index_shuffle), not a permutation in memory: the split takes 4 bytes a study.
    Of a mix, each store has an order and epochs of its own, and any n studies in a row hold each store's share of n, to
    the nearest whole study.
    Raises UserError when the split has no patients.
    """
    parts = sources(samples.store, split)
    # Hashed, because epoch e is shuffled with (order + e): neighbouring seeds would repeat each other's epochs.
    seeds = np.random.SeedSequence(seed).generate_state(2 * len(parts)).reshape(-1, 2).tolist()
    orders = [
        _shuffled(rows.astype(np.uint32), order).random_map(samples.draw, seed=draws)
        for (_, rows), (order, draws) in zip(parts, seeds)
    ]
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, [weight for weight, _ in parts])


def _shuffled(rows: np.ndarray, seed: int) -> grain.MapDataset:
    if len(rows) < _FEW:
        return grain.MapDataset.source(_FewRows(rows, seed))
    return grain.MapDataset.source(cast(Sequence[int], rows)).shuffle(seed).repeat()


class _FewRows:
    """The endless order of a small split. grain's cipher is of 16 bits at least and tries again until it lands within
    the split, which takes 65,536 / studies turns: 3 ms a study for a split of 8."""

    def __init__(self, rows: np.ndarray, seed: int):
        self._rows = rows
        self._epoch = functools.lru_cache(4)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(rows))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        epoch, at = divmod(index, len(self._rows))
        return self._epoch(epoch)[at]


def local_batches(
    dataset: grain.MapDataset[Drawn],
    batch_size: int,
    local_rows: np.ndarray,
    start_step: int,
    threads: int,
    prefetch: int,
    packed: Mapping[str, PackedShape] | None = None,
) -> Generator[Batch, None, None]:
    """The rows `local_rows` (of `range(batch_size)`) of each global batch from `start_step` on, without end.

    `packed`: how images share rows of tokens, by role (`Samples.packed`); `local_rows` parts no such row. `threads`
    read up to `prefetch` batches ahead; neither changes the batches. Closing the generator stops them. What a reader
    raises is raised here.
    """
    rows = np.asarray(local_rows)

    def draw(index: int) -> Drawn:
        step, i = divmod(index, len(rows))
        return cast(Drawn, dataset[(start_step + step) * batch_size + int(rows[i])])

    return _read_ahead(draw, sys.maxsize, len(rows), threads, prefetch, packed or {})


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

    def draw(index: int) -> Drawn:
        row = int(local[index])
        return samples.absent() if row == _ABSENT else samples.draw(row, None)

    return _read_ahead(draw, len(local), len(local_rows), threads, prefetch, samples.whole)


def batch_checksum(batch: Batch) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all leaves, for comparing batches between runs and hosts."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class _Reading:
    """The studies that a process reads, one after another, each into its place in a batch of `size`.

    Threads may ask for them in any order, each once. The room of a batch is made when its first study is read.
    """

    def __init__(self, draw: Callable[[int], Drawn], length: int, size: int):
        self._draw, self._length, self._size = draw, length, size
        self._room: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, Begun]:
        drawn, (batch, place) = self._draw(index), divmod(index, self._size)
        with self._lock:
            if batch not in self._room:
                self._room[batch] = drawn.samples.voxels(self._size)
            room = self._room[batch]
        return batch, drawn.begin({role: voxels[place] for role, voxels in room.items()})

    def joined(self, studies: Sequence[tuple[int, Begun]], packed: Mapping[str, PackedShape]) -> Batch:
        """The studies of one batch, once all their voxels are there."""
        for _, begun in studies:
            begun.wait()
        return stack([begun.study for _, begun in studies], self._room.pop(studies[0][0]), packed)


def _read_ahead(
    draw: Callable[[int], Drawn], length: int, size: int, threads: int, prefetch: int, packed: Mapping[str, PackedShape]
) -> Generator[Batch, None, None]:
    """Studies in batches of `size`, `prefetch` of them ahead, the first of which is already put together.

    Threads begin to read single studies and TensorStore reads many at once, so the first batch comes as soon as it can.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, (prefetch - 1) * size))
    reading = _Reading(draw, length, size)
    elements = grain.MapDataset.source(cast(Sequence[tuple[int, Begun]], reading)).to_iter_dataset(options)
    batches = iter(elements.batch(size, batch_fn=functools.partial(reading.joined, packed=packed)))
    yield from _one_ahead(batches)


def _one_ahead(batches: Any) -> Generator[Batch, None, None]:
    """`batches`, the next of which a thread puts together while the step runs: copying volumes side by side is slow."""
    try:
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(next, batches, None)
            while (batch := following.result()) is not None:
                following = pool.submit(next, batches, None)
                yield batch
    finally:  # after the one under way, for which the pool waits
        batches.close()


def stack(studies: Sequence[Batch], voxels: Mapping[str, np.ndarray], packed: Mapping[str, PackedShape]) -> Batch:
    """Unbatched studies as a batch, the images of `packed` roles in rows of tokens.

    `voxels`: those of the other roles, which already stand side by side.
    """
    small = [
        replace(study, images={role: replace(part, voxels=0) for role, part in study.images.items()}, packed={})
        for study in studies
    ]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *small)
    return replace(
        batch,
        images={role: replace(part, voxels=voxels[role]) for role, part in batch.images.items()},
        packed={
            role: packing.pack([study.packed[role] for study in studies], shape.studies, shape.tokens)
            for role, shape in packed.items()
        },
    )
