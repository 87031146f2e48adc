"""One study as the model is given it: cropped, a text drawn, tokenized and indexed, its values still raw."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from mmfm_jax.config.inputs import ImageInput, Inputs, TextInput
from mmfm_jax.data.feed import packing, resample
from mmfm_jax.data.feed.damage import Damage
from mmfm_jax.data.feed.foreground import centre, check
from mmfm_jax.data.feed.intensity import own_limits
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.parts import (
    PAD,
    Batch,
    ImagePart,
    ImageShape,
    InputSpec,
    LabelPart,
    PackedPart,
    PackedShape,
    TablePart,
    TextPart,
    map_arrays,
)
from mmfm_jax.data.store.studies import Studies
from mmfm_jax.data.store.study_store import DamagedImage, Wanted
from mmfm_jax.errors import UserError

ABSENT = -1  # in the place of a study's row
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Box:
    """Where the crop of an image lies in its volume; `start` is negative where it sticks out."""

    start: tuple[int, int, int]
    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    limits: tuple[float, float] | None
    """Raw values of the whole volume that map to 0 and 1; None where the window is the role's."""


@dataclass(frozen=True)
class Drawn:
    """A study with everything drawn and all but its voxels read; what it lacks has no key."""

    samples: Samples
    row: int
    texts: dict[str, list[tuple[str, str]]]
    """By field, what is shown of each text, and the whole."""
    excerpts: dict[str, str]
    """By field of which one was drawn."""
    values: dict[str, float | str]
    labels: dict[str, int]
    boxes: dict[str, Box]

    def read(self) -> Batch:
        """The study with its voxels, unbatched; images of packed roles are grids of patches, arrays [z, y, x, ...].

        Raises UserError when a file of the store is damaged.
        """
        room = self.samples.room(1, {})
        begun = self.samples.begin([self], room, 0)
        begun.wait()
        packed = {role: patches() for role, (patches,) in begun.patches.items()}
        return replace(map_arrays(lambda array: array[0, ...], room), packed=packed)


@dataclass(frozen=True)
class Begun:
    """Studies whose voxels are on their way."""

    waits: list[Callable[[], None]]
    patches: dict[str, list[Callable[[], PackedPart]]]
    """By packed role, what waits for the grid of patches of each study."""

    def wait(self) -> None:
        """Until the voxels of unpacked roles are there. Raises what reading them raises."""
        for wait in self.waits:
            wait()


class Samples:
    """Studies of a store: cropped, tokenized and indexed, values still raw. Pickles as what it is made of."""

    def __init__(
        self,
        store: Studies,
        inputs: Inputs,
        spec: InputSpec,
        tokenizer: Tokenizer,
        labels: Sequence[str] | None = None,
        max_damaged: int = 0,
    ):
        """`labels`: those that are read; all of the store where None. `max_damaged`: images that may turn out to be
        damaged and count as absent; the next is a UserError."""
        self.store, self.inputs, self.spec, self.tokenizer = store, inputs, spec, tokenizer
        self.labels = tuple(spec.labels) if labels is None else tuple(labels)
        self.damage = Damage(max_damaged)
        self._wanted = Wanted(
            frozenset(spec.texts), frozenset([*spec.numbers, *spec.categories]), frozenset(self.labels)
        )
        for role in spec.images:
            for image in store.image_inputs(role, inputs.images[role]):
                if image.foreground:
                    check(image.foreground, store, role)
            if spec.images[role].normalise is not None and (url := store.without_intensities(role)):
                raise UserError(
                    f"inputs.images.{role}.normalise: {url} holds no samples of the intensities of {role}, as it was "
                    "written by an earlier release; build it anew, or give a window in place of normalise"
                )
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
        texts, values, labels = self.store.table(row, self._wanted)
        drawn = {
            field: _drawn(held, self.inputs.texts[field], rng)
            for field in self.spec.texts
            if (held := texts.get(field))
        }
        boxes = {role: box for role in self.spec.images if (box := self._box(role, row, rng))}
        shares = {field: self.inputs.texts[field].excerpt for field in drawn if rng is not None}
        excerpts = {
            field: _sentences(drawn[field][0][1], share, rng)[0]
            for field, share in shares.items()
            if share is not None and rng is not None
        }
        return Drawn(self, row, drawn, excerpts, values, labels, boxes)

    def readings(self, row: int) -> list[dict[str, str]]:
        """The words of the study at `row`, by field: first the first text of each field, then the second, and so on."""
        texts = self.store.table(int(row), self._wanted)[0]
        held = {field: texts.get(field, ()) for field in self.spec.texts}
        most = max(map(len, held.values()), default=0)
        return [{field: of[i] for field, of in held.items() if i < len(of)} for i in range(most)]

    def absent(self) -> Drawn:
        """A study of which everything is missing, to fill up a batch."""
        return Drawn(self, ABSENT, {}, {}, {}, {}, {})

    # ------------------------------------------------------------ batches

    def batch(self, drawn: Sequence[Drawn], packed: Mapping[str, PackedShape]) -> Batch:
        """Studies side by side, with their voxels."""
        room = self.room(len(drawn), packed)
        self.join([self.begin(drawn, room, 0)], room)
        return room

    def room(self, studies: int, packed: Mapping[str, PackedShape], allocate: Callable[..., np.ndarray] = np.empty):
        """A batch of so many studies, of arrays that `allocate(shape, dtype)` gives; what stands there is not set.

        `packed`: how packed roles share rows of tokens; those that are not named are left out.
        """
        spec = self.spec

        def some(*each: int, dtype: Any) -> Any:
            return allocate((studies, *each), dtype)

        images = {
            role: ImagePart(
                some(*shape.raw, shape.raw_channels, dtype=self._dtype(role)),
                some(3, dtype=np.float32),
                some(dtype=bool),
                None if shape.normalise is None else some(2, dtype=np.float32),
            )
            for role, shape in spec.images.items()
            if role not in self.packed
        }
        return Batch(
            study=some(dtype=np.int32),
            images=images,
            texts={
                field: TextPart(
                    some(tokens, dtype=np.int32),
                    some(dtype=bool),
                    some(2 * tokens // spec.texts[field], dtype=np.uint32),
                    some(spec.texts[field], dtype=np.int32) if field in spec.excerpts else None,
                )
                for field, tokens in spec.text_tokens.items()
            },
            table=TablePart(
                some(len(spec.numbers), dtype=np.float32),
                some(len(spec.numbers), dtype=bool),
                some(len(spec.categories), dtype=np.int32),
                some(len(spec.categories), dtype=bool),
            ),
            labels={name: LabelPart(some(dtype=np.int32), some(dtype=bool)) for name in self.labels},
            packed={
                role: packing.room(
                    studies, pack, shape.raw_voxels_of_patch, shape.normalise is not None, self._dtype(role), allocate
                )
                for role, pack in packed.items()
                if (shape := spec.images[role])
            },
            source=some(dtype=np.int32) if self.store.mixed else None,
        )

    def begin(self, drawn: Sequence[Drawn], room: Batch, first: int) -> Begun:
        """Writes studies into a batch, from place `first` on, and begins to read their voxels there."""
        place = slice(first, first + len(drawn))
        room.study[place] = [study.row for study in drawn]
        if room.source is not None:
            room.source[place] = [self._source(study.row) or 0 for study in drawn]
        for field, text in room.texts.items():
            part = map_arrays(lambda array: array[place], text)
            length = self.spec.texts[field]
            fill_texts(part, [study.texts.get(field, ()) for study in drawn], length, self.tokenizer)
            if part.excerpt is not None:
                part.excerpt[...] = PAD
                if held := {i: study.excerpts[field] for i, study in enumerate(drawn) if field in study.excerpts}:
                    part.excerpt[[*held]] = self.tokenizer.encode_batch([*held.values()], length)
        self._table([study.values for study in drawn], map_arrays(lambda array: array[place], room.table))
        for name, label in room.labels.items():
            label.value[place] = [study.labels.get(name, 0) for study in drawn]
            label.present[place] = [name in study.labels for study in drawn]
        waits = [wait for role, part in room.images.items() for wait in self._begin_images(role, drawn, part, first)]
        patches = {role: [self._begin_patches(role, study) for study in drawn] for role in self.packed}
        return Begun(waits, patches)

    def join(self, begun: Sequence[Begun], room: Batch) -> None:
        """Waits until the voxels of a batch are there, and packs its patches. Raises what reading them raises."""
        for some in begun:
            some.wait()
        for role, part in room.packed.items():
            grids = [patches() for some in begun for patches in some.patches[role]]
            packing.pack(grids, part.studies, part.patches.shape[1], part)

    @property
    def whole(self) -> dict[str, PackedShape]:
        """How evaluation packs: a study a row, with room for the largest crop, so none depends on its neighbours."""
        return {role: PackedShape(studies=1, tokens=math.prod(self.spec.images[role].grid)) for role in self.packed}

    def _source(self, row: int) -> int | None:
        return self.store.source(row) if self.store.mixed and row != ABSENT else None

    def _shape(self, role: str, row: int) -> ImageShape:
        shape = self.spec.images[role]
        return shape.of_source(self.store.source(row)) if self.store.mixed else shape

    def _input(self, role: str, row: int) -> ImageInput:
        image = self.inputs.images[role]
        return self.store.image_input(role, image, row)

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
        moved = image.crop == "random"
        try:
            limits = shape.normalise and own_limits(self.store.intensities(role, row), shape.normalise)
            on = centre(image.foreground, self.store, role, row, rng) if rng and moved and image.foreground else None
        except DamagedImage as error:
            self.damage.leave_out(role, row, error)
            return None
        if rng is not None and moved:
            for axis, (h, s) in enumerate(zip(held, size)):
                if h > s:
                    start[axis] = int(rng.integers(h - s + 1) if on is None else np.clip(on[axis] - s // 2, 0, h - s))
        z, y, x = start
        return Box((z, y, x), size, spacing_mm, limits)

    def _begin_images(
        self, role: str, drawn: Sequence[Drawn], part: ImagePart, first: int
    ) -> Iterator[Callable[[], None]]:
        """Begins to read the images of a role; gives what waits for them. Equal boxes are one read if they can be."""
        voxels, room = np.asarray(part.voxels), self.spec.images[role].raw
        alike: dict[tuple, list[int]] = {}
        for at, study in enumerate(drawn, first):
            box = study.boxes.get(role)
            part.present[at] = box is not None
            part.spacing_mm[at] = box.spacing_mm if box else 0
            if part.limits is not None:
                part.limits[at] = box.limits if box else 0
            if box is None:
                voxels[at] = 0
            else:
                together = (self._source(study.row), box.start) if box.size == room else (at,)
                alike.setdefault(together, []).append(at)
        for places in alike.values():
            rows = [drawn[at - first].row for at in places]
            box = drawn[places[0] - first].boxes[role]
            wait = self.store.begin_crops(voxels, places, role, rows, box.start) if box.size == room else None
            each = [(at, row, drawn[at - first].boxes[role]) for at, row in zip(places, rows)]
            if wait:
                yield functools.partial(self._wait_together, wait, role, each, part)
            else:
                for one in each:
                    yield self._begin_spared(role, *one, part)

    def _wait_together(
        self, wait: Callable[[], None], role: str, each: Sequence[tuple[int, int, Box]], part: ImagePart
    ) -> None:
        """Waits for one read of several images; where that fails, each is read by itself."""
        try:
            wait()
        except DamagedImage:
            for one in each:
                self._begin_spared(role, *one, part)()

    def _begin_spared(self, role: str, at: int, row: int, box: Box, part: ImagePart) -> Callable[[], None]:
        """Begins to read an image into place `at`; one that is damaged counts as absent, as far as that is allowed."""

        def leave_out(error: DamagedImage) -> None:
            self.damage.leave_out(role, row, error)
            part.voxels[at], part.spacing_mm[at], part.present[at] = 0, 0, False

        def spared() -> None:
            try:
                wait()
            except DamagedImage as error:
                leave_out(error)

        try:
            wait = self._begin_image(role, row, box, np.asarray(part.voxels)[at])
        except DamagedImage as error:
            leave_out(error)
            return _nothing
        return spared

    def _begin_image(self, role: str, row: int, box: Box, out: np.ndarray) -> Callable[[], None]:
        """Begins to read the voxels of a box into `out`; returns what waits for them."""
        fill = self._fill(role, row, box)
        if box.size != out.shape[:3]:  # in the middle, of one parity with it
            out[...] = fill
            out = out[tuple(slice((room - n) // 2, (room + n) // 2) for room, n in zip(out.shape, box.size))]
        return self.store.begin_crop(out, role, row, box.start, fill=fill)

    def _begin_patches(self, role: str, study: Drawn) -> Callable[[], PackedPart]:
        """Begins to read an image; what is returned gives the grid of as many patches as it fills."""
        config, box = self.inputs.images[role].pack, study.boxes.get(role)

        def nothing() -> PackedPart:
            return packing.nothing(self.spec.images[role], self._dtype(role))

        if box is None or config is None:
            return nothing
        shape = self._shape(role, study.row)
        voxels = np.empty((*box.size, shape.raw_channels), self._dtype(role))
        try:
            wait = self.store.begin_crop(voxels, role, study.row, box.start, fill=self._fill(role, study.row, box))
        except DamagedImage as error:
            self.damage.leave_out(role, study.row, error)
            return nothing

        def patches() -> PackedPart:
            try:
                wait()
            except DamagedImage as error:
                self.damage.leave_out(role, study.row, error)
                return nothing()
            return packing.cut(voxels, box.spacing_mm, shape, config.trim, box.limits)

        return patches

    def _fill(self, role: str, row: int, box: Box) -> float:
        """Raw value of padding: at the lowest end of a window, so it is 0 once windowed, as far as the dtype goes."""
        return _below(self._shape(role, row).low(box.limits), self._dtype(role))

    def _table(self, rows: Sequence[dict[str, float | str]], part: TablePart) -> None:
        numbers = [[row.get(name) for name in self.spec.numbers] for row in rows]
        # A value outside the vocabulary that the model was built with is as good as missing.
        codes = [[of.get(row.get(name)) for name, of in self._codes.items()] for row in rows]
        part.numbers[...] = [[0 if v is None else v for v in row] for row in numbers]
        part.number_present[...] = [[v is not None for v in row] for row in numbers]
        part.categories[...] = [[c or 0 for c in row] for row in codes]
        part.category_present[...] = [[c is not None for c in row] for row in codes]


def _nothing() -> None:
    """Of what there is no need to wait for."""


@functools.cache
def _below(value: float, dtype: str) -> float:
    """The largest value of a dtype that is not above `value`; the least of all where there is none."""
    if np.dtype(dtype).kind not in "iu":
        return value
    return min(max(math.floor(value), np.iinfo(dtype).min), np.iinfo(dtype).max)


def fill_texts(part: TextPart, studies: Sequence[Sequence[tuple[str, str]]], length: int, tokenizer: Tokenizer) -> None:
    """Writes what is shown of the texts of studies side by side, `length` tokens each, and the digest of each whole."""
    part.tokens[...], part.digest[...] = PAD, 0
    if places := [(i, j) for i, texts in enumerate(studies) for j in range(len(texts))]:
        shown = [text for texts in studies for text, _ in texts]
        at = tuple(zip(*places))
        part.tokens.reshape(len(studies), -1, length)[at] = tokenizer.encode_batch(shown, length)
        part.digest.reshape(len(studies), -1, 2)[at] = [digest(whole) for texts in studies for _, whole in texts]
    # A foreign tokenizer may have no start token; then an empty text has nothing to attend to and counts as absent.
    part.present[...] = (part.tokens != PAD).any(1)


def digest(text: str) -> np.ndarray:
    """64 bits of a text, uint32 [2]: equal for equal texts but for space at their ends."""
    return np.frombuffer(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), np.uint32)


def _drawn(texts: Sequence[str], config: TextInput, rng: np.random.Generator | None) -> list[tuple[str, str]]:
    """What is shown of some of the texts, and the whole of each. Without `rng` all of the first; else of texts and of
    how many of them every choice is equally likely."""
    if rng is None:
        return [(texts[0], texts[0])]
    if config.readings == 1 or len(texts) == 1:
        chosen = [int(rng.integers(len(texts)))] if len(texts) > 1 else [0]
    else:
        chosen = rng.permutation(len(texts))[: 1 + rng.integers(min(config.readings, len(texts)))]
    return [_sentences(texts[i], config.sentence_keep, rng) for i in chosen]


def _sentences(text: str, keep: float, rng: np.random.Generator) -> tuple[str, str]:
    """What is shown of a text, and the whole: with `keep` below 1 some of its sentences, at least one, in random
    order."""
    if keep == 1:
        return text, text
    sentences = _SENTENCE_END.split(text.strip())
    kept = rng.random(len(sentences)) < keep
    kept[rng.integers(len(sentences))] |= not kept.any()
    return " ".join(sentences[i] for i in rng.permutation(np.flatnonzero(kept))), text
