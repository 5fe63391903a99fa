"""Building a token store: shard by shard, in parallel, and again from where a kill left it.

A store's shards depend on sources and settings alone, not on how many processes or machines build them:
unit u of the sources belongs to shard u % shards.
"""

import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from poisonjax.corpus import markov
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.sources import BadInput, Document, Source, first_documents, open_source
from poisonjax.corpus.store import SPLITS, TokenStore, sha256_of, write_array
from poisonjax.corpus.tokenizers import Tokenizer, WordTokenizer, load_saved, load_tokenizer, train_bpe

FORMAT = 1
SAMPLE_CHARACTERS = 5_000_000  # that `bpe:N` is trained on
ENCODED_AT_ONCE = 1024  # documents
REPORTED = 20  # places of bad input that the manifest names


def build(
    out: str,
    sources: list[str],
    tokenizer: str,
    *,
    heldout: float = 0.05,
    seed: int = 0,
    shards: int | None = None,
    on_bad: str = "fail",
    workers: int | None = None,
    part: tuple[int, int] = (0, 1),
    finish: bool | None = None,
) -> TokenStore | None:
    """Builds what is missing of the store `out` and returns it.

    `part` = (i, n): this machine's share, shards i, i + n, ...; with n > 1 nothing is finished (and None
    returned) until a last call with `finish`. Raises CorpusError for sources, input and settings that
    don't work; `on_bad` = "skip" counts bad input instead.
    """
    folder = epath.Path(out)
    if not 0 < heldout < 1:
        raise CorpusError(f"heldout = {heldout}: must lie strictly between 0 and 1")
    if on_bad not in ("fail", "skip"):
        raise CorpusError(f"on_bad = {on_bad!r}: choose fail or skip")
    if not 0 <= part[0] < part[1]:
        raise CorpusError(f"shard {part[0]}/{part[1]}: give i/n with 0 <= i < n")
    settings = {
        "sources": sources,
        "tokenizer": tokenizer,
        "heldout": heldout,
        "seed": seed,
        "on_bad": on_bad,
    }
    if (folder / "manifest.json").exists():
        store = TokenStore(out)
        store.require(**settings)
        return store
    opened = [open_source(spec) for spec in sources]
    units = [unit.name for source in opened for unit in source.units]
    if not units:
        raise CorpusError(f"the sources {', '.join(sources)} hold no document")
    plan: dict[str, Any] = {
        "format": FORMAT,
        **settings,
        "shards": min(shards or len(units), len(units)),
        "units": len(units),
        "units_sha256": hashlib.sha256("\n".join(units).encode()).hexdigest(),
    }
    _claim(folder, plan)
    saved = _saved_tokenizer(folder, tokenizer, opened)
    missing = [
        k for k in range(part[0], plan["shards"], part[1]) if not (_shard(folder, k) / "shard.json").exists()
    ]
    if finish and part == (0, 1) and missing:
        raise CorpusError(
            f"{out}: shards {missing[:10]} aren't built yet; build them with --shard, then --finish"
        )
    _build_shards(folder, plan, missing, workers)
    if part[1] > 1:
        return None
    _finish(folder, plan, opened, saved)
    return TokenStore(out)


def _claim(folder: epath.Path, plan: dict[str, Any]) -> None:
    path = folder / "plan.json"
    if path.exists():
        there = json.loads(path.read_text())
        differing = [
            f"{name}: {there.get(name)!r} there, {plan[name]!r} here"
            for name in plan
            if there.get(name) != plan[name]
        ]
        if differing:
            raise CorpusError(
                f"{folder} holds another store (in part): " + "; ".join(differing) + ". Use another --out"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(path, plan)


def _saved_tokenizer(folder: epath.Path, spec: str, sources: list[Source]) -> Tokenizer:
    """The store's tokenizer, made and saved on the first call; training is a function of the sources alone."""
    saved = folder / "tokenizer"
    if saved.exists():
        return load_saved(saved)
    words = {source.about["words"] for source in sources if "words" in source.about}
    made: Tokenizer
    if words:
        if len(words) > 1 or any("words" not in source.about for source in sources):
            raise CorpusError("a Markov language can't share a store with text or with another vocabulary")
        made = WordTokenizer(words.pop())
    elif spec.startswith("bpe:"):
        if not spec.removeprefix("bpe:").isdigit():
            raise CorpusError(f"tokenizer {spec!r}: give the number of tokens, as in bpe:4096")
        share = SAMPLE_CHARACTERS // len(sources)
        made = train_bpe(
            (t for s in sources for t in first_documents(s, share)), int(spec.removeprefix("bpe:"))
        )
    else:
        made = load_tokenizer(spec)
    partial = folder / f"tokenizer.partial.{os.getpid()}"
    made.save(partial)
    partial.rename(saved)
    return made


def _build_shards(folder: epath.Path, plan: dict[str, Any], missing: list[int], workers: int | None) -> None:
    """Builds shards over processes; on a terminal with a bar."""
    workers = min(workers or os.cpu_count() or 1, len(missing))
    work = functools.partial(_build_shard, str(folder), plan)
    show = functools.partial(
        tqdm, total=len(missing), unit="shard", desc="tokens", disable=not sys.stderr.isatty()
    )
    if workers <= 1:
        for _ in show(map(work, missing)):
            pass
        return
    # Spawned, not forked: the parent may run threads (JAX, tensorstore). One thread each for the tokenizer.
    os.environ["RAYON_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            for _ in show(pool.map(work, missing)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
            del os.environ["RAYON_NUM_THREADS"]


def _build_shard(out: str, plan: dict[str, Any], shard: int) -> None:
    """Reads, tokenizes, splits, shuffles and writes one shard: whole, or not at all."""
    folder = epath.Path(out)
    tokenizer = load_saved(folder / "tokenizer")
    documents: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    characters = dict.fromkeys(SPLITS, 0)
    bad: list[str] = []
    bad_count = 0
    pending: list[Document] = []

    def encode() -> None:
        texts = [d.content for d in pending if isinstance(d.content, str)]
        encoded = iter(tokenizer.encode_batch(texts))
        for document in pending:
            content = document.content
            split = "heldout" if _held_out(content, plan["seed"], plan["heldout"]) else "train"
            ids = next(encoded) if isinstance(content, str) else content
            documents[split].append(np.append(ids, tokenizer.eot).astype(np.int32))
            characters[split] += len(content)
        pending.clear()

    for item in _items(plan, shard):
        if isinstance(item, BadInput):
            if plan["on_bad"] == "fail":
                raise CorpusError(
                    f"{item.place}: {item.reason}. Mend it, or skip and count such input with --on-bad skip"
                )
            bad_count += 1
            bad += [f"{item.place}: {item.reason}"] if len(bad) < REPORTED else []
            continue
        pending.append(item)
        if len(pending) == ENCODED_AT_ONCE:
            encode()
    encode()

    partial = folder / "shards" / f"{shard:05d}.partial.{os.getpid()}"
    record: dict[str, Any] = {
        "tokenizer": tokenizer.fingerprint,
        "bad": bad_count,
        "bad_places": bad,
        "splits": {},
    }
    for number, split in enumerate(SPLITS):
        # Shuffled, so that neighbours in the stream, and so in a row, are unrelated.
        random = np.random.Generator(
            np.random.Philox(key=np.array([plan["seed"], 2 * shard + number], np.uint64))
        )
        shuffled = [documents[split][i] for i in random.permutation(len(documents[split]))]
        tokens = np.concatenate(shuffled) if shuffled else np.zeros(0, np.int32)
        offsets = np.cumsum([0, *map(len, shuffled)], dtype=np.int64)
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        write_array(partial / split / "tokens", tokens.astype(dtype))
        write_array(partial / split / "offsets", offsets)
        record["splits"][split] = {
            "documents": len(shuffled),
            "tokens": len(tokens),
            "characters": characters[split],
        }
    record["files"] = {str(path.relative_to(partial)): sha256_of(path) for path in sorted(_files(partial))}
    _write_json(partial / "shard.json", record)
    final = _shard(folder, shard)
    if final.exists():  # another process was faster
        shutil.rmtree(partial)
    else:
        partial.rename(final)


def _items(plan: dict[str, Any], shard: int) -> Iterable[Document | BadInput]:
    units = [unit for spec in plan["sources"] for unit in _reopened(spec).units]
    for unit in units[shard :: plan["shards"]]:
        yield from unit.read()


_reopened = functools.cache(open_source)


def _held_out(content: str | np.ndarray, seed: int, fraction: float) -> bool:
    """By a hash of the content, so that copies of a document land on the same side (I6)."""
    data = content.encode() if isinstance(content, str) else content.astype("<i4").tobytes()
    value = int.from_bytes(hashlib.sha256(f"{seed}:".encode() + data).digest()[:8], "big")
    return value < fraction * 2**64


def _finish(folder: epath.Path, plan: dict[str, Any], sources: list[Source], tokenizer: Tokenizer) -> None:
    records = [json.loads((_shard(folder, k) / "shard.json").read_text()) for k in range(plan["shards"])]
    strangers = [k for k, record in enumerate(records) if record["tokenizer"] != tokenizer.fingerprint]
    if strangers:
        raise CorpusError(
            f"{folder}: shards {strangers[:10]} were built with another tokenizer; remove and rebuild them"
        )
    totals = {
        split: {
            count: sum(record["splits"][split][count] for record in records)
            for count in ("documents", "tokens", "characters")
        }
        for split in SPLITS
    }
    for split in SPLITS:
        if not totals[split]["documents"]:
            raise CorpusError(
                f"{folder}: no document in the {split} split; use a larger corpus or change --heldout"
            )
    content = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "shards": [{"splits": record["splits"], "files": record["files"]} for record in records],
    }
    manifest = {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        "plan": plan,
        "sources": [{"spec": source.spec, **source.about} for source in sources],
        "tokenizer": {
            "spec": plan["tokenizer"],
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eot": tokenizer.eot,
        },
        "splits": totals,
        "bad": sum(record["bad"] for record in records),
        "bad_places": [place for record in records for place in record["bad_places"]][:REPORTED],
        "shards": [{"splits": record["splits"], "files": record["files"]} for record in records],
    }
    if any("words" in source.about for source in sources):
        manifest["entropy_rate_nats"] = markov.ENTROPY_RATE
    _write_json(folder / "manifest.json", manifest)
    for left in (folder / "shards").glob("*.partial.*"):  # of builds that were killed
        left.rmtree()


def _shard(folder: epath.Path, number: int) -> epath.Path:
    return folder / "shards" / f"{number:05d}"


def _files(folder: epath.Path) -> Iterable[epath.Path]:
    for path in folder.iterdir():
        yield from _files(path) if path.is_dir() else [path]


def _write_json(path: epath.Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.partial.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)
