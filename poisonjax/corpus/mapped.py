"""A stream of tokens where it lies: files of a local disk, mapped into memory, that rows are copied out of."""

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped

from poisonjax.files import parse_json

INDEX = np.dtype("<u8")  # of a zarr3 shard: offset and size of each chunk, then a checksum of four bytes


class Mapped:
    """Arrays that `write_array` wrote, one after the other."""

    def __init__(self, files: Sequence[Shaped[np.ndarray, " _"]]):
        self._files, self._starts = files, [0, *np.cumsum([len(file) for file in files]).tolist()]

    @classmethod
    def of(cls, arrays: Sequence[Path]) -> "Mapped | None":
        """None where the chunks of a file don't follow each other in it, or some aren't there (all of them zeros)."""
        files: list[np.ndarray] = []
        for array in arrays:
            for file in _files(array):
                if file is None:
                    return None
                files.append(file)
        return cls(files)

    def copy(self, start: int, row: Int[np.ndarray, " length"]) -> None:
        """Tokens from `start` on, into a row."""
        file, filled = bisect.bisect_right(self._starts, start) - 1, 0
        while filled < len(row):
            first = start + filled - self._starts[file]
            piece = self._files[file][first : first + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled, file = filled + len(piece), file + 1


def _files(array: Path) -> Iterator[Shaped[np.ndarray, " _"] | None]:
    """Each file's tokens."""
    about = parse_json((array / "zarr.json").read_bytes())
    (tokens,), (shard,) = about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"]
    (chunk,) = about["codecs"][0]["configuration"]["chunk_shape"]
    kind = np.dtype(about["data_type"]).newbyteorder("<")
    for number, start in enumerate(range(0, tokens, shard)):
        path, size = array / "c" / str(number), min(shard, tokens - start)
        chunks = np.arange(-(-size // chunk), dtype=INDEX)
        if not path.is_file():
            yield None
            return
        with path.open("rb") as file:
            file.seek(-(shard // chunk * 16 + 4), 2)
            index = np.frombuffer(file.read(16 * len(chunks)), INDEX).reshape(-1, 2)
        ordered = np.array_equal(index[:, 0], chunks * np.uint64(chunk * kind.itemsize))
        yield np.asarray(np.memmap(path, kind, "r", shape=(size,))) if ordered else None
