"""The Pallas kernels at their widest compile for each generation of TPU, none of which need be there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmfm_jax.model import head_layout
from mmfm_jax.model.attention import attention
from mmfm_jax.model.flash import Segments
from mmfm_jax.parallel.mesh import AXES


def layout(dtype, width: int):
    """Value and gradient of the kernels of head layout, and the arguments they are of."""

    def both(x, scale, angles, gradient):
        out, back = jax.vjp(lambda x, scale: head_layout.fused(x, width // 128, scale, angles), x, scale)
        return head_layout.join(head_layout.cut_with_inner(out, gradient)[0]), back(gradient)

    of_heads = jax.ShapeDtypeStruct((1, 512, width // 128, 128), dtype)
    scale, angles = jax.ShapeDtypeStruct((128,), jnp.float32), jax.ShapeDtypeStruct((1, 512, 64), jnp.float32)
    return both, (jax.ShapeDtypeStruct((1, 512, width), dtype), scale, angles, of_heads)


def splash(dtype, head: int):
    """Likewise of attention, packed and causal, by tiles as large as they get."""

    def both(q, segments, gradient):
        def attend(q, k, v):
            return attention(q, k, v, Segments.packed(segments), causal=True, implementation="splash")

        out, back = jax.vjp(attend, q, q, q)
        return out, back(gradient)

    q = jax.ShapeDtypeStruct((1, 2048, 1, head), dtype)
    return both, (q, jax.ShapeDtypeStruct((1, 2048), jnp.int32), q)


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_kernels_fit_the_vector_memory(topology, make_pod):
    """All in one program, since most of a compilation is what any program costs."""
    widest = [layout(jnp.float32, 8192), layout(jnp.bfloat16, 16384)]
    widest += [splash(jnp.float32, 128), splash(jnp.float32, 256), splash(jnp.bfloat16, 256)]
    functions, arguments = zip(*widest)
    mesh = Mesh(np.array(make_pod(topology).devices[:1]).reshape(1, 1, 1, 1), AXES)
    here = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
    with jax.set_mesh(mesh):
        both = jax.jit(lambda *given: [function(*of) for function, of in zip(functions, given)])
        text = both.trace(*arguments).lower().compile().as_text() or ""
    for kernel in ("heads_forward", "heads_backward", "heads_inner", "heads_join", "splash_mha_dkv"):
        assert kernel in text
