"""One split of a token store, as a stream of tokens: its shards, one after the other, less what is left out."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath
from jaxtyping import Int, Shaped, UInt64
from numpy.lib.stride_tricks import sliding_window_view

from poisonjax.corpus import instructions
from poisonjax.corpus.arrays import open_array
from poisonjax.corpus.documents import Place
from poisonjax.corpus.exclusions import Exclusions, exclusions_of
from poisonjax.corpus.mapped import Mapped
from poisonjax.files import is_object

SPLITS = ("train", "heldout")
PROVENANCE = (*Place._fields, "planted")  # of a document, in numbers: the file is one of its shard's sources
IN_MEMORY_BYTES = 256 * 2**20  # splits up to here are held in memory
COUNTED_TOKENS = 10_000_000


class TokenSplit:
    """One split's documents as one stream of tokens; `tokens` and `documents` count them."""

    def __init__(self, path: epath.Path, manifest: dict[str, Any], name: str, exclusions: Exclusions | None):
        """Of the store at `path`, as if the listed documents weren't in it."""
        self._provenance = manifest["provenance"]
        counts = [shard["splits"][name] for shard in manifest["shards"]]
        folders = [path / "shards" / f"{number:05d}" / name for number in range(len(counts))]
        # Shards without documents have nothing to read.
        self._parts = [
            (number, folder, of["documents"], of["tokens"])
            for number, (folder, of) in enumerate(zip(folders, counts, strict=True))
            if of["documents"]
        ]
        self._vocabulary: int = manifest["tokenizer"]["vocab_size"]
        self._on_disk = not is_object(path)
        self.eot: int = manifest["tokenizer"]["eot"]
        self.tokens: int = sum(of["tokens"] for of in counts)
        self.documents: int = sum(of["documents"] for of in counts)
        self.excluded_documents = self.excluded_tokens = 0
        planted = manifest["planted"][name]
        self.planted_documents, self.planted_tokens = planted["documents"], planted["tokens"]
        if exclusions:
            self._leave_out(exclusions)

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
        mapped = Mapped.of([Path(folder) for folder in folders]) if self._on_disk else None
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
        for (number, _, documents, _), rows in zip(self._parts, self._places, strict=True):
            if index < documents:
                start = index * len(PROVENANCE)
                source, *numbers, planted = rows[start : start + len(PROVENANCE)].read().result().tolist()
                return Place(self._provenance[number]["sources"][source], *numbers), bool(planted)
            index -= documents
        raise IndexError(f"the split has {self.documents} documents")

    @functools.cached_property
    def _places(self) -> list[ts.TensorStore]:
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
