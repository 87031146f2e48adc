"""AdamW (arXiv:1711.05101) or Muon after global-norm clipping, and their learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax import contrib

from mmfm_jax.config.training import OptimizerConfig
from mmfm_jax.model.parameter import kind_of, largest_of, stacked
from mmfm_jax.train import groups

MOMENTUM = 0.95  # of Muon, its author's
UPDATE_RMS = 0.2  # of Muon's update: about what AdamW's is, so that learning rates and weight decay carry over


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine, or constant and linear decay (arXiv:2405.18392)."""
    peak, last, warmup = config.learning_rate, config.learning_rate * config.final_fraction, warmup_of(config, steps)
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, steps - warmup, config.final_fraction)
        return optax.join_schedules([rise, fall], [warmup])
    end = constant_until(config, steps)
    fall = optax.linear_schedule(peak, last, max(steps - end, 1))
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, end])


def warmup_of(config: OptimizerConfig, steps: int) -> int:
    """Steps in which the learning rate rises."""
    return min(config.warmup_steps, steps - 1)


def constant_until(config: OptimizerConfig, steps: int) -> int:
    """The last step whose update and those before it are the same in a longer run: of wsd that before the decay, of
    cosine 0, since it falls from the end of the warm-up on."""
    if config.schedule == "cosine":
        return 0
    return steps - min(round(config.decay_fraction * steps), steps - warmup_of(config, steps))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clips, scales, decays matrices, and multiplies by the learning rate and that of the parameter's group.

    `config.state_dtype` is that of the first moment alone, as in big_vision. A step moves the first moment by a tenth
    of its difference from the gradient, and Muon's by a twentieth; bfloat16, with 8 bits, holds that. It moves the
    second by 1 - b2 of it, which at b2 = 0.999 is less than half of bfloat16's last bit, so that it would stand still.
    """

    def at_own_rate(updates: Any, _):
        return jax.tree.map(jnp.multiply, updates, groups.rates(updates, config.groups))

    adamw = optax.scale_by_adam(config.b1, config.b2, mu_dtype=config.state_dtype)
    parts = [
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition({"muon": muon(config.state_dtype), "adamw": adamw}, kinds) if config.kind == "muon" else adamw,
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(schedule(config, steps)),
    ]
    if config.groups:  # last, so that checkpoints name their states the same with and without groups
        parts.append(optax.stateless(at_own_rate))
    return optax.chain(*parts)


def muon(state_dtype: str) -> optax.GradientTransformation:
    """Momentum of stacked matrices [layer, in, out], each layer made orthogonal by five Newton-Schulz iterations
    (https://kellerjordan.github.io/posts/muon) and scaled by 0.2 sqrt(max(in, out)) (Moonlight, arXiv:2502.16982).

    `optax.contrib.muon` would bring an AdamW of its own, with Nesterov momentum and no mask for its weight decay.
    """

    def shape_scaled(updates, _):
        return jax.tree.map(lambda x: UPDATE_RMS * max(x.shape[-2:]) ** 0.5 * x, updates)

    def every_layer(params):
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), params)

    scaled = contrib.scale_by_muon(beta=MOMENTUM, mu_dtype=state_dtype, weight_dimension_numbers=every_layer)
    return optax.chain(scaled, optax.stateless(shape_scaled))


def kinds(params: nnx.State) -> nnx.State:
    """`muon` for the matrices of stacks; `adamw` for embeddings, heads, projections between encoders, and vectors."""
    return _of_each(params, lambda variable: "muon" if stacked(variable) and kind_of(variable) == "matrix" else "adamw")


def matrices(params: nnx.State) -> nnx.State:
    """Which parameters decay: those made as matrices."""
    return _of_each(params, lambda variable: kind_of(variable) == "matrix")


def bounded(params: nnx.State) -> nnx.State:
    """The parameters after an update, none above the largest value that it was made with.

    That is done to the parameter and not where it is used: there, a clamp has no gradient, and what once passed the
    bound would never come back.
    """
    largest = _of_each(params, lambda variable: np.inf if largest_of(variable) is None else largest_of(variable))
    return jax.tree.map(lambda x, most: x if most == np.inf else jnp.minimum(x, most), params, largest)


def _of_each(params: nnx.State, of: Callable[[nnx.Variable], Any]) -> nnx.State:
    return jax.tree.unflatten(jax.tree.structure(params), [of(variable) for _, variable in nnx.to_flat_state(params)])
