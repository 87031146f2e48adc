"""Experiments to be timed: an image and a text encoder under the sigmoid loss, in the sizes that SigLIP has."""

from __future__ import annotations

from mmfm_jax.experiment import Experiment, validate

SMALL = {"width": 384, "depth": 12, "heads": 6}
BASE = {"width": 768, "depth": 12, "heads": 12}
LARGE = {"width": 1024, "depth": 24, "heads": 16}
TEXT_OF_LARGE = {"width": 1024, "depth": 12, "heads": 16}
FLAT = {"size": [1, 224, 224], "patch": [1, 16, 16]}
VOLUME = {"size": [96, 192, 192], "patch": [8, 16, 16]}  # 1,728 patches

MODELS = {  # by name: the image, the two encoders, tokens of a text, studies a step, dtype
    "vit-s": (FLAT, SMALL, SMALL, 64, 16, "float32"),
    "vit-b": (FLAT, BASE, BASE, 64, 128, "bfloat16"),
    "vit-l": (FLAT, LARGE, TEXT_OF_LARGE, 64, 64, "bfloat16"),
    "vit-l-3d": (VOLUME, LARGE, TEXT_OF_LARGE, 256, 8, "bfloat16"),
}
FOR_PLATFORM = {"cpu": ("vit-s",), "gpu": ("vit-b", "vit-l", "vit-l-3d")}


def builtin(name: str) -> Experiment:
    """One of `MODELS`. Registers are left out and the fusion, which this loss does not use, is small and frozen."""
    image, vision, text, length, batch_size, dtype = MODELS[name]
    raw = {
        "name": name,
        "inputs": {"images": {"image": {**image, "window": [-1000, 1000]}}, "texts": {"report": {"length": length}}},
        "data": {"store": "none", "vocabulary_size": 32_000, "augment": {"flip": 0.0}},
        "model": {
            "vision": {**vision, "registers": 0},
            "text": text,
            "table": {"width": 64, "depth": 1, "heads": 1},
            "fusion": {"width": 64, "depth": 1, "heads": 1, "latents": 1},
            "dtype": dtype,
        },
        "tasks": {"image_text": {"kind": "contrastive", "between": ["image", "text"], "width": vision["width"]}},
        "optimizer": {"groups": [{"match": "model.fusion.*", "frozen": True}]},
        "train": {"steps": 10_000, "batch_size": batch_size},
    }
    return validate(raw, f"bench {name}")
