"""mmfm_jax: pretrain medical multimodal foundation models in JAX."""

__version__ = "0.1.0"
