"""Text to token ids and back: byte-level BPE trained on a store's own texts, or any Hugging Face tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmfm_jax.data.feed.tokenizer_file import check_described
from mmfm_jax.data.parts import PAD
from mmfm_jax.errors import UserError

_PAD_TOKENS, _MASK_TOKENS = ("[PAD]", "<pad>"), ("[MASK]", "<mask>")
_START_TOKEN = "[START]"
_MOST_CHARACTERS = 256 * 2**20
_MOST_GAPS = 4096  # ids without an entry
_SPECIAL = [_PAD_TOKENS[0], _MASK_TOKENS[0], _START_TOKEN]  # in the order of their ids, from 0


class Tokenizer:
    """Encodes texts of any script and length. Safe to use from many threads; pickles as its JSON.

    Byte-level BPE (Radford et al. 2019) over lower-cased text: every byte is an entry, so nothing is ever unknown and
    no text of a rare word or another language is lost. Ids 0 to 2 are

    - [PAD], after the end of a text;
    - [MASK], in the place of a token that the model has to predict;
    - [START], before every text. It gives even an empty text one token to attend to, and is what a decoder begins from.

    Written-out special tokens ("[MASK]" typed into a report) are read as the characters that they are.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, mask_token: int):
        self._tokenizer = tokenizer
        self.mask_token = mask_token
        self.vocabulary_size = max(tokenizer.get_vocab().values()) + 1  # ids of foreign tokenizers may leave gaps

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
        """Learns at most `vocabulary_size` entries; the same texts in any order give the same tokenizer.

        Memory grows with the number of different words. Raises UserError when `vocabulary_size` cannot hold every
        byte and the special tokens.
        """
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        least = len(alphabet) + len(_SPECIAL)
        if vocabulary_size < least:
            raise UserError(
                f"data.vocabulary_size {vocabulary_size} is too small to hold every byte; give at least {least}"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{_START_TOKEN} $A", special_tokens=[(_START_TOKEN, _SPECIAL.index(_START_TOKEN))]
        )
        return cls.from_json(tokenizer.to_str())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a Hugging Face tokenizer.json.

        Raises UserError when there is no such file, it is not a tokenizer, it has no mask token, or its padding
        token does not have id 0.
        """
        try:
            with Path(path).open(encoding="utf-8") as file:
                text = file.read(_MOST_CHARACTERS + 1)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); give the path of a Hugging Face tokenizer.json"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not text; give the path of a Hugging Face tokenizer.json") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "tokenizer.json") -> Tokenizer:
        """The inverse of `to_json`; raises what `load` raises, with `source` named in the error."""
        check_described(text, source)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"{source}: is not a Hugging Face tokenizer.json; save one with `save_pretrained`"
            ) from error
        ids = [tokenizer.token_to_id(token) for token in _PAD_TOKENS]
        if PAD not in ids:
            raise UserError(
                f"{source}: the padding token ({' or '.join(_PAD_TOKENS)}) does not have id {PAD}; "
                "use another tokenizer, or leave data.tokenizer out to train one"
            )
        mask = next((i for i in map(tokenizer.token_to_id, _MASK_TOKENS) if i is not None), None)
        if mask is None:
            raise UserError(
                f"{source}: there is no mask token ({' or '.join(_MASK_TOKENS)}); "
                "add one to the tokenizer, or leave data.tokenizer out to train one"
            )
        vocabulary = tokenizer.get_vocab()
        if max(vocabulary.values()) > 2 * len(vocabulary) + _MOST_GAPS:
            raise UserError(
                f"{source}: has {len(vocabulary):,} entries and an id of {max(vocabulary.values()):,}, up to which a "
                "model would hold embeddings; use another tokenizer"
            )
        # A saved tokenizer may cut, pad or trust what is typed; here the caller's length rules, and text is only text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return cls(tokenizer, mask)

    def __reduce__(self):
        return Tokenizer.from_json, (self.to_json(),)

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return self._tokenizer.to_str()

    def encode(self, text: str, length: int) -> np.ndarray:
        """Token ids int32 [length]: cut when longer, PAD after the end when shorter."""
        return self.encode_batch([text], length)[0]

    def encode_batch(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Likewise of several texts, int32 [text, length]; other threads run meanwhile."""
        tokens = np.full((len(texts), length), PAD, np.int32)
        for row, encoding in zip(tokens, self._tokenizer.encode_batch_fast(list(texts))):
            ids = encoding.ids[:length]
            row[: len(ids)] = ids
        return tokens

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of token ids for a reader, special tokens left out."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True).strip()
