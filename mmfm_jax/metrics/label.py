"""How well predictors tell the classes of a label on held-out patients."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from mmfm_jax.metrics.bootstrap import Bootstrap
from mmfm_jax.metrics.findings import Exhibit, Findings, Forest, Panel
from mmfm_jax.metrics.held_out import HeldOut, LogProbability
from mmfm_jax.metrics.statistics import (
    ClassAuroc,
    Measure,
    Statistic,
    Weights,
    calibration_error,
    confidence,
)

BASELINE = "baseline_"


@dataclass(frozen=True)
class Predictions:
    """What every predictor of one label says of the studies that carry it."""

    classes: tuple[str, ...]
    label: Int[np.ndarray, "study"]
    patients: Shaped[np.ndarray, "study"]
    by_predictor: dict[str, LogProbability]
    headline: str = ""
    """The predictor whose gain over the baselines and whose calibration are measured; empty: none."""

    @property
    def measurable(self) -> bool:
        """Whether there are two classes to tell apart, and something that tells them."""
        return len(np.unique(self.label)) > 1 and bool(self.by_predictor)

    def measures(self, bootstrap: Bootstrap) -> dict[str, Measure]:
        """AUROC of each predictor, what the headline gains over each baseline (paired), and its calibration error."""
        aurocs = {name: ClassAuroc(scores, self.label) for name, scores in self.by_predictor.items()}
        measures = {f"{name}/auroc": bootstrap(auroc, self.patients) for name, auroc in aurocs.items()}
        if self.headline in aurocs:
            for name in (name for name in aurocs if name.startswith(BASELINE)):
                gain = functools.partial(_difference, aurocs[self.headline], aurocs[name])
                measures[f"{self.headline}_minus_{name}/auroc"] = bootstrap(gain, self.patients)
            claimed = confidence(self.by_predictor[self.headline], self.label)
            measures[f"{self.headline}/calibration_error"] = bootstrap(
                functools.partial(calibration_error, claimed), self.patients
            )
        return measures


def _difference(a: Statistic, b: Statistic, weights: Weights) -> Float[np.ndarray, "resample"]:
    return a(weights) - b(weights)


def tell(
    name: str,
    label: str,
    scores: dict[str, LogProbability],
    held_out: HeldOut,
    headline: str = "",
    measured: Bool[np.ndarray, "study"] | None = None,
) -> Findings:
    """What predictors of a label are worth on the test studies that carry it, among the `measured` ones if given.

    `name` stands in front of the measures; `scores`: by predictor, log-probabilities of all test studies.
    """
    test = held_out.test
    kept = test.labels[label] >= 0
    if measured is not None:
        kept &= measured
    predictions = Predictions(
        held_out.classes[label],
        test.labels[label][kept],
        test.patients[kept],
        {predictor: of[kept] for predictor, of in scores.items()},
        headline,
    )
    if not predictions.measurable:
        note = f"{name} is left out: the {held_out.split} studies that carry it are not of two classes or more."
        return Findings(notes=(note,), answered=(label,))
    measures = {f"{name}/{key}": value for key, value in predictions.measures(held_out.bootstrap).items()}
    return Findings(measures, tuple(_exhibits(name, predictions, measures)), answered=(label,))


def _exhibits(name: str, predictions: Predictions, measures: dict[str, Measure]) -> list[Exhibit]:
    aurocs = {
        key.removesuffix("/auroc"): m for key, m in measures.items() if key.endswith("/auroc") and "_minus_" not in key
    }
    shown: list[Exhibit] = [
        Forest(
            "Telling one class from another",
            "AUROC: the chance that a study of the class scores above one without it; 0.5 is guessing, 1 is perfect. "
            "Dot: value on held-out patients. Line: its 95% interval.",
            "AUROC",
            aurocs,
            reference=0.5,
        )
    ]
    if len(predictions.classes) == 2:
        shown.append(Panel("ROC curves", "", f"ROC of {name}", functools.partial(_roc, name, predictions)))
    if predictions.headline in predictions.by_predictor:
        shown.append(
            Panel(
                "Calibration",
                "Of studies given a probability, the share that had the class; on the dotted line claims come true.",
                f"Calibration of {name}",
                functools.partial(_calibration, name, predictions),
            )
        )
    return shown


def _roc(name: str, predictions: Predictions):
    from mmfm_jax.metrics import figures

    return figures.roc(roc_curves(predictions), name)


def _calibration(name: str, predictions: Predictions):
    from mmfm_jax.metrics import figures

    claimed = confidence(predictions.by_predictor[predictions.headline], predictions.label)
    return figures.calibration(claimed, f"{name}, {predictions.headline}")


def roc_curves(predictions: Predictions) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """False and true positive rates of the headline and of the predictors that use all they are given."""
    from sklearn.metrics import roc_curve

    return {
        name: roc_curve(predictions.label, scores[:, 1] - scores[:, 0])[:2]
        for name, scores in predictions.by_predictor.items()
        if "_without_" not in name or name == predictions.headline
    }
