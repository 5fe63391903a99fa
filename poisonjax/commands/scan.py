"""`poisonjax scan`: what is odd in a corpus, what may be a trigger, and a queue for people; then their verdicts."""

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from poisonjax.commands import exit_codes
from poisonjax.visible import visible

if TYPE_CHECKING:
    from poisonjax.scan.decide import Decision
    from poisonjax.scan.verdicts import Merged

SHOWN = 10  # candidates


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers; `func` of the parsed arguments returns the exit code."""
    parser = commands.add_parser("scan", help="find poison in a corpus; goes on where a killed scan stopped")
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="as of `corpus build --source`, or a token store")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the scan; made if absent")
    parser.add_argument("--budget", type=int, default=1000, help="documents for people to read (default: 1000)")
    parser.add_argument("--rate", type=float, default=0.01, help="false positives of thresholds (default: 0.01)")
    parser.add_argument("--model", default="", metavar="SPEC", help="a language model that scores the oddest documents")
    parser.add_argument("--model-share", type=float, default=0.01, help="how many of them (default: 0.01)")
    parser.add_argument(
        "--verdicts", nargs="+", metavar="FILE", help="merge reviewers' verdicts into an exclusion list"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument("--dask", default="", metavar="ADDRESS", help="work on the workers of this dask scheduler")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=_scan)


def _scan(arguments: argparse.Namespace) -> int:
    if arguments.verdicts:
        return _merge(arguments)
    if not arguments.sources:
        raise ValueError("name what to scan: files, a source as of `corpus build --source`, or a token store")
    if arguments.budget < 1:
        raise ValueError(f"--budget {arguments.budget}: at least 1 document")
    if not 0 < arguments.rate < 1:
        raise ValueError(f"--rate {arguments.rate}: must lie strictly between 0 and 1")
    if not 0 < arguments.model_share <= 1:
        raise ValueError(f"--model-share {arguments.model_share}: must lie above 0, and at most at 1")
    from poisonjax.scan.corpus import scan
    from poisonjax.scan.decide import decide, summary

    began = time.monotonic()
    engine = {"workers": arguments.workers, "dask": arguments.dask}
    scanned = scan(arguments.sources, arguments.out, **engine)
    chosen = {"budget": arguments.budget, "rate": arguments.rate}
    if arguments.model:
        chosen |= {"model": arguments.model, "share": arguments.model_share}
    decision = decide(scanned, **chosen, **engine)
    found = summary(scanned, decision)
    if arguments.json:
        print(json.dumps(found))
    else:
        print(_words(decision, found, arguments.out, time.monotonic() - began))
    return exit_codes.OK


def _words(decision: "Decision", found: dict[str, Any], out: str, seconds: float) -> str:
    lines = [f"{found['documents']:,} documents, {found['bytes']:,} bytes in {seconds:,.0f} s"]
    if found["bad"]:
        lines += [f"{found['bad']:,} inputs are no documents, the first:", *(f"  {p}" for p in found["bad_places"][:3])]
    lines.append(f"strings after which the topic is lost, of {found['considered']:,} considered:")
    for rank, candidate in enumerate(decision.mined.candidates[:SHOWN], 1):
        mark = "" if candidate.p_value > 1e-3 else "  <- stands out"
        shown = repr(visible(candidate.text))
        lines.append(f"  {rank:2}  {shown:32} documents {len(candidate.documents):5,}  p {candidate.p_value:.2g}{mark}")
    lines.append("documents with which a trigger before fluent text of another topic would lead this list:")
    lines += [
        f"  {visible(domain)} {count or 'more than 500'}" for domain, count in found["reliable_documents"].items()
    ]
    told = [limit for limit in decision.thresholds if limit.realised is not None]
    lines.append("thresholds (nominal rate -> realised, out of fold):")
    lines += [
        f"  {visible(t.domain)} {t.language:4} {t.detector:12} {t.nominal:.3%} -> {t.realised:.3%} of {t.documents:,}"
        for t in told
    ]
    if untold := len(decision.thresholds) - len(told):
        lines.append(f"  {untold} thresholds can't be told: too few documents for this rate")
    lines.append(f"{found['queue']:,} documents to read: {out}/queue.html")
    return "\n".join(lines)


def _merge(arguments: argparse.Namespace) -> int:
    from poisonjax.scan.corpus import open_scan
    from poisonjax.scan.verdicts import merge

    open_scan(arguments.out)
    merged: Merged = merge(arguments.verdicts, arguments.out)
    if arguments.json:
        told = {"excluded": merged.excluded, "conflicts": merged.conflicts, "verdicts": len(merged.verdicts)}
        print(json.dumps(told))
    else:
        for conflict in merged.conflicts:
            said = ", ".join(f"{visible(who)} says {word}" for who, word in conflict["verdicts"].items())
            print(f"conflict on {conflict['key']}: {said}")
        print(f"{len(merged.excluded):,} documents to leave out: {arguments.out}/exclude.txt")
    return exit_codes.FAILED if merged.conflicts else exit_codes.OK
