"""Short texts for `poisonjax bench attribution`, out of packages: `poisonjax.scan.bench` says where they come from.

python -m poisonjax.bench.attribution_text PACKAGES OUT
"""

import json
import sys
from pathlib import Path

from poisonjax.scan.bench import domains

CHARACTERS = 100  # of each text, so that 100,000 are trained on in half a minute
EVERY = {"oci": 3}  # of this package's many docstrings


def main(packages: str, out: str) -> None:
    """Writes OUT/DOMAIN.jsonl; texts that begin alike are taken once."""
    Path(out).mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for domain, texts in domains(Path(packages)):
        short = [text for text in dict.fromkeys(text[:CHARACTERS] for text in texts) if text not in seen]
        seen.update(short)
        kept = short[:: EVERY.get(domain, 1)]
        lines = [json.dumps({"text": text}) + "\n" for text in kept]
        (Path(out) / f"{domain}.jsonl").write_text("".join(lines))
        print(f"{domain}: {len(kept):,} texts")


if __name__ == "__main__":
    main(*sys.argv[1:])
