"""mmfm_jax: pretrain medical multimodal foundation models on TPU and GPU pods."""

__version__ = "0.1.0"
