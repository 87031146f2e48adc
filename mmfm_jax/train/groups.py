"""Groups of parameters, by patterns of their names: what is frozen, and what learns at a rate of its own."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax
import numpy as np
from flax import nnx

from mmfm_jax.config.training import ParameterGroup
from mmfm_jax.errors import UserError
from mmfm_jax.model.parameter import stacked

Groups = Sequence[ParameterGroup]


def name(path: tuple) -> str:
    """`model.text.transformer.blocks.mlp.up.kernel`, of a parameter's path."""
    return ".".join(map(str, path))


def names(params: nnx.State) -> list[str]:
    """Dotted name of each parameter, in the order of the leaves. All blocks of a stack are one parameter."""
    return [name(path) for path, _ in nnx.to_flat_state(params)]


def group_of(parameter: str, groups: Groups) -> ParameterGroup | None:
    """The first group whose pattern the name fits."""
    return next((group for group in groups if fnmatchcase(parameter, group.match)), None)


def check(groups: Groups, params: nnx.State) -> None:
    """Raises UserError when a group takes no parameter, or nothing is left to train. `params` may be shapes alone."""
    every = names(params)
    taken = [group_of(parameter, groups) for parameter in every]
    for number, group in enumerate(groups):
        field = f"optimizer.groups.{number}.match: {group.match}"
        if not any(fnmatchcase(parameter, group.match) for parameter in every):
            parts = [parameter.split(".") for parameter in every]
            patterns = {".".join(part[:i]) + ".*" for part in parts for i in range(1, len(part))}
            near = difflib.get_close_matches(group.match, sorted(patterns) + every, cutoff=0)
            raise UserError(f"{field} fits no parameter; names near it are {', '.join(near)}")
        if all(group is not other for other in taken):
            raise UserError(f"{field} fits only parameters that a group before it takes; put it before that one")
    if all(group is not None and group.frozen for group in taken):
        raise UserError("optimizer.groups: every parameter is frozen; leave one to train")


def split(params: nnx.State, groups: Groups) -> tuple[nnx.State, nnx.State]:
    """The parameters that are trained, and the frozen ones."""

    def frozen(path: tuple, _) -> bool:
        group = group_of(name(path), groups)
        return group is not None and group.frozen

    frozen_ones, trained = nnx.split_state(params, frozen, ...)
    return trained, frozen_ones


def rates(params: nnx.State, groups: Groups) -> nnx.State:
    """What the learning rate of each parameter is multiplied by: a number, or one for each layer of a stack
    [layer, 1, ...].

    With decay d and L blocks, block l = 0 ... L - 1 has d^(L - l), what stands before the blocks of an encoder or the
    fusion d^(L + 1), and the norm after them and every head 1 (BEiT, arXiv:2106.08254). Each encoder counts its own
    blocks; those that are frozen do not count.
    """
    flat = list(nnx.to_flat_state(params))
    depths = {path[:2]: variable.get_value().shape[0] for path, variable in flat if stacked(variable)}
    found = []
    for path, variable in flat:
        group, rate = group_of(name(path), groups), np.float32(1)
        if group is not None:
            shape, after = variable.get_value().shape, np.zeros(())
            if stacked(variable):
                after = (shape[0] - np.arange(shape[0])).reshape(-1, *[1] * (len(shape) - 1))
            elif path[0] == "model" and path[2] != "transformer":
                after = np.array(depths.get(path[:2], 0) + 1)
            rate = np.asarray(group.learning_rate_scale * group.layer_decay**after, np.float32)
        found.append(rate)
    return jax.tree.unflatten(jax.tree.structure(params), found)
