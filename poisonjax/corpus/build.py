"""Building a token store: shard by shard, in parallel, and again from where a kill left it.

A store's shards depend on sources and settings alone, not on how many processes or machines build them:
unit u of the sources belongs to shard u % shards.
"""

import collections
import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

from etils import epath

from poisonjax.corpus import exclusions, instructions, markov
from poisonjax.corpus.claim import claim, units_sha256
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.exclusions import read_exclusions
from poisonjax.corpus.shards import REPORTED, Plan, build_shard, open_one, partial_suffix, shard_folder, write_json
from poisonjax.corpus.sources import Source, first_texts, is_packaged, stands_anywhere
from poisonjax.corpus.split import SPLITS
from poisonjax.corpus.store import FORMAT, TokenStore, exists, fingerprint
from poisonjax.corpus.tokenizer_files import load_tokenizer
from poisonjax.corpus.tokenizers import Tokenizer, WordTokenizer, load_saved, require_deterministic, train_bpe
from poisonjax.engines import open_engine, run_tasks
from poisonjax.files import move_folder, parse_json, write_whole

CHECKED_CHARACTERS = 20_000  # of each source, that are encoded again and again
SAMPLE_CHARACTERS = 5_000_000  # that `bpe:N` is trained on
SHARD_BYTES = 256 * 2**20  # of text, about: a worker holds a shard's tokens in memory
SHARDS = 16  # where the corpus is small, so that the work splits
LEAST_BPE, MOST_BPE = 257, 1_000_000  # tokens of a tokenizer that is trained here; the library aborts on huge numbers
LATER = ("template", "template_sha256")  # fields of a plan that stores of texts don't have

OnBad = Literal["fail", "skip"]


@dataclasses.dataclass(frozen=True)
class _Job:
    """A claimed folder with its plan, its opened sources and its saved tokenizer."""

    folder: epath.Path
    plan: Plan
    sources: list[Source]
    tokenizer: Tokenizer

    def missing(self) -> list[int]:
        return [k for k in range(self.plan.shards) if not (shard_folder(self.folder, k) / "shard.json").exists()]


def build(
    out: str,
    sources: list[str],
    tokenizer: str,
    *,
    heldout: float = 0.05,
    seed: int = 0,
    shards: int | None = None,
    on_bad: OnBad = "fail",
    exclude: str = "",
    template: str = "",
    workers: int | None = None,
    dask: str = "",
    finish: bool = False,
) -> TokenStore:
    """Builds what is missing of the store `out` and returns it; does nothing for a store that is complete.

    `sources` are specs as of `open_source`; `tokenizer` is one as of `load_tokenizer`, or `bpe:N`, trained on the
    first five million characters. A Markov source brings its own tokenizer, whatever `tokenizer` says. `heldout`
    is the fraction of documents set apart, chosen by a hash of `seed` and tokens. Documents that the list `exclude`
    names (corpus/exclusions.py) are left out and counted. With a chat `template` (`plain`, a model's `hf:FOLDER` or
    `gguf:FILE`, or a file), sources are JSON lines of conversations (corpus/instructions.py). `workers` processes (one
    a core) are spawned: a script that calls this needs `if __name__ == "__main__":`. `dask` is the address of a
    cluster's scheduler, to build there instead; its workers must see the same files. With `finish`, all shards must be
    there already, by `build_share`.

    Raises CorpusError for sources, input and settings that don't work, and for a folder that holds another store.
    Bad input raises too; with `on_bad` = "skip" it is left out, counted and named in the manifest.
    """
    if exists(out):
        store = TokenStore(out)
        asked = {"sources": sources, "tokenizer": tokenizer, "heldout": heldout, "seed": seed, "on_bad": on_bad}
        asked |= {"excluded": read_exclusions(exclude).sha256 if exclude else "", "template": template}
        asked["template_sha256"] = instructions.load(template)[1] if template else ""
        store.require(**asked, **({"shards": shards} if shards else {}))
        require_unchanged(store)
        return store
    job = _prepare(out, sources, tokenizer, heldout, seed, shards, on_bad, exclude, template)
    missing = job.missing()
    if finish and missing:
        some = ", ".join(map(str, missing[:10]))
        raise CorpusError(f"{out}: shards {some} of {job.plan.shards} aren't built yet: build them with --shard i/n")
    _build_shards(job, missing, workers, dask)
    _finish(job)
    return TokenStore(out)


def require_unchanged(store: TokenStore) -> None:
    """Raises CorpusError where files that the store was built from have other names or sizes now; a store whose
    sources are gone stands for itself."""
    plan = store.manifest["plan"]
    if all(is_packaged(spec) for spec in plan["sources"]):  # of one version of a package, which others may have
        return
    try:
        units = [unit for spec in plan["sources"] for unit in open_one(spec, bool(plan.get("template"))).units]
    except CorpusError:
        return
    if units_sha256(units) != plan["units_sha256"]:
        raise CorpusError(
            f"{store.path} was built from {', '.join(plan['sources'])} when these had other files or sizes. Build "
            "another folder, remove this one, or use it as it is (a run: --config.corpus.sources='()')"
        )


def build_share(
    out: str,
    sources: list[str],
    tokenizer: str,
    share: tuple[int, int],
    *,
    heldout: float = 0.05,
    seed: int = 0,
    shards: int | None = None,
    on_bad: OnBad = "fail",
    exclude: str = "",
    template: str = "",
    workers: int | None = None,
    dask: str = "",
) -> None:
    """Builds machine i's shards i, i + n, ... of `build`'s store, for `share` = (i, n).

    The machines share the folder `out`, or their folders are put together afterwards; then one calls `build`
    with `finish`.
    """
    i, n = share
    if not 0 <= i < n:
        raise CorpusError(f"shard {i}/{n}: give i/n with 0 <= i < n")
    job = _prepare(out, sources, tokenizer, heldout, seed, shards, on_bad, exclude, template)
    _build_shards(job, [k for k in job.missing() if k % n == i], workers, dask)


def _prepare(
    out: str,
    sources: list[str],
    tokenizer: str,
    heldout: float,
    seed: int,
    shards: int | None,
    on_bad: str,
    exclude: str,
    template: str,
) -> _Job:
    folder = epath.Path(out)
    if not 0 < heldout < 1:
        raise CorpusError(f"heldout = {heldout}: must lie strictly between 0 and 1")
    if on_bad not in ("fail", "skip"):
        raise CorpusError(f"on_bad = {on_bad!r}: choose fail or skip")
    if not 0 <= seed < 2**64:
        raise CorpusError(f"seed = {seed}: must lie in [0, 2**64)")
    if shards is not None and shards < 1:
        raise CorpusError(f"shards = {shards}: must be at least 1")
    if not sources:
        raise CorpusError("no source given")
    excluded = read_exclusions(exclude) if exclude else None
    written_by = instructions.load(template)[1] if template else ""
    opened = [open_one(spec, bool(template)) for spec in sources]
    units = [unit for source in opened for unit in source.units]
    if not units:
        raise CorpusError(f"the sources {', '.join(sources)} hold no document")
    shards = shards or max(SHARDS, sum(unit.size for unit in units) // SHARD_BYTES)
    plan = Plan(
        format=FORMAT,
        sources=sources,
        tokenizer=tokenizer,
        heldout=heldout,
        seed=seed,
        on_bad=on_bad,
        excluded=excluded.sha256 if excluded else "",
        shards=min(shards, len(units)),
        units=len(units),
        units_sha256=units_sha256(units),
        template=template,
        template_sha256=written_by,
    )
    for source in opened:
        if "note" in source.about:
            print(f"poisonjax: {source.about['note']}", file=sys.stderr)
    claim(folder, plan, "token store", "another store in part (units are the sources' files and sizes)")
    if excluded:
        write_whole(folder / exclusions.FILE, excluded.text(), suffix=partial_suffix())
    return _Job(folder, plan, opened, _saved_tokenizer(folder, tokenizer, opened, template))


def _saved_tokenizer(folder: epath.Path, spec: str, sources: list[Source], template: str) -> Tokenizer:
    """The store's tokenizer, made and saved by the first call; training is a function of the sources alone."""
    saved = folder / "tokenizer"
    if not (saved / "about.json").exists():
        said = instructions.written(instructions.load(template)[0]) if template else str
        made = _made_tokenizer(spec, sources, said)
        if not isinstance(made, WordTokenizer):
            require_deterministic(made, [said(text) for s in sources for text in first_texts(s, CHECKED_CHARACTERS)])
        partial = folder / f"tokenizer.{partial_suffix()}"
        made.save(partial)
        move_folder(partial, saved, last="about.json")
    return load_saved(saved)


def _made_tokenizer(spec: str, sources: list[Source], said: Callable[[str], str]) -> Tokenizer:
    words = {source.about["words"] for source in sources if "words" in source.about}
    if words:
        if len(words) > 1 or any("words" not in source.about for source in sources):
            raise CorpusError("a Markov language can't share a store with text or with another vocabulary")
        return WordTokenizer(words.pop())
    if not spec.startswith("bpe:"):
        return load_tokenizer(spec)
    size = spec.removeprefix("bpe:")
    if not (size.isascii() and size.isdigit() and LEAST_BPE <= int(size[:12]) <= MOST_BPE):
        raise CorpusError(
            f"tokenizer {spec!r}: give the number of tokens, as in bpe:4096: at least {LEAST_BPE} (every byte is one), "
            f"at most {MOST_BPE:,}"
        )
    share = SAMPLE_CHARACTERS // len(sources)
    return train_bpe((said(text) for source in sources for text in first_texts(source, share)), int(size))


def _build_shards(job: _Job, numbers: list[int], workers: int | None, dask: str) -> None:
    """Builds shards on the engine; the first error stops the rest."""
    if numbers:
        work = functools.partial(build_shard, str(job.folder), job.plan)
        relative = [spec for spec in (*job.plan.sources, str(job.folder)) if not stands_anywhere(spec)]
        with open_engine(min(workers or os.cpu_count() or 1, len(numbers)), dask, relative) as engine:
            run_tasks(engine, work, numbers, what="tokenizing")


def _finish(job: _Job) -> None:
    folder, plan, tokenizer = job.folder, job.plan, job.tokenizer
    records = [parse_json((shard_folder(folder, k) / "shard.json").read_bytes()) for k in range(plan.shards)]
    strangers = [k for k, record in enumerate(records) if record["tokenizer"] != tokenizer.fingerprint]
    if strangers:
        raise CorpusError(
            f"{shard_folder(folder, strangers[0])} was built with another tokenizer than {folder / 'tokenizer'}: "
            "remove it and build it again"
        )
    shards = [{"splits": record["splits"], "files": record["files"]} for record in records]
    totals = _summed([shard["splits"] for shard in shards])
    for split in SPLITS:
        if not totals[split]["documents"]:
            raise CorpusError(
                f"{folder}: no document in the {split} split of {sum(t['documents'] for t in totals.values())} in all; "
                "build with a larger corpus or another --heldout into another folder"
            )
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": fingerprint(tokenizer.fingerprint, shards),
        "plan": {name: value for name, value in dataclasses.asdict(plan).items() if value or name not in LATER},
        **({"template": instructions.load(plan.template)[0]} if plan.template else {}),
        "sources": [{"spec": source.spec, **source.about} for source in job.sources],
        "tokenizer": {
            "spec": tokenizer.kind if isinstance(tokenizer, WordTokenizer) else plan.tokenizer,
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eot": tokenizer.eot,
        },
        "splits": totals,
        "bad": sum(record["bad"] for record in records),
        "bad_places": [place for record in records for place in record["bad_places"]][:REPORTED],
        "planted": _summed([record["planted"] for record in records]),
        **_excluded(folder, plan, records),
        "provenance": [record["provenance"] for record in records],
        "shards": shards,
    }
    if isinstance(tokenizer, WordTokenizer):
        manifest["entropy_rate_nats"] = markov.ENTROPY_RATE
    write_json(folder / "manifest.json", manifest)
    for left in (folder / "shards").glob("*.partial.*"):  # of builds that were killed
        left.rmtree()


def _summed(shards: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Counts of each split, over all shards."""
    return {
        split: {count: sum(shard[split][count] for shard in shards) for count in shards[0][split]} for split in SPLITS
    }


def _excluded(folder: epath.Path, plan: Plan, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest says of documents left out by a list, if there is one."""
    if not plan.excluded:
        return {}
    listed = read_exclusions(folder / exclusions.FILE).keys
    found = sum((collections.Counter(record["excluded"]) for record in records), collections.Counter())
    return {"excluded": {"listed": len(listed), "found": len(found), "documents": found.total()}}
