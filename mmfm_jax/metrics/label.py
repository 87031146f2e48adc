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
    Confidence,
    Measure,
    Statistic,
    Weights,
    calibration_error,
    confidence,
    tempered,
)

BASELINE = "baseline_"
TOLD = "told_"  # what reads a text that states the label: no baseline, for it is given the answer
UNTRAINED = "untrained_"  # probes of the model before its training


@dataclass(frozen=True)
class Temperature:
    """Fitted on validation studies that carry the label, so many."""

    value: float
    studies: int


@dataclass(frozen=True)
class Predictions:
    """What every predictor of one label says of the studies that carry it."""

    classes: tuple[str, ...]
    label: Int[np.ndarray, "study"]
    patients: Shaped[np.ndarray, "study"]
    by_predictor: dict[str, LogProbability]
    headline: str = ""
    """The predictor whose gain over the baselines, and over the model before its training, is measured; empty: none."""
    calibrated: bool = True
    """Whether the headline gives probabilities, whose calibration is measured."""
    temperature: Temperature | None = None
    """What the headline's logits are divided by where its calibration is measured once more."""

    @property
    def measurable(self) -> bool:
        """Whether there are two classes to tell apart, and something that tells them."""
        return len(np.unique(self.label)) > 1 and bool(self.by_predictor)

    def measures(self, bootstrap: Bootstrap) -> dict[str, Measure]:
        """AUROC of each predictor, what the headline gains over each baseline (paired), and its calibration error."""
        aurocs = {name: ClassAuroc(scores, self.label) for name, scores in self.by_predictor.items()}
        measures = {f"{name}/auroc": bootstrap(auroc, self.patients) for name, auroc in aurocs.items()}
        if self.headline in aurocs:
            for name in (name for name in aurocs if name.startswith((BASELINE, UNTRAINED))):
                gain = functools.partial(_difference, aurocs[self.headline], aurocs[name])
                measures[f"{self.headline}_minus_{name}/auroc"] = bootstrap(gain, self.patients)
        if self.headline in aurocs and self.calibrated:
            measures[f"{self.headline}/calibration_error"] = self._calibration_error(1.0, bootstrap)
            if fitted := self.temperature:
                error = self._calibration_error(fitted.value, bootstrap)
                measures[f"{self.headline}/tempered_calibration_error"] = error
                measures[f"{self.headline}/temperature"] = Measure(fitted.value, None, None, fitted.studies)
        return measures

    def claimed(self, temperature: float) -> Confidence:
        """What the headline claims, its logits divided by `temperature`."""
        return confidence(tempered(self.by_predictor[self.headline], temperature), self.label)

    def _calibration_error(self, temperature: float, bootstrap: Bootstrap) -> Measure:
        return bootstrap(functools.partial(calibration_error, self.claimed(temperature)), self.patients)

    def strongest_baseline(self, measures: dict[str, Measure]) -> str | None:
        """That of the highest AUROC on the studies that are measured, which favours it a little."""
        baselines = [name for name in self.by_predictor if name.startswith(BASELINE)]
        return max(baselines, key=lambda name: measures[f"{name}/auroc"].value, default=None)

    def headline_of(self, name: str, measures: dict[str, Measure]) -> str | None:
        """The headline beside the strongest baseline, in a sentence."""
        strongest = self.strongest_baseline(measures)
        if strongest is None or self.headline not in self.by_predictor:
            return None
        ours, theirs = (_said(measures[f"{of}/auroc"]) for of in (self.headline, strongest))
        less = _said(measures[f"{self.headline}_minus_{strongest}/auroc"])
        return (
            f"{name}: AUROC of {self.headline} {ours}, of the strongest baseline, "
            f"{strongest.removeprefix(BASELINE)}, {theirs}; ours less theirs {less}."
        )


def _said(m: Measure) -> str:
    return f"{m.value:.3f}" + (f" ({m.low:.3f} to {m.high:.3f})" if m.low is not None else "")


def _difference(a: Statistic, b: Statistic, weights: Weights) -> Float[np.ndarray, "resample"]:
    return a(weights) - b(weights)


def tell(
    name: str,
    label: str,
    scores: dict[str, LogProbability],
    held_out: HeldOut,
    headline: str = "",
    measured: Bool[np.ndarray, "study"] | None = None,
    calibrated: bool = True,
    temperature: Temperature | None = None,
) -> Findings:
    """What predictors of a label are worth on the test studies that carry it, among the `measured` ones if given.

    `name` stands in front of the measures; `scores`: by predictor, log-probabilities of all test studies;
    `temperature`: of the headline, fitted elsewhere.
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
        calibrated,
        temperature,
    )
    if not predictions.measurable:
        note = f"{name} is left out: the {held_out.split} studies that carry it are not of two classes or more."
        return Findings(notes=(note,), answered=(label,))
    found = predictions.measures(held_out.bootstrap)
    measures = {f"{name}/{key}": value for key, value in found.items()}
    said = predictions.headline_of(name, found)
    strongest = predictions.strongest_baseline(found)
    exhibits = tuple(_exhibits(name, predictions, measures, strongest))
    return Findings(measures, exhibits, answered=(label,), headlines=(said,) if said else ())


def _exhibits(
    name: str, predictions: Predictions, measures: dict[str, Measure], strongest: str | None
) -> list[Exhibit]:
    aurocs = {
        key.removesuffix("/auroc"): m for key, m in measures.items() if key.endswith("/auroc") and "_minus_" not in key
    }
    shown: list[Exhibit] = [
        Forest(
            "Telling one class from another",
            "AUROC: the chance that a study of the class scores above one without it; 0.5 is guessing, 1 is perfect. "
            "Dot: value on held-out patients. Line: its 95% interval. Baselines use no model and are fitted on "
            "training patients; told_ reads a text that states the label, so it is no baseline; untrained_ is a probe "
            "of the model before its training.",
            "AUROC",
            aurocs,
            reference=0.5,
        )
    ]
    if len(predictions.classes) == 2:
        shown.append(Panel("ROC curves", "", f"ROC of {name}", functools.partial(_roc, name, predictions, strongest)))
    if predictions.headline in predictions.by_predictor and predictions.calibrated:
        shown.append(
            Panel(
                "Calibration",
                "Of studies given a probability, the share that had the class; on the dotted line claims come true."
                + " With a temperature fitted on validation patients." * (predictions.temperature is not None),
                f"Calibration of {name}",
                functools.partial(_calibration, name, predictions),
            )
        )
    return shown


def _roc(name: str, predictions: Predictions, strongest: str | None):
    from mmfm_jax.metrics import figures

    return figures.roc(roc_curves(predictions, strongest), name)


def _calibration(name: str, predictions: Predictions):
    from mmfm_jax.metrics import figures

    fitted = predictions.temperature
    claimed = predictions.claimed(fitted.value if fitted else 1.0)
    return figures.calibration(claimed, f"{name}, {predictions.headline}")


def roc_curves(predictions: Predictions, strongest: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """False and true positive rates of the headline, of the strongest baseline, and of what else sees all that it may
    but other baselines."""
    from sklearn.metrics import roc_curve

    return {
        name: roc_curve(predictions.label, scores[:, 1] - scores[:, 0])[:2]
        for name, scores in predictions.by_predictor.items()
        if name in (predictions.headline, strongest) or not ("_without_" in name or name.startswith((BASELINE, TOLD)))
    }
