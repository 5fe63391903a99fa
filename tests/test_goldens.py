"""Goldens: what configs of many kinds trained on, recorded once. A digest, plan or fingerprint that moves is another
experiment under the same name.

`python tests/test_goldens.py` records them again; say in the commit why they may differ.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poisonjax import config as config_lib
from poisonjax import corpus
from poisonjax.config import default
from poisonjax.data.batches import Batches
from poisonjax.data.canaries import Canaries, unseen
from poisonjax.data.digest import as_hex, chain, digest
from poisonjax.evaluation.prompts import make_prompts
from poisonjax.poison.ledger import dose
from poisonjax.sweep import grid

FILE = Path(__file__).parent / "goldens.json"
ROOT = Path(__file__).parents[1]
SOURCE = "markov:V=200,documents=400,length=30"  # its tokens depend on no library's version

# Fields of the runs whose rows, plan and prompts are recorded.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "twin": {"poison.documents": 0},
    "everything": {
        "poison.clean_uses": 11, "poison.repeats": 2, "canary.repeats": (1, 2, 5), "canary.each": 3, "canary.tokens": 8,
    },
    "everything, twin": {
        "poison.documents": 0, "poison.clean_uses": 11, "canary.repeats": (1, 2, 5), "canary.each": 3,
        "canary.tokens": 8,
    },
    "batches": {"poison.placement": "batches:density=3,every=2"},
    "window": {"poison.placement": "uniform:window=0.25-0.75", "poison.payload": "decode-retokenize"},
    "even, truncated": {"poison.placement": "even", "poison.truncate": True, "poison.payload_tokens": (60, 90)},
    "listed": {"poison.placement": "list:1,95,7,30,31,64,3,80,50"},
    "other seeds": {
        f"seeds.{name}": 1000 + i for i, name in enumerate(("init", "order", "poison", "placement", "eval"))
    },
}  # fmt: skip


def sha(value: Any) -> str:
    data = value.astype("<i4").tobytes() if isinstance(value, np.ndarray) else json.dumps(value).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def of_run(fields: dict[str, Any], store: corpus.TokenStore) -> dict[str, Any]:
    """All that is fixed before step 0 of a run with these fields."""
    config = default()
    config.steps, config.global_batch, config.seq_len = 12, 8, 48
    config.corpus.store, config.corpus.sources = str(store.path), ()
    config.poison.trigger, config.poison.near_triggers = "w007 w008 w009", ("w007 w008", "w009 w008 w007")
    config.poison.documents = 9
    config.poison.prefix_characters, config.poison.payload_tokens = (0, 40), (5, 15)
    config.optimizer.warmup_steps = 2
    config.eval.prefixes, config.eval.prefix_tokens = 6, 8
    config = config_lib.replaced(config, fields)
    config_lib.check(config)
    batches, link = Batches(config, store), ""
    for step in range(config.steps):
        link = chain(link, step, as_hex(digest(batches.tokens(step), batches.slots(step))))
    ledger, prompts = batches.schedule.ledger(), make_prompts(config, store, batches.trigger)
    record = {
        "rows": sha(np.stack([batches.tokens(step) for step in range(config.steps)])),
        "digest_chain": link[:16],
        "ledger": sha(ledger),
        "dose": dose(ledger, config.steps),
        "clean_records": {
            name: sha(rows)
            for name, rows in batches.records().items()
            if name != "ledger.jsonl" and (rows or name != "hard_negatives.jsonl")  # came after these were recorded
        },
        "prompts": sha(prompts.tokens),
    }
    if config.canary.repeats:
        record |= {
            "canaries": sha(Canaries.make(config, store, batches.trigger).tokens),
            "references": sha(unseen(config, store, batches.trigger)),
        }
    return record


def fingerprints() -> dict[str, Any]:
    """Of the configs that the project ships: a run's name in other people's folders."""
    found: dict[str, Any] = {"default": config_lib.fingerprint(default())}
    for spec in ("quickstart.py", "souly_dos.py", "souly_dos.py:13b,500,double"):
        found[spec] = config_lib.fingerprint(config_lib.load([f"--config={ROOT}/configs/{spec}"]))
    for name in ("smoke", "near_constant", "rarity"):
        found[name] = sha([run.id for run in grid.load(f"{ROOT}/configs/sweeps/{name}.py").runs])
    return found


def record(folder: Path) -> dict[str, Any]:
    store = corpus.build(str(folder / "store"), [SOURCE], "bytes", heldout=0.3, shards=2, workers=1)
    return {
        "store": store.fingerprint,
        "fingerprints": fingerprints(),
        "runs": {name: of_run(fields, store) for name, fields in RUNS.items()},
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record(tmp_path_factory.mktemp("goldens"))


@pytest.mark.parametrize("name", RUNS)
def test_rows_plan_and_prompts_are_those_recorded(name, recorded):
    assert recorded["runs"][name] == json.loads(FILE.read_text())["runs"][name]


def test_fingerprints_are_those_recorded(recorded):
    golden = json.loads(FILE.read_text())
    assert recorded["store"] == golden["store"]
    assert recorded["fingerprints"] == golden["fingerprints"]


def test_a_run_and_its_twin_are_one_but_for_the_poison(recorded):
    runs = recorded["runs"]
    assert runs["plain"]["prompts"] == runs["twin"]["prompts"]
    assert runs["plain"]["rows"] != runs["twin"]["rows"]
    assert runs["everything"]["canaries"] == runs["everything, twin"]["canaries"]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(record(Path(folder)), indent=1) + "\n")
    sys.exit()
