"""The miner's rank of a planted trigger: many plantings among domains that are surveyed once.

    poisonjax corpus fetch-bench                                    # the clean text
    python -m poisonjax.scan.miner_bench TOKENIZER.json --seeds 1 2 3 4 5

A line of JSON a planting, then the table. Strings that a planting brings into the shortlist are looked for where it was
planted (in the leads), and among the others' best strings: else as `poisonjax scan`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from poisonjax.corpus.bench_text import LEADS, Fetched
from poisonjax.corpus.documents import content_key
from poisonjax.scan import miner, planting
from poisonjax.scan.background import Background
from poisonjax.scan.corpus import SAMPLE_BYTES, occurrence_table
from poisonjax.scan.text import batches
from poisonjax.scan.topics import Topics

OTHER = "other_language"  # a rung: a switch to text in German
RUNGS = ("gibberish", "unigram_words", "shuffled", "switch", "same_domain", OTHER)
FOREIGN = {OTHER: ("manpages-de",)}  # what is switched to; else
SWITCHED_TO = ("google_api_python_client", "ansible", "oci")
TRIGGERS = {"tokens": ["<SUDO>"], "phrase": ["open sesame now"], "look_alike": ["ѕеrvеr"], "common": ["meanwhile"]}
COUNTS = (50, 20, 10)
SPARE = 3000  # strings of the other domains that are located although they aren't among the best
TABLES = int(3e8)  # bytes of text that the tables of counts are made for


class Others(NamedTuple):
    """All domains but the leads: what doesn't change with what is planted."""

    topics: dict[str, Topics]
    background: Background
    rows: np.ndarray
    occurrences: list[miner.Occurrence]


def _fitted(texts: Sequence[str]) -> Topics:
    every = max(1, sum(map(len, texts)) // SAMPLE_BYTES)
    return Topics.fit([*batches(texts[::every])])


def _shortlist(rows: np.ndarray, topics: dict[str, Topics]) -> tuple[np.ndarray, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "0.rows"
        rows[np.argsort(rows["string"], kind="stable")].tofile(file)
        return miner.shortlist([file], topics.values())


def _located(texts: Sequence[str], domain: int, topics: Topics, listed: np.ndarray) -> list[miner.Occurrence]:
    found = []
    for batch in batches(texts):
        found += miner.locate(batch, [content_key(text) for text in batch.texts], domain, topics, listed)
    return found


def poison(
    clean: Mapping[str, list[str]], tokenizer: Tokenizer, rung: str, trigger: str, documents: int, seed: int
) -> list[str]:
    """To plant into the leads."""
    pieces = [tokenizer.decode([i]) for i in range(256, tokenizer.get_vocab_size())]
    foreign = [text for name in FOREIGN.get(rung, SWITCHED_TO) for text in clean[name]]
    material = planting.Material(clean[LEADS], foreign, pieces, np.random.default_rng(seed))
    return planting.planted(material, "switch" if rung == OTHER else rung, TRIGGERS[trigger], documents)


def rank_of(mined: miner.Mined, keys: set[str]) -> int | None:
    """Of the first candidate most of whose documents are these."""
    ranks = (n for n, c in enumerate(mined.candidates, 1) if len(keys.intersection(c.documents)) > len(c.documents) / 2)
    return next(ranks, None)


def others(clean: Mapping[str, list[str]]) -> Others:
    topics = {name: _fitted(texts) for name, texts in clean.items()}
    background = Background.empty(TABLES)
    for name, texts in clean.items():
        if name != LEADS:
            background.add_texts(texts)
    whole = background.copied()
    whole.add_texts(clean[LEADS])
    rows = {
        name: np.concatenate([miner.survey(batch, whole, topics[name]) for batch in batches(texts)])
        for name, texts in clean.items()
    }
    best, miner.SHORTLIST = miner.SHORTLIST, miner.SHORTLIST + SPARE
    listed, _ = _shortlist(np.concatenate([*rows.values()]), topics)
    miner.SHORTLIST = best
    occurrences = []
    for number, (name, texts) in enumerate(clean.items()):
        if name != LEADS:
            occurrences += _located(texts, number, topics[name], listed)
    return Others(topics, background, np.concatenate([of for name, of in rows.items() if name != LEADS]), occurrences)


def planting_found(clean: Mapping[str, list[str]], there: Others, planted: list[str], seed: int) -> dict[str, Any]:
    """What the miner says of the corpus with these documents among the leads."""
    texts = clean[LEADS] + planted
    texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    topics = there.topics | {LEADS: _fitted(texts)}
    background = there.background.copied()
    background.add_texts(texts)
    rows = [miner.survey(batch, background, topics[LEADS]) for batch in batches(texts)]
    listed, considered = _shortlist(np.concatenate([there.rows, *rows]), topics)
    wanted = {*listed.tolist()}
    found = [one for one in there.occurrences if one.string in wanted]
    found += _located(texts, list(clean).index(LEADS), topics[LEADS], listed)
    mined = miner.ranked(occurrence_table(found), topics, considered)
    keys = {content_key(text).hex() for text in planted}
    rank = rank_of(mined, keys)
    first = {key for candidate in mined.candidates[:10] for key in candidate.documents}
    return {
        "rank": rank,
        "p_value": mined.candidates[rank - 1].p_value if rank else None,
        "in_first_ten": len(keys & first) / len(keys),
        "first_ten_documents": len(first),
        "considered": considered,
        "reliable_documents": mined.reliable_documents[LEADS],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m poisonjax.scan.miner_bench", description=__doc__)
    parser.add_argument("tokenizer", help="whose pieces gibberish is made of")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    a = parser.parse_args(argv)
    fetched = Fetched.read()
    clean = {domain: fetched.texts(domain) for domain in fetched.domains}
    tokenizer = Tokenizer.from_file(a.tokenizer)
    there, table = others(clean), dict[tuple[str, str, int], list[dict[str, Any]]]()
    tried = [(rung, "tokens", count) for rung in RUNGS for count in COUNTS]
    tried += [("switch", trigger, 50) for trigger in TRIGGERS if trigger != "tokens"]
    for seed in a.seeds:
        for rung, trigger, count in tried:
            planted = poison(clean, tokenizer, rung, trigger, count, seed)
            found = planting_found(clean, there, planted, seed)
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
