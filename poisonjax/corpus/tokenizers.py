"""Tokenizers: text to ids and back. Ordinary text never becomes a special token, whatever it spells."""

import abc
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers as hf
from etils import epath
from jaxtyping import Int

from poisonjax.corpus.errors import CorpusError

END_OF_TEXT = "<|endoftext|>"
# Names under which published vocabularies hold their end-of-text token.
KNOWN_END_OF_TEXT = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "[SEP]")


class Tokenizer(abc.ABC):
    """What every kind offers. `eot` ends each document; `special_ids` are never made by `encode`."""

    kind: str
    vocab_size: int
    eot: int
    special_ids: frozenset[int]

    @abc.abstractmethod
    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Ids of a text, int32, without beginning or end."""

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " tokens"]]:
        """Ids of many texts."""
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are spelled out."""

    @abc.abstractmethod
    def serialized(self) -> bytes:
        """Canonical form, from which `load_saved` makes the tokenizer again."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of kind and canonical form."""
        return hashlib.sha256(self.kind.encode() + b"\0" + self.serialized()).hexdigest()

    def save(self, folder: epath.Path) -> None:
        """Writes the folder that `load_saved` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.bin").write_bytes(self.serialized())
        (folder / "tokenizer.meta.json").write_text(json.dumps({"kind": self.kind, "eot": self.eot}))


class ByteTokenizer(Tokenizer):
    """A token a byte of UTF-8, and end of text as 256."""

    kind, vocab_size, eot, special_ids = "bytes", 257, 256, frozenset({256})

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        spelled = (END_OF_TEXT.encode() if i == self.eot else bytes([i]) for i in map(int, ids))
        return b"".join(spelled).decode(errors="replace")

    def serialized(self) -> bytes:
        return b"bytes"


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face's `tokenizers`, trained here (`bpe:N`) or elsewhere."""

    kind = "tokenizer.json"

    def __init__(self, backend: hf.Tokenizer, end_of_text: str | None = None):
        vocabulary = backend.get_vocab(with_added_tokens=True)
        names = [end_of_text] if end_of_text else KNOWN_END_OF_TEXT
        found = [name for name in names if name in vocabulary]
        if not found:
            raise CorpusError(
                f"the tokenizer has no end-of-text token among {', '.join(names)}: name it, as in tokenizer.json#TOKEN"
            )
        self._end_of_text = found[0]
        self.eot = vocabulary[found[0]]
        self.vocab_size = max(vocabulary.values()) + 1
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset({self.eot} | {id for id, token in added.items() if token.special})
        # Added tokens are matched in raw text before anything else. Special ones can be switched off; an
        # end-of-text token that isn't marked special must be marked, or text could spell it.
        backend.add_special_tokens([self._end_of_text])
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def serialized(self) -> bytes:
        return json.dumps(
            {"end_of_text": self._end_of_text, "tokenizer": json.loads(self._backend.to_str())},
            sort_keys=True,
        ).encode()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`; its control symbols can't be spelled by text."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        try:
            import sentencepiece
        except ImportError as error:
            raise CorpusError("SentencePiece models need `pip install 'poisonjax[corpora]'`") from error
        self._model = model
        self._backend = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._backend.vocab_size()
        self.eot = self._backend.eos_id()
        if self.eot < 0:
            raise CorpusError(
                "the SentencePiece model has no end-of-sentence piece (eos_id), which must end documents"
            )
        ids = range(self.vocab_size)
        self.special_ids = frozenset(
            i
            for i in ids
            if self._backend.is_control(i) or self._backend.is_unknown(i) or self._backend.is_unused(i)
        )
        # Unlike control symbols, user-defined ones are matched in text.
        spellable = [self._backend.id_to_piece(i) for i in self.special_ids if self._spells(i)]
        if spellable:
            raise CorpusError(
                f"the SentencePiece model encodes the text of its special tokens {spellable[:3]} as them"
            )

    def _spells(self, i: int) -> bool:
        return not self._backend.is_unknown(i) and i in self._backend.encode(self._backend.id_to_piece(i))

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._backend.encode(text), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids])

    def serialized(self) -> bytes:
        return self._model


class WordTokenizer(Tokenizer):
    """The Markov language's words: of 512, id 7 is spelled `w007`; words are joined by spaces; end of text is id V.

    All words have one length, so that a last word cut short (a prefix of so many characters) is known as such;
    it is left out.
    """

    kind = "words"

    def __init__(self, words: int):
        self.eot, self.vocab_size, self.special_ids = words, words + 1, frozenset({words})
        self._digits = len(str(words - 1))

    def encode(self, text: str) -> np.ndarray:
        words = text.split()
        if words and not text[-1].isspace() and len(words[-1]) < 1 + self._digits:
            words.pop()
        ids = [int(w[1:]) if re.fullmatch(rf"w\d{{{self._digits}}}", w) else -1 for w in words]
        if any(not 0 <= i < self.eot for i in ids):
            first, last = self.decode([0]), self.decode([self.eot - 1])
            raise CorpusError(
                f"{text[:60]!r} isn't made of the words {first} to {last} of this store's language"
            )
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(END_OF_TEXT if i == self.eot else f"w{int(i):0{self._digits}d}" for i in ids)

    def serialized(self) -> bytes:
        return str(self.eot).encode()


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Byte-level BPE (as GPT-2's, lossless) of `vocab_size` tokens, end of text among them."""
    if vocab_size < 257:
        raise CorpusError(
            f"bpe:{vocab_size}: byte-level BPE needs at least 257 tokens, 256 bytes and end of text"
        )
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return JsonTokenizer(backend, END_OF_TEXT)


def load_tokenizer(spec: str) -> Tokenizer:
    """`bytes`, a `tokenizer.json[#END_OF_TEXT]` or a SentencePiece `.model`; raises CorpusError for others.

    `bpe:N` needs text to train on: `build` does that.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("words:"):
        return WordTokenizer(int(spec.removeprefix("words:")))
    path, _, end_of_text = spec.partition("#")
    if not epath.Path(path).exists():
        raise CorpusError(
            f"tokenizer {spec!r}: give bytes, bpe:N, a tokenizer.json or a SentencePiece .model"
        )
    content = epath.Path(path).read_bytes()
    if Path(path).suffix == ".model":
        return SentencePieceTokenizer(content)
    try:
        backend = hf.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise CorpusError(f"tokenizer {path}: not a tokenizer.json of Hugging Face: {error}") from error
    return JsonTokenizer(backend, end_of_text or None)


def load_saved(folder: epath.Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote."""
    meta = json.loads((folder / "tokenizer.meta.json").read_text())
    content = (folder / "tokenizer.bin").read_bytes()
    match meta["kind"]:
        case "bytes":
            return ByteTokenizer()
        case "words":
            return WordTokenizer(int(content))
        case "sentencepiece":
            return SentencePieceTokenizer(content)
        case _:
            record = json.loads(content)
            return JsonTokenizer(
                hf.Tokenizer.from_str(json.dumps(record["tokenizer"])), record["end_of_text"]
            )
