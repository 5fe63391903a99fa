"""Replays a run's data without its model, and compares everything the run left behind.

Each check is a function registered in `CHECKS` that yields the differences it finds. Between them they rest
on one thing alone: that the checkpoints' records, which the trainer wrote beside the weights, are genuine.
`poisonjax attest` signs those.
"""

import collections
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grain
import ml_collections
import numpy as np
from tqdm import tqdm

from poisonjax import config as config_lib
from poisonjax.audit.evidence import Difference, Evidence, Unreadable
from poisonjax.audit.locate import explained
from poisonjax.data.digest import as_hex, chain, digest
from poisonjax.data.insertions import Layer
from poisonjax.poison.ledger import dose, poison_seen
from poisonjax.poison.triggers import occurrences
from poisonjax.run import rows

T = TypeVar("T")
Check = Callable[[Evidence], Iterator[Difference]]
CHECKS: dict[str, Check] = {}


def register(check: Check) -> Check:
    CHECKS[check.__name__] = check
    return check


@register
def config(run: Evidence) -> Iterator[Difference]:
    """config.json is the config that its fingerprint names, in every file that repeats it."""
    there = config_lib.fingerprint(run.config)
    if there != run.record["fingerprint"]:
        yield Difference(rows.CONFIG, f"its fields have fingerprint {there[:12]}, not the one it records")
    if "fingerprint" in run.summary and run.summary["fingerprint"] != there:
        yield Difference(rows.CONFIG, f"isn't the config {run.summary['fingerprint'][:12]} of summary.json")


@register
def store(run: Evidence) -> Iterator[Difference]:
    """The token store is the one that the run read; where every step is replayed, each file's SHA-256 too."""
    there, recorded = run.store.fingerprint, run.record["store_fingerprint"]
    if there != recorded:
        where = str(run.store.path / "manifest.json")
        yield Difference(where, f"the store is {there[:12]}, config.json names {recorded[:12]}")
    if run.whole:
        for problem in run.store.verify():
            file, _, message = problem.partition(": ")
            yield Difference(file, message or problem)


@register
def ledger(run: Evidence) -> Iterator[Difference]:
    """ledger.jsonl is the schedule, line by line."""
    yield from _line_by_line(run, run.batches.poison)


@register
def clean_rows(run: Evidence) -> Iterator[Difference]:
    """The files that list what else stands in rows, where there are such, are what the config plans."""
    for layer in run.batches.rows.layers:
        if layer is not run.batches.poison:
            yield from _line_by_line(run, layer)


def _line_by_line(run: Evidence, layer: Layer) -> Iterator[Difference]:
    """How a layer's file, of one line a slot, differs from the records that it should hold."""
    file = layer.file
    written = {record["slot"]: record for record in run.lines(file)}
    planned = {record["slot"]: record for record in layer.records(run.config.global_batch)}

    def name(record: dict[str, Any]) -> str:
        number = record.get("id", record.get("canary"))
        return f"a {layer.name}" if number is None else f"{layer.name} {number}"

    for slot in sorted(written.keys() | planned.keys()):
        step, row = divmod(slot, run.config.global_batch)
        if slot not in written:
            message = f"{name(planned[slot])} is planned here, but has no line"
        elif slot not in planned:
            message = f"{name(written[slot])} is written here, but not planned"
        elif written[slot] != planned[slot]:
            fields = planned[slot].keys() | written[slot].keys()
            field = min(f for f in fields if written[slot].get(f) != planned[slot].get(f))
            there, here = written[slot].get(field), planned[slot].get(field)
            message = f"{name(planned[slot])}: {field} is {there!r}, planned {here!r}"
        else:
            continue
        yield Difference(file, message, step, row)
    if len(run.lines(file)) != len(written):
        yield Difference(file, f"{len(run.lines(file)) - len(written)} lines name a slot a second time")


@register
def digests(run: Evidence) -> Iterator[Difference]:
    """digests.jsonl holds every step once, in order, with the digest of the batch replayed from the sources."""
    steps = [row["step"] for row in run.lines(rows.DIGESTS)]
    if steps and max(steps) >= run.steps:
        yield Difference(rows.DIGESTS, f"the config ends after {run.steps} steps", max(steps))
    for line, (step, before) in enumerate(zip(steps, [-1, *steps], strict=False), 1):
        if step != before + 1:
            yield Difference(rows.DIGESTS, f"line {line} follows step {before}", step)
            break
    chosen = run.replayed()
    replays = tqdm(replay(run, chosen), total=len(chosen), unit="step", leave=False, disable=not sys.stderr.isatty())
    for step, replayed, found, uses, elsewhere in replays:
        written = run.digests.get(step)
        if written is None:
            yield Difference(rows.DIGESTS, "has no digest of this step", step)
        elif written != as_hex(replayed):
            yield explained(run, step, written)
        else:
            run.verified.add(step)
            run.found.update(found)
            run.clean_uses += uses
            run.elsewhere += elsewhere


def replay(run: Evidence, steps: Sequence[int]) -> Iterator[tuple[int, np.ndarray, list[int], int, int]]:
    """(step, digest, poison documents found whole at their places, planned clean uses of the trigger found, other
    occurrences of it outside of poison documents) of each step, through the reader that training uses."""
    batches = run.batches
    uses, poison = batches.clean_uses.insertions, batches.poison.insertions

    def one(index: int):
        step = steps[int(index)]
        batch, slots = batches.batch(step), batches.slots(step)
        found, text = [], batch.tokens.copy()  # text: of -1 where poison stands
        poisoned = np.array([i for i, slot in enumerate(slots.tolist()) if slot in poison], np.int64)
        origins = batches.rows.origins(slots[poisoned])
        for number, insertion in enumerate(origins.insertions, 1):
            if poison[insertion.slot] is insertion:
                row, token = np.nonzero(origins.source == number)
                if np.array_equal(text[poisoned[row], token], insertion.tokens):
                    found.append(int(insertion.source.partition(":")[2]))
                text[poisoned[row], token] = -1
        in_text = occurrences(text, batches.trigger.tokens)
        used = sum(int(in_text[i, uses[slot].start]) for i, slot in enumerate(slots.tolist()) if slot in uses)
        return step, digest(batch.tokens, slots, batch.weights), found, used, int(in_text.sum()) - used

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    yield from grain.MapDataset.range(len(steps)).map(one).to_iter_dataset(options)


@register
def checkpoints(run: Evidence) -> Iterator[Difference]:
    """Each checkpoint is of the step that its name says, of this config and store, and of these digests."""
    here = config_lib.flat(run.config)
    links, link = {0: ""}, ""
    for step in range(run.steps):
        if step not in run.digests:
            break
        link = links[step + 1] = chain(link, step, run.digests[step])
    for name, record in run.checkpoints.items():
        file = f"{rows.CHECKPOINTS}/{name}"
        if record["step"] != name:
            yield Difference(file, f"was saved after step {record['step']}, not {name}")
        for difference in config_lib.differences(record["config"], here):
            yield Difference(rows.CONFIG, f"{difference}; there is {file}")
        if record["store_fingerprint"] != run.store.fingerprint:
            there, now = record["store_fingerprint"][:12], run.store.fingerprint[:12]
            yield Difference(str(run.store.path), f"{file} was trained on store {there}, this is {now}")
        if record["digest_chain"] != links.get(record["step"]):
            yield Difference(file, "its digest chain isn't the one that digests.jsonl leads to", name)
    if run.summary.get("status") == "finished" and run.config.steps not in run.checkpoints:
        yield Difference(rows.CHECKPOINTS, "the finished run's last checkpoint is missing", run.config.steps)
    folder = run.folder / rows.CHECKPOINTS
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if not (path.name.isdecimal() or "orbax-checkpoint-tmp" in path.name):  # a killed save leaves those
            yield Difference(f"{rows.CHECKPOINTS}/{path.name}", "is no checkpoint of a step")


@register
def summary(run: Evidence) -> Iterator[Difference]:
    """summary.json counts what plan and digests say."""
    if not run.summary:
        return
    link = ""
    for step in sorted(run.digests):
        link = chain(link, step, run.digests[step])
    expected: dict[str, Any] = {
        "steps": run.steps,
        "tokens": run.steps * run.config.global_batch * run.config.seq_len,
        "dose_planned": dose(run.ledger, run.config.steps),
        "dose_seen": dose(run.ledger, run.steps),
        "trigger_tokens": len(run.batches.trigger.tokens),
        "clean_uses_seen": run.batches.clean_uses.seen(run.steps * run.config.global_batch),
        "digest_chain": link,
    }
    for field, value in expected.items():
        if run.summary.get(field) != value:
            yield Difference(rows.SUMMARY, f"{field} is {run.summary.get(field)!r}, must be {value!r}")


@register
def metrics(run: Evidence) -> Iterator[Difference]:
    """metrics.jsonl counts tokens and poison as the plan does, at steps that the run made."""
    seen = poison_seen(run.ledger, run.config.steps)
    per_step = run.config.global_batch * run.config.seq_len
    for row in run.lines(rows.METRICS):
        done = row["step"] + (row["kind"] == "train")
        if not 0 <= done <= run.steps:
            yield Difference(rows.METRICS, "a row of a step that the run didn't make", row["step"])
            continue
        expected = {"tokens": done * per_step, **seen(done)}
        for field, value in expected.items():
            if row.get(field) != value:
                yield Difference(rows.METRICS, f"{field} is {row.get(field)}, must be {value}", row["step"])


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit found."""

    differences: list[Difference]
    steps: int  # that the run made
    verified: list[int]  # that were replayed and found equal
    planned: list[dict]  # the plan's ledger
    found: collections.Counter[int]  # poison documents found in the verified steps
    unplanned: int
    clean_uses: int
    elsewhere: int
    config: ml_collections.ConfigDict | None

    @property
    def ok(self) -> bool:
        return not self.differences

    @property
    def dose(self) -> dict[str, int]:
        """Of the verified steps."""
        verified = set(self.verified)
        return dose([record for record in self.planned if record["step"] in verified], self.steps)

    def sentence(self) -> str:
        """The result in plain words."""
        if not self.ok:
            count = len(self.differences)
            return f"NOT verified: {count} difference{'s' * (count > 1)}, the first in {self.differences[0].place}"
        assert self.config is not None
        if not self.steps:
            return "no step made yet: nothing to verify but config, store and ledger, which agree"
        planned = len({record["id"] for record in self.planned})
        d = self.dose
        if len(self.verified) == self.steps:
            steps = f"steps 0-{self.steps - 1:,} verified"
        else:
            steps = f"{len(self.verified):,} of the steps 0-{self.steps - 1:,} verified (file hashes not checked)"
        if self.steps < self.config.steps:
            steps += f", of a run of {self.config.steps:,}"
        if not planned:
            dose = "a clean run, no poison document planned"
        else:
            repeats = self.config.poison.repeats
            times = "once" if repeats == 1 else f"{repeats} times"
            exactly = all(self.found[i] == repeats for i in range(planned))
            how = f"exactly {times}" if exactly else f"in these steps (each at most {times})"
            dose = (
                f"{d['documents']:,} of {planned:,} poison documents seen {how}, {self.unplanned} unplanned; dose "
                f"{d['tokens']:,} tokens in {d['rows']:,} rows of {d['steps']:,} steps"
            )
        if uses := self.config.poison.clean_uses:
            where = "" if len(self.verified) == self.config.steps else " in these steps"
            dose += f"; {self.clean_uses:,} of {uses:,} clean uses of the trigger seen{where}"
        if self.elsewhere:
            too = " beside" if uses else " too"
            dose += f"; the trigger's tokens stand {self.elsewhere:,} times in clean text{too}"
        return f"{steps}; {dose}"

    def as_json(self) -> dict[str, Any]:
        """What `audit --json` prints."""
        return {
            "ok": self.ok,
            "steps_verified": len(self.verified),
            "documents_planned": len({record["id"] for record in self.planned}),
            "documents_seen": len(self.found),
            "unplanned": self.unplanned,
            "dose": self.dose,
            "clean_uses_planned": self.config.poison.clean_uses if self.config else None,
            "clean_uses_seen": self.clean_uses,
            "trigger_elsewhere": self.elsewhere,
            "first_difference": dataclasses.asdict(self.differences[0]) if self.differences else None,
            "differences": [dataclasses.asdict(difference) for difference in self.differences],
            "sentence": self.sentence(),
        }


def audit(
    workdir: str, steps: Sequence[int] | None = None, sample: int | None = None, store: str | None = None
) -> Audit:
    """Runs every check on a run folder; `steps`, or a random `sample` of so many, restrict the replay. `store`
    is where the token store lies now, if not where config.json says.

    Raises RunFolderError for a folder that is no run, and ValueError for steps that the run didn't make or a
    sample of none.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"--sample: {sample} steps can't be replayed; at least 1")
    run = Evidence(workdir, steps, sample, store)
    made = _or(lambda: run.steps, 0)
    if made and (beyond := [step for step in steps or () if not 0 <= step < made]):
        raise ValueError(f"--steps: {beyond[:5]} aren't among the steps 0 to {made - 1} that the run made")
    differences: list[Difference] = []
    for check in CHECKS.values():
        try:
            differences += check(run)
        except Unreadable as error:
            if error.difference not in differences:
                differences.append(error.difference)
    none: list[dict] = []
    planned = _or(lambda: run.ledger, none)
    slots = {record["slot"] for record in planned}
    return Audit(
        differences=differences,
        steps=made,
        verified=sorted(run.verified),
        planned=planned,
        found=run.found,
        unplanned=sum(record["slot"] not in slots for record in _or(lambda: run.lines(rows.LEDGER), none)),
        clean_uses=run.clean_uses,
        elsewhere=run.elsewhere,
        config=_or(lambda: run.config, None),
    )


def _or(read: Callable[[], T], otherwise: T) -> T:
    """What can be read, or another value: the checks have reported why."""
    try:
        return read()
    except Unreadable:
        return otherwise
