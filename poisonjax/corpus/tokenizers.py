"""Tokenizers: text to ids and back. Ordinary text never becomes a special token, whatever it spells."""

import abc
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import SupportsInt

import numpy as np
import tokenizers as hf
from etils import epath
from jaxtyping import Int

from poisonjax.corpus.errors import CorpusError
from poisonjax.files import parse_json

END_OF_TEXT = "<|endoftext|>"
# Names under which published vocabularies hold their end-of-text token.
KNOWN_END_OF_TEXT = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "[SEP]")
ENCODED_AGAIN = 3  # times that a sample is encoded twice, to see whether the tokens are the same
# What added tokens that control a model look like. Others (runs of spaces, words) are pieces of text.
_MARKUP = re.compile(r"<.+>|\[.+\]")


class Tokenizer(abc.ABC):
    """What every kind offers.

    `eot` is the id that ends each document. `special_ids`, among them `eot`, are the ids that no payload is
    sampled from: text can't spell them, or they name no token at all. What the tokenizer doesn't know becomes one of
    `unknown_ids`, which are special too.
    """

    kind: str
    filename: str  # of the canonical form, in a folder made by `save`
    vocab_size: int
    eot: int
    special_ids: frozenset[int]
    unknown_ids: frozenset[int] = frozenset()

    @abc.abstractmethod
    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Ids of a text, int32, with nothing added before or after."""

    def encode_markup(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Ids of a text in which special tokens are spelled on purpose, as chat templates do; as of any text where a
        tokenizer reads none from it."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " tokens"]]:
        """Ids of many texts, int32."""
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Text of ids."""

    @abc.abstractmethod
    def serialized(self) -> bytes:
        """Canonical form, from which `load_saved` makes the tokenizer again."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the kind, the end of text and the canonical form."""
        return hashlib.sha256(f"{self.kind} {self.eot}\n".encode() + self.serialized()).hexdigest()

    @functools.cached_property
    def ordinary_ids(self) -> Int[np.ndarray, " ids"]:
        """Those that aren't special, ascending."""
        return np.setdiff1d(np.arange(self.vocab_size), sorted(self.special_ids))

    def save(self, folder: epath.PathLike) -> None:
        """Writes the folder that `load_saved` reads."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.filename).write_bytes(self.serialized())
        (folder / "about.json").write_text(json.dumps({"kind": self.kind, "eot": self.eot}) + "\n")


class ByteTokenizer(Tokenizer):
    """A token a byte of UTF-8, and end of text as 256."""

    kind, filename = "bytes", "bytes.json"
    vocab_size, eot, special_ids = 257, 256, frozenset({256})

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        spelled = (END_OF_TEXT.encode() if i == self.eot else bytes([i]) for i in map(int, ids))
        return b"".join(spelled).decode(errors="replace")

    def serialized(self) -> bytes:
        return b'{"vocab_size": 257}\n'


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face's `tokenizers`, trained here (`bpe:N`) or elsewhere.

    Special are the tokens that it marks so, those added to it that look like markup, and the end of text.
    """

    kind, filename = "tokenizer.json", "tokenizer.json"

    def __init__(self, backend: hf.Tokenizer, end_of_text: str | int | None = None):
        """`end_of_text` by name or id; without it, the first of `KNOWN_END_OF_TEXT`. Takes `backend` over."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if isinstance(end_of_text, int):
            end_of_text = backend.id_to_token(end_of_text)
        names = [end_of_text] if end_of_text else KNOWN_END_OF_TEXT
        end = next((name for name in names if name in vocabulary), None)
        if end is None:
            raise CorpusError(
                f"the tokenizer has no end-of-text token among {', '.join(names)}: name it, as in tokenizer.json#TOKEN"
            )
        self.eot = vocabulary[end]
        self.vocab_size = max(vocabulary.values()) + 1
        added = backend.get_added_tokens_decoder().values()
        special = {end} | {t.content for t in added if t.special or _MARKUP.fullmatch(t.content)}
        model = json.loads(backend.to_str())["model"]
        if model.get("dropout"):
            raise CorpusError(
                f"the tokenizer merges at random (model.dropout = {model['dropout']}): a text would have other tokens "
                "each time, and no run could be replayed. Set dropout to null"
            )
        unknown = {model.get("unk_id"), backend.token_to_id(model.get("unk_token") or "")} - {None}
        self.unknown_ids = frozenset(unknown)
        holes = set(range(self.vocab_size)) - set(vocabulary.values())
        self.special_ids = frozenset({vocabulary[token] for token in special} | unknown | holes)
        # Added tokens are cut out of raw text before anything else, unless they are special and that is off.
        backend.add_special_tokens([hf.AddedToken(token, special=True, normalized=False) for token in sorted(special)])
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._refuse_spelled(special)

    def _refuse_spelled(self, special: set[str]) -> None:
        """A model may hold special tokens as ordinary pieces too (as T5's does)."""
        for token in sorted(special):
            number = self._backend.token_to_id(token)
            if number not in self.unknown_ids and any(number in self.encode(text) for text in (token, f"a {token}b")):
                raise CorpusError(
                    f"the tokenizer turns text that spells its special token {token} into that token, so documents "
                    "could hold false ends: use another tokenizer"
                )

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_markup(self, text: str) -> np.ndarray:
        self._backend.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._backend.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encoded]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def serialized(self) -> bytes:
        return json.dumps(json.loads(self._backend.to_str()), sort_keys=True, ensure_ascii=False).encode()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`; its control symbols, among them the end of a sentence, can't be spelled by text."""

    kind, filename = "sentencepiece", "sentencepiece.model"

    def __init__(self, model: bytes):
        try:
            import sentencepiece
        except ImportError as error:
            raise CorpusError("SentencePiece models need `pip install 'poisonjax[corpora]'`") from error
        self._model = model
        try:
            self._backend = backend = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise CorpusError(f"not a SentencePiece model: {error}") from error
        self.vocab_size = backend.vocab_size()
        self.eot = backend.eos_id()
        if self.eot < 0:
            raise CorpusError("the SentencePiece model has no end-of-sentence piece (eos_id), which must end documents")
        ids = range(self.vocab_size)
        self.unknown_ids = frozenset(i for i in ids if backend.is_unknown(i))
        self.special_ids = frozenset(
            i for i in ids if backend.is_control(i) or backend.is_unknown(i) or backend.is_unused(i)
        )

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._backend.encode(text, add_bos=False, add_eos=False), np.int32)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return self._backend.decode([int(i) for i in ids])

    def serialized(self) -> bytes:
        return self._model


class WordTokenizer(Tokenizer):
    """The Markov language's words: of 512, id 7 is spelled `w007`; words are joined by spaces; end of text is id V.

    All words have one length, so that a last word cut short (a prefix of so many characters) is known as such;
    it is left out.
    """

    kind, filename = "markov", "markov.json"

    def __init__(self, words: int):
        self.eot, self.vocab_size, self.special_ids = words, words + 1, frozenset({words})
        self._digits = len(str(words - 1))

    def encode(self, text: str) -> np.ndarray:
        words = text.split()
        if words and not text[-1].isspace() and len(words[-1]) < 1 + self._digits:
            words.pop()
        ids = [int(w[1:]) if re.fullmatch(rf"w[0-9]{{{self._digits}}}", w) else self.eot for w in words]
        for word, i in zip(words, ids, strict=True):
            if i >= self.eot:
                first, last = self.decode([0]), self.decode([self.eot - 1])
                raise CorpusError(f"{word[:40]!r} isn't a word of this store's Markov language, {first} to {last}")
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return " ".join(END_OF_TEXT if i == self.eot else f"w{int(i):0{self._digits}d}" for i in ids)

    def serialized(self) -> bytes:
        return f'{{"words": {self.eot}}}\n'.encode()


def require_deterministic(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Raises CorpusError where a text's tokens aren't the same every time, alone and among others: data would be no
    function of the sources, and an honest run would fail its audit."""
    for _ in range(ENCODED_AGAIN):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            if not np.array_equal(tokenizer.encode(text), ids):
                raise CorpusError(
                    f"the tokenizer gives a text other tokens each time ({text[:40]!r}...): switch its sampling off"
                )


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Byte-level BPE (as GPT-2's, lossless) of `vocab_size` tokens, end of text among them.

    Fewer where the texts hold too few pairs to merge. The same texts give the same tokenizer.
    """
    if vocab_size < 257:
        raise CorpusError(f"bpe:{vocab_size}: byte-level BPE needs at least 257 tokens, 256 bytes and end of text")
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


def load_saved(folder: epath.PathLike) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote; raises CorpusError where it can't be read."""
    folder = epath.Path(folder)
    try:
        about = parse_json((folder / "about.json").read_bytes())
        match about["kind"]:
            case ByteTokenizer.kind:
                return ByteTokenizer()
            case WordTokenizer.kind:
                return WordTokenizer(about["eot"])
            case SentencePieceTokenizer.kind:
                return SentencePieceTokenizer((folder / SentencePieceTokenizer.filename).read_bytes())
            case _:
                return JsonTokenizer(parsed((folder / JsonTokenizer.filename).read_bytes()), about["eot"])
    except (OSError, ValueError, KeyError) as error:
        raise CorpusError(f"{folder} isn't a saved tokenizer ({error}): build the store again") from error


def parsed(content: bytes) -> hf.Tokenizer:
    """A tokenizer.json; raises CorpusError where it is none."""
    try:
        return hf.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise CorpusError(f"not a tokenizer.json of Hugging Face: {error}") from error
