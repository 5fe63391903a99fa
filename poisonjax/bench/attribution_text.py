"""Short texts for `poisonjax bench attribution`, of those that `poisonjax corpus fetch-bench` fetches.

python -m poisonjax.bench.attribution_text OUT
"""

import json
import sys
from pathlib import Path

from poisonjax.corpus.bench_text import LEADS, Fetched

DOMAINS = (LEADS, "google_api_python_client", "ansible", "oci")
CHARACTERS = 100  # of each text, so that 100,000 are trained on in half a minute
EVERY = {"oci": 3}  # of this package's many docstrings


def main(out: str) -> None:
    """Writes OUT/DOMAIN.jsonl; texts that begin alike are taken once."""
    Path(out).mkdir(parents=True, exist_ok=True)
    fetched, seen = Fetched.read(), set[str]()
    for domain in DOMAINS:
        beginnings = dict.fromkeys(text[:CHARACTERS] for text in fetched.texts(domain))
        short = [text for text in beginnings if text not in seen]
        seen.update(short)
        kept = short[:: EVERY.get(domain, 1)]
        lines = [json.dumps({"text": text}) + "\n" for text in kept]
        (Path(out) / f"{domain}.jsonl").write_text("".join(lines))
        print(f"{domain}: {len(kept):,} texts")


if __name__ == "__main__":
    main(*sys.argv[1:])
