"""`poisonjax corpus build` and `poisonjax corpus inspect`."""

import argparse
import json
import sys
from typing import Any

import numpy as np
from tqdm import tqdm

from poisonjax.corpus.build import build
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.store import SPLITS, TokenStore


def add_arguments(commands: Any) -> None:
    """Registers the commands on argparse's subparsers."""
    corpus = commands.add_parser("corpus", help="build and inspect token stores").add_subparsers(
        dest="corpus_command", required=True, metavar="COMMAND"
    )
    make = corpus.add_parser("build", help="text to token store; goes on where a killed build stopped")
    make.add_argument("--out", required=True, metavar="STORE")
    make.add_argument(
        "--source",
        action="append",
        metavar="SPEC",
        help="repeatable: default, wikipedia-leads, docstrings, PATH or GLOB of .txt/.jsonl/.parquet (.gz, .zst; #FIELD), "
        "hf:NAME[:CONFIG][:SPLIT][#FIELD], markov:V=512,documents=2000,length=300,seed=0",
    )
    make.add_argument(
        "--tokenizer", default="bpe:4096", help="bytes, bpe:N, tokenizer.json[#END_OF_TEXT], X.model"
    )
    make.add_argument(
        "--heldout", type=float, default=0.05, help="fraction of documents set apart for evaluation"
    )
    make.add_argument(
        "--seed", type=int, default=0, help="of the held-out choice and the shuffle within shards"
    )
    make.add_argument(
        "--on-bad", choices=("fail", "skip"), default="fail", help="bad input: stop, or skip and count"
    )
    make.add_argument(
        "--shards", type=int, help="how many (default: one a file, or one a thousand documents)"
    )
    make.add_argument("--workers", type=int, help="processes (default: one a core)")
    make.add_argument("--shard", metavar="i/n", help="build machine i's share of n; end with one --finish")
    make.add_argument(
        "--finish", action="store_true", help="all machines' shares are built: write the manifest"
    )
    make.set_defaults(func=_build)

    look = corpus.add_parser("inspect", help="counts, samples, and every hash checked")
    look.add_argument("store", metavar="STORE")
    look.add_argument("--samples", type=int, default=3, help="documents shown of each split")
    look.add_argument("--no-verify", action="store_true", help="don't hash the files")
    look.add_argument("--json", action="store_true")
    look.set_defaults(func=_inspect)


def _build(arguments: argparse.Namespace) -> int:
    try:
        i, n = map(int, arguments.shard.split("/")) if arguments.shard else (0, 1)
    except ValueError:
        raise CorpusError(f"--shard {arguments.shard!r}: give i/n, for example 0/4") from None
    store = build(
        arguments.out,
        arguments.source or ["default"],
        arguments.tokenizer,
        heldout=arguments.heldout,
        seed=arguments.seed,
        shards=arguments.shards,
        on_bad=arguments.on_bad,
        workers=arguments.workers,
        part=(i, n),
        finish=arguments.finish,
    )
    if store is None:
        print(
            f"share {i}/{n} of {arguments.out} is built; when all are: the same command with --finish for --shard"
        )
        return 0
    print(_counts(store))
    return 0


def _counts(store: TokenStore) -> str:
    manifest = store.manifest
    lines = [
        f"{store.path}: {manifest['fingerprint'][:16]}, {manifest['tokenizer']['vocab_size']} tokens in the vocabulary"
    ]
    for split in SPLITS:
        counts = manifest["splits"][split]
        lines.append(f"  {split:8} {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    if manifest["bad"]:
        lines.append(f"  skipped  {manifest['bad']:,} bad inputs, the first:")
        lines += [f"    {place}" for place in manifest["bad_places"]]
    return "\n".join(lines)


def _inspect(arguments: argparse.Namespace) -> int:
    store = TokenStore(arguments.store)
    samples = {
        split: [
            store.tokenizer.decode(store.split(split).document(int(i)))
            for i in np.linspace(0, store.split(split).documents - 1, arguments.samples).astype(int)
        ]
        for split in SPLITS
    }
    problems = []
    if not arguments.no_verify:
        files = sum(len(shard["files"]) for shard in store.manifest["shards"])
        with tqdm(total=files, unit="file", desc="verify", disable=not sys.stderr.isatty()) as bar:
            problems = store.verify(bar.update)
    if arguments.json:
        manifest = {name: value for name, value in store.manifest.items() if name != "shards"}
        print(
            json.dumps(
                manifest | {"samples": samples, "verified": not arguments.no_verify, "problems": problems}
            )
        )
    else:
        print(_counts(store))
        for split, texts in samples.items():
            for text in texts:
                print(f"  {split}: {text[:200]!a}")
        verdict = (
            "not verified"
            if arguments.no_verify
            else f"{len(problems)} problems"
            if problems
            else "all hashes match"
        )
        print("\n".join([verdict, *problems]))
    return 1 if problems else 0
