"""The real training step of an experiment, traced and compiled for devices that need not be there."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

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
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel import sharding
from mmfm_jax.plan.phases import Phase, unsaid
from mmfm_jax.train.fit import check_fit
from mmfm_jax.train.optimizer import make_optimizer
from mmfm_jax.train.state import TrainState, initial_state, learner_shapes, state_shardings
from mmfm_jax.train.step import jitted_step

MASK_TOKEN = 1  # of no effect on shapes
VOXELS = "int16"  # as CT is stored


@dataclass(frozen=True)
class Program:
    """The step of an experiment on a mesh, and the shapes that it takes."""

    experiment: Experiment
    spec: InputSpec
    mesh: Mesh
    graph: Any
    state: TrainState
    """Shapes and shardings."""
    batch: Batch
    """Likewise."""
    step: Any
    """Jitted, not yet traced."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. Arguments are donated, so the new state takes the room of the old."""

    arguments: int
    temporaries: int
    """Activations kept for backward, gradients and scratch, at their peak."""
    outputs: int
    """That no argument gave its room to."""
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs + self.code


class DoesNotFit(Exception):
    """The compiler ran out of HBM; `used` and `limit` are bytes of one device."""

    def __init__(self, used: float, limit: float):
        super().__init__(f"{used / 2**30:.2f} of {limit / 2**30:.2f} GiB")
        self.used, self.limit = used, limit


def assumed_spec(experiment: Experiment) -> InputSpec:
    """What a store would give, from the configuration alone: images of one channel, columns as numbers, a label of
    two classes for each task that names one."""
    return InputSpec(
        images={
            role: ImageShape(
                size=image.size,
                patch=image.patch,
                channels=max(1, len(image.windows)),
                window=image.window,
                normalise=image.own_window,
                pack=image.pack and PackedShape(studies=image.pack.studies, tokens=image.pack.tokens),
            )
            for role, image in experiment.inputs.images.items()
        },
        texts={field: text.length for field, text in experiment.inputs.texts.items()},
        readings={field: text.readings for field, text in experiment.inputs.texts.items() if text.readings > 1},
        excerpts=tuple(field for field, text in experiment.inputs.texts.items() if text.excerpt is not None),
        vocabulary_size=experiment.data.vocabulary_size,
        mask_token=MASK_TOKEN,
        numbers={name: NumberStats(mean=0.0, sd=1.0) for name in experiment.inputs.columns},
        categories={},
        labels=dict.fromkeys(experiment.labels, ("absent", "present")),
    )


def spec_of_store(experiment: Experiment) -> tuple[InputSpec, dict[str, str]]:
    """The specification that the configured store gives, and the dtypes of its voxels by role; no text is read.

    Raises UserError when the store cannot be read or lacks an input.
    """
    from mmfm_jax.data.feed.spec import make_spec
    from mmfm_jax.data.store.mix import open_data

    store = open_data(experiment.data)
    tokenizer: Any = SimpleNamespace(vocabulary_size=experiment.data.vocabulary_size, mask_token=MASK_TOKEN)
    spec = make_spec(experiment.inputs, store.schema, store.stats, tokenizer, store.windows(experiment.inputs.images))
    return spec, {role: image.dtype for role, image in store.schema.images.items()}


def batch_shapes(spec: InputSpec, labels: tuple[str, ...], studies: int, voxels: dict[str, str] | None = None) -> Batch:
    """A raw global batch as the pipeline makes it, shapes alone. `voxels`: dtypes by role, int16 where not named."""

    def shape(dtype, *axes: int, rows: int = studies) -> Any:
        return jax.ShapeDtypeStruct((rows, *axes), np.dtype(dtype))

    def dtype(role: str) -> str:
        return (voxels or {}).get(role, VOXELS)

    def limits(of: ImageShape) -> Any:
        return None if of.normalise is None else shape("float32", 2)

    def packed(role: str, of: ImageShape, pack: PackedShape) -> PackedPart:
        rows = studies // pack.studies
        return PackedPart(
            shape(dtype(role), pack.tokens, math.prod(of.patch) * of.raw_channels, rows=rows),
            shape("float32", pack.tokens, 3, rows=rows),
            shape("int32", pack.tokens, rows=rows),
            shape(bool),
            limits(of),
        )

    numbers, categories = len(spec.numbers), len(spec.categories)
    return Batch(
        study=shape("int32"),
        images={
            role: ImagePart(shape(dtype(role), *of.raw, of.raw_channels), shape("float32", 3), shape(bool), limits(of))
            for role, of in spec.images.items()
            if of.pack is None
        },
        texts={
            field: TextPart(
                shape("int32", tokens),
                shape(bool),
                shape("uint32", 2 * tokens // spec.texts[field]),
                shape("int32", spec.texts[field]) if field in spec.excerpts else None,
            )
            for field, tokens in spec.text_tokens.items()
        },
        table=TablePart(
            shape("float32", numbers), shape(bool, numbers), shape("int32", categories), shape(bool, categories)
        ),
        labels={name: LabelPart(shape("int32"), shape(bool)) for name in labels},
        packed={role: packed(role, of, of.pack) for role, of in spec.images.items() if of.pack is not None},
    )


def make_program(experiment: Experiment, spec: InputSpec, mesh: Mesh, voxels: dict[str, str] | None = None) -> Program:
    """The step that `train` would compile. Raises UserError when experiment, inputs and mesh do not fit together."""
    config = experiment.train
    check_fit(experiment, mesh)
    optimizer = make_optimizer(experiment.optimizer, config.steps)
    graph, *_ = learner_shapes(experiment, spec)
    shapes = jax.eval_shape(lambda: initial_state(experiment, spec, optimizer))
    shardings = state_shardings(shapes, mesh)

    def placed(leaf, place):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    shapes_of_batch = batch_shapes(spec, experiment.labels, config.batch_size, voxels)
    batch = jax.tree.map(lambda leaf: placed(leaf, sharding.by_study(mesh)), shapes_of_batch)
    step = jitted_step(graph, experiment, spec, optimizer, shardings, mesh)
    return Program(experiment, spec, mesh, graph, jax.tree.map(placed, shapes, shardings), batch, step)


def compile_step(program: Program, phase: Phase = unsaid) -> jax.stages.Compiled:
    """Raises DoesNotFit when the compiler finds no room in HBM."""
    with jax.set_mesh(program.mesh):
        phase("trace")
        traced = program.step.trace(program.state, program.batch)
        phase("lower")
        lowered = traced.lower()
        phase("compile")
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if (excess := _excess(str(error))) is None:
                raise
            raise DoesNotFit(*excess) from error


def memory(compiled: jax.stages.Compiled) -> Memory:
    of: Any = compiled.memory_analysis()
    return Memory(
        arguments=of.argument_size_in_bytes,
        temporaries=of.temp_size_in_bytes,
        outputs=max(of.output_size_in_bytes - of.alias_size_in_bytes, 0),
        code=of.generated_code_size_in_bytes,
    )


def held(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"


def _excess(message: str) -> tuple[float, float] | None:
    """Bytes needed and bytes there, from what the compiler says when HBM is too small; None of any other error.

    It speaks of temporaries; programs of known size show that arguments and outputs are counted with them.
    """
    for pattern in (rf"Used {_SIZE} of {_SIZE} hbm", rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"):
        if found := re.search(pattern, message):
            used, used_unit, limit, limit_unit = found.groups()
            return float(used) * _UNITS[used_unit], float(limit) * _UNITS[limit_unit]
    return None
