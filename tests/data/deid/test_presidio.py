"""Presidio finds what rules miss, with and without a language model, and never touches the network."""

import random
import socket

import pytest

pytest.importorskip("presidio_analyzer")
import spacy
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_jax.data.deid.presidio import PATTERNS, check
from mmfm_jax.data.ingest.convert import Cleaning, clean
from mmfm_jax.errors import UserError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def card(rng: random.Random) -> str:
    """A number of a credit card, whose last digit is Luhn's."""
    digits = [4, *(rng.randrange(10) for _ in range(14))]
    total = sum(d if i % 2 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits))
    return "".join(map(str, [*digits, -total % 10]))


def cleaned(text: str, model: str = PATTERNS, known: tuple[str, ...] = ()) -> str:
    task = Cleaning((text,), "", True, model, frozenset(known))
    ((made,),) = clean([task])
    return str(made)


@settings(max_examples=30)
@given(st.randoms(use_true_random=False))
def test_checked_numbers_are_found_whole_where_rules_see_a_part(rng):
    number = card(rng)
    grouped = " ".join(number[i : i + 4] for i in range(0, 16, 4))
    text = f"Paid by card {grouped}. The nodule measures 3.5 x 2.1 cm, 120 HU, for 3 months."
    assert cleaned(text) == text.replace(grouped, "[REMOVED]")
    assert number[-4:] in cleaned(text, model="")


def test_the_rules_go_on_as_before():
    text = "Seen by Dr. Krell on 2021-03-04 at 4711 Xanadu Street, jane@example.org or example.org. Stable, 7 mm."
    ruled = cleaned(text, model="", known=("4711 Xanadu Street",))
    assert ruled == "Seen by Dr. [NAME] on [DATE] at [REMOVED], [EMAIL] or example.org. Stable, 7 mm."
    assert cleaned(text, known=("4711 Xanadu Street",)) == ruled.replace("example.org", "[REMOVED]")


def test_a_language_model_finds_names_and_places_in_running_text(tmp_path):
    """The model here is a list of words; one that has learnt is used the same way."""
    nlp = spacy.blank("en")
    rules = [("PERSON", "Jane Quux"), ("GPE", "Xyzzyville"), ("DATE", "3 months"), ("GPE", "Xanadu")]
    nlp.add_pipe("entity_ruler").add_patterns(  # pyright: ignore[reportAttributeAccessIssue]
        [{"label": label, "pattern": words} for label, words in rules]
    )
    nlp.to_disk(tmp_path / "model")
    text = "Jane Quux was anxious in Xyzzyville for 3 months, of 4711 Xanadu Street. Later Jane  QUUX was not."
    assert cleaned(text, str(tmp_path / "model"), known=("4711 Xanadu Street",)) == (
        "[REMOVED] was anxious in [REMOVED] for 3 months, of [REMOVED]. Later [REMOVED] was not."
    )
    assert "anxious in Xyzzyville" in cleaned(text)


def test_a_model_that_is_not_there_is_not_fetched():
    with pytest.raises(
        UserError, match="the spaCy model en_core_web_lg is not installed; install it, or give patterns"
    ):
        check("en_core_web_lg")
