"""One shard of a token store: its part of the sources read, tokenized, split, shuffled and written."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int, Shaped

from poisonjax.corpus import exclusions, instructions
from poisonjax.corpus.arrays import write_array
from poisonjax.corpus.claim import units_sha256
from poisonjax.corpus.documents import Document, Place
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.exclusions import Exclusions, read_exclusions
from poisonjax.corpus.sources import BadInput, Source, open_source
from poisonjax.corpus.sources.source import NoDocument
from poisonjax.corpus.split import SPLITS
from poisonjax.corpus.tokenizers import load_saved
from poisonjax.files import files_below, move_folder, sha256_of, write_whole
from poisonjax.streams import stream

BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 8_000_000  # encoded at once
REPORTED = 20  # places of bad input that the manifest names


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is being built: all that decides the content of the store. Lies in plan.json and in the manifest."""

    format: int
    sources: list[str]
    tokenizer: str
    heldout: float
    seed: int
    on_bad: str
    excluded: str  # SHA-256 of the listed keys; "" = no list
    shards: int
    units: int
    units_sha256: str
    template: str = ""  # chat template by which conversations are written; "": documents are texts
    template_sha256: str = ""  # of what it says

    def opened(self) -> list[Source]:
        """Its sources; each is opened once a process."""
        return [_opened(spec, bool(self.template)) for spec in self.sources]


def build_shard(out: str, plan: Plan, number: int) -> None:
    """Reads, tokenizes, splits, shuffles and writes one shard: whole, or not at all."""
    folder = epath.Path(out)
    tokenizer = load_saved(folder / "tokenizer")
    listed = read_exclusions(folder / exclusions.FILE) if plan.excluded else Exclusions(frozenset())
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    documents: dict[str, list[_Tokenized]] = {split: [] for split in SPLITS}
    counts: dict[str, dict[str, int]] = {split: {"characters": 0, "bytes": 0} for split in SPLITS}
    bad: list[BadInput] = []
    left_out: collections.Counter[bytes] = collections.Counter()

    units = [unit for source in plan.opened() for unit in source.units]
    if units_sha256(units) != plan.units_sha256:  # every worker lists them itself
        raise CorpusError(f"{out}: files of {', '.join(plan.sources)} changed while the store was being built")
    template, sha256 = instructions.load(plan.template) if plan.template else ("", "")
    if sha256 != plan.template_sha256:
        raise CorpusError(f"{out}: the chat template {plan.template} changed while the store was being built")
    units = units[number :: plan.shards]
    for batch in _batches(_good((item for unit in units for item in unit.read()), plan.on_bad, bad)):
        keyed = [(document, document.key) for document in batch]
        left_out.update(key for _, key in keyed if key in listed.keys)
        keyed = [(document, key) for document, key in keyed if key not in listed.keys]
        texts = [] if plan.template else [d.content for d, _ in keyed if isinstance(d.content, str)]
        encoded = iter(tokenizer.encode_batch(texts))
        for document, key in keyed:
            content, turns = document.content, None
            if plan.template:
                try:
                    ids, turns = instructions.tokenized(str(content), template, tokenizer)
                except NoDocument as why:
                    _note_bad(BadInput(str(document.place), str(why)), plan.on_bad, bad)
                    continue
            else:
                ids = next(encoded) if isinstance(content, str) else content
            if not len(ids) or (turns is None and (ids == tokenizer.eot).any()):  # a template may end turns by it
                made = "end-of-text tokens" if len(ids) else "nothing"
                _note_bad(BadInput(str(document.place), f"the tokenizer turns it into {made}"), plan.on_bad, bad)
                continue
            # Conversations that begin with the same question are on one side, whatever is said then.
            asked = ids if turns is None else ids[: turns[turns[:, 0] == instructions.ANSWERS][0, 1]]
            split = "heldout" if _held_out(asked, plan.seed, plan.heldout) else "train"
            tokens = np.append(ids, tokenizer.eot).astype(dtype)
            documents[split].append(_Tokenized(tokens, key, document.place, document.planted, turns))
            if isinstance(content, str):
                counts[split]["characters"] += len(content)
                counts[split]["bytes"] += len(content.encode())

    partial = folder / "shards" / f"{number:05d}.{partial_suffix()}"
    source_files: dict[str, int] = {}
    for which, split in enumerate(SPLITS):
        # Shuffled, so that neighbours in the stream, and so in a row, are unrelated.
        random = stream(plan.seed, "shard order", 2 * number + which)
        shuffled = [documents[split][i] for i in random.permutation(len(documents[split]))]
        tokens = np.concatenate([np.zeros(0, dtype), *(d.tokens for d in shuffled)])
        write_array(partial / split / "tokens", tokens)
        write_array(partial / split / "offsets", np.cumsum([0, *(len(d.tokens) for d in shuffled)], dtype=np.int64))
        write_array(partial / split / "keys", exclusions.halves(b"".join(d.key for d in shuffled)).ravel())
        rows = [(source_files.setdefault(d.place.file, len(source_files)), *d.place[1:], d.planted) for d in shuffled]
        write_array(partial / split / "provenance", np.array(rows, np.int64).ravel())
        if plan.template:
            of = [d.turns for d in shuffled if d.turns is not None]
            flat = np.concatenate([np.zeros(0, np.int64), *(turns.ravel() for turns in of)])
            write_array(partial / split / "turns", flat)
            write_array(partial / split / "turn_offsets", np.cumsum([0, *map(len, of)], dtype=np.int64))
        counts[split] |= {"documents": len(shuffled), "tokens": len(tokens)}
    files = {str(path.relative_to(partial)): sha256_of(path) for path in sorted(files_below(partial))}
    provenance = {name: sha256 for name, sha256 in files.items() if name.split("/")[1] == "provenance"}
    planted = {split: [len(d.tokens) for d in of if d.planted] for split, of in documents.items()}
    record = {
        "tokenizer": tokenizer.fingerprint,
        "splits": counts,
        # Where documents came from doesn't change what is trained on: it isn't of the content.
        "files": {name: sha256 for name, sha256 in files.items() if name not in provenance},
        "provenance": {"sources": [*source_files], "files": provenance},
        "planted": {split: {"documents": len(of), "tokens": sum(of)} for split, of in planted.items()},
        "excluded": {key.hex(): count for key, count in sorted(left_out.items())},
        "bad": len(bad),
        "bad_places": [f"{b.place}: {b.reason}" for b in bad[:REPORTED]],
    }
    write_json(partial / "shard.json", record)
    move_folder(partial, shard_folder(folder, number), last="shard.json")


class _Tokenized(NamedTuple):
    """A document as it goes into the store."""

    tokens: Shaped[np.ndarray, " tokens"]
    key: bytes
    place: Place
    planted: bool
    turns: instructions.Turns | None


def open_one(spec: str, conversations: bool) -> Source:
    """A source of texts or of `conversations`."""
    return open_source(spec, instructions.conversation if conversations else None)


_opened = functools.cache(open_one)


def _good(items: Iterable[Document | BadInput], on_bad: str, bad: list[BadInput]) -> Iterator[Document]:
    """The documents among the items; bad input raises CorpusError, or is added to `bad`."""
    for item in items:
        if isinstance(item, BadInput):
            _note_bad(item, on_bad, bad)
        else:
            yield item


def _note_bad(item: BadInput, on_bad: str, bad: list[BadInput]) -> None:
    if on_bad != "skip":
        raise CorpusError(f"{item.place}: {item.reason}. Mend it, or skip and count such input with --on-bad skip")
    bad.append(item)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _held_out(ids: Int[np.ndarray, " tokens"], seed: int, fraction: float) -> bool:
    """By a hash of the tokens, so that documents that are the same to a model land on the same side (I6)."""
    tokens = ids.astype("<i4").tobytes()
    value = int.from_bytes(hashlib.sha256(f"{seed}:".encode() + tokens).digest()[:8], "big")
    return value < fraction * 2**64


def shard_folder(folder: epath.Path, number: int) -> epath.Path:
    """Where a shard lies when it is whole."""
    return folder / "shards" / f"{number:05d}"


def partial_suffix() -> str:
    """What a name ends with until its content is whole; other processes and machines have others."""
    return f"partial.{os.urandom(4).hex()}"


def write_json(path: epath.Path, value: Any) -> None:
    """Whole or not at all, though others may write the same at once."""
    write_whole(path, json.dumps(value, indent=1) + "\n", suffix=partial_suffix())
