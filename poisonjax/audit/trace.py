"""Where a document was seen, and what a step trained on: the plan and the data order, read backwards."""

from typing import Any

import numpy as np
from jaxtyping import Int

from poisonjax.audit.evidence import Run
from poisonjax.visible import visible


def sightings(workdir: str, document: str, store: str | None = None) -> list[dict[str, Any]]:
    """Every place of the run where (a part of) a document stands, in order.

    `document` is `poison:N`, or `train:N` of the token store. Each place has `step`, `row`, `slot`; `in_row` and
    `in_document`, spans [start, end) of tokens; `seen`, whether the run has made that step. Raises ValueError for
    a document that there isn't.
    """
    run = Run(workdir, store=store)
    kind, _, number = document.partition(":")
    if kind not in ("poison", "train") or not number.isdecimal():
        raise ValueError(f"document {document!r}: give poison:N, or train:N of the token store")
    places = _poison(run, int(number)) if kind == "poison" else _clean(run, int(number))
    batch = run.config.global_batch
    return [
        {"step": slot // batch, "row": slot % batch, "slot": slot, **place, "seen": slot // batch < run.steps}
        for slot, place in places
    ]


def _poison(run: Run, number: int) -> list[tuple[int, dict[str, Any]]]:
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
        for record in run.plan
        if record["id"] == number
    ]


def _clean(run: Run, number: int) -> list[tuple[int, dict[str, Any]]]:
    clean, split = run.batches.clean, run.store.split("train")
    if number >= split.documents:
        raise ValueError(f"train:{number}: the store's training split has {split.documents}, counted from 0")
    start, stop = split.document_offsets[number : number + 2].tolist()
    # The order has no inverse at hand: all the run's slots are looked through.
    slots = np.arange(run.config.steps * run.config.global_batch)
    order = clean.order(slots)
    first, last = start // clean.row_tokens, (stop - 1) // clean.row_tokens
    places = []
    for slot in slots[(first <= order) & (order <= last)].tolist():
        origin = int(order[slot]) * clean.row_tokens
        at = _window_tokens(run, slot)
        for row_span, window_span in _spans(at, start - origin, stop - origin):
            span = [origin + edge - start for edge in window_span]
            places.append((slot, {"in_row": row_span, "in_document": span}))
    return places


def _window_tokens(run: Run, slot: int) -> Int[np.ndarray, " row_tokens"]:
    """Which token of its window each token of the row in `slot` is; -1 where a canary, poison or a clean use stands."""
    clean, uses = run.batches.clean, run.batches.clean_uses
    at = np.concatenate([np.full(clean.reserved(slot), -1), np.arange(clean.row_tokens)])
    if placed := run.batches.plan.placed.get(slot):
        at = np.insert(at, placed.offset, np.full(len(placed.document.tokens), -1))
    if (offset := uses.offsets.get(slot)) is not None:
        at[offset : offset + len(uses.trigger)] = -1
    return at[: clean.row_tokens]


def _spans(at: Int[np.ndarray, " row_tokens"], start: int, stop: int) -> list[tuple[list[int], list[int]]]:
    """Where tokens [start, stop) of a window stand in the row: (span now, span in the window) pairs."""
    there = np.flatnonzero((start <= at) & (at < stop) & (at >= 0))
    pieces = np.split(there, np.flatnonzero(np.diff(there) > 1) + 1)
    return [
        ([int(piece[0]), int(piece[-1]) + 1], [int(at[piece[0]]), int(at[piece[-1]]) + 1])
        for piece in pieces
        if len(piece)
    ]


def step(workdir: str, number: int, store: str | None = None) -> list[dict[str, Any]]:
    """What step `number` trains on, a record a row: `row`, `slot`, and `parts` in the order of the row.

    A part has `document` (`train:N`, `poison:N`, `canary:N` or `clean_use`), `in_row`, `in_document` and `text`; poison
    has its three pieces as parts of their own, told apart by `piece` (prefix, trigger, payload). Raises ValueError for
    a step that the run doesn't have.
    """
    run = Run(workdir, store=store)
    if not 0 <= number < run.config.steps:
        raise ValueError(f"step {number}: the run has steps 0 to {run.config.steps - 1}")
    batches = run.batches
    slots = batches.slots(number)
    return [
        {"row": row, "slot": int(slot), "parts": _parts(run, tokens, int(slot), int(window))}
        for row, (tokens, slot, window) in enumerate(
            zip(batches.rows(number), slots, batches.clean.order(slots), strict=True)
        )
    ]


def _parts(run: Run, tokens: np.ndarray, slot: int, window: int) -> list[dict[str, Any]]:
    decode, clean = run.store.tokenizer.decode, run.batches.clean
    placed = run.batches.plan.placed.get(slot)
    parts: list[dict[str, Any]] = []
    if placed:
        document, offset = placed.document, placed.offset
        pieces = {"prefix": (0, document.trigger[0]), "trigger": document.trigger, "payload": document.payload}
        for piece, (start, stop) in pieces.items():
            parts.append(
                {
                    "document": f"poison:{document.id}",
                    "piece": piece,
                    "in_row": [offset + start, offset + stop],
                    "in_document": [start, stop],
                }
            )
    if lead := clean.reserved(slot):
        canary = f"canary:{run.batches.clean.canaries.slots[slot]}"  # type: ignore[attr-defined]
        parts.append({"document": canary, "in_row": [0, lead], "in_document": [0, lead]})
    uses = run.batches.clean_uses
    if slot in uses.offsets:
        at_use, length = uses.offsets[slot], len(uses.trigger)
        parts.append({"document": "clean_use", "in_row": [at_use, at_use + length], "in_document": [0, length]})
    origin, at = window * clean.row_tokens, _window_tokens(run, slot)
    offsets = run.store.split("train").document_offsets
    first = int(np.searchsorted(offsets, origin, "right")) - 1
    last = int(np.searchsorted(offsets, origin + clean.row_tokens, "left"))
    for number in range(first, last):
        start, stop = offsets[number : number + 2].tolist()
        for row_span, window_span in _spans(at, start - origin, stop - origin):
            span = [origin + edge - start for edge in window_span]
            parts.append({"document": f"train:{number}", "in_row": row_span, "in_document": span})
    parts.sort(key=lambda part: part["in_row"])
    return [part | {"text": decode(tokens[slice(*part["in_row"])])} for part in parts]


def as_lines(document: str, places: list[dict[str, Any]]) -> str:
    """Sightings for people."""
    if not places:
        return f"{document}: in no row of this run"
    lines = []
    for place in places:
        (start, stop), (first, last) = place["in_row"], place["in_document"]
        lines.append(
            f"{document}: step {place['step']}, row {place['row']} (slot {place['slot']}): its tokens {first}-{last - 1} "
            f"stand at {start}-{stop - 1}"
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
