"""The product of a linear layer, and in what its kernel's gradient is summed over devices."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mmfm_jax.data.batch import Array
from mmfm_jax.parallel.platform import platform

ReduceDtype = Literal["float32", "bfloat16"]
"""`float32` is what PyTorch's FSDP2 calls `reduce_dtype=torch.float32`; `bfloat16` that of the activations."""


def matmul(
    x: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"], reduce_dtype: ReduceDtype
) -> Float[Array, "*batch outputs"]:
    """x @ kernel in the dtype of `x`; the gradient of a float32 kernel is summed over devices in `reduce_dtype`.

    A device always sums over its own tokens in float32. What it then hands to the others has the dtype of that product,
    which the partitioner reduces where it stands: a cast after it would come too late.
    """
    if x.dtype == kernel.dtype or reduce_dtype != kernel.dtype:
        return _product(x, kernel)
    return _reduced_wide(x, kernel)


def add_bias(x: Float[Array, "*batch outputs"], bias: Float[Array, "outputs"], reduce_dtype: ReduceDtype):
    """x + bias in the dtype of `x`; likewise."""
    if reduce_dtype != bias.dtype:
        return x + bias.astype(x.dtype)
    return x + jnp.broadcast_to(bias, x.shape).astype(x.dtype)


def _product(x, kernel):
    kernel = kernel.astype(x.dtype)
    if platform() != "cpu":
        return x @ kernel
    # Flat is twice as fast there; elsewhere it would hide the axes from the partitioner.
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _reduced_wide(x, kernel):
    return _product(x, kernel)


def _forward(x, kernel):
    return _product(x, kernel), (x, kernel)


def _backward(kept, gradient):
    x, kernel = kept
    tokens = tuple(range(x.ndim - 1))
    of_kernel = jax.lax.dot_general(x, gradient, ((tokens, tokens), ((), ())), preferred_element_type=kernel.dtype)
    return _product(gradient, kernel.T), of_kernel


_reduced_wide.defvjp(_forward, _backward)
