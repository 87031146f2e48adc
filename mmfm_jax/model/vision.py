"""The image encoder: patches of a volume as tokens that know where they are in millimetres. 2D is one slice."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from mmfm_jax.config.model import VisionConfig
from mmfm_jax.data.batch import Array, ImagePart, ImageShape, PackedPart
from mmfm_jax.model.flash import ALL, Segments
from mmfm_jax.model.layers import Linear, Table
from mmfm_jax.model.position import angles_3d
from mmfm_jax.model.tokens import Tokens
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


def as_patches(part: ImagePart, shape: ImageShape) -> PackedPart:
    """Images of one size as rows of one study each, without padding."""
    return PackedPart(patches(part.voxels, shape), patch_centres_mm(part.spacing_mm, shape), None, part.present)


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
        self.registers = Table(config.registers, config.width, rngs, kind="token") if config.registers else None
        self.transformer = Transformer(config, rngs)

    def __call__(self, role: str, part: ImagePart | PackedPart, keys: PRNGKeyArray | None = None) -> Tokens:
        """Tokens of the registers, of each study of a row its own, then of the patches. No study meets another.

        `keys`: one a study, of noise in training."""
        part = part if isinstance(part, PackedPart) else as_patches(part, dict(self.shapes)[role])
        centres, segment, studies = part.centres_mm, part.segment, part.studies
        # In [0, 2]: a mean square near 1, and zero where the image is empty.
        x = self.embed[role]((2 * part.patches).astype(self.dtype))
        if self.registers is not None:  # they stand at the centre of the crop
            registers = jnp.tile(self.registers.all, (studies, 1)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(registers, (len(x), *registers.shape)), x], axis=1)
            centres = jnp.pad(centres, ((0, 0), (len(registers), 0), (0, 0)))
            if segment is not None:
                own = jnp.where(part.present.reshape(-1, studies), 1 + jnp.arange(studies), 0)
                segment = jnp.concatenate([jnp.repeat(own, self.config.registers, axis=1), segment], axis=1)
        angles = angles_3d(centres, self.config.width // self.config.heads, self.config.wavelengths_mm)
        x = self.transformer(x, ALL if segment is None else Segments.packed(segment), angles, keys=keys)
        return Tokens(x, jnp.broadcast_to(part.present[:, None], x.shape[:2]) if segment is None else segment, studies)
