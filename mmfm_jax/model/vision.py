"""The image encoder: patches of a volume as tokens that know where they are in millimetres. 2D is one slice."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Float, Int

from mmfm_jax.config import VisionConfig
from mmfm_jax.data.batch import Array, ImagePart, ImageShape
from mmfm_jax.model.layers import Linear, Table
from mmfm_jax.model.position import angles_3d
from mmfm_jax.model.transformer import Transformer


def patches(voxels: Float[Array, "batch z y x channel"], shape: ImageShape) -> Float[Array, "batch patch voxel"]:
    """The volume cut into patches, in z y x order."""
    z, y, x = shape.patch
    return rearrange(voxels, "b (z p) (y q) (x r) c -> b (z y x) (p q r c)", p=z, q=y, r=x)


def patch_centres_mm(spacing_mm: Float[Array, "batch 3"], shape: ImageShape) -> Float[Array, "batch patch 3"]:
    """z y x of the centre of each patch, from the centre of the crop."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape.grid), indexing="ij"), axis=-1).reshape(-1, 3)
    in_voxels = (grid + 0.5) * shape.patch - np.array(shape.size) / 2
    return in_voxels.astype(np.float32) * spacing_mm[:, None, :]


class VisionEncoder(nnx.Module):
    """One patch embedding a role, then one transformer shared by all roles."""

    def __init__(self, config: VisionConfig, images: dict[str, ImageShape], dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, self.shapes, self.dtype = config, tuple(images.items()), dtype
        self.embed = nnx.Dict(
            {
                role: Linear(
                    int(np.prod(shape.patch)) * shape.channels, config.width, ("voxel", "width"), rngs, bias=True
                )
                for role, shape in images.items()
            }
        )
        self.registers = Table(config.registers, config.width, rngs) if config.registers else None
        self.transformer = Transformer(config, rngs)

    def __call__(
        self, role: str, part: ImagePart, kept: Int[Array, "batch kept"] | None = None
    ) -> Float[Array, "batch token width"]:
        """Tokens of the registers, then of the patches; of the `kept` patches alone if given."""
        shape = dict(self.shapes)[role]
        content, centres = patches(part.voxels, shape), patch_centres_mm(part.spacing_mm, shape)
        if kept is not None:
            content = jnp.take_along_axis(content, kept[:, :, None], axis=1)
            centres = jnp.take_along_axis(centres, kept[:, :, None], axis=1)
        # In [0, 2]: a mean square near 1, and zero where the image is empty.
        x = self.embed[role]((2 * content).astype(self.dtype))
        if self.registers is not None:  # they stand at the centre of the crop
            registers = jnp.broadcast_to(self.registers.all, (len(x), *self.registers.all.shape)).astype(x.dtype)
            x = jnp.concatenate([registers, x], axis=1)
            centres = jnp.pad(centres, ((0, 0), (self.config.registers, 0), (0, 0)))
        angles = angles_3d(centres, self.config.width // self.config.heads, self.config.wavelengths_mm)
        return self.transformer(x, angles=angles)
