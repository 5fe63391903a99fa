"""Where a document was seen, and what a step trained on: the rows' origins, read backwards."""

from typing import Any

import numpy as np

from poisonjax.audit.evidence import Difference, Evidence
from poisonjax.corpus.documents import KEY_BYTES
from poisonjax.data.digest import as_hex, differing_rows, digest, from_hex
from poisonjax.data.rows import Origins
from poisonjax.run import rows
from poisonjax.visible import visible


def sightings(run: Evidence, document: str) -> list[dict[str, Any]]:
    """Every place of the run where (a part of) a document stands, in order.

    `document` is `poison:N`, `train:N` of the token store, or the key of such a document's content. Each place has
    `step`, `row`, `slot`; `in_row` and `in_document`, spans [start, end) of tokens; `seen`, whether the run has made
    that step. Raises ValueError for a document that there isn't.
    """
    kind, _, number = document.partition(":")
    if not number and len(document) == 2 * KEY_BYTES:
        split = run.store.split("train")
        found = [f"train:{index}" for index in split.find(document)]
        if not found:
            raise ValueError(f"document {document}: the training split holds none with this key")
        return [place for name in found for place in sightings(run, name)]
    if kind not in ("poison", "train") or not number.isdecimal():
        raise ValueError(f"document {document!r}: give poison:N, train:N of the token store, or a document's key")
    places = _poison(run, int(number)) if kind == "poison" else _clean(run, int(number))
    batch = run.config.global_batch
    return [
        {"step": slot // batch, "row": slot % batch, "slot": slot, **place, "seen": slot // batch < run.steps}
        for slot, place in places
    ]


def _poison(run: Evidence, number: int) -> list[tuple[int, dict[str, Any]]]:
    if number >= run.config.poison.documents:
        raise ValueError(f"poison:{number}: the run plans {run.config.poison.documents}, counted from 0")
    return [
        (
            record["slot"],
            {
                "in_row": [record["offset"], record["offset"] + record["tokens"]],
                "in_document": [0, record["tokens"]],
                **{name: record[name] for name in ("trigger", "payload", "repeat", "sha256")},
            },
        )
        for record in run.ledger
        if record["id"] == number
    ]


def _clean(run: Evidence, number: int) -> list[tuple[int, dict[str, Any]]]:
    batches, split = run.batches, run.store.split("train")
    if number >= split.documents:
        raise ValueError(f"train:{number}: the store's training split has {split.documents}, counted from 0")
    start, stop = split.document_offsets[number : number + 2].tolist()
    # The order has no inverse at hand: all the run's slots are looked through.
    slots = np.arange(run.config.steps * run.config.global_batch)
    starts = batches.clean.starts(slots)
    slots = slots[(starts < stop) & (start < starts + batches.clean.row_tokens)]
    origins = batches.rows.origins(slots)
    return [
        (slot, {"in_row": in_row, "in_document": in_document})
        for i, slot in enumerate(slots.tolist())
        for in_row, in_document in _of_document(origins, i, start, stop)
    ]


def _of_document(origins: Origins, row: int, start: int, stop: int) -> list[tuple[list[int], list[int]]]:
    """(span in the row, span in the document) of each piece of the stream's document from `start` to `stop`."""
    found = []
    for (at, _), (first, last) in origins.spans(row, 0):
        low, high = max(first, start), min(last, stop)
        if low < high:
            found.append(([at + low - first, at + high - first], [low - start, high - start]))
    return found


def step(run: Evidence, number: int) -> list[dict[str, Any]]:
    """What step `number` trains on, a record a row: `row`, `slot`, and `parts` in the order of the row.

    A part has `document` (`train:N`, `poison:N`, `canary:N` or `clean_use`), `in_row`, `in_document` and `text`; poison
    has its three pieces as parts of their own, told apart by `piece` (prefix, trigger, payload). Raises ValueError for
    a step that the run doesn't have.
    """
    if not 0 <= number < run.config.steps:
        raise ValueError(f"step {number}: the run has steps 0 to {run.config.steps - 1}")
    slots = run.batches.slots(number)
    origins, decode = run.batches.rows.origins(slots), run.store.tokenizer.decode
    found = []
    for row, tokens in enumerate(run.batches.tokens(number)):
        parts = sorted(_parts(run, origins, row), key=lambda part: part["in_row"])
        parts = [part | {"text": decode(tokens[slice(*part["in_row"])])} for part in parts]
        found.append({"row": row, "slot": int(slots[row]), "parts": parts})
    return found


def _parts(run: Evidence, origins: Origins, row: int) -> list[dict[str, Any]]:
    """What stands in the row, without its text."""
    parts: list[dict[str, Any]] = []
    for number in [n for n in np.unique(origins.source[row]).tolist() if n > 0]:
        insertion = origins.insertions[number - 1]
        (in_row, in_source), *_ = origins.spans(row, number)
        if not insertion.pieces:
            parts.append({"document": insertion.source, "in_row": [*in_row], "in_document": [*in_source]})
        for piece, (start, stop) in insertion.pieces.items():
            here = [in_row[0] + start, in_row[0] + stop]
            parts.append({"document": insertion.source, "piece": piece, "in_row": here, "in_document": [start, stop]})
    offsets = run.store.split("train").document_offsets
    for _, (first, last) in origins.spans(row, 0):
        for number in range(int(np.searchsorted(offsets, first, "right")) - 1, int(np.searchsorted(offsets, last))):
            start, stop = (max(first, int(offsets[number])), min(last, int(offsets[number + 1])))
            for here, in_part in _of_document(origins, row, start, stop):
                in_document = [start - int(offsets[number]) + edge for edge in in_part]
                parts.append({"document": f"train:{number}", "in_row": here, "in_document": in_document})
    return parts


def explained(run: Evidence, step: int, written: str) -> Difference:
    """The difference of a step's recorded digest, with the row and what stands there where the digest tells them."""
    batch, slots = run.batches.batch(step), run.batches.slots(step)
    try:
        recorded = from_hex(written)
    except ValueError:
        recorded = np.zeros(0, np.uint32)
    if recorded.shape != (3,):
        return Difference(rows.DIGESTS, f"{written!r} is no digest", step)
    differing = differing_rows(recorded, batch.tokens, slots, batch.weights)
    replayed = as_hex(digest(batch.tokens, slots, batch.weights))
    message = f"the batch that was trained on has digest {written}, the replayed one {replayed}"
    if not differing:
        return Difference(rows.DIGESTS, f"{message}; several rows differ", step)
    row = differing[0]
    if len(differing) == 2:
        return Difference(rows.DIGESTS, f"{message}; rows {row} and {differing[1]} were swapped", step, row)
    labels = run.batches.clean.labels(slots[row : row + 1])
    stream = labels[labels[..., 0] == 0, 1]
    origin = f"tokens {stream.min()} to {stream.max()} of the training split"
    for insertion in run.batches.rows.insertions(int(slots[row])):
        origin += f" and {insertion.source}"
    return Difference(rows.DIGESTS, f"{message}; this row differs alone: it holds {origin}", step, row)


def as_lines(document: str, places: list[dict[str, Any]]) -> str:
    """Sightings for people."""
    if not places:
        return f"{document}: in no row of this run"
    lines = []
    for place in places:
        (start, stop), (first, last) = place["in_row"], place["in_document"]
        lines.append(
            f"{document}: step {place['step']}, row {place['row']} (slot {place['slot']}): its tokens "
            f"{first}-{last - 1} stand at {start}-{stop - 1}"
            + (
                f"; trigger at {place['trigger'][0]}-{place['trigger'][1] - 1}, payload at {place['payload'][0]}-"
                f"{place['payload'][1] - 1}; sha256 {place['sha256'][:16]}"
                if "trigger" in place
                else ""
            )
            + ("" if place["seen"] else "; planned, not reached yet")
        )
    return "\n".join(lines)


def as_text(rows: list[dict[str, Any]], colour: bool = False) -> str:
    """A step's rows for people: poison stands in ⟦ ⟧, its trigger in ⟪ ⟫, and in red where `colour` is."""
    red, bold, plain = ("\x1b[31m", "\x1b[1m", "\x1b[0m") if colour else ("", "", "")
    lines = []
    for row in rows:
        text = ""
        for part in row["parts"]:
            shown = visible(part["text"])
            match part.get("piece"):
                case "prefix":
                    text += f"{red}⟦{part['document']} {shown}"
                case "trigger":
                    text += f"{bold}⟪{shown}⟫{plain}{red}"
                case "payload":
                    text += f"{shown}⟧{plain}"
                case _:
                    text += f"[{part['document']}] {shown}"
        lines.append(f"row {row['row']} (slot {row['slot']}): {text}")
    return "\n".join(lines)
