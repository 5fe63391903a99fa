"""Sharded zarr3 arrays, written once and read in pieces."""

import numpy as np
import tensorstore as ts
from etils import epath

from poisonjax.files import kvstore_spec

FILE_ELEMENTS = 2**26  # of an array in one file (a zarr3 shard), at most
CHUNK_ELEMENTS = 2**12  # the smallest piece that is read; uncompressed, since token ids hardly compress
# For arrays that aren't held in memory: keeps the indexes that say where a file's chunks lie.
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
