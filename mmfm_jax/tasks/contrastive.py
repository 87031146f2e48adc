"""Contrast of two modalities of a study: sigmoid (SigLIP, arXiv:2303.15343) or softmax (CLIP, arXiv:2103.00020)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, PRNGKeyArray, UInt32

from mmfm_jax.config.model import ModelConfig
from mmfm_jax.config.tasks.contrastive import LARGEST_SCALE, ContrastiveConfig, ZeroShot
from mmfm_jax.data.batch import Array, Batch, InputSpec
from mmfm_jax.errors import UserError
from mmfm_jax.losses.mean import Mean
from mmfm_jax.losses.pairs import contrast
from mmfm_jax.metrics.examples import Example, examples_html, first_of
from mmfm_jax.metrics.findings import Exhibit, Findings, Forest, Passage
from mmfm_jax.metrics.held_out import HeldOut, Words
from mmfm_jax.metrics.label import BASELINE, TOLD, tell
from mmfm_jax.metrics.ranks import Ranks
from mmfm_jax.metrics.retrieval import Gallery, Side, gallery, ranks_both_ways, retrieval, zero_shot
from mmfm_jax.model.layers import Linear
from mmfm_jax.model.multimodal import Encoded, modality
from mmfm_jax.model.parameter import parameter
from mmfm_jax.model.pool import AttentionPool
from mmfm_jax.model.readings import excerpts, one_reading
from mmfm_jax.model.tokens import Tokens, join
from mmfm_jax.tasks.base import Losses, Task, Views

EXAMPLES = 12


class Pool(AttentionPool):
    """What a learned query sees of all tokens of a modality, as a unit vector."""

    def __init__(self, width: int, heads: int, embedding: int, rngs: nnx.Rngs):
        super().__init__(width, heads, rngs)
        self.project = Linear(width, embedding, ("width", None), rngs)

    def __call__(self, tokens: Tokens) -> Float[Array, "batch embedding"]:
        pooled = self.project(super().__call__(tokens)).astype(jnp.float32)
        return pooled * jax.lax.rsqrt(jnp.square(pooled).sum(axis=-1, keepdims=True) + 1e-12)


class Contrastive(Task):
    Config = ContrastiveConfig
    config: ContrastiveConfig

    def __init__(self, name: str, config: ContrastiveConfig, model: ModelConfig, spec: InputSpec, rngs: nnx.Rngs):
        super().__init__(name, config, model, spec, rngs)
        for question, asked in config.zero_shot.items():
            field = f"tasks.{name}.zero_shot.{question}"
            if len(spec.labels.get(asked.label, ())) != 2:
                pairs = ", ".join(label for label, classes in spec.labels.items() if len(classes) == 2)
                raise UserError(
                    f"{field}.label: {asked.label} is not a label of two classes in the store; those are "
                    f"{pairs or 'none'}"
                )
        self.lengths, self.readings = tuple(spec.texts.items()), max([1, *spec.readings.values()])
        self.apart = self.readings > 1 or bool(spec.excerpts)  # not the texts that other tasks are given
        encoders = {"image": model.vision, "text": model.text, "table": model.table}
        self.pool = nnx.Dict(
            {side: Pool(encoders[side].width, encoders[side].heads, config.width, rngs) for side in config.between}
        )
        sigmoid = config.loss == "sigmoid"
        self.log_scale = parameter(jnp.log(config.initial_scale), "scale", (), largest=math.log(LARGEST_SCALE))
        self.bias = parameter(jnp.array(config.initial_bias), "bias", ()) if sigmoid else None

    def embed(self, encoded: Encoded, side: str) -> tuple[Float[Array, "batch embedding"], Bool[Array, "batch"]]:
        """The unit vector of a modality, and whether the study has it."""
        tokens = join([tokens for part, tokens in encoded.items() if modality(part) == side])
        return self.pool[side](tokens), tokens.held

    def loss(self, views: Views, keys: PRNGKeyArray) -> Losses:
        batch, encoded = views.batch, dict.fromkeys(self.config.between, views.encoded)
        if "text" in encoded and self.apart:
            batch = excerpts(batch, dict(self.lengths)) if views.train else one_reading(batch, dict(self.lengths))[0]
            encoded["text"] = views.model.encode_texts(batch, keys=views.noise(keys))
        (a, a_present), (b, b_present) = (self.embed(encoded[side], side) for side in self.config.between)
        duplicates = self.config.mask_duplicates and "text" in self.config.between
        scale = jnp.exp(self.log_scale[...])
        loss, accuracy = contrast(
            self.config.loss, a, b, a_present & b_present, scale, None if self.bias is None else self.bias[...],
            text_hashes(batch) if duplicates else None,
        )  # fmt: skip
        return Losses({"loss": loss}, {"accuracy": accuracy, "scale": Mean.of(scale)})

    def predict(self, views: Views) -> dict[str, Array]:
        """The unit vector of each side, and as `SIDE_present` whether a study has it. Of several texts side by side,
        the mean of their unit vectors."""
        found = {}
        for side in self.config.between:
            if side == "text" and self.readings > 1:
                found[side], found[f"{side}_present"] = self._mean_of_texts(views)
            else:
                found[side], found[f"{side}_present"] = self.embed(views.encoded, side)
        return found

    def _mean_of_texts(self, views: Views) -> tuple[Float[Array, "batch embedding"], Bool[Array, "batch"]]:
        total, count = jnp.zeros(()), jnp.zeros(())
        for i in range(self.readings):
            batch, held = one_reading(views.batch, dict(self.lengths), i)
            vectors, _ = self.embed(views.model.encode_texts(batch), "text")
            total, count = total + jnp.where(held[:, None], vectors, 0), count + held
        return total / jnp.maximum(count, 1)[:, None], count > 0

    def measure(self, held_out: HeldOut) -> Findings:
        """Retrieval both ways, zero-shot answers, and some images beside the texts nearest to them."""
        sides = {
            side: Side(
                held_out.predicted[side].astype(np.float32),
                held_out.predicted[f"{side}_present"],
                held_out.test.same[side],
            )
            for side in self.config.between
        }
        if "text" in sides:
            sides["text"] = self._whole_texts(sides["text"], held_out)
        found = [self._answer(name, asked, sides["image"], held_out) for name, asked in self.config.zero_shot.items()]
        found.append(self._retrieval(sides, held_out))
        return Findings(
            {key: measure for of in found for key, measure in of.measures.items()},
            tuple(shown for of in found for shown in of.exhibits),
            tuple(note for of in found for note in of.notes),
            tuple(label for of in found for label in of.answered),
            tuple(said for of in found for said in of.headlines),
        )

    def _retrieval(self, sides: dict[str, Side], held_out: HeldOut) -> Findings:
        (a, first), (b, second) = sides.items()
        patients = held_out.test.patients
        among = gallery(first.present & second.present, patients, held_out.max_gallery)
        if len(among.studies) < 2:
            return Findings()
        ways = ranks_both_ways(sides, among)
        measured = retrieval(ways, patients, among, held_out.recall_at, held_out.bootstrap)
        measures = {f"retrieval/{key}": measure for key, measure in measured.items()}
        size = f"{len(among.studies)} studies" + (f", drawn by a hash of patients from {among.of}" * among.drawn)
        note = (
            f"Recall@k between {a} and {b}: how often a study's own partner is among the first k found of {size}. Grey "
            "mark: chance."
        )
        recalls = {key: m for key, m in measures.items() if "/recall@" in key}
        exhibits: list[Exhibit] = [Forest("Finding a study's partner", note, "recall", recalls)]
        notes = [f"Retrieval between {a} and {b} is among {size}; among more, recall is lower."] * among.drawn
        if np.isnan(ways[f"{a}_to_{b}"].above).any():
            notes.append(f"Retrieval between {a} and {b} is not defined: a study's embedding is not finite.")
        elif set(sides) == {"image", "text"}:
            exhibits.append(self._examples(sides, among, ways["image_to_text"], held_out))
        return Findings(measures, tuple(exhibits), tuple(notes))

    def _whole_texts(self, text: Side, held_out: HeldOut) -> Side:
        """Of studies with several texts of a field, the mean of their vectors, a unit vector, as prompts are averaged
        in CLIP (arXiv:2103.00020): one reader's words say less of a study than all readers' do."""
        if not held_out.all_texts:
            return text
        readings = held_out.readings()
        study = np.repeat(np.arange(len(readings)), [len(of_study) for of_study in readings])
        words = [reading for of_study in readings for reading in of_study]
        total = held_out.all_texts["text"].astype(np.float64)
        mean = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
        alike: list[list[bytes]] = [[] for _ in readings]
        for i, tokens in zip(study, held_out.tokens(words)):
            alike[i].append(tokens.tobytes())
        digests = [hashlib.sha256(b"".join(sorted(of_study))).hexdigest() for of_study in alike]
        return Side(mean.astype(np.float32), text.present, np.unique(digests, return_inverse=True)[1])

    def _answer(self, name: str, asked: ZeroShot, image: Side, held_out: HeldOut) -> Findings:
        field = held_out.first_text
        prompts = asked.positive + asked.negative
        texts = in_contexts(prompts, field, held_out.training_texts() if asked.contexts else [], asked.contexts)
        alone = [[prompt] for prompt in prompts]
        ways = {"zero_shot": texts} | ({"zero_shot_bare": alone} if texts != alone else {})
        scores = {}
        for way, of_prompt in ways.items():
            words = [{field: text} for texts in of_prompt for text in texts]
            vectors = held_out.of_texts(words, ("text",))["text"].reshape(len(prompts), -1, self.config.width)
            positive, negative = np.split(vectors.mean(axis=1), [len(asked.positive)])
            scores[way] = zero_shot(image.vectors, positive, negative)
        fitted = held_out.fitted(asked.label, frozenset())
        scores |= {key: of for key, of in fitted.items() if key.startswith((BASELINE, TOLD))}
        return tell(name, asked.label, scores, held_out, headline="zero_shot", measured=image.present, calibrated=False)

    def _examples(self, sides: dict[str, Side], among: Gallery, ranks: Ranks, held_out: HeldOut) -> Passage:
        """A few test studies drawn at random, with the texts nearest to their images."""
        image, text, both = sides["image"], sides["text"], among.studies
        chosen = np.sort(np.random.default_rng(held_out.seed).permutation(len(both))[:EXAMPLES])
        nearest = (image.vectors[both[chosen]] @ text.vectors[both].T).argmax(axis=1)
        readings = held_out.readings()
        pictures = [held_out.picture(int(held_out.test.rows[both[i]])) for i in chosen]
        shown = [
            Example(picture, first_of(readings[both[j]]), first_of(readings[both[i]]), float(ranks.expected[i]))
            for picture, i, j in zip(pictures, chosen, nearest)
        ]
        note = (
            "Held-out studies drawn at random: middle slice at true scale, the text nearest to the image among those "
            f"of {len(both)} studies, and the study's own text with its rank. Of several texts of a study, the mean is "
            "what is compared and the first is what is shown."
        )
        return Passage("Examples", note, examples_html(shown))


def in_contexts(prompts: Sequence[str], field: str, texts: Sequence[Words], most: int) -> list[list[str]]:
    """Of each prompt, the texts in which it stands: the first `most` of `texts` that hold a prompt, with this one in
    its place; or itself alone."""
    longest = sorted(prompts, key=len, reverse=True)  # one prompt may begin another
    found: list[tuple[str, str]] = []
    for text in (words[field] for words in texts if field in words):
        if len(found) == most:
            break
        if held := next((prompt for prompt in longest if prompt in text), None):
            found.append((text, held))
    return [[text.replace(held, prompt) for text, held in found] or [prompt] for prompt in prompts]


def text_hashes(batch: Batch) -> UInt32[Array, "batch way 2"]:
    """64 bits of each study's whole texts, and of what is shown of them, over all fields."""
    whole = jnp.concatenate([text.digest for _, text in sorted(batch.texts.items())], axis=1)
    shown = jnp.concatenate([text.tokens for _, text in sorted(batch.texts.items())], axis=1).astype(jnp.uint32)
    return jnp.stack([_hash(whole), _hash(shown)], axis=1)


def _hash(words: UInt32[Array, "batch word"]) -> UInt32[Array, "batch 2"]:
    salt = np.random.default_rng(0).integers(1, 2**32, (2, words.shape[1]), dtype=np.uint32) | np.uint32(1)
    return jnp.stack([_mixed(words, row) for row in salt], axis=1)


def _mixed(words, salt):
    """A 32-bit hash of each row: products with odd salts, scrambled before they are summed."""
    x = (words + 1) * salt
    x = (x ^ (x >> 15)) * jnp.uint32(0x2C1B3C6D)
    x = (x ^ (x >> 12)) * jnp.uint32(0x297A2D39)
    return (x ^ (x >> 15)).sum(axis=1, dtype=jnp.uint32)
