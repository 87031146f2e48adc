"""Matrix products in eight bits, scaled as they are made: quantised training by qwix's arrays and products."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mmfm_jax.data.batch import Array
from mmfm_jax.errors import UserError
from mmfm_jax.extras import pip_install

Precision = Literal["dtype", "int8", "fp8"]
TYPES = {  # of activations and kernels, of gradients: the fp8 of more range (arXiv:2209.05433)
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}
# qwix lets the largest entry be 127.5, half way between what int8 has and what it has not; here it is 127.
CALIBRATION = {jnp.int8: f"absmax,{127.5 / 127}"}


def check_installed(precision: Precision) -> None:
    """Raises UserError when qwix is needed and not installed."""
    if precision == "dtype":
        return
    try:
        import qwix  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"model: precision {precision} needs qwix, which is not installed; {pip_install('quantised')}"
        ) from error


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"], precision: Literal["int8", "fp8"]
) -> Float[Array, "*batch outputs"]:
    """x @ kernel of quantised operands, in the dtype of `x`.

    Each token and each output column has a scale of its own, its largest magnitude over that of the type, so tokens
    do not meet. The gradient of `x` is such a product too. That of the kernel is not: it sums over all tokens of the
    batch, and what rounds to zero there is no noise that averages out.
    """
    return _product(x, kernel, 0, TYPES[precision][0], TYPES[precision][0])


def _forward(x, kernel, precision):
    return matmul(x, kernel, precision), (x, kernel)


def _backward(precision, kept, gradient):
    x, kernel = kept
    own, of_gradient = TYPES[precision]
    tokens = tuple(range(x.ndim - 1))
    of_kernel = jax.lax.dot_general(x, gradient, ((tokens, tokens), ((), ())), preferred_element_type=jnp.float32)
    return _product(gradient, kernel, 1, of_gradient, own), of_kernel.astype(kernel.dtype)


matmul.defvjp(_forward, _backward)


def _product(x, kernel, axis: int, x_type, kernel_type):
    """Contracts the last axis of `x` with an axis of the kernel; sums are of int32 or float32."""
    import qwix

    def scaled(values, dtype, channels):
        how = CALIBRATION.get(dtype, "absmax")
        return qwix.quantize(values.astype(jnp.float32), dtype, channelwise_axes=channels, calibration_method=how)

    last = x.ndim - 1
    rows, columns = scaled(x, x_type, range(last)), scaled(kernel, kernel_type, (1 - axis,))
    sums = qwix.dot_general(rows, columns, (((last,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    return sums.astype(x.dtype)
