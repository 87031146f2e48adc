"""AdamW (arXiv:1711.05101) after global-norm clipping, and its learning-rate schedules."""

from __future__ import annotations

import jax
import optax
from flax import nnx

from mmfm_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine, or constant and linear decay (arXiv:2405.18392)."""
    peak, last, warmup = config.learning_rate, config.learning_rate * config.final_fraction, config.warmup_steps
    warmup = min(warmup, steps - 1)
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, steps - warmup, config.final_fraction)
        return optax.join_schedules([rise, fall], [warmup])
    decay = min(round(config.decay_fraction * steps), steps - warmup)
    fall = optax.linear_schedule(peak, last, max(decay, 1))
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, steps - decay])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def matrices(params: nnx.State) -> nnx.State:
    """Which parameters are matrices, by their named axes: a stack of vectors is not one."""
    flags = [len(variable.get_metadata()["axes"]) >= 2 for _, variable in nnx.to_flat_state(params)]
    return jax.tree.unflatten(jax.tree.structure(params), flags)
