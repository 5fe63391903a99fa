"""A language model's scores, for the share of documents that cheap scores find oddest."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from poisonjax.corpus.documents import Document
from poisonjax.engines import Progress
from poisonjax.files import written_whole
from poisonjax.scan.detectors.model import ModelLoss
from poisonjax.weights import open_weights
from poisonjax.weights.weights import one_device_mesh

DOCUMENTS = 64  # scored between two steps of the progress bar
SHARE = 0.01


def model_scores(
    folder: Path, spec: str, keys: Sequence[bytes], read: Callable[[set[bytes]], dict[bytes, Document]]
) -> Float[np.ndarray, " documents"]:
    """Of the documents with these `keys`.

    They are kept in model.parquet, by key, with the model's checksum: those of the same model aren't made again.
    Raises WeightsError where `spec` names no model.
    """
    import pyarrow as pa
    from pyarrow import parquet

    path, known = folder / "model.parquet", dict[bytes, float]()
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        weights = open_weights(spec, mesh)
        about = {"model": json.dumps({"spec": spec, "weights": weights.parent["weights"]})}
        if path.exists():
            table = parquet.read_table(path)
            if json.loads(table.schema.metadata[b"model"])["weights"] == weights.parent["weights"]:
                known = dict(zip(table["key"].to_pylist(), table["model"].to_pylist(), strict=True))
        missing = [key for key in dict.fromkeys(keys) if key not in known]
        found, detector = read({*missing}), ModelLoss(weights)
        with Progress("model", len(missing), "document") as progress:
            for start in range(0, len(missing), DOCUMENTS):
                some = missing[start : start + DOCUMENTS]
                scores = detector.scores([str(found[key].content) for key in some])
                known |= {key: score.value for key, score in zip(some, scores, strict=True)}
                progress.add(len(some))
    columns = pa.array([*known], pa.binary(16)), pa.array([*known.values()], pa.float32())
    with written_whole(path) as partial:
        parquet.write_table(pa.table(columns, ["key", "model"]).replace_schema_metadata(about), partial)
    return np.array([known[key] for key in keys])
