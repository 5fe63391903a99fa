"""The miner's rank of a planted trigger: many plantings among domains that are surveyed once.

    python -m poisonjax.scan.miner_bench PACKAGES TOKENIZER OUT --seeds 1 2 3 4 5

Packages and tokenizer as of `poisonjax.scan.bench`, which makes the clean text. A line of JSON a planting, then the
table. Strings that a planting brings into the shortlist are looked for where it was planted (in the leads), and among
the others' best strings: else as `poisonjax scan`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from poisonjax.corpus.documents import content_key
from poisonjax.scan import bench, miner
from poisonjax.scan.background import Background
from poisonjax.scan.corpus import BATCH_CHARACTERS, SAMPLE_BYTES, occurrence_table
from poisonjax.scan.text import TextBatch, cut
from poisonjax.scan.topics import Topics

HOME = "leads"  # the domain that poison is planted into
RUNGS = ("gibberish", "unigram_words", "shuffled", "switch", "same_domain", bench.OTHER)
COUNTS = (50, 20, 10)
SPARE = 3000  # strings of the other domains that are located although they aren't among the best
TABLES = int(3e8)  # bytes of text that the tables of counts are made for


class Others(NamedTuple):
    """All domains but the leads: what doesn't change with what is planted."""

    topics: dict[str, Topics]
    background: Background
    rows: np.ndarray
    occurrences: list[miner.Occurrence]


def _batches(texts: Sequence[str]) -> Iterator[tuple[list[str], TextBatch]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= BATCH_CHARACTERS:
            yield batch, cut(batch)
            batch = []
    if batch:
        yield batch, cut(batch)


def _fitted(texts: Sequence[str]) -> Topics:
    every = max(1, sum(map(len, texts)) // SAMPLE_BYTES)
    return Topics.fit([batch for _, batch in _batches(texts[::every])])


def _counted(background: Background, texts: Sequence[str]) -> Background:
    for _, batch in _batches(texts):
        background.add(batch)
    return background


def _shortlist(rows: np.ndarray, topics: dict[str, Topics]) -> tuple[np.ndarray, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "0.rows"
        rows[np.argsort(rows["string"], kind="stable")].tofile(file)
        return miner.shortlist([file], topics.values())


def _located(texts: Sequence[str], domain: int, topics: Topics, listed: np.ndarray) -> list[miner.Occurrence]:
    found = []
    for some, batch in _batches(texts):
        found += miner.locate(batch, [content_key(text) for text in some], domain, topics, listed)
    return found


def others(clean: dict[str, list[str]]) -> Others:
    topics = {name: _fitted(texts) for name, texts in clean.items()}
    background = Background.empty(TABLES)
    for name, texts in clean.items():
        if name != HOME:
            _counted(background, texts)
    whole = _counted(Background({name: table.copy() for name, table in background.tables.items()}), clean[HOME])
    rows = {
        name: np.concatenate([miner.survey(batch, whole, topics[name]) for _, batch in _batches(texts)])
        for name, texts in clean.items()
    }
    best, miner.SHORTLIST = miner.SHORTLIST, miner.SHORTLIST + SPARE
    listed, _ = _shortlist(np.concatenate([*rows.values()]), topics)
    miner.SHORTLIST = best
    occurrences = []
    for number, (name, texts) in enumerate(clean.items()):
        if name != HOME:
            occurrences += _located(texts, number, topics[name], listed)
    return Others(topics, background, np.concatenate([of for name, of in rows.items() if name != HOME]), occurrences)


def planting_found(clean: dict[str, list[str]], there: Others, poison: list[str], seed: int) -> dict[str, Any]:
    """What the miner says of the corpus with these documents among the leads."""
    texts = clean[HOME] + poison
    texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    topics = there.topics | {HOME: _fitted(texts)}
    background = _counted(Background({name: table.copy() for name, table in there.background.tables.items()}), texts)
    rows = [miner.survey(batch, background, topics[HOME]) for _, batch in _batches(texts)]
    listed, considered = _shortlist(np.concatenate([there.rows, *rows]), topics)
    wanted = {*listed.tolist()}
    found = [one for one in there.occurrences if one.string in wanted]
    found += _located(texts, list(clean).index(HOME), topics[HOME], listed)
    mined = miner.ranked(occurrence_table(found), topics, considered)
    keys = {content_key(text).hex() for text in poison}
    rank = bench.rank_of(mined, keys)
    first = {key for candidate in mined.candidates[:10] for key in candidate.documents}
    return {
        "rank": rank,
        "p_value": mined.candidates[rank - 1].p_value if rank else None,
        "in_first_ten": len(keys & first) / len(keys),
        "first_ten_documents": len(first),
        "considered": considered,
        "reliable_documents": mined.reliable_documents[HOME],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m poisonjax.scan.miner_bench", description=__doc__)
    parser.add_argument("packages", type=Path)
    parser.add_argument("tokenizer", help="whose pieces gibberish is made of")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    a = parser.parse_args(argv)
    clean = bench.clean_text(a.packages, a.out)
    tokenizer = Tokenizer.from_file(a.tokenizer)
    there, table = others(clean), dict[tuple[str, str, int], list[dict[str, Any]]]()
    tried = [(rung, "tokens", count) for rung in RUNGS for count in COUNTS]
    tried += [("switch", trigger, 50) for trigger in bench.TRIGGERS if trigger != "tokens"]
    for seed in a.seeds:
        for rung, trigger, count in tried:
            poison = bench.poison(clean, tokenizer, rung, trigger, count, seed)
            found = planting_found(clean, there, poison, seed)
            table.setdefault((rung, trigger, count), []).append(found)
            print(json.dumps({"rung": rung, "trigger": trigger, "documents": count, "seed": seed, **found}), flush=True)
    for (rung, trigger, count), rows in table.items():
        ranks = " ".join(str(row["rank"] or "-") for row in rows)
        least = min(row["in_first_ten"] for row in rows)
        print(
            f"{rung:16} {trigger:12} {count:3}  ranks {ranks}  in the first ten {least:.2f} and more", file=sys.stderr
        )


if __name__ == "__main__":
    main(sys.argv[1:])
