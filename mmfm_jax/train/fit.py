"""Whether an experiment fits a mesh, asked before anything is read or compiled.

An axis that the mesh does not divide would stay whole on every device, which is right and wastes the mesh in silence.
Tokens that are joined are not asked for: they are padded (`Tokens.padded`).
"""

from __future__ import annotations

import math

from jax.sharding import AbstractMesh, Mesh

from mmfm_jax.config.tasks.base import TaskConfig
from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment
from mmfm_jax.parallel.sharding import check_batch_size


def check_fit(experiment: Experiment, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError when batch, heads or tokens do not divide over the mesh; it says what would."""
    config = experiment.train
    check_batch_size(config.batch_size, config.accumulate, mesh, experiment.inputs.studies_a_row)
    _check_heads(experiment, mesh.shape["tensor"])
    _check_tokens(experiment, mesh.shape["sequence"])
    _check_tasks(experiment, mesh.shape["sequence"])


def _check_heads(experiment: Experiment, tensor: int) -> None:
    inputs, model = experiment.inputs, experiment.model
    used = {"vision": bool(inputs.images), "text": bool(inputs.texts), "table": bool(inputs.columns), "fusion": True}
    stacks = {f"model.{name}": getattr(model, name) for name, used in used.items() if used}
    for name, task in experiment.tasks.items():
        stacks |= {f"tasks.{name}.{field}": stack for field, stack in task.stacks().items()}
    for name, stack in stacks.items():
        if stack.heads % tensor:
            shared = math.gcd(*(stack.heads for stack in stacks.values()))
            largest = max(size for size in range(1, tensor + 1) if shared % size == 0 and tensor % size == 0)
            raise UserError(
                f"{name}.heads: {stack.heads} heads do not divide over mesh.tensor {tensor}; make them a multiple of "
                f"{tensor}, or mesh.tensor {largest}"
            )


def _check_tokens(experiment: Experiment, sequence: int) -> None:
    registers = experiment.model.vision.registers
    for role, image in experiment.inputs.images.items():
        patches = math.prod(size // patch for size, patch in zip(image.size, image.patch))
        if image.pack:
            added = image.pack.studies * registers
            if lacking := -(image.pack.tokens + added) % sequence:
                raise UserError(
                    f"inputs.images.{role}.pack.tokens: {image.pack.tokens} and {added} registers do not divide over "
                    f"mesh.sequence {sequence}; make it {image.pack.tokens + lacking}"
                )
        elif lacking := -(patches + registers) % sequence:
            raise UserError(
                f"inputs.images.{role}: {patches} patches and {registers} registers do not divide over mesh.sequence "
                f"{sequence}; make model.vision.registers {registers + lacking}, or choose a size of a multiple of "
                f"{sequence} patches and no registers"
            )
    for field, text in experiment.inputs.texts.items():
        if text.length % sequence:
            raise UserError(
                f"inputs.texts.{field}.length: {text.length} tokens do not divide over mesh.sequence {sequence}; make "
                f"it {text.length + -text.length % sequence}"
            )


def _check_tasks(experiment: Experiment, sequence: int) -> None:
    """Raises UserError when what a task encodes does not divide; it names the nearest share that would."""
    inputs, registers = experiment.inputs, experiment.model.vision.registers

    def odd(task: TaskConfig, field: str) -> int:
        """Tokens of the first sequence that does not divide; 0 where all do."""
        return next((n for n in task.sequence_lengths(inputs, registers)[field] if n % sequence), 0)

    for name, task in experiment.tasks.items():
        for field in task.sequence_lengths(inputs, registers):
            if tokens := odd(task, field):
                share, hundredths = getattr(task, field), (i / 100 for i in range(1, 100))
                nearest = sorted(hundredths, key=lambda other: abs(other - share))
                fitting = (x for x in nearest if not odd(task.model_copy(update={field: x}), field))
                mend = next((f"make it {x}" for x in fitting), "no share does; make mesh.sequence smaller")
                raise UserError(
                    f"tasks.{name}.{field}: a share of {share} leaves {tokens} tokens to encode, which do not divide "
                    f"over mesh.sequence {sequence}; {mend}"
                )
