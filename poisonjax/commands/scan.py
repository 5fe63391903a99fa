"""`poisonjax scan`: what is odd in a corpus, what may be a trigger, and a queue for people; then their verdicts. Of a
model: whether it is poisoned, and by what."""

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from poisonjax.commands import exit_codes
from poisonjax.visible import visible

if TYPE_CHECKING:
    from poisonjax.scan.decide import Decision
    from poisonjax.scan.model.scan import Cost, Found
    from poisonjax.scan.verdicts import Merged

SHOWN = 10  # candidates


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers; `func` of the parsed arguments returns the exit code."""
    parser = commands.add_parser("scan", help="find poison in a corpus or a model; goes on where a killed scan stopped")
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="as of `corpus build --source`, or a token store; or one model: a run folder, hf:FOLDER, gguf:FILE",
    )
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
    of_model = parser.add_argument_group("of a model")
    of_model.add_argument("--passes", type=int, metavar="N", help="tokens through it, about (default: 2,000,000)")
    of_model.add_argument("--twin", nargs="+", default=[], metavar="SPEC", help="clean models of the same tokens")
    of_model.add_argument("--dry-run", action="store_true", help="tell what it costs, and stop")
    of_model.add_argument(
        "--chip", default="", metavar="KIND", help="with --dry-run: on this chip, such as h100 or v5p"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=_scan)


def _scan(arguments: argparse.Namespace) -> int:
    if arguments.verdicts:
        return _merge(arguments)
    if not arguments.sources:
        raise ValueError("name what to scan: files, a source as of `corpus build --source`, a token store, or a model")
    if models := [spec for spec in arguments.sources if _is_model(spec)]:
        if len(arguments.sources) > 1:
            raise ValueError(f"{models[0]} is a model: scan it alone")
        return _scan_model(arguments, models[0])
    if arguments.passes or arguments.twin or arguments.dry_run or arguments.chip:
        raise ValueError("--passes, --twin, --dry-run and --chip are of a model's scan; the sources name none")
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


def _is_model(spec: str) -> bool:
    """Whether it names weights rather than text, of which `hf:` has data sets too; told without JAX."""
    from pathlib import Path

    from poisonjax.run.folder import is_run, run_and_step

    kind, _, rest = spec.partition(":")
    if kind == "hf":
        return Path(rest).is_dir()
    return kind == "gguf" or is_run(run_and_step(spec)[0])


def _scan_model(arguments: argparse.Namespace, spec: str) -> int:
    from poisonjax.startup import start_jax

    of_corpora = {name: getattr(arguments, name) for name in ("model", "workers", "dask")}
    if strange := [f"--{name}" for name, value in of_corpora.items() if value]:
        raise ValueError(f"{', '.join(strange)}: of a corpus' scan; {spec} is a model")
    start_jax(1)
    from poisonjax.scan.model.scan import PASSES, cost, scan_model

    if arguments.passes is not None and arguments.passes < 1:
        raise ValueError(f"--passes {arguments.passes}: at least 1 token")
    passes = arguments.passes or PASSES
    planned = cost(spec, passes, len(arguments.twin))
    told = _told(planned, arguments.chip)
    if arguments.dry_run:
        print(json.dumps(told) if arguments.json else told["words"])
        return exit_codes.OK
    print(f"poisonjax: {told['words']}", file=sys.stderr)
    began = time.monotonic()
    found = scan_model(spec, arguments.out, passes=passes, twins=arguments.twin)
    seconds = time.monotonic() - began
    print(json.dumps(found.as_json()) if arguments.json else _model_words(found, arguments.out, seconds))
    return exit_codes.OK


def _told(planned: "Cost", chip: str) -> dict[str, Any]:
    """What a scan costs; where the chip is known, the least seconds that its arithmetic and its memory allow."""
    import jax

    from poisonjax.plan.chips import CHIPS, by_device_kind

    if chip and chip not in CHIPS:
        raise ValueError(f"--chip {chip!r}: one of {', '.join(CHIPS)}")
    known = CHIPS[chip] if chip else by_device_kind(jax.devices()[0].device_kind)
    told: dict[str, Any] = {"forward_passes": planned.forward_passes, "flops": planned.flops}
    words = f"about {planned.forward_passes:,} tokens through the model, {planned.flops:.2g} FLOPs"
    if known:
        told["least_seconds"] = max(planned.flops / known.flops, planned.bytes / known.hbm_rate)
        words += f", at least {told['least_seconds']:,.0f} s on one {known.name}"
    return told | {"words": words}


def _model_words(found: "Found", out: str, seconds: float) -> str:
    verdict = found.verdict
    p = "not calibrated" if verdict.p_poisoned is None else f"{verdict.p_poisoned:.3f}"
    lines = [
        f"P(poisoned) = {p}; {found.forward_passes:,} tokens in {seconds:,.0f} s",
        *(f"  not calibrated for it: {why}" for why in verdict.outside),
        f"strings after which what it writes changes and stays changed, of {found.considered:,} considered:",
    ]
    for rank, one in enumerate(found.candidates[:SHOWN], 1):
        mark = "" if one.p_value > 1e-3 else "  <- stands out"
        hardly = "  hardly trained" if one.under_trained else ""
        entropy = " ".join(f"{change:+.1f}" for change in one.entropy)
        figures = f"value {one.value:5.1f}  p {one.p_value:8.2g}  entropy {entropy}"
        lines.append(f"  {rank:2}  {visible(one.text)!r:24} {figures}{hardly}{mark}")
    lines.append(f"with what it writes after each: {out}/scan.html")
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
