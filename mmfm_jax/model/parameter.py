"""What a parameter is, said where it is made: how it is sharded, decayed, updated and bounded follows from that."""

from __future__ import annotations

from typing import Any, Literal, get_args

from flax import nnx

Kind = Literal["matrix", "embedding", "token", "position", "frequency", "bias", "scale"]
"""Of a parameter:

- `matrix`: of a product with activations; the only kind that decays, as in timm and big_vision.
- `embedding`: a vector for each entry of a vocabulary.
- `token`: a vector that takes the place of one, such as a register, a latent, a query or a mask.
- `position`: a vector that says where or in which part a token is.
- `frequency`: of the waves that a number becomes.
- `bias`: is added.
- `scale`: multiplies, of a norm, a branch or a temperature.
"""
KINDS: tuple[Kind, ...] = get_args(Kind)


def parameter(value: Any, kind: Kind, axes: tuple[str | None, ...], largest: float | None = None) -> nnx.Param:
    """A parameter with the names of its axes; each update ends at or below `largest`, if given.

    Raises TypeError for an unknown kind, or axes that are not those of the value.
    """
    if kind not in KINDS:
        raise TypeError(f"a parameter is one of {', '.join(KINDS)}, not {kind}")
    if len(axes) != value.ndim:
        raise TypeError(f"a parameter of {value.ndim} axes has {len(axes)} names of axes")
    return nnx.Param(value, kind=kind, axes=axes, largest=largest, stacked=False)


def kind_of(variable: nnx.Variable) -> Kind:
    return variable.get_metadata()["kind"]


def largest_of(variable: nnx.Variable) -> float | None:
    return variable.get_metadata().get("largest")


def stacked(variable: nnx.Variable) -> bool:
    """Whether it has the axis of a stack's layers in front of those it names."""
    return variable.get_metadata().get("stacked", False)


def check_parameters(params: nnx.State) -> None:
    """Raises TypeError when a parameter was made without `parameter`. `params` may be shapes alone."""
    for path, variable in nnx.to_flat_state(params):
        if variable.get_metadata().get("kind") not in KINDS:
            raise TypeError(f"{'.'.join(map(str, path))}: make it with mmfm_jax.model.parameter.parameter")
