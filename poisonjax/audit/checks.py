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
from poisonjax.audit.evidence import Difference, Run, Unreadable
from poisonjax.data.digest import as_hex, chain, differing_rows, digest, from_hex
from poisonjax.poison.plan import dose, met, occurrences

T = TypeVar("T")
Check = Callable[[Run], Iterator[Difference]]
CHECKS: dict[str, Check] = {}


def register(check: Check) -> Check:
    CHECKS[check.__name__] = check
    return check


@register
def config(run: Run) -> Iterator[Difference]:
    """config.json is the config that its fingerprint names, in every file that repeats it."""
    there = config_lib.fingerprint(run.config)
    if there != run.record.get("fingerprint"):
        yield Difference("config.json", f"its fields have fingerprint {there[:12]}, not the one it records")
    if "fingerprint" in run.summary and run.summary["fingerprint"] != there:
        yield Difference("config.json", f"isn't the config {run.summary['fingerprint'][:12]} of summary.json")


@register
def store(run: Run) -> Iterator[Difference]:
    """The token store is the one that the run read; where every step is replayed, each file's SHA-256 too."""
    if run.store.fingerprint != run.record.get("store_fingerprint"):
        yield Difference(
            str(run.store.path / "manifest.json"),
            f"the store is {run.store.fingerprint[:12]}, config.json names {str(run.record.get('store_fingerprint'))[:12]}",
        )
    if run.whole:
        for problem in run.store.verify():
            file, _, message = problem.partition(": ")
            yield Difference(file, message or problem)


@register
def ledger(run: Run) -> Iterator[Difference]:
    """ledger.jsonl is the plan, line by line."""
    yield from _line_by_line(run, "ledger.jsonl", run.plan, lambda record: f"poison document {record['id']}")


@register
def clean_rows(run: Run) -> Iterator[Difference]:
    """canaries.jsonl and clean_uses.jsonl, where there are such, are what the config plans."""
    for file, records in run.batches.clean_records().items():
        yield from _line_by_line(
            run, file, records, lambda record: f"canary {record['canary']}" if "canary" in record else "a clean use"
        )


def _line_by_line(run: Run, file: str, records: list[dict], name: Callable[[dict], str]) -> Iterator[Difference]:
    """How a file of one line a slot differs from the records that it should hold."""
    written = {record["slot"]: record for record in run.lines(file)}
    planned = {record["slot"]: record for record in records}
    for slot in sorted(written.keys() | planned.keys()):
        step, row = divmod(slot, run.config.global_batch)
        if slot not in written:
            message = f"{name(planned[slot])} is planned here, but has no line"
        elif slot not in planned:
            message = f"{name(written[slot])} is written here, but not planned"
        elif written[slot] != planned[slot]:
            fields = planned[slot].keys() | written[slot].keys()
            field = min(f for f in fields if written[slot].get(f) != planned[slot].get(f))
            message = (
                f"{name(planned[slot])}: {field} is {written[slot].get(field)!r}, planned {planned[slot].get(field)!r}"
            )
        else:
            continue
        yield Difference(file, message, step, row)
    if len(run.lines(file)) != len(written):
        yield Difference(file, f"{len(run.lines(file)) - len(written)} lines name a slot a second time")


@register
def digests(run: Run) -> Iterator[Difference]:
    """digests.jsonl holds every step once, in order, with the digest of the batch replayed from the sources."""
    steps = [row["step"] for row in run.lines("digests.jsonl")]
    if steps and max(steps) >= run.steps:
        yield Difference("digests.jsonl", f"the config ends after {run.steps} steps", max(steps))
    for line, (step, before) in enumerate(zip(steps, [-1, *steps], strict=False), 1):
        if step != before + 1:
            yield Difference("digests.jsonl", f"line {line} follows step {before}", step)
            break
    chosen = run.replayed()
    replays = tqdm(replay(run, chosen), total=len(chosen), unit="step", leave=False, disable=not sys.stderr.isatty())
    for step, replayed, found, uses, elsewhere in replays:
        written = run.digests.get(step)
        if written is None:
            yield Difference("digests.jsonl", "has no digest of this step", step)
        elif written != as_hex(replayed):
            yield _explained(run, step, written)
        else:
            run.verified.add(step)
            run.found.update(found)
            run.clean_uses += uses
            run.elsewhere += elsewhere


def replay(run: Run, steps: Sequence[int]) -> Iterator[tuple[int, np.ndarray, list[int], int, int]]:
    """(step, digest, poison documents found whole at their places, planned clean uses of the trigger found, other
    occurrences of it outside of poison documents) of each step, through the reader that training uses."""
    batches = run.batches
    uses = batches.clean_uses

    def one(index: int):
        step = steps[int(index)]
        rows, slots = batches.rows(step), batches.slots(step)
        found, text = [], rows.copy()  # text: of -1 where poison stands
        for i, slot in enumerate(slots.tolist()):
            if placed := batches.plan.placed.get(slot):
                document = text[i, placed.offset :][: len(placed.document.tokens)]
                if np.array_equal(document, placed.document.tokens):
                    found.append(placed.document.id)
                document[:] = -1
        in_text = occurrences(text, uses.trigger)
        used = sum(int(in_text[i, uses.offsets[slot]]) for i, slot in enumerate(slots.tolist()) if slot in uses.offsets)
        return step, digest(rows, slots), found, used, int(in_text.sum()) - used

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    yield from grain.MapDataset.range(len(steps)).map(one).to_iter_dataset(options)


def _explained(run: Run, step: int, written: str) -> Difference:
    """The difference of a digest, with the row and the store's file where the digest tells them."""
    batches = run.batches
    rows, slots = batches.rows(step), batches.slots(step)
    try:
        recorded = from_hex(written)
    except ValueError:
        recorded = np.zeros(0, np.uint32)
    if recorded.shape != (3,):
        return Difference("digests.jsonl", f"{written!r} is no digest", step)
    differing = differing_rows(recorded, rows, slots)
    message = f"the batch that was trained on has digest {written}, the replayed one {as_hex(digest(rows, slots))}"
    if not differing:
        return Difference("digests.jsonl", f"{message}; several rows differ", step)
    row = differing[0]
    if len(differing) == 2:
        return Difference("digests.jsonl", f"{message}; rows {row} and {differing[1]} were swapped", step, row)
    slot = int(slots[row])
    start = int(batches.clean.order(slots[row : row + 1])[0]) * batches.clean.row_tokens
    origin = f"tokens {start} to {start + batches.clean.row_tokens - 1} of the training split"
    if slot in batches.plan.placed:
        origin += f" and poison document {batches.plan.placed[slot].document.id}"
    return Difference("digests.jsonl", f"{message}; this row differs alone: it holds {origin}", step, row)


@register
def checkpoints(run: Run) -> Iterator[Difference]:
    """Each checkpoint is of the step that its name says, of this config and store, and of these digests."""
    here = config_lib.flat(run.config)
    links, link = {0: ""}, ""
    for step in range(run.steps):
        if step not in run.digests:
            break
        link = links[step + 1] = chain(link, step, run.digests[step])
    for name, record in run.checkpoints.items():
        file = f"checkpoints/{name}"
        if record.get("step") != name:
            yield Difference(file, f"was saved after step {record.get('step')}, not {name}")
        for difference in config_lib.differences(record.get("config", {}), here):
            yield Difference("config.json", f"{difference}; there is {file}")
        if record.get("store_fingerprint") != run.store.fingerprint:
            there, now = str(record.get("store_fingerprint"))[:12], run.store.fingerprint[:12]
            yield Difference(str(run.store.path), f"{file} was trained on store {there}, this is {now}")
        if record.get("digest_chain") != links.get(record.get("step", -1)):
            yield Difference(file, "its digest chain isn't the one that digests.jsonl leads to", name)
    if run.summary.get("status") == "finished" and run.config.steps not in run.checkpoints:
        yield Difference("checkpoints", "the finished run's last checkpoint is missing", run.config.steps)
    folder = run.folder / "checkpoints"
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if not (path.name.isdecimal() or "orbax-checkpoint-tmp" in path.name):  # a killed save leaves those
            yield Difference(f"checkpoints/{path.name}", "is no checkpoint of a step")


NEWER = ("trigger_tokens", "clean_uses_seen")  # fields of summary.json that the first runs didn't have


@register
def summary(run: Run) -> Iterator[Difference]:
    """summary.json counts what plan and digests say."""
    if not run.summary:
        return
    link = ""
    for step in sorted(run.digests):
        link = chain(link, step, run.digests[step])
    expected: dict[str, Any] = {
        "steps": run.steps,
        "tokens": run.steps * run.config.global_batch * run.config.seq_len,
        "dose_planned": dose(run.plan, run.config.steps),
        "dose_seen": dose(run.plan, run.steps),
        "trigger_tokens": len(run.batches.clean_uses.trigger),
        "clean_uses_seen": run.batches.clean_uses.met(run.steps * run.config.global_batch),
        "digest_chain": link,
    }
    for field, value in expected.items():
        if field not in run.summary and field in NEWER:
            continue  # a run of before there was such a field
        if run.summary.get(field) != value:
            yield Difference("summary.json", f"{field} is {run.summary.get(field)!r}, must be {value!r}")


@register
def metrics(run: Run) -> Iterator[Difference]:
    """metrics.jsonl counts tokens and poison as the plan does, at steps that the run made."""
    seen = met(run.plan, run.config.steps)
    per_step = run.config.global_batch * run.config.seq_len
    for row in run.lines("metrics.jsonl"):
        done = row["step"] + (row["kind"] == "train")
        if not 0 <= done <= run.steps:
            yield Difference("metrics.jsonl", "a row of a step that the run didn't make", row["step"])
            continue
        expected = {"tokens": done * per_step, **seen(done)}
        for field, value in expected.items():
            if row.get(field) != value:
                yield Difference("metrics.jsonl", f"{field} is {row.get(field)}, must be {value}", row["step"])


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
    run = Run(workdir, steps, sample, store)
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
    planned = _or(lambda: run.plan, none)
    slots = {record["slot"] for record in planned}
    return Audit(
        differences=differences,
        steps=made,
        verified=sorted(run.verified),
        planned=planned,
        found=run.found,
        unplanned=sum(record["slot"] not in slots for record in _or(lambda: run.lines("ledger.jsonl"), none)),
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
