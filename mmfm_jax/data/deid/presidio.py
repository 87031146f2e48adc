"""Presidio on top of the scrubber's rules: checked numbers of more kinds and, with a spaCy model, names and places.

Nothing is fetched: a model that is not installed is an error, and Presidio's recognizer of e-mails, which asks the
network for the list of domains, is left to the rule. Dates are too: a model takes `3 months` for one (https://github.com/data-privacy-stack/presidio).
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmfm_jax.errors import UserError
from mmfm_jax.extras import pip_install

PATTERNS = "patterns"
"""Stands for the recognizers that need no language model."""
_LEAST_SCORE = 0.4
"""Presidio gives bare digits less, unless words beside them speak of such a number."""
_RECOGNIZERS = (
    "CreditCardRecognizer", "CryptoRecognizer", "IbanRecognizer", "IpRecognizer", "MacAddressRecognizer",
    "MedicalLicenseRecognizer", "NhsRecognizer", "PhoneRecognizer", "UrlRecognizer", "UsBankRecognizer",
    "UsItinRecognizer", "UsLicenseRecognizer", "UsPassportRecognizer", "UsSsnRecognizer",
)  # fmt: skip


def check(model: str) -> None:
    """Raises UserError unless Presidio and the model are installed. `model`: as `Presidio` takes it."""
    if find_spec("presidio_analyzer") is None:
        raise UserError(f"presidio, which texts ask for, is not installed; {pip_install('presidio')}")
    if model != PATTERNS:
        import spacy

        if not (spacy.util.is_package(model) or Path(model).is_dir()):
            raise UserError(f"presidio: the spaCy model {model} is not installed; install it, or give {PATTERNS}")


@functools.cache
def loaded(model: str) -> Presidio:
    """The process's one Presidio of a model."""
    return Presidio(model)


class Presidio:
    """Finds what may identify. Loads once and reads many texts.

    `model`: name of an installed spaCy model, or its folder, or `patterns`. Raises UserError as `check` does.
    """

    def __init__(self, model: str):
        check(model)
        import presidio_analyzer.predefined_recognizers as recognizers
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine

        registry = RecognizerRegistry([getattr(recognizers, name)() for name in _RECOGNIZERS])
        engine: Any = SpacyNlpEngine([{"lang_code": "en", "model_name": model}])
        if model == PATTERNS:
            import spacy

            engine.nlp = {"en": spacy.blank("en")}  # words alone: for what stands beside a number
        else:
            engine.load()
            registry.add_recognizer(recognizers.SpacyRecognizer(supported_entities=["PERSON", "LOCATION"]))
        self._engine = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])

    def find(self, text: str) -> set[str]:
        """What of a text may identify, as it is spelt there: for `scrub`, among what is known of the patient."""
        found = self._engine.analyze(text, language="en", score_threshold=_LEAST_SCORE)
        return {text[one.start : one.end].strip() for one in found}
