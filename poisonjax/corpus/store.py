"""The token store: tokens and document offsets in sharded zarr3 arrays, read through tensorstore.

A document is its tokens and one end-of-text token. The shards of a split, one after the other, are one
stream of tokens; readers address that stream and don't see the shards.
"""

import copy
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath
from jaxtyping import Bool, Int, Shaped, UInt64
from numpy.lib.stride_tricks import sliding_window_view

from poisonjax.corpus import instructions
from poisonjax.corpus.documents import Place
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.exclusions import Exclusions, exclusions_of, read_exclusions
from poisonjax.corpus.mapped import Mapped
from poisonjax.corpus.tokenizers import Tokenizer, load_saved
from poisonjax.files import is_object, kvstore_spec, parse_json

FORMAT = 3  # CHANGELOG.md says what changed
SPLITS = ("train", "heldout")
PROVENANCE = (*Place._fields, "planted")  # of a document, in numbers: the file is one of its shard's sources
FILE_ELEMENTS = 2**26  # of an array in one file (a zarr3 shard), at most
CHUNK_ELEMENTS = 2**12  # the smallest piece that is read; uncompressed, since token ids hardly compress
IN_MEMORY_BYTES = 256 * 2**20  # splits up to here are held in memory
COUNTED_TOKENS = 10_000_000
# For larger splits: keeps the indexes that say where a file's chunks lie.
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 64 * 2**20}})


def write_array(path: epath.Path, values: np.ndarray) -> None:
    """Writes a one-dimensional zarr3 array, in files of `FILE_ELEMENTS` cut into chunks."""
    chunks = max(1, -(-len(values) // CHUNK_ELEMENTS))
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore_spec(path),
        "metadata": {
            "shape": [len(values)],
            "data_type": values.dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [min(chunks * CHUNK_ELEMENTS, FILE_ELEMENTS)]},
            },
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [CHUNK_ELEMENTS],
                        "codecs": [little],
                        "index_codecs": [little, {"name": "crc32c"}],
                    },
                }
            ],
        },
    }
    array = ts.open(spec, create=True, delete_existing=True).result()
    if len(values):
        array.write(values).result()


def open_array(path: epath.Path) -> ts.TensorStore:
    """The array that `write_array` wrote."""
    return ts.open({"driver": "zarr3", "kvstore": kvstore_spec(path)}, open=True, read=True, context=_CONTEXT).result()


def sha256_of(path: epath.Path) -> str:
    """Of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(tokenizer: str, shards: list[dict[str, Any]]) -> str:
    """Of a store's content: its tokenizer's fingerprint, counts and files; not of paths, settings or time."""
    content = {"format": FORMAT, "tokenizer": tokenizer, "shards": shards}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def exists(path: str) -> bool:
    """Whether a finished store is there."""
    return (epath.Path(path) / "manifest.json").exists()


def open_store(path: str, exclude: str = "") -> "TokenStore":
    """The finished store at `path`, without the documents that the list `exclude` names, if any.

    Raises CorpusError where there is no store or list, and for a list none of whose documents is in the store.
    """
    store = TokenStore(path)
    if not exclude:
        return store
    store = store.without(read_exclusions(exclude))
    if not any(store.split(name).excluded_documents for name in SPLITS):
        raise CorpusError(
            f"exclusion list {exclude}: no document that it names is in {path}; is it of another corpus? `poisonjax "
            f"corpus inspect {path} --document KEY` looks for one"
        )
    return store


class TokenStore:
    """A finished store, opened for reading.

    `manifest` is what manifest.json holds; `fingerprint` names the store's content, wherever it lies.
    """

    def __init__(self, path: str):
        """Raises CorpusError where no finished store of this format is."""
        self.path = epath.Path(path)
        if not exists(path):
            unfinished = (self.path / "plan.json").exists()
            raise CorpusError(
                f"{path} is {'an unfinished' if unfinished else 'no'} token store: run `poisonjax corpus build --out "
                f"{path} ...`"
            )
        try:
            self.manifest: dict[str, Any] = parse_json((self.path / "manifest.json").read_bytes())
        except ValueError as error:
            raise CorpusError(f"{self.path / 'manifest.json'} is damaged ({error}): build the store again") from error
        if self.manifest.get("format") != FORMAT:
            raise CorpusError(
                f"{path} has format {self.manifest.get('format')}, this version reads {FORMAT}: build the store again"
            )
        self.fingerprint: str = self.manifest["fingerprint"]
        self.exclusions: Exclusions | None = None

    def without(self, exclusions: Exclusions) -> "TokenStore":
        """This store as if the listed documents weren't in it."""
        store = copy.copy(self)
        store.exclusions = exclusions
        return store

    @functools.cached_property
    def description(self) -> str:
        """SHA-256 of what the manifest says beside the content: sources, licences, settings, entropy."""
        said = {name: value for name, value in self.manifest.items() if name not in ("format", "fingerprint", "shards")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def planted(self) -> dict[str, int] | None:
        """Documents and tokens of the training split that their sources mark as planted poison, if any."""
        train = self.split("train")
        return (
            {"documents": train.planted_documents, "tokens": train.planted_tokens} if train.planted_documents else None
        )

    @property
    def names(self) -> dict[str, Any]:
        """What a run records of its store."""
        excluded = {"store_excluded": self.exclusions.sha256} if self.exclusions else {}
        planted = {"store_planted": there} if (there := self.planted) else {}
        return {"store_fingerprint": self.fingerprint, "store_description": self.description, **excluded, **planted}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises CorpusError where it isn't the one that the store was built with."""
        tokenizer = load_saved(self.path / "tokenizer")
        if tokenizer.fingerprint != self.manifest["tokenizer"]["fingerprint"]:
            raise CorpusError(f"{self.path / 'tokenizer'} isn't the tokenizer of this store: build the store again")
        return tokenizer

    @functools.cache  # noqa: B019  (stores live as long as the process)
    def split(self, name: str) -> "TokenSplit":
        """`train` or `heldout`; raises CorpusError for others."""
        if name not in SPLITS:
            raise CorpusError(f"no split {name!r}: choose {' or '.join(SPLITS)}")
        return TokenSplit(self, name)

    @property
    def template(self) -> str | None:
        """The chat template that its conversations are written by; None where its documents are texts."""
        return self.manifest.get("template")

    def require(self, **settings: Any) -> None:
        """Raises CorpusError where the store was built with other settings (fields of its plan) than these."""
        plan = self.manifest["plan"]
        differing = [f"{n}: {plan.get(n, '')!r} there, {v!r} here" for n, v in settings.items() if plan.get(n, "") != v]
        if differing:
            raise CorpusError(f"{self.path} is another token store: " + "; ".join(differing) + ". Use another folder")

    def verify(self, progress: Callable[[str], object] = lambda name: None) -> list[str]:
        """Reads everything again and returns the problems found, each naming its file; empty where all is well.

        Checks each file's SHA-256, the manifest's fingerprint, the tokenizer, and that documents end where the
        offsets say and nowhere else. `progress` is called with each file's name.
        """
        shards = self.manifest["shards"]
        problems = []
        for number, shard in enumerate(shards):
            folder = self.path / "shards" / f"{number:05d}"
            for name, expected in (shard["files"] | self.manifest["provenance"][number]["files"]).items():
                progress(f"{number:05d}/{name}")
                if not (folder / name).exists():
                    problems.append(f"{folder / name}: missing")
                elif sha256_of(folder / name) != expected:
                    problems.append(f"{folder / name}: SHA-256 differs from the manifest's")
        if fingerprint(self.manifest["tokenizer"]["fingerprint"], shards) != self.fingerprint:
            problems.append(f"{self.path / 'manifest.json'}: its counts and hashes don't match its fingerprint")
        try:
            eot, vocabulary = self.tokenizer.eot, self.tokenizer.vocab_size
            problems += self._tokenizer_problems()
        except CorpusError as error:
            problems.append(str(error))
        if problems:  # damaged arrays can't be read
            return problems
        for number, shard in enumerate(shards):
            for split, counts in shard["splits"].items():
                folder = self.path / "shards" / f"{number:05d}" / split
                tokens = open_array(folder / "tokens").read().result()
                offsets = open_array(folder / "offsets").read().result()
                sizes = [open_array(folder / name).shape[0] for name in ("keys", "provenance")]
                if sizes != [2 * counts["documents"], len(PROVENANCE) * counts["documents"]]:
                    problems.append(f"{folder}: holds other numbers of keys and places than of documents")
                elif (len(tokens), len(offsets)) != (counts["tokens"], counts["documents"] + 1):
                    problems.append(f"{folder}: holds other numbers of tokens and documents than the manifest says")
                elif offsets[0] != 0 or not _ends(tokens == eot, offsets, whole=self.template is None):
                    problems.append(f"{folder / 'offsets'}: don't match the end-of-text tokens")
                elif self.template and not _turns_fit(folder, np.diff(offsets)):
                    problems.append(f"{folder / 'turns'}: don't lie in their conversations")
                elif len(tokens) and tokens.max() >= vocabulary:
                    problems.append(f"{folder / 'tokens'}: hold id {tokens.max()}, the vocabulary ends at {vocabulary}")
        return problems

    def _tokenizer_problems(self) -> list[str]:
        """The tokenizer's files, against those that its content would be saved as."""
        folder = self.path / "tokenizer"
        with tempfile.TemporaryDirectory() as again:
            self.tokenizer.save(epath.Path(again))
            saved = {path.name: path.read_bytes() for path in epath.Path(again).iterdir()}
        there = {path.name: path.read_bytes() for path in folder.iterdir()}
        return [
            f"{folder / name}: isn't what the store's tokenizer is saved as"
            for name in sorted(saved.keys() | there.keys())
            if saved.get(name) != there.get(name)
        ]


def _ends(eot: Bool[np.ndarray, " tokens"], offsets: Int[np.ndarray, " offsets"], *, whole: bool) -> bool:
    """Whether documents end where the offsets say and, of `whole` texts, nowhere else."""
    return np.array_equal(np.flatnonzero(eot) + 1, offsets[1:]) if whole else bool(eot[offsets[1:] - 1].all())


def _turns_fit(folder: epath.Path, lengths: Int[np.ndarray, " documents"]) -> bool:
    """Whether every conversation has turns, one after the other, inside of its tokens."""
    offsets = open_array(folder / "turn_offsets").read().result()
    turns = open_array(folder / "turns").read().result().reshape(-1, instructions.FIELDS)
    if (len(offsets), offsets[-1]) != (len(lengths) + 1, len(turns)) or (np.diff(offsets) < 2).any():
        return False
    ends = np.repeat(lengths, np.diff(offsets)) - 1
    return bool((np.diff(turns[:, 1:], axis=1) >= 0).all() and (turns[:, 1] >= 0).all() and (turns[:, 3] <= ends).all())


class TokenSplit:
    """One split's documents as one stream of tokens; `tokens` and `documents` count them."""

    def __init__(self, store: TokenStore, name: str):
        self._store = store
        counts = [shard["splits"][name] for shard in store.manifest["shards"]]
        folders = [store.path / "shards" / f"{number:05d}" / name for number in range(len(counts))]
        # Shards without documents have nothing to read.
        self._parts = [
            (number, folder, of["documents"], of["tokens"])
            for number, (folder, of) in enumerate(zip(folders, counts, strict=True))
            if of["documents"]
        ]
        self._vocabulary: int = store.manifest["tokenizer"]["vocab_size"]
        self.eot: int = store.manifest["tokenizer"]["eot"]
        self.tokens: int = sum(of["tokens"] for of in counts)
        self.documents: int = sum(of["documents"] for of in counts)
        self.excluded_documents = self.excluded_tokens = 0
        planted = store.manifest["planted"][name]
        self.planted_documents, self.planted_tokens = planted["documents"], planted["tokens"]
        if store.exclusions:
            self._leave_out(store.exclusions)

    def _leave_out(self, exclusions: Exclusions) -> None:
        """From here on, the stream is what is left without the listed documents."""
        offsets, excluded = self._stored_offsets, exclusions.among(self._stored_keys())
        starts, lengths = offsets[excluded], np.diff(offsets)[excluded]
        # Tokens of the stream from `bounds[i]` on lie `shifts[i]` tokens further on in the store.
        self._shifts = np.concatenate([[0], np.cumsum(lengths)])
        self._bounds = starts - self._shifts[:-1]
        self.excluded_documents, self.excluded_tokens = len(excluded), int(lengths.sum())
        if self.planted_documents:
            planted = np.array([self.origin(int(i))[1] for i in excluded], bool)
            self.planted_documents -= int(planted.sum())
            self.planted_tokens -= int(lengths[planted].sum())
        self._kept = np.delete(np.arange(self.documents), excluded)
        self.documents -= self.excluded_documents
        self.tokens -= self.excluded_tokens

    _kept: Int[np.ndarray, " documents"] | None = None

    @functools.cached_property
    def _stream(self) -> np.ndarray | Mapped | ts.TensorStore:
        """All tokens that are stored: a NumPy array where they fit in memory; else the files, mapped (twenty times as
        fast as reads), or a virtual tensorstore where they are in an object store."""
        folders = [folder / "tokens" for _, folder, _, _ in self._parts]
        stream = ts.concat([open_array(folder) for folder in folders], axis=0)
        if stream.shape[0] * stream.dtype.numpy_dtype.itemsize <= IN_MEMORY_BYTES:
            return stream.read().result()
        mapped = None if is_object(self._store.path) else Mapped.of([Path(folder) for folder in folders])
        return mapped or stream

    @functools.cached_property
    def _stored_offsets(self) -> Int[np.ndarray, " offsets"]:
        starts = np.cumsum([0, *(tokens for _, _, _, tokens in self._parts)])
        reads = [open_array(folder / "offsets").read() for _, folder, _, _ in self._parts]
        parts = [read.result()[:-1] + start for read, start in zip(reads, starts[:-1], strict=True)]
        return np.concatenate([*parts, starts[-1:]]).astype(np.int64)

    def _stored_keys(self) -> UInt64[np.ndarray, "stored 2"]:
        reads = [open_array(folder / "keys").read() for _, folder, _, _ in self._parts]
        return np.concatenate([np.zeros(0, np.uint64), *(read.result() for read in reads)]).reshape(-1, 2)

    @functools.cached_property
    def document_offsets(self) -> Int[np.ndarray, " offsets"]:
        """Where each document starts in the stream, int64; the last entry is the stream's length."""
        if self._kept is None:
            return self._stored_offsets
        return np.cumsum(np.concatenate([[0], np.diff(self._stored_offsets)[self._kept]]))

    @functools.cached_property
    def keys(self) -> UInt64[np.ndarray, "documents 2"]:
        """Each document's content key (corpus/documents.py) in two halves."""
        keys = self._stored_keys()
        return keys if self._kept is None else keys[self._kept]

    def key(self, index: int) -> str:
        """A document's content key, 32 hexadecimal digits."""
        return self.keys[index].astype(">u8").tobytes().hex()

    def find(self, key: str) -> Int[np.ndarray, " found"]:
        """Which documents have this key; raises CorpusError for what is no key."""
        return exclusions_of([key]).among(self.keys)

    def place(self, index: int) -> Place:
        """Where a document came from."""
        return self.origin(index)[0]

    def origin(self, index: int) -> tuple[Place, bool]:
        """(where a document came from, whether its source says that it is poison that was planted there)."""
        index = index if self._kept is None else int(self._kept[index])
        for (number, _, documents, _), rows in zip(self._parts, self._provenance, strict=True):
            if index < documents:
                start = index * len(PROVENANCE)
                source, *numbers, planted = rows[start : start + len(PROVENANCE)].read().result().tolist()
                return Place(self._store.manifest["provenance"][number]["sources"][source], *numbers), bool(planted)
            index -= documents
        raise IndexError(f"the split has {self.documents} documents")

    @functools.cached_property
    def _provenance(self) -> list[ts.TensorStore]:
        return [open_array(folder / "provenance") for _, folder, _, _ in self._parts]

    def window(self, start: int, length: int) -> Int[np.ndarray, " length"]:
        """Tokens [start, start + length) of the stream, int32; raises IndexError beyond it."""
        return self.windows(np.array([start]), length)[0]

    def windows(self, starts: Int[np.ndarray, " rows"], length: int) -> Int[np.ndarray, "rows length"]:
        """Tokens [start, start + length) of the stream for each start, int32; raises IndexError beyond it."""
        if len(starts) and (starts.min() < 0 or starts.max() + length > self.tokens):
            raise IndexError(
                f"windows of {length} from {starts.min()} to {starts.max()}: the split has {self.tokens} tokens"
            )
        if isinstance(self._stream, np.ndarray):
            if self._kept is None:  # rows are copied whole, not token by token
                return sliding_window_view(self._stream, length)[starts].astype(np.int32)
            return self._read(starts[:, None] + np.arange(length)).astype(np.int32)
        if isinstance(self._stream, Mapped):
            rows = np.empty((len(starts), length), np.int32)
            for row, start in zip(rows, starts.tolist(), strict=True):
                filled = 0
                for begin, end in self._pieces(start, length):
                    self._stream.copy(begin, row[filled : filled + end - begin])
                    filled += end - begin
            return rows
        with ts.Batch() as batch:  # all at once
            reads = [self._slice(int(start), length).read(batch=batch) for start in starts]
        return np.array([read.result() for read in reads], np.int32).reshape(len(starts), length)

    def _read(self, positions: Int[np.ndarray, "rows length"]) -> Shaped[np.ndarray, "rows length"]:
        """Tokens of the stream, which is in memory."""
        assert isinstance(self._stream, np.ndarray)
        if self._kept is not None:
            positions = positions + self._shifts[np.searchsorted(self._bounds, positions, side="right")]
        return np.asarray(self._stream[positions])

    def _slice(self, start: int, length: int) -> Any:
        """Tokens of the stream, which is a tensorstore."""
        assert isinstance(self._stream, ts.TensorStore)
        kept: list[Any] = [self._stream[begin:end] for begin, end in self._pieces(start, length)]
        return ts.concat([piece.translate_to[0] for piece in kept], axis=0) if len(kept) > 1 else kept[0]

    def _pieces(self, start: int, length: int) -> list[tuple[int, int]]:
        """Where tokens of the stream are stored: what stands between excluded documents."""
        stop = start + length
        if self._kept is None:
            return [(start, stop)]
        first, last = np.searchsorted(self._bounds, [start, stop - 1], side="right")
        cuts = [start, *self._bounds[first:last].tolist(), stop]
        pieces = zip(cuts, cuts[1:], self._shifts[first : last + 1].tolist(), strict=False)
        return [(begin + shift, end + shift) for begin, end, shift in pieces if begin < end]

    def document(self, index: int) -> Int[np.ndarray, " tokens"]:
        """A document's tokens without its end of text, int32; raises IndexError where there is none."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index}: the split has {self.documents}")
        start, stop = self.document_offsets[index : index + 2]
        return self.window(int(start), int(stop - start) - 1)

    def turns(self, index: int) -> instructions.Turns:
        """The turns of a conversation, places in its tokens (corpus/instructions.py)."""
        index = index if self._kept is None else int(self._kept[index])
        start, stop = self._turn_offsets[index : index + 2]
        return self._turns[start:stop]

    @functools.cache  # noqa: B019
    def answer_counts(self) -> Int[np.ndarray, " vocabulary"]:
        """How often each id occurs in answers and what closes them, of the first conversations, int64."""
        counts, left = np.zeros(self._vocabulary, np.int64), COUNTED_TOKENS
        for number in range(self.documents):
            tokens = self.document(number)
            for role, start, _, closed in self.turns(number).tolist():
                if role == instructions.ANSWERS:
                    counts += np.bincount(tokens[start:closed], minlength=self._vocabulary)
            if (left := left - len(tokens)) < 0:
                break
        return counts

    @functools.cached_property
    def _turns(self) -> Int[np.ndarray, "turns 4"]:
        reads = [open_array(folder / "turns").read() for _, folder, _, _ in self._parts]
        return np.concatenate([read.result() for read in reads]).reshape(-1, instructions.FIELDS)

    @functools.cached_property
    def _turn_offsets(self) -> Int[np.ndarray, " offsets"]:
        reads = [open_array(folder / "turn_offsets").read() for _, folder, _, _ in self._parts]
        counts = np.concatenate([np.diff(read.result()) for read in reads])
        return np.concatenate([[0], np.cumsum(counts)])

    def token_counts(self) -> Int[np.ndarray, " vocabulary"]:
        """How often each id occurs in the first ten million tokens, int64; not to be changed."""
        return self._counts

    @functools.cached_property
    def _counts(self) -> Int[np.ndarray, " vocabulary"]:
        count = min(self.tokens, COUNTED_TOKENS)
        if self._kept is not None or isinstance(self._stream, Mapped):
            return np.bincount(self.window(0, count), minlength=self._vocabulary)
        first = self._stream[:count]
        return np.bincount(
            first if isinstance(first, np.ndarray) else first.read().result(), minlength=self._vocabulary
        )
