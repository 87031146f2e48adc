"""The other side of a comparison: the SigLIP of `transformers` (arXiv:2303.15343) trained by PyTorch's AdamW.

Where the two models differ at equal widths, depths, heads, tokens and loss:

| | ours | the peer |
|---|---|---|
| positions | rotary, in mm | learned, added once |
| norms | RMSNorm, and of queries and keys | LayerNorm |
| biases of linear layers | none within blocks | everywhere |
| pooling of the image | one query attends, one linear map | one query attends, an MLP |
| pooling of the text | one query attends, one linear map | the last token, one linear map |
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmfm_jax.errors import UserError
from mmfm_jax.experiment import Experiment

DIFFERENCES = (
    "Ours has rotary positions, RMSNorm, norms of queries and keys and no biases; SigLIP learned positions, LayerNorm, "
    "biases and an MLP in its image pooling."
)


def check_comparable(experiment: Experiment) -> None:
    """Raises UserError when SigLIP has no counterpart of an experiment."""
    inputs, model = experiment.inputs, experiment.model
    tasks = [task.model_dump() for task in experiment.tasks.values()]
    plain = len(tasks) == 1 and tasks[0]["kind"] == "contrastive" and tasks[0]["loss"] == "sigmoid"
    if not (plain and set(tasks[0]["between"]) == {"image", "text"}):
        raise UserError("tasks: SigLIP knows one sigmoid contrast of image and text; name that task alone")
    if len(inputs.images) != 1 or len(inputs.texts) != 1 or inputs.columns:
        raise UserError("inputs: SigLIP takes one image and one text; name one of each and no columns")
    if any(text.readings > 1 for text in inputs.texts.values()):
        raise UserError("inputs.texts: SigLIP reads one text of a study; leave readings at 1")
    for name, stack in (("vision", model.vision), ("text", model.text)):
        if stack.gated or stack.precision != "dtype":
            raise UserError(f"model.{name}: SigLIP has neither gated MLPs nor eight bits; leave them out")
    if experiment.train.accumulate > 1:
        raise UserError("train.accumulate: the comparison takes whole batches; leave it at 1")


class Peer:
    """SigLIP on a device, with its optimizer and a random batch; `step(n)` takes n steps and waits for the last."""

    name = "transformers"

    def __init__(self, experiment: Experiment, device: str, threads: int | None = None):
        """`device`: of PyTorch, such as `cuda`. There the model is compiled, and attention is PyTorch's own kernels."""
        import torch

        check_comparable(experiment)
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(experiment.seed)
        torch.set_float32_matmul_precision("high")  # of no effect on products in bfloat16, nor on the CPU
        self.parameters, self.flops = size_of(experiment)
        self._torch, self._device = torch, device
        self._dtype = getattr(torch, experiment.model.dtype)
        self._model = _siglip(experiment).to(device)
        config = experiment.optimizer
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), config.learning_rate, (config.b1, config.b2),
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        self._clip_norm = config.clip_norm
        self._run = torch.compile(self._model) if device.startswith("cuda") else self._model
        self._batch = _batch(experiment, device)
        self.loss = float("nan")

    def step(self, steps: int) -> None:
        torch = self._torch
        mixed = self._dtype is not torch.float32
        for _ in range(steps):
            self._optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self._device.partition(":")[0], self._dtype, enabled=mixed):
                loss = self._run(**self._batch, return_loss=True).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
            self._optimizer.step()
        self.loss = loss.item()  # waits
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()


def size_of(experiment: Experiment) -> tuple[int, float]:
    """Parameters, and model FLOPs of a step: 3 x PyTorch's count of forward. Nothing is allocated."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = _siglip(experiment)
    counter = FlopCounterMode(display=False)
    with counter:
        model(**_batch(experiment, "meta"), return_loss=True)
    return sum(parameter.numel() for parameter in model.parameters()), 3.0 * counter.get_total_flops()


def _siglip(experiment: Experiment) -> Any:
    import torch
    from transformers import SiglipConfig, SiglipModel  # pyright: ignore[reportMissingImports]  it is an extra

    image = next(iter(experiment.inputs.images.values()))
    length = next(iter(experiment.inputs.texts.values())).length
    vision, text = experiment.model.vision, experiment.model.text

    def tower(stack) -> dict[str, int]:
        return {
            "hidden_size": stack.width,
            "intermediate_size": round(stack.mlp_ratio * stack.width),
            "num_hidden_layers": stack.depth,
            "num_attention_heads": stack.heads,
        }

    config = SiglipConfig(
        vision_config=tower(vision) | {"num_channels": 1, "image_size": image.size[1], "patch_size": image.patch[1]},
        text_config=tower(text)
        | {
            "vocab_size": experiment.data.vocabulary_size,
            "max_position_embeddings": length,
            "projection_size": vision.width,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    )
    model = SiglipModel._from_config(config, attn_implementation="sdpa")

    class Volume(torch.nn.Module):
        """Patches of a volume, with learned positions; SigLIP itself has images of one square slice alone."""

        def __init__(self):
            super().__init__()
            self.patch = torch.nn.Conv3d(1, vision.width, image.patch, stride=image.patch)
            self.position = torch.nn.Parameter(0.02 * torch.randn(patches(experiment), vision.width))

        def forward(self, pixel_values, interpolate_pos_encoding=False):
            return self.patch(pixel_values).flatten(2).transpose(1, 2) + self.position

    if not _flat(experiment):
        embeddings: Any = Volume()
        model.vision_model.embeddings = embeddings
    return model.train()


def patches(experiment: Experiment) -> int:
    """Of the one image."""
    image = next(iter(experiment.inputs.images.values()))
    return int(np.prod([size // patch for size, patch in zip(image.size, image.patch)]))


def _flat(experiment: Experiment) -> bool:
    (z, y, x), (pz, py, px) = next((i.size, i.patch) for i in experiment.inputs.images.values())
    return z == pz == 1 and y == x and py == px


def _batch(experiment: Experiment, device: str) -> dict[str, Any]:
    import torch

    studies, size = experiment.train.batch_size, next(iter(experiment.inputs.images.values())).size
    length = next(iter(experiment.inputs.texts.values())).length
    shape = (studies, 1, *(size[1:] if _flat(experiment) else size))
    return {
        "pixel_values": torch.rand(shape, device=device),
        "input_ids": torch.randint(1, experiment.data.vocabulary_size, (studies, length), device=device),
    }
