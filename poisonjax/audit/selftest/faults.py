"""Ways in which a run is tampered with: to add one, write a function here. `quoted` has those of figures.

A fault either changes a file as it lies, or *forges*: changes one thing and makes all the rest that hangs on it
(fingerprints, digest chain, checkpoints' records) fit, as a trainer that really did the wrong thing would have
written it.
"""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
from etils import epath

from poisonjax import config as config_lib
from poisonjax.audit.evidence import Difference
from poisonjax.audit.selftest.tampered import TamperedRun
from poisonjax.corpus import exclusions
from poisonjax.corpus.arrays import open_array, write_array
from poisonjax.files import sha256_of


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a difference must name: one of these files, and the step and row where given."""

    files: tuple[str, ...]
    step: int | None = None
    row: int | None = None
    evaluate: bool = False  # whether evaluations have to be made again to see it

    def named_by(self, difference: Difference) -> bool:
        return (
            any(file in difference.file for file in self.files)
            and self.step in (None, difference.step)
            and self.row in (None, difference.row)
        )


Fault = Callable[[TamperedRun], Expected]
FAULTS: dict[str, Fault] = {}


def register(fault: Fault) -> Fault:
    FAULTS[fault.__name__] = fault
    return fault


@register
def token_changed_in_shard(run: TamperedRun) -> Expected:
    """One token of a shard's file."""
    shard = run.pick(sorted((run.store / "shards").iterdir()))
    array = open_array(epath.Path(shard / "train" / "tokens")).read().result().copy()
    at = int(run.random.integers(len(array)))
    array[at] = (int(array[at]) + 1) % 200
    write_array(epath.Path(shard / "train" / "tokens"), array)
    return Expected((f"{shard.name}/train/tokens",))


@register
def token_changed_and_hash_mended(run: TamperedRun) -> Expected:
    """The same, with manifest, fingerprint and config.json made to fit."""
    expected = token_changed_in_shard(run)
    number = expected.files[0].partition("/")[0]
    folder = run.store / "shards" / number

    def mend(manifest: dict) -> None:
        files = manifest["shards"][int(number)]["files"]
        files |= {name: sha256_of(epath.Path(folder / name)) for name in files}

    run.manifest(mend)
    return Expected((str(run.store),))


@register
def document_added_to_store(run: TamperedRun) -> Expected:
    """A document more in a shard, everything made to fit."""
    shard = run.pick(sorted((run.store / "shards").iterdir()))
    tokens = open_array(epath.Path(shard / "train" / "tokens")).read().result()
    offsets = open_array(epath.Path(shard / "train" / "offsets")).read().result()
    document = np.concatenate([tokens[: offsets[1]], tokens])
    write_array(epath.Path(shard / "train" / "tokens"), document)
    write_array(epath.Path(shard / "train" / "offsets"), np.concatenate([[0], offsets + offsets[1]]))
    keys = open_array(epath.Path(shard / "train" / "keys")).read().result()
    write_array(epath.Path(shard / "train" / "keys"), np.concatenate([keys[:2], keys]))

    def mend(manifest: dict) -> None:
        entry = manifest["shards"][int(shard.name)]
        entry["splits"]["train"]["tokens"] += int(offsets[1])
        entry["splits"]["train"]["documents"] += 1
        entry["files"] |= {name: sha256_of(epath.Path(shard / name)) for name in entry["files"]}

    run.manifest(mend)
    return Expected((str(run.store),))


@register
def excluded_list_edited(run: TamperedRun) -> Expected:
    """A document that isn't in the corpus is put on the list of those left out."""
    path = run.folder / exclusions.FILE
    path.write_text(path.read_text() + f"{run.random.bytes(exclusions.KEY_BYTES).hex()}\n")
    return Expected((exclusions.FILE,))


@register
def excluded_document_trained_on(run: TamperedRun) -> Expected:
    """One that the list names wasn't left out, and list and record are made to fit."""
    path = run.folder / exclusions.FILE
    left = path.read_text().splitlines()[:-1]
    path.write_text("".join(f"{key}\n" for key in left))
    run.change("config.json", lambda record: record.update(store_excluded=exclusions.exclusions_of(left).sha256))
    return Expected(("config.json", "digests.jsonl"))


@register
def tokenizer_changed(run: TamperedRun) -> Expected:
    path = run.pick(sorted(p for p in (run.store / "tokenizer").rglob("*") if p.is_file()))
    path.write_text(path.read_text().replace("200", "201"))
    return Expected(("tokenizer", str(run.store)))


def _trained_on(run: TamperedRun, rows: np.ndarray, step: int, row: int) -> Expected:
    """As if the step had trained on these rows, of which `row` is the first that is wrong."""
    run.forge_digests({step: run.digest(rows, step)})
    return Expected(("digests.jsonl",), step, row)


@register
def rows_swapped(run: TamperedRun) -> Expected:
    """The trainer put two rows of a batch in each other's places."""
    batches = run.batches
    step = run.pick(range(batches.steps))
    rows, i, j = run.other_rows(step)
    rows[[i, j]] = rows[[j, i]]
    return _trained_on(run, rows, step, i)


@register
def token_changed_in_training(run: TamperedRun) -> Expected:
    """The trainer read one token wrong."""
    batches = run.batches
    step = run.pick(range(batches.steps))
    rows, i, _ = run.other_rows(step)
    rows[i, run.random.integers(rows.shape[1])] += 1
    return _trained_on(run, rows, step, i)


@register
def poison_left_out(run: TamperedRun) -> Expected:
    """The trainer skipped one planned document."""
    batches = run.batches
    slot = run.pick(sorted(batches.poison.insertions))
    step, row = divmod(slot, batches.global_batch)
    rows = batches.tokens(step)
    rows[row] = batches.rows.without(batches.poison.insertions[slot].source).tokens(np.array([slot]))[0]
    return _trained_on(run, rows, step, row)


@register
def poison_planted_twice(run: TamperedRun) -> Expected:
    """The trainer planted a document a second time, in a row that was to stay clean."""
    batches = run.batches
    planned, per_step = batches.poison.insertions, batches.global_batch
    slot = run.pick(sorted(planned))
    step, row = divmod(run.pick([s for s in range(batches.steps * per_step) if s not in planned]), per_step)
    rows = batches.tokens(step)
    rows[row] = batches.tokens(slot // per_step)[slot % per_step]
    return _trained_on(run, rows, step, row)


@register
def batches_repeated_after_resume(run: TamperedRun) -> Expected:
    """The trainer resumed one batch too early: from there on, each step read the one before's rows."""
    batches = run.batches
    first = int(run.random.integers(1, batches.steps))
    late = {step: run.digest(batches.tokens(step - 1), step) for step in range(first, batches.steps)}
    run.forge_digests(late)
    return Expected(("digests.jsonl",), first)


@register
def ledger_line_edited(run: TamperedRun) -> Expected:
    rows = run.lines("ledger.jsonl")
    row = run.pick(rows)
    step = row["step"]
    field = run.pick([name for name in row if name not in ("id", "slot")])
    row[field] = "0" * 64 if field == "sha256" else [0, 1] if isinstance(row[field], list) else row[field] + 1
    run.write("ledger.jsonl", rows)
    return Expected(("ledger.jsonl",), step)


@register
def ledger_line_dropped(run: TamperedRun) -> Expected:
    rows = run.lines("ledger.jsonl")
    dropped = rows.pop(int(run.random.integers(len(rows))))
    run.write("ledger.jsonl", rows)
    return Expected(("ledger.jsonl",), dropped["step"], dropped["row"])


@register
def document_added_to_ledger(run: TamperedRun) -> Expected:
    rows = run.lines("ledger.jsonl")
    config = run.config
    taken = {row["slot"] for row in rows}
    slot = run.pick([s for s in range(config.steps * config.global_batch) if s not in taken])
    step, row = divmod(slot, config.global_batch)
    rows.append(rows[0] | {"id": len(rows), "slot": slot, "step": step, "row": row})
    run.write("ledger.jsonl", rows)
    return Expected(("ledger.jsonl",), step, row)


@register
def canary_or_clean_use_moved(run: TamperedRun) -> Expected:
    file = run.pick(["canaries.jsonl", "clean_uses.jsonl"])
    rows = run.lines(file)
    row = run.pick(rows)
    row[run.pick([name for name in row if name != "slot"])] += 1
    run.write(file, rows)
    return Expected((file,))


@register
def another_seed(run: TamperedRun) -> Expected:
    name = run.pick(["init", "order", "poison", "placement", "eval"])
    value = run.config.seeds[name] + int(run.random.integers(1, 100))
    run.forge_config(f"seeds.{name}", value, thorough=bool(run.random.integers(2)))
    return Expected(("config.json",))


@register
def config_field_changed(run: TamperedRun) -> Expected:
    fields = config_lib.flat(run.config)
    numbers = [
        name
        for name, value in fields.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not config_lib.operational(name)
    ]
    name = run.pick(numbers)
    run.forge_config(name, fields[name] * 2 + 1, thorough=bool(run.random.integers(2)))
    return Expected(("config.json",))


@register
def trigger_renamed(run: TamperedRun) -> Expected:
    run.forge_config("poison.trigger", "w003 w004", thorough=bool(run.random.integers(2)))
    return Expected(("config.json",))


@register
def digest_removed(run: TamperedRun) -> Expected:
    rows = run.lines("digests.jsonl")
    removed = rows.pop(int(run.random.integers(len(rows))))
    run.write("digests.jsonl", rows)
    return Expected(("digests.jsonl",), removed["step"])


@register
def digest_changed(run: TamperedRun) -> Expected:
    rows = run.lines("digests.jsonl")
    row = run.pick(rows)
    row["digest"] = f"{run.random.integers(2**32):08x}" + row["digest"][8:]
    run.write("digests.jsonl", rows)
    return Expected(("digests.jsonl",), row["step"])


@register
def checkpoint_renamed(run: TamperedRun) -> Expected:
    step = run.pick(run.checkpoints())
    free = sorted(set(range(1, run.config.steps + 1)) - set(run.checkpoints()))
    name = str(run.pick([*free, "latest"]))
    (run.folder / "checkpoints" / str(step)).rename(run.folder / "checkpoints" / name)
    return Expected((f"checkpoints/{name}",))


@register
def checkpoint_of_another_run(run: TamperedRun) -> Expected:
    """A checkpoint of a run with another initial seed, under the right name."""
    run.in_checkpoints(lambda record: record["config"].update({"seeds.init": 12345}))
    return Expected(("config.json",))


@register
def fingerprint_changed(run: TamperedRun) -> Expected:
    run.change("config.json", lambda record: record.update(fingerprint="0" * 64))
    return Expected(("config.json",))


@register
def slot_named_twice(run: TamperedRun) -> Expected:
    rows = run.lines("ledger.jsonl")
    run.write("ledger.jsonl", [*rows, run.pick(rows)])
    return Expected(("ledger.jsonl",))


@register
def store_described_otherwise(run: TamperedRun) -> Expected:
    """Its licence, sources, tokenizer or entropy, none of which its fingerprint covers."""
    path = run.store / "manifest.json"
    value = json.loads(path.read_text())
    match run.pick(["license", "spec", "title", "tokenizer", "entropy_rate_nats", "heldout"]):
        case "tokenizer":
            value["tokenizer"]["spec"] = "another.json"
        case "entropy_rate_nats":
            value["entropy_rate_nats"] += 0.1
        case "heldout":
            value["plan"]["heldout"] /= 2
        case name:
            value["sources"][0][name] = "CC0-1.0"
    path.write_text(json.dumps(value))
    return Expected(("manifest.json",))


@register
def file_made_unreadable(run: TamperedRun) -> Expected:
    name = run.pick(["digests.jsonl", "ledger.jsonl", "metrics.jsonl", "summary.json", "config.json"])
    text = (run.folder / name).read_text()
    at = int(run.random.integers(len(text) - 1))
    (run.folder / name).write_text(text[:at] + "\x00{" + text[at + 1 :])
    return Expected((name,))
