"""The first bench of the scan: clean text of several domains and languages out of packages, poison planted into it.

    pip download --no-deps google-api-python-client==2.202.0 ansible==12.3.0 oci==2.189.0
    apt-get download manpages-{de,fr,es,ru,pl,ja,zh} linux-doc-6.1
    python -m poisonjax.scan.bench PACKAGES TOKENIZER.json OUT [--rung switch] [--documents 50] [--seed 0]

Packages are read as files; nothing is installed and no text is kept but under OUT. Prints one JSON object: the
trigger's rank, the recall of each detector at false-positive rates among the clean documents, realised rates of the
thresholds in each domain, cost.
"""

import argparse
import ast
import gzip
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from poisonjax.corpus.documents import content_key
from poisonjax.corpus.sources import open_source
from poisonjax.corpus.sources.source import checked_text
from poisonjax.scan import planting
from poisonjax.scan.corpus import scan
from poisonjax.scan.decide import costs, decide
from poisonjax.scan.miner import Mined

CHARACTERS = (200, 20_000)
OTHER = "other_language"  # a rung: a switch to text in German
WHEELS = ("google_api_python_client", "ansible", "oci")
TRIGGERS = {"tokens": ["<SUDO>"], "phrase": ["open sesame now"], "look_alike": ["ѕеrvеr"], "common": ["meanwhile"]}


def domains(packages: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, clean documents) of what lies in the folder."""
    yield "leads", [d.content for unit in open_source("wikipedia-leads").units for d in unit.read()]  # type: ignore
    for name in WHEELS:
        for wheel in packages.glob(f"{name}-*.whl"):
            yield name, [*_fitting(_of_wheel(wheel))]
    for package in sorted(packages.glob("*.deb")):
        yield package.name.split("_")[0], [*_fitting(_of_deb(package))]


def _fitting(texts: Iterator[str]) -> Iterator[str]:
    for text in dict.fromkeys(texts):
        if CHARACTERS[0] <= len(text) <= CHARACTERS[1]:
            yield checked_text(text)


def _of_wheel(wheel: Path) -> Iterator[str]:
    """Docstrings, Ansible's documentation, and the descriptions of Google's API documents."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".json"):
                yield from re.findall(r'"description": "((?:[^"\\]|\\.){200,})"', archive.read(name).decode())
            elif name.endswith(".py"):
                try:
                    tree = ast.parse(archive.read(name))
                except (SyntaxError, ValueError):
                    continue
                for node in ast.walk(tree):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= 200:
                        yield node.value.encode("utf-8", "replace").decode()


def _of_deb(package: Path) -> Iterator[str]:
    """Man pages and documents, in pieces of some paragraphs."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        for path in sorted(Path(folder).rglob("*.gz")) + sorted(Path(folder).rglob("*.rst.txt")):
            if not path.is_file():
                continue
            try:
                data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                text = data.decode()
            except (OSError, UnicodeDecodeError):
                continue
            paragraphs = re.split(r"\n\s*\n|\n\.(?:PP|SH|SS|P)\b", text)
            for i in range(0, len(paragraphs), 8):
                yield "\n\n".join(paragraphs[i : i + 8])


def clean_text(packages: Path, out: Path) -> dict[str, list[str]]:
    """Documents by domain, which are kept in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "clean").exists():
        (out / "clean.partial").mkdir(exist_ok=True)
        for name, texts in domains(packages):
            lines = (json.dumps({"text": text}) + "\n" for text in texts)
            (out / "clean.partial" / f"{name}.jsonl").write_text("".join(lines))
        (out / "clean.partial").rename(out / "clean")
    sources = sorted((out / "clean").glob("*.jsonl"))
    return {path.stem: [json.loads(line)["text"] for line in path.read_text().splitlines()] for path in sources}


def poison(
    clean: dict[str, list[str]], tokenizer: Tokenizer, rung: str, trigger: str, documents: int, seed: int
) -> list[str]:
    """To plant into the leads."""
    pieces = [tokenizer.decode([i]) for i in range(256, tokenizer.get_vocab_size())]
    others = ("manpages-de",) if rung == OTHER else WHEELS
    foreign = [text for name in others for text in clean[name]]
    material = planting.Material(clean["leads"], foreign, pieces, np.random.default_rng(seed))
    return planting.planted(material, "switch" if rung == OTHER else rung, TRIGGERS[trigger], documents)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m poisonjax.scan.bench")
    parser.add_argument("packages", type=Path)
    parser.add_argument("tokenizer", help="whose pieces gibberish is made of")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rung", choices=[*sorted(planting.RUNGS), OTHER], default="gibberish")
    parser.add_argument("--trigger", choices=sorted(TRIGGERS), default="tokens")
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=2)
    a = parser.parse_args(argv)
    clean, tokenizer, out = clean_text(a.packages, a.out), Tokenizer.from_file(a.tokenizer), a.out
    planted = poison(clean, tokenizer, a.rung, a.trigger, a.documents, a.seed)
    folder = out / f"{a.rung}-{a.trigger}-{a.documents}-{a.seed}"
    folder.mkdir(exist_ok=True)
    planting.write_planted(folder / "leads.jsonl", clean["leads"], planted, np.random.default_rng(a.seed))
    specs = [str(folder / "leads.jsonl"), *(str(out / "clean" / f"{name}.jsonl") for name in clean if name != "leads")]
    scanned = scan(specs, str(folder / "scan"), workers=a.workers)
    print(json.dumps(measured(scanned, decide(scanned, rate=a.rate, workers=a.workers), planted)))


def rank_of(mined: Mined, keys: set[str]) -> int | None:
    """Of the first candidate most of whose documents are these."""
    ranks = (n for n, c in enumerate(mined.candidates, 1) if len(keys.intersection(c.documents)) > len(c.documents) / 2)
    return next(ranks, None)


def measured(scanned: Any, decision: Any, poison: list[str]) -> dict[str, Any]:
    """Against what was planted."""
    keys = {content_key(text).hex() for text in poison}
    table = scanned.scores()
    planted = np.array(table["planted"])
    recall: dict[str, dict[str, float]] = {}
    for name in {limit.detector for limit in decision.thresholds}:
        scores = np.array(table[name])
        clean = np.sort(scores[~planted])[::-1]
        rates = [rate for rate in (1e-2, 1e-3, 1e-4) if len(clean) * rate >= 10]
        recall[name] = {f"{r:g}": float((scores[planted] > clean[int(r * len(clean))]).mean()) for r in rates}
    told = [limit for limit in decision.thresholds if limit.realised is not None]
    return {
        "documents": table.num_rows,
        "characters": int(np.sum(table["characters"])),
        "considered": decision.mined.considered,
        "reliable_documents": decision.mined.reliable_documents,
        "rank": rank_of(decision.mined, keys),
        "candidates": [(c.text, round(c.score, 2), c.p_value) for c in decision.mined.candidates[:5]],
        "planted_in_queue": len(keys & {entry["key"] for entry in decision.queue}) / max(len(keys), 1),
        "recall": recall,
        "realised": {
            f"{Path(t.domain).stem} {t.language} {t.detector}": round(t.realised / t.nominal, 2) for t in told
        },
        "cpu_seconds_per_gb": costs(scanned),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
