"""The token store: tokens and document offsets in sharded zarr3 arrays, read through tensorstore.

A document is its tokens and one end-of-text token. The shards of a split, one after the other, are one
stream of tokens; readers address that stream and don't see the shards.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath
from jaxtyping import Int

from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.tokenizers import Tokenizer, load_saved

SPLITS = ("train", "heldout")
FILE_ELEMENTS = 2**26  # of an array in one file (a zarr3 shard)
CHUNK_ELEMENTS = 2**15  # the smallest piece that is read; uncompressed, since token ids hardly compress
IN_MEMORY_BYTES = 256 * 2**20  # splits up to here are held in memory
COUNTED_TOKENS = 10_000_000


def write_array(path: epath.Path, values: np.ndarray) -> None:
    """Writes a one-dimensional zarr3 array of files of `FILE_ELEMENTS`, cut into chunks."""
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(path),
        "metadata": {
            "shape": [len(values)],
            "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [FILE_ELEMENTS]}},
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [CHUNK_ELEMENTS],
                        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                        "index_codecs": [
                            {"name": "bytes", "configuration": {"endian": "little"}},
                            {"name": "crc32c"},
                        ],
                    },
                }
            ],
        },
    }
    array = ts.open(spec, create=True, delete_existing=True).result()
    if len(values):
        array.write(values).result()


def open_array(path: epath.Path) -> Any:
    """The array that `write_array` wrote, as a tensorstore."""
    return ts.open({"driver": "zarr3", "kvstore": _kvstore(path)}, open=True, read=True).result()


def _kvstore(path: epath.Path) -> str | dict[str, str]:
    # Local paths may hold characters that mean something in a URL.
    return f"{path}/" if "://" in str(path) else {"driver": "file", "path": f"{path.resolve()}/"}


def sha256_of(path: epath.Path) -> str:
    """Of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def exists(path: str) -> bool:
    """Whether a finished store is there."""
    return (epath.Path(path) / "manifest.json").exists()


class TokenStore:
    """A finished store, opened for reading."""

    def __init__(self, path: str):
        """Raises CorpusError where no finished store is."""
        self.path = epath.Path(path)
        if not exists(path):
            unfinished = (self.path / "plan.json").exists()
            raise CorpusError(
                f"{path} is {'an unfinished' if unfinished else 'no'} token store: run `poisonjax corpus build --out "
                f"{path} ...`"
            )
        self.manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        self.fingerprint: str = self.manifest["fingerprint"]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_saved(self.path / "tokenizer")

    @functools.cache  # noqa: B019  (stores live as long as the process)
    def split(self, name: str) -> "TokenSplit":
        """`train` or `heldout`."""
        return TokenSplit(self, name)

    def require(self, **settings: Any) -> None:
        """Raises CorpusError where the store was built with other settings than these."""
        plan = self.manifest["plan"]
        differing = [
            f"{n}: {plan[n]!r} there, {value!r} here" for n, value in settings.items() if plan[n] != value
        ]
        if differing:
            raise CorpusError(
                f"{self.path} is another token store: " + "; ".join(differing) + ". Use another folder"
            )

    def verify(self, checked: Callable[[], object] = lambda: None) -> list[str]:
        """Problems found by hashing every file again and checking the offsets; empty where all is well."""
        problems = []
        for number, shard in enumerate(self.manifest["shards"]):
            folder = self.path / "shards" / f"{number:05d}"
            for name, expected in shard["files"].items():
                checked()
                if not (folder / name).exists():
                    problems.append(f"{folder / name}: missing")
                elif sha256_of(folder / name) != expected:
                    problems.append(f"{folder / name}: SHA-256 differs from the manifest's")
        if not problems:
            for name in SPLITS:
                split = self.split(name)
                ends = split.document_offsets[1:] - 1
                if split.document_offsets[-1] != split.tokens:
                    problems.append(
                        f"{name}: the offsets end at {split.document_offsets[-1]}, not {split.tokens}"
                    )
                elif (split.windows(ends, 1)[:, 0] != self.tokenizer.eot).any():
                    problems.append(f"{name}: a document doesn't end with the end-of-text token")
        return problems


class TokenSplit:
    """One split's documents as one stream of tokens."""

    def __init__(self, store: TokenStore, name: str):
        counts = [shard["splits"][name] for shard in store.manifest["shards"]]
        folders = [store.path / "shards" / f"{number:05d}" / name for number in range(len(counts))]
        # Shards without documents have nothing to read.
        self._parts = [
            (f, c["tokens"], c["documents"]) for f, c in zip(folders, counts, strict=True) if c["documents"]
        ]
        self._starts = np.cumsum([0, *(tokens for _, tokens, _ in self._parts)], dtype=np.int64)
        self.tokens = int(self._starts[-1])
        self.documents = sum(documents for _, _, documents in self._parts)
        self._vocabulary = store.manifest["tokenizer"]["vocab_size"]

    @functools.cached_property
    def _stream(self) -> Any:
        """All tokens: a NumPy array where they fit in memory, a virtual tensorstore otherwise."""
        stream = ts.concat([open_array(folder / "tokens") for folder, _, _ in self._parts], axis=0)
        small = self.tokens * stream.dtype.numpy_dtype.itemsize <= IN_MEMORY_BYTES
        return stream.read().result() if small else stream

    @functools.cached_property
    def document_offsets(self) -> Int[np.ndarray, " documents+1"]:
        """Where each document starts in the stream; the last entry is the stream's length."""
        parts = [
            open_array(folder / "offsets").read().result()[:-1] + start
            for (folder, _, _), start in zip(self._parts, self._starts, strict=False)
        ]
        return np.concatenate([*parts, [self.tokens]]).astype(np.int64)

    def windows(self, starts: Int[np.ndarray, " rows"], length: int) -> Int[np.ndarray, "rows length"]:
        """Tokens [start, start + length) of the stream for each start, int32."""
        stream = self._stream
        if isinstance(stream, np.ndarray):
            view = np.lib.stride_tricks.sliding_window_view(stream, length)
            return view[starts].astype(np.int32)
        reads = [stream[int(start) : int(start) + length].read() for start in starts]  # all at once
        return np.stack([read.result() for read in reads]).astype(np.int32)

    def document(self, index: int) -> Int[np.ndarray, " tokens"]:
        """A document's tokens without its end of text, int32."""
        start, stop = self.document_offsets[index : index + 2]
        return self.windows(np.array([start]), int(stop - start) - 1)[0]

    def token_counts(self) -> Int[np.ndarray, " vocabulary"]:
        """How often each id occurs in the first ten million tokens."""
        first = self._stream[: min(self.tokens, COUNTED_TOKENS)]
        return np.bincount(
            np.asarray(first if isinstance(first, np.ndarray) else first.read().result()),
            minlength=self._vocabulary,
        )
