"""Texts survive the tokenizer, training is deterministic, and one that cannot serve is refused in a sentence."""

import json
import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmfm_jax.data import batch
from mmfm_jax.data.feed.tokenizer import PAD, Tokenizer
from mmfm_jax.errors import UserError

TEXTS = [
    "Solid nodule of 8.5 mm in the right upper lobe. Margin spiculated.",
    "Part-solid nodule, margin smooth. No calcification.",
    "Lésion évidente; 結節 5 mm.",
] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


# Letters that Python's tables do not know yet (Cn) may have a lower case in those of the tokenizer: U+16EA0.
@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60))
@example("")
@example("Naïve «5,2 mm» 結節 🫁")
@example("[MASK] [PAD] [START]")
def test_any_text_is_encoded_without_loss(tokenizer, text):
    tokens = tokenizer.encode(text, 400)
    assert tokens.dtype == np.int32 and tokens.shape == (400,)
    assert tokenizer.decode(tokens) == unicodedata.normalize("NFC", text).lower().strip()
    assert tokens.min() >= 0 and tokens.max() < tokenizer.vocabulary_size


@settings(deadline=None)
@given(text=st.text(max_size=40), length=st.integers(1, 50))
def test_length_is_kept_by_cutting_and_padding(tokenizer, text, length):
    whole = tokenizer.encode(text, 1000)
    end = int((whole != PAD).sum())
    assert (whole[:end] != PAD).all()
    np.testing.assert_array_equal(tokenizer.encode(text, length), whole[:length])


def test_an_empty_text_still_has_its_start_token(tokenizer):
    start = tokenizer.encode("", 4)
    assert start[0] != PAD and (start[1:] == PAD).all()
    assert tokenizer.encode("nodule", 4)[0] == start[0]


def test_special_tokens_typed_into_a_report_are_text(tokenizer):
    tokens = tokenizer.encode("seen [MASK] and [PAD] here [START]", 100)
    end = int((tokens != PAD).sum())
    assert (tokens[:end] != PAD).all() and tokenizer.mask_token not in tokens
    assert tokens[0] not in tokens[1:]


def test_padding_is_the_id_that_batches_mean(tokenizer):
    assert PAD == batch.PAD == json.loads(tokenizer.to_json())["model"]["vocab"]["[PAD]"]


def test_training_learns_words_of_the_texts_up_to_the_size(tokenizer):
    assert tokenizer.vocabulary_size <= 400
    assert (tokenizer.encode(" nodule", 9) != PAD).sum() == 2  # the start token and one word
    assert (tokenizer.encode(" zebra", 9) != PAD).sum() > 3
    with pytest.raises(UserError, match=r"vocabulary_size 258 .* at least 259"):
        Tokenizer.train(TEXTS, 258)


def test_training_is_the_same_in_any_order_and_process(tokenizer):
    assert Tokenizer.train(reversed(TEXTS), 400).to_json() == tokenizer.to_json()
    script = f"from mmfm_jax.data.feed.tokenizer import Tokenizer\nprint(Tokenizer.train({TEXTS!r}, 400).to_json())"
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
        assert out.stdout.strip() == tokenizer.to_json()


def test_tokenizing_needs_no_jax():
    script = "import sys, mmfm_jax.data.feed.tokenizer; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_saved_tokenizers_encode_the_same(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    text = "Margin [MASK] spiculated, 8.5 mm, évidente."
    for other in (
        Tokenizer.load(path),
        Tokenizer.from_json(tokenizer.to_json()),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        np.testing.assert_array_equal(other.encode(text, 30), tokenizer.encode(text, 30))
        assert other.mask_token == tokenizer.mask_token and other.vocabulary_size == tokenizer.vocabulary_size
        assert other.to_json() == tokenizer.to_json()


def word_tokenizer(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    foreign = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    foreign.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return foreign


def test_a_foreign_tokenizer_is_used_with_the_callers_length(tmp_path):
    foreign = word_tokenizer({"[PAD]": 0, "[UNK]": 1, "[MASK]": 7, "nodule": 9, "smooth": 4})
    foreign.enable_truncation(2)
    foreign.enable_padding(direction="left", length=20, pad_id=0)
    foreign.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode("smooth nodule smooth zebra", 6).tolist() == [4, 9, 4, 1, 0, 0]
    assert loaded.mask_token == 7
    assert loaded.vocabulary_size == 10  # an embedding needs a row for the largest id, whatever the gaps below it


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.json: cannot be read"),
        (b"{}", "tokenizer.json: is not a Hugging Face"),
        (b"\xff\xfe\x00", "tokenizer.json: is not text"),
        (word_tokenizer({"<s>": 0, "<pad>": 1, "<mask>": 2, "[UNK]": 3}).to_str().encode(), "does not have id 0"),
        (word_tokenizer({"[PAD]": 0, "[UNK]": 1}).to_str().encode(), "there is no mask token"),
    ],
)
def test_what_cannot_serve_is_refused_in_one_sentence(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        Tokenizer.load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
