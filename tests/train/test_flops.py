"""FLOPs counted from the program against a hand count."""

import jax
import jax.numpy as jnp
from flax import nnx

from mmfm_jax.config import TransformerConfig
from mmfm_jax.model.transformer import Transformer
from mmfm_jax.train.flops import model_flops


def test_a_scanned_transformer_counts_every_layer():
    width, depth, tokens, batch = 8, 5, 7, 3
    model = Transformer(TransformerConfig(width=width, depth=depth, heads=2), nnx.Rngs(params=0))
    x = jax.ShapeDtypeStruct((batch, tokens, width), jnp.float32)
    projections = 4 * width * width + 2 * 4 * width * width
    by_hand = depth * batch * (2 * tokens * projections + 2 * 2 * tokens * tokens * width)
    assert model_flops(model, x) == by_hand


def test_convolutions_and_branches_count():
    image, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))

    def convolve(image):
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    by_hand = 2 * 8 * 8 * 5 * 3 * 3 * 3
    assert model_flops(convolve, image) == by_hand

    def branch(image):
        return jax.lax.cond(image.sum() > 0, lambda x: convolve(x).sum(), lambda x: x.sum(), image)

    assert model_flops(branch, image) == by_hand
