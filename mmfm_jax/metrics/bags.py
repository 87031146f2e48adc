"""Texts as bags of their sentences or words, in which order and meaning are lost: baselines of what a model reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

from mmfm_jax.metrics.held_out import Words

Readings = Sequence[Words]
"""Of one study: the first text of each field, then the second of each, and so on."""
Piece = Literal["sentences", "words"]
VOCABULARY = 20_000  # the commonest pieces of the training texts

_PIECES: dict[Piece, Callable[[str], list[str]]] = {
    "sentences": re.compile(r"[^.!?\s](?:[^.!?]|[.!?](?!\s|$))*").findall,
    "words": re.compile(r"\w+").findall,
}


class Bag:
    """Bags of the pieces that training texts hold; the vocabulary stays in memory and is never written or shown."""

    def __init__(self, pieces: Piece, train: Sequence[Readings], first: bool = False, limit: int = VOCABULARY):
        """`first`: only the first reading of a study is read. `limit`: pieces that are told apart, the commonest.

        Raises ValueError when the training texts hold no piece.
        """
        from sklearn.feature_extraction.text import CountVectorizer

        self._pieces, self._first = _PIECES[pieces], first
        analyse: Any = self._analyse  # scikit-learn's stubs know no function here
        self._vectorizer = CountVectorizer(analyzer=analyse, binary=True, max_features=limit)
        self.train = self._average(train, self._vectorizer.fit_transform)
        """Of the training studies [study, piece]."""

    def __call__(self, studies: Sequence[Readings]) -> csr_matrix:
        """By study and piece, the share of the study's texts of a field that hold the piece, sparse [study, piece]."""
        return self._average(studies, self._vectorizer.transform)

    def _analyse(self, text: tuple[str, str]) -> list[str]:
        field, words = text
        return [f"{field}\0{piece}" for piece in self._pieces(words.lower())]

    def _average(self, studies: Sequence[Readings], count: Callable) -> csr_matrix:
        texts: list[tuple[str, str]] = []
        study: list[int] = []
        weight: list[float] = []
        for i, readings in enumerate(studies):
            own = [text for words in (readings[:1] if self._first else readings) for text in words.items()]
            held = Counter(field for field, _ in own)
            texts += own
            study += [i] * len(own)
            weight += [1 / held[field] for field, _ in own]
        mean = csr_matrix((weight, (study, np.arange(len(texts)))), shape=(len(studies), len(texts)))
        return csr_matrix(mean @ count(texts))
