"""Checks of what was trained on: config, store, schedule, and every batch by its digest.

Each check is a function registered in `CHECKS` that yields the differences it finds; `quoted` has the checks of
figures, weights and cards. Between them they rest on one thing alone: that the checkpoints' records, which the trainer
wrote beside the weights, are genuine. `poisonjax attest` signs those.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from tqdm import tqdm

from poisonjax import config as config_lib
from poisonjax.audit.evidence import Difference, Evidence, reading
from poisonjax.audit.locate import explained
from poisonjax.corpus import SPLITS
from poisonjax.corpus import exclusions as exclusion_lists
from poisonjax.data.digest import as_hex, digest
from poisonjax.data.insertions import Layer
from poisonjax.run import rows
from poisonjax.run.folder import inherited_lines

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
    where = str(run.store.path / "manifest.json")
    if there != recorded:
        yield Difference(where, f"the store is {there[:12]}, config.json names {recorded[:12]}")
    elif run.store.description != run.record["store_description"]:
        yield Difference(where, "its sources, licences or settings aren't those that config.json names")
    if run.whole:
        for problem in run.store.verify():
            file, _, message = problem.partition(": ")
            yield Difference(file, message or problem)


@register
def exclusions(run: Evidence) -> Iterator[Difference]:
    """No document that corpus.exclude lists is in what the run read: by the list it keeps, and each document's key."""
    if not run.config.corpus.exclude:
        return
    listed = run.store.exclusions
    assert listed
    if listed.sha256 != run.record.get("store_excluded"):
        yield Difference(exclusion_lists.FILE, "isn't the list that config.json names")
    for name in SPLITS:
        with reading(str(run.store.path)):
            keys = run.store.split(name).keys.astype(">u8")
        # One by one: `Exclusions.among` is what left them out.
        if there := sum(key.tobytes() in listed.keys for key in keys):
            yield Difference(str(run.store.path), f"{there} listed documents stand in the {name} split that was read")


@register
def ledger(run: Evidence) -> Iterator[Difference]:
    """ledger.jsonl is the schedule, line by line, after what the weights that the run began from had seen."""
    there = run.lines(rows.LEDGER)
    if there[: len(there) - len(run.exposures)] != inherited_lines(run.parent):
        yield Difference(rows.LEDGER, "its inherited poison isn't that of the weights that the run began from")
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
    lines = [line for line in run.lines(file) if "inherited" not in line]
    written = {record["slot"]: record for record in lines}
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
    if len(lines) != len(written):
        yield Difference(file, f"{len(lines) - len(written)} lines name a slot a second time")
    if run.run.raw_lines(file)[1]:
        yield Difference(file, "its last line has no end")


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
    uses, poison = batches.uses(), batches.poison.insertions

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
        in_text = batches.trigger.begins(text)
        used = sum(int(in_text[i, uses[slot]]) for i, slot in enumerate(slots.tolist()) if slot in uses)
        return step, digest(batch.tokens, slots, batch.weights), found, used, int(in_text.sum()) - used

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    yield from grain.MapDataset.range(len(steps)).map(one).to_iter_dataset(options)
