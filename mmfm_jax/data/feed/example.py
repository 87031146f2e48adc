"""One study as the model is given it: cropped, a text drawn, tokenized and indexed, its values still raw."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from mmfm_jax.config.inputs import ImageInput, Inputs
from mmfm_jax.data.batch import (
    Batch,
    ImagePart,
    ImageShape,
    InputSpec,
    LabelPart,
    PackedPart,
    PackedShape,
    TablePart,
    TextPart,
)
from mmfm_jax.data.feed import packing, resample
from mmfm_jax.data.feed.foreground import centre, check
from mmfm_jax.data.feed.tokenizer import PAD, Tokenizer
from mmfm_jax.data.store.mix import StoreMix
from mmfm_jax.data.store.study_store import StudyStore

ABSENT = -1  # in the place of a study's row
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


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

    def __init__(
        self,
        store: StudyStore | StoreMix,
        inputs: Inputs,
        spec: InputSpec,
        tokenizer: Tokenizer,
        labels: Sequence[str] | None = None,
    ):
        """`labels`: those that are read; all of the store where None."""
        self.store, self.inputs, self.spec, self.tokenizer = store, inputs, spec, tokenizer
        self.labels = tuple(spec.labels) if labels is None else tuple(labels)
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
            labels={name: _label(labels.get(name)) for name in self.labels},
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
            study=np.asarray(ABSENT, np.int32),
            images={},
            texts={field: self._text(field, (), None) for field in self.spec.texts},
            table=self._table({}),
            labels={name: _label(None) for name in self.labels},
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
        return _nearest(self._shape(role, row).window[0], self._dtype(role))

    def _text(self, field: str, texts: Sequence[str], rng: np.random.Generator | None) -> TextPart:
        length = self.spec.texts[field]
        if not texts:
            return TextPart(np.full(length, PAD, np.int32), np.asarray(False), np.zeros(2, np.uint32))
        text = texts[0] if rng is None else texts[int(rng.integers(len(texts)))]
        shown = text if rng is None else _some_sentences(text, self.inputs.texts[field].sentence_keep, rng)
        tokens = self.tokenizer.encode(shown, length)
        # A foreign tokenizer may have no start token; then an empty text has nothing to attend to and counts as absent.
        return TextPart(tokens, np.asarray((tokens != PAD).any()), digest(text))

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


@functools.cache
def _nearest(value: float, dtype: str) -> float:
    """The value of a dtype that is nearest to `value`."""
    if np.dtype(dtype).kind not in "iu":
        return value
    return min(max(round(value), np.iinfo(dtype).min), np.iinfo(dtype).max)


def _label(value: int | None) -> LabelPart:
    return LabelPart(np.asarray(value or 0, np.int32), np.asarray(value is not None))


def digest(text: str) -> np.ndarray:
    """64 bits of a text, uint32 [2]: equal for equal texts but for space at their ends."""
    return np.frombuffer(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), np.uint32)


def _some_sentences(text: str, keep: float, rng: np.random.Generator) -> str:
    """With `keep` below 1 some of the sentences of a text, at least one, in random order."""
    if keep == 1:
        return text
    sentences = _SENTENCE_END.split(text.strip())
    kept = rng.random(len(sentences)) < keep
    kept[rng.integers(len(sentences))] |= not kept.any()
    return " ".join(sentences[i] for i in rng.permutation(np.flatnonzero(kept)))
