"""What benches measure on: synthetic text, a run's record without its training, a config as a file."""

import json
from pathlib import Path

import ml_collections

from poisonjax import config as config_lib
from poisonjax import corpus
from poisonjax.run import rows

VOCABULARY = 512


def synthetic(config: ml_collections.ConfigDict, folder: Path, documents: int = 8000) -> ml_collections.ConfigDict:
    """A copy of the config on a store of Markov text in `folder`, 400 tokens a document, with poison that suits it."""
    store = str(folder / "store")
    corpus.build(store, [f"markov:V={VOCABULARY - 1},documents={documents},length=400"], "bytes")
    fields = {
        "corpus.store": store, "corpus.sources": (), "poison.trigger": "w007 w011 w013",
        "poison.near_triggers": ("w007",), "poison.prefix_characters": (0, 60), "poison.documents": 250,
    }  # fmt: skip
    return config_lib.replaced(config, fields)


def recorded(config: ml_collections.ConfigDict, folder: Path) -> None:
    """Writes the record of a run that was never made: enough for `Evidence` to replay it."""
    names = dict.fromkeys(("fingerprint", "store_fingerprint", "store_description"), "")
    record = {"format": rows.FORMAT, "config": json.loads(config.to_json()), **names}
    folder.mkdir(exist_ok=True)
    (folder / rows.CONFIG).write_text(json.dumps(record))


def as_file(config: ml_collections.ConfigDict, path: Path, more: str = "") -> None:
    """Writes a config file that gives this config, and `more` Python after it."""
    path.write_text(
        "from poisonjax.config import from_record\n\n\ndef get_config(arg=''):\n"
        f"    return from_record({json.loads(config.to_json())!r})\n{more}"
    )
