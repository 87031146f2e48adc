"""What the frozen model makes of a split: fused features, class probabilities and contrastive embeddings."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, Shaped

from mmfm_jax.data.batch import Batch, ImagePart, InputSpec, LabelPart, TablePart, TextPart
from mmfm_jax.data.tokenizer import Tokenizer
from mmfm_jax.data.transforms import prepare
from mmfm_jax.tasks.base import Views
from mmfm_jax.tasks.classification import Classification
from mmfm_jax.tasks.contrastive import Contrastive
from mmfm_jax.tasks.learner import Learner

FUSED = "fused"


@dataclass(frozen=True)
class Embedding:
    """Unit vectors of one modality in the space of a contrastive task; meaningless where not present."""

    vectors: Float[np.ndarray, "study width"]
    present: Bool[np.ndarray, "study"]


@dataclass(frozen=True)
class Features:
    """The studies of a split, in one order, as the model sees them. A view is `fused` or `fused_without_MODALITY`."""

    rows: Int[np.ndarray, "study"]
    """Of the store."""
    patients: Shaped[np.ndarray, "study"]
    labels: dict[str, Int[np.ndarray, "study"]]
    """Index into the label's classes, -1 where the study has none."""
    fused: dict[str, Float[np.ndarray, "study width"]]
    """By view: mean over the fusion's latents."""
    heads: dict[str, dict[str, Float[np.ndarray, "study label_class"]]]
    """By label, then view: log-probabilities of the label's classification head."""
    embeddings: dict[str, dict[str, Embedding]]
    """By contrastive task, then modality."""
    same: dict[str, Int[np.ndarray, "study"]]
    """By modality: studies whose inputs are identical share a number."""


def views_of(modalities: tuple[str, ...]) -> dict[str, str | None]:
    """Each view of the fusion and the modality it leaves out; a model of one modality has only the whole view."""
    without = {f"{FUSED}_without_{modality}": modality for modality in modalities}
    return {FUSED: None, **(without if len(modalities) > 1 else {})}


def extractor(learner: Learner, spec: InputSpec) -> Callable[[Batch], dict]:
    """The function from a host batch to `fused`, `heads` and `embeddings` of its studies, on all local devices.

    The number of studies of a batch must be a multiple of the number of local devices.
    """
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    graph, state = nnx.split(learner)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    views = views_of(spec.modalities)

    @jax.jit
    def extract(state: nnx.State, batch: Batch) -> dict:
        learner = nnx.merge(graph, state)
        seen = Views(learner.model, prepare(batch, spec, None, None), jax.random.key(0), train=False)
        latents = {view: _latents(seen, without, spec.modalities) for view, without in views.items()}
        heads = {t.config.label: t for t in learner.tasks.values() if isinstance(t, Classification)}
        return {
            "fused": {view: x.astype(jnp.float32).mean(axis=1) for view, x in latents.items()},
            "heads": {
                label: {view: jax.nn.log_softmax(head.logits(x).astype(jnp.float32)) for view, x in latents.items()}
                for label, head in heads.items()
            },
            "embeddings": {
                name: {modality: tuple(pair) for modality, pair in task.embed(seen).items()}
                for name, task in learner.tasks.items()
                if isinstance(task, Contrastive)
            },
        }

    by_study = NamedSharding(mesh, PartitionSpec("data"))
    return lambda batch: jax.device_get(extract(state, jax.device_put(batch, by_study)))


def _latents(seen: Views, without: str | None, modalities: tuple[str, ...]):
    """Latents [study, latent, width] of the fusion, blind to one modality or to none."""
    if without is None:
        return seen.latents
    studies = seen.batch.study.shape[0]
    keep = {modality: jnp.full(studies, modality != without) for modality in modalities}
    return seen.model.fuse(seen.encoded, keep)


def collect(extract: Callable[[Batch], dict], batches: Iterable[Batch], patients: Callable) -> Features:
    """Runs `extract` over a split and joins its batches; `patients(rows)` gives the patient of each row."""
    parts, rows, labels, contents = [], [], [], []
    for batch in batches:
        real = np.asarray(batch.study) >= 0  # the last batch is padded
        parts.append(jax.tree.map(operator.itemgetter(real), extract(batch)))
        rows.append(batch.study[real])
        labels.append({k: np.where(part.present, part.value, -1)[real] for k, part in batch.labels.items()})
        contents.append({k: _digests(part, real) for k, part in _modalities(batch).items()})
    joined = _concatenate(parts)
    embeddings = {
        task: {modality: Embedding(*pair) for modality, pair in both.items()}
        for task, both in joined["embeddings"].items()
    }
    return Features(
        rows=np.concatenate(rows),
        patients=np.asarray(patients(np.concatenate(rows))),
        labels=_concatenate(labels),
        fused=joined["fused"],
        heads=joined["heads"],
        embeddings=embeddings,
        same={k: np.unique(v, return_inverse=True)[1] for k, v in _concatenate(contents).items()},
    )


def _concatenate(trees: list):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees)


def _modalities(batch: Batch) -> dict:
    return {"image": batch.images, "text": batch.texts, "table": batch.table}


def _digests(part, real: Bool[np.ndarray, "batch"]) -> Shaped[np.ndarray, "study"]:
    """A digest of each study's raw arrays of one modality: equal exactly when the model is given the same."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(part)]
    return np.array(
        [hashlib.sha256(b"".join(leaf[i].tobytes() for leaf in leaves)).hexdigest() for i in np.flatnonzero(real)]
    )


# ---------------------------------------------------------------- prompts


def embed_prompts(
    learner: Learner, spec: InputSpec, tokenizer: Tokenizer, task: str, prompts: tuple[str, ...]
) -> Float[np.ndarray, "prompt width"]:
    """Unit vectors of sentences, each as the only content of a study: its first text field."""
    batch = prompt_batch(spec, tokenizer, prompts)

    @nnx.jit
    def embed(learner: Learner):
        seen = Views(learner.model, prepare(batch, spec, None, None), jax.random.key(0), train=False)
        return cast(Contrastive, learner.tasks[task]).embed(seen)["text"][0]

    return np.asarray(embed(learner), np.float32)


def prompt_batch(spec: InputSpec, tokenizer: Tokenizer, prompts: tuple[str, ...]) -> Batch:
    """One study a prompt, holding nothing else."""
    n = len(prompts)
    absent = np.zeros(n, bool)
    texts = {name: TextPart(np.zeros((n, length), np.int32), absent) for name, length in spec.texts.items()}
    field, length = next(iter(spec.texts.items()))
    tokens = np.stack([tokenizer.encode(prompt, length) for prompt in prompts])
    texts[field] = dataclasses.replace(texts[field], tokens=tokens, present=~absent)
    images = {
        role: ImagePart(np.zeros((n, *image.size, image.channels), np.float32), np.ones((n, 3), np.float32), absent)
        for role, image in spec.images.items()
    }
    numbers, categories = (n, len(spec.numbers)), (n, len(spec.categories))
    table = TablePart(
        np.zeros(numbers, np.float32),
        np.zeros(numbers, bool),
        np.zeros(categories, np.int32),
        np.zeros(categories, bool),
    )
    labels = {label: LabelPart(np.zeros(n, np.int32), absent) for label in spec.labels}
    return Batch(np.full(n, -1, np.int32), images, texts, table, labels)
