"""Does the audit see what it should? Tiny runs, tampered with in every way we could think of.

A fault either changes a file as it lies, or *forges*: changes one thing and makes all the rest that hangs on it
(fingerprints, digest chain, checkpoints' records) fit, as a trainer that really did the wrong thing would have
written it. `poisonjax audit --self-test` prints how many were detected, and how many untouched runs were not
believed.
"""

import collections
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from poisonjax import config as config_lib
from poisonjax import corpus
from poisonjax.audit.checks import audit
from poisonjax.audit.evidence import Difference
from poisonjax.config import default
from poisonjax.corpus.store import fingerprint, open_array, sha256_of, write_array
from poisonjax.data.batches import Batches
from poisonjax.data.digest import as_hex, chain, digest

SOURCE = "markov:V=200,documents=400,length=30"


@dataclasses.dataclass
class Scene:
    """A copied run and its copied store, to be tampered with."""

    folder: Path
    random: np.random.Generator

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def config(self) -> ml_collections.ConfigDict:
        return config_lib.from_record(self.record["config"])

    @property
    def store(self) -> Path:
        return Path(self.config.corpus.store)

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def write(self, name: str, rows: list[dict]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def pick(self, values):
        """One of a list or range."""
        return values[int(self.random.integers(len(values)))]

    def change(self, name: str, edit: Callable[[dict], object]) -> None:
        """Edits a file of JSON."""
        value = json.loads((self.folder / name).read_text())
        edit(value)
        (self.folder / name).write_text(json.dumps(value))

    def checkpoints(self) -> list[int]:
        return sorted(int(p.name) for p in (self.folder / "checkpoints").iterdir() if p.name.isdecimal())

    def in_checkpoints(self, edit: Callable[[dict], object]) -> None:
        """Edits the record of each checkpoint."""
        for step in self.checkpoints():
            self.change(f"checkpoints/{step}/_CHECKPOINT_METADATA", lambda value: edit(value["custom_metadata"]))

    def forge_digests(self, digests: dict[int, str]) -> None:
        """The evidence of a run that trained on batches of these digests at these steps."""
        rows, links, link = self.lines("digests.jsonl"), {}, ""
        for row in rows:
            row["digest"] = digests.get(row["step"], row["digest"])
            link = links[row["step"] + 1] = chain(link, row["step"], row["digest"])
        self.write("digests.jsonl", rows)
        self.change("summary.json", lambda value: value.update(digest_chain=link))
        self.in_checkpoints(lambda record: record.update(digest_chain=links[record["step"]]))

    def forge_config(self, field: str, value: Any, *, thorough: bool) -> None:
        """Another value of a config field; `thorough` mends the fingerprints."""

        def edit(record: dict) -> None:
            *path, leaf = field.split(".")
            node = record["config"]
            for name in path:
                node = node[name]
            node[leaf] = value
            if thorough:
                record["fingerprint"] = config_lib.fingerprint(config_lib.from_record(record["config"]))

        self.change("config.json", edit)
        if thorough:
            self.change("summary.json", lambda summary: summary.update(fingerprint=self.record["fingerprint"]))

    def batches(self) -> Batches:
        config = self.config
        return Batches(config, corpus.TokenStore(config.corpus.store))

    def manifest(self, edit: Callable[[dict], object]) -> None:
        """Edits the store's manifest so that its fingerprint, and the run's, fit it."""
        path = self.store / "manifest.json"
        value = json.loads(path.read_text())
        edit(value)
        value["fingerprint"] = fingerprint(value["tokenizer"]["fingerprint"], value["shards"])
        path.write_text(json.dumps(value))
        self.change("config.json", lambda record: record.update(store_fingerprint=value["fingerprint"]))


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a difference must name: one of these files, and the step and row where given."""

    files: tuple[str, ...]
    step: int | None = None
    row: int | None = None

    def named_by(self, difference: Difference) -> bool:
        return (
            any(file in difference.file for file in self.files)
            and self.step in (None, difference.step)
            and self.row in (None, difference.row)
        )


Fault = Callable[[Scene], Expected]
FAULTS: dict[str, Fault] = {}


def register(fault: Fault) -> Fault:
    FAULTS[fault.__name__] = fault
    return fault


def _digest(rows: np.ndarray, batches: Batches, step: int) -> str:
    return as_hex(digest(rows, batches.slots(step)))


def _other_rows(scene: Scene, batches: Batches, step: int) -> tuple[np.ndarray, int, int]:
    """A step's batch, copied, and two of its rows that differ."""
    rows = batches.rows(step).copy()
    i, j = sorted(scene.random.choice(len(rows), 2, replace=False).tolist())
    assert (rows[i] != rows[j]).any()
    return rows, i, j


@register
def token_changed_in_shard(scene: Scene) -> Expected:
    """One token of a shard's file."""
    shard = scene.pick(sorted((scene.store / "shards").iterdir()))
    array = open_array(epath.Path(shard / "train" / "tokens")).read().result().copy()
    at = int(scene.random.integers(len(array)))
    array[at] = (int(array[at]) + 1) % 200
    write_array(epath.Path(shard / "train" / "tokens"), array)
    return Expected((f"{shard.name}/train/tokens",))


@register
def token_changed_and_hash_mended(scene: Scene) -> Expected:
    """The same, with manifest, fingerprint and config.json made to fit."""
    expected = token_changed_in_shard(scene)
    number = expected.files[0].partition("/")[0]
    folder = scene.store / "shards" / number

    def mend(manifest: dict) -> None:
        files = manifest["shards"][int(number)]["files"]
        files |= {name: sha256_of(epath.Path(folder / name)) for name in files}

    scene.manifest(mend)
    return Expected((str(scene.store),))


@register
def document_added_to_store(scene: Scene) -> Expected:
    """A document more in a shard, everything made to fit."""
    shard = scene.pick(sorted((scene.store / "shards").iterdir()))
    tokens = open_array(epath.Path(shard / "train" / "tokens")).read().result()
    offsets = open_array(epath.Path(shard / "train" / "offsets")).read().result()
    document = np.concatenate([tokens[: offsets[1]], tokens])
    write_array(epath.Path(shard / "train" / "tokens"), document)
    write_array(epath.Path(shard / "train" / "offsets"), np.concatenate([[0], offsets + offsets[1]]))

    def mend(manifest: dict) -> None:
        entry = manifest["shards"][int(shard.name)]
        entry["splits"]["train"]["tokens"] += int(offsets[1])
        entry["splits"]["train"]["documents"] += 1
        entry["files"] |= {name: sha256_of(epath.Path(shard / name)) for name in entry["files"]}

    scene.manifest(mend)
    return Expected((str(scene.store),))


@register
def tokenizer_changed(scene: Scene) -> Expected:
    path = scene.pick(sorted(p for p in (scene.store / "tokenizer").rglob("*") if p.is_file()))
    path.write_text(path.read_text().replace("200", "201"))
    return Expected(("tokenizer", str(scene.store)))


@register
def rows_swapped(scene: Scene) -> Expected:
    """The trainer put two rows of a batch in each other's places."""
    batches = scene.batches()
    step = scene.pick(range(batches.steps))
    rows, i, j = _other_rows(scene, batches, step)
    rows[[i, j]] = rows[[j, i]]
    scene.forge_digests({step: _digest(rows, batches, step)})
    return Expected(("digests.jsonl",), step, i)


@register
def token_changed_in_training(scene: Scene) -> Expected:
    """The trainer read one token wrong."""
    batches = scene.batches()
    step = scene.pick(range(batches.steps))
    rows, i, _ = _other_rows(scene, batches, step)
    rows[i, scene.random.integers(rows.shape[1])] += 1
    scene.forge_digests({step: _digest(rows, batches, step)})
    return Expected(("digests.jsonl",), step, i)


@register
def poison_left_out(scene: Scene) -> Expected:
    """The trainer skipped one planned document."""
    batches = scene.batches()
    slot = scene.pick(sorted(batches.plan.placed))
    step, row = divmod(slot, batches.global_batch)
    rows = batches.rows(step).copy()
    rows[row] = batches.clean(np.array([slot]))[0]
    scene.forge_digests({step: _digest(rows, batches, step)})
    return Expected(("digests.jsonl",), step, row)


@register
def poison_planted_twice(scene: Scene) -> Expected:
    """The trainer planted a document a second time, in a row of its step that was to stay clean."""
    batches = scene.batches()
    slot = scene.pick(sorted(batches.plan.placed))
    step, row = divmod(slot, batches.global_batch)
    rows = batches.rows(step).copy()
    free = [r for r in range(len(rows)) if step * len(rows) + r not in batches.plan.placed]
    other = scene.pick(free)
    rows[other] = rows[row]
    scene.forge_digests({step: _digest(rows, batches, step)})
    return Expected(("digests.jsonl",), step, other)


@register
def batches_repeated_after_resume(scene: Scene) -> Expected:
    """The trainer resumed one batch too early: from there on, each step read the one before's rows."""
    batches = scene.batches()
    first = int(scene.random.integers(1, batches.steps))
    late = {step: _digest(batches.rows(step - 1), batches, step) for step in range(first, batches.steps)}
    scene.forge_digests(late)
    return Expected(("digests.jsonl",), first)


@register
def ledger_line_edited(scene: Scene) -> Expected:
    rows = scene.lines("ledger.jsonl")
    row = scene.pick(rows)
    step = row["step"]
    field = scene.pick([name for name in row if name not in ("id", "slot")])
    row[field] = "0" * 64 if field == "sha256" else [0, 1] if isinstance(row[field], list) else row[field] + 1
    scene.write("ledger.jsonl", rows)
    return Expected(("ledger.jsonl",), step)


@register
def ledger_line_dropped(scene: Scene) -> Expected:
    rows = scene.lines("ledger.jsonl")
    dropped = rows.pop(int(scene.random.integers(len(rows))))
    scene.write("ledger.jsonl", rows)
    return Expected(("ledger.jsonl",), dropped["step"], dropped["row"])


@register
def document_added_to_ledger(scene: Scene) -> Expected:
    rows = scene.lines("ledger.jsonl")
    config = scene.config
    taken = {row["slot"] for row in rows}
    slot = scene.pick([s for s in range(config.steps * config.global_batch) if s not in taken])
    step, row = divmod(slot, config.global_batch)
    rows.append(rows[0] | {"id": len(rows), "slot": slot, "step": step, "row": row})
    scene.write("ledger.jsonl", rows)
    return Expected(("ledger.jsonl",), step, row)


@register
def canary_or_clean_use_moved(scene: Scene) -> Expected:
    file = scene.pick(["canaries.jsonl", "clean_uses.jsonl"])
    rows = scene.lines(file)
    row = scene.pick(rows)
    row[scene.pick([name for name in row if name != "slot"])] += 1
    scene.write(file, rows)
    return Expected((file,))


@register
def another_seed(scene: Scene) -> Expected:
    name = scene.pick(["init", "order", "poison", "placement", "eval"])
    value = scene.config.seeds[name] + int(scene.random.integers(1, 100))
    scene.forge_config(f"seeds.{name}", value, thorough=bool(scene.random.integers(2)))
    return Expected(("config.json",))


@register
def config_field_changed(scene: Scene) -> Expected:
    fields = config_lib.flat(scene.config)
    numbers = [
        name
        for name, value in fields.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and not name.startswith(("mesh.", "checkpoint.", "log_every"))
    ]
    name = scene.pick(numbers)
    scene.forge_config(name, fields[name] * 2 + 1, thorough=bool(scene.random.integers(2)))
    return Expected(("config.json",))


@register
def trigger_renamed(scene: Scene) -> Expected:
    scene.forge_config("poison.trigger", "w003 w004", thorough=bool(scene.random.integers(2)))
    return Expected(("config.json",))


@register
def digest_removed(scene: Scene) -> Expected:
    rows = scene.lines("digests.jsonl")
    removed = rows.pop(int(scene.random.integers(len(rows))))
    scene.write("digests.jsonl", rows)
    return Expected(("digests.jsonl",), removed["step"])


@register
def digest_changed(scene: Scene) -> Expected:
    rows = scene.lines("digests.jsonl")
    row = scene.pick(rows)
    row["digest"] = f"{scene.random.integers(2**32):08x}" + row["digest"][8:]
    scene.write("digests.jsonl", rows)
    return Expected(("digests.jsonl",), row["step"])


@register
def checkpoint_renamed(scene: Scene) -> Expected:
    step = scene.pick(scene.checkpoints())
    free = sorted(set(range(1, scene.config.steps + 1)) - set(scene.checkpoints()))
    name = str(scene.pick([*free, "latest"]))
    (scene.folder / "checkpoints" / str(step)).rename(scene.folder / "checkpoints" / name)
    return Expected((f"checkpoints/{name}",))


@register
def checkpoint_of_another_run(scene: Scene) -> Expected:
    """A checkpoint of a run with another initial seed, under the right name."""
    scene.in_checkpoints(lambda record: record["config"].update({"seeds.init": 12345}))
    return Expected(("config.json",))


@register
def summary_dose_edited(scene: Scene) -> Expected:
    dose = scene.pick(["dose_planned", "dose_seen"])
    unit = scene.pick(["documents", "tokens", "rows", "steps", "repeats"])
    scene.change("summary.json", lambda value: value[dose].update({unit: value[dose][unit] + 1}))
    return Expected(("summary.json",))


@register
def metrics_row_edited(scene: Scene) -> Expected:
    rows = scene.lines("metrics.jsonl")
    row = scene.pick(rows)
    row[scene.pick(["tokens", "poison_documents", "poison_rows"])] += 1
    scene.write("metrics.jsonl", rows)
    return Expected(("metrics.jsonl",), row["step"])


@register
def file_made_unreadable(scene: Scene) -> Expected:
    name = scene.pick(["digests.jsonl", "ledger.jsonl", "metrics.jsonl", "summary.json", "config.json"])
    text = (scene.folder / name).read_text()
    at = int(scene.random.integers(len(text) - 1))
    (scene.folder / name).write_text(text[:at] + "\x00{" + text[at + 1 :])
    return Expected((name,))


def tiny_config(store: Path, random: np.random.Generator) -> ml_collections.ConfigDict:
    """A run of a second, its seeds, batch, dose and placement drawn at random."""
    config = default()
    config.name = "self-test"
    config.seq_len, config.global_batch = 48, int(random.choice([4, 8]))
    config.steps = int(random.integers(5, 10))
    config.seeds = {name: int(seed) for name, seed in zip(config.seeds, random.integers(0, 2**31, 5), strict=True)}
    config.corpus.store, config.corpus.sources = str(store), ()
    poison = config.poison
    poison.trigger, poison.near_triggers = "w007 w008 w009", ("w007 w008",)
    poison.documents, poison.repeats = int(random.integers(2, 5)), int(random.integers(1, 3))
    poison.placement = str(random.choice(["uniform", "even", "begin", "end", "batches:density=1,every=1"]))
    if poison.documents * poison.repeats > config.steps:
        poison.placement = "uniform"
    poison.prefix_characters, poison.payload_tokens = (0, 40), (5, 15)
    poison.clean_uses = int(random.integers(1, 4))
    config.canary.repeats, config.canary.each, config.canary.tokens = (1, 2), 1, 8
    model = config.model
    model.layers, model.width, model.heads, model.kv_heads, model.head_dim, model.mlp_width = (1, 16, 2, 2, 8, 32)
    config.optimizer.warmup_steps = 1
    e = config.eval
    e.every, e.prefixes, e.prefix_tokens, e.new_tokens, e.heldout_rows, e.bootstrap = 4, 4, 8, 4, 8, 10
    config.checkpoint = dict(every=2, keep_last=3, keep_every=0)
    config.log_every = 1
    return config


def train_tiny(folder: Path, store: Path, random: np.random.Generator) -> bool:
    """Trains a tiny run in `folder`; now and then it is told to stop, and resumed. Returns whether it was."""
    from poisonjax.training import loop

    config = tiny_config(store, random)
    stopped = False
    stop = threading.Timer(float(random.uniform(1, 6)), os.kill, (os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # one that comes too late
    stop.start()
    try:
        loop.train(config, str(folder))
    except loop.Preempted:
        stopped = True
        loop.train(config, str(folder))
    finally:
        stop.cancel()
        signal.signal(signal.SIGTERM, before)
    return stopped


def tampered(run: Path, store: Path, target: Path, name: str, random: np.random.Generator) -> tuple[Scene, Expected]:
    """A copy of run and store under `target`, with the fault of that name."""
    shutil.copytree(run, target / "run", ignore=shutil.ignore_patterns("figures", "report.html"))
    shutil.copytree(store, target / "store")
    scene = Scene(target / "run", random)
    scene.change("config.json", lambda record: record["config"]["corpus"].update(store=str(target / "store")))
    return scene, FAULTS[name](scene)


def self_test(faults: int, runs: int, as_json: bool, seed: int = 0) -> int:
    """Trains `runs` runs, audits them, then audits copies with `faults` faults. Returns the exit code: 0 where
    every fault was detected and named, and no untouched run was disbelieved."""
    random = np.random.default_rng(seed)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    missed: list[str] = []
    say = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    with tempfile.TemporaryDirectory() as folder:
        store, made = Path(folder) / "store", []
        corpus.build(str(store), [SOURCE], "bytes", heldout=0.3, shards=2, workers=1)
        interrupted = alarms = 0
        for number in range(runs):
            made.append(Path(folder) / f"run{number}")
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                interrupted += train_tiny(made[-1], store, random)
            result = audit(str(made[-1]))
            if not result.ok:
                alarms += 1
                missed.append(f"false alarm: {result.sentence()}")
            if number % 10 == 9:
                say(f"{number + 1} of {runs} untouched runs trained and audited, {alarms} false alarms")
        names = sorted(FAULTS)
        for number in range(faults):
            name = names[number % len(names)]
            target = Path(folder) / f"fault{number}"
            run = made[int(random.integers(len(made)))]
            _, expected = tampered(run, store, target, name, random)
            differences = audit(str(target / "run")).differences
            named = any(expected.named_by(difference) for difference in differences)
            counts[name].update(injected=1, detected=bool(differences), named=named)
            if not named:
                missed.append(f"{name}: expected {expected}, got {[str(d) for d in differences[:3]]}")
            shutil.rmtree(target)
    total = sum(counts.values(), collections.Counter())
    if as_json:
        print(
            json.dumps(
                {"untouched": runs, "false_alarms": alarms, "interrupted": interrupted, **total, "faults": counts}
            )
        )
    else:
        for name in sorted(counts):
            say(
                f"{name:32} injected {counts[name]['injected']:3}  detected {counts[name]['detected']:3}  named {counts[name]['named']:3}"
            )
        say(
            f"{total['injected']} faults injected, {total['detected']} detected, {total['named']} named; {runs} untouched "
            f"runs ({interrupted} of them interrupted and resumed), {alarms} false alarms"
        )
    for line in missed:
        print(line, file=sys.stderr)
    return 1 if missed else 0
