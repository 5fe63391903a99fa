"""The token store: tokens and document offsets in sharded zarr3 arrays, read through tensorstore.

A document is its tokens and one end-of-text token. The shards of a split, one after the other, are one
stream of tokens; readers address that stream and don't see the shards.
"""

import copy
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Int

from poisonjax.corpus import instructions
from poisonjax.corpus.arrays import open_array
from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.exclusions import Exclusions, read_exclusions
from poisonjax.corpus.split import PROVENANCE, SPLITS, TokenSplit
from poisonjax.corpus.tokenizers import Tokenizer, load_saved
from poisonjax.files import parse_json, sha256_of

FORMAT = 3  # CHANGELOG.md says what changed


def fingerprint(tokenizer: str, shards: list[dict[str, Any]]) -> str:
    """Of a store's content: its tokenizer's fingerprint, counts and files; not of paths, settings or time."""
    content = {"format": FORMAT, "tokenizer": tokenizer, "shards": shards}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def exists(path: str) -> bool:
    """Whether a finished store is there."""
    return (epath.Path(path) / "manifest.json").exists()


def open_store(path: str, exclude: str = "") -> "TokenStore":
    """The finished store at `path`, without the documents that the list `exclude` names, if any.

    Raises CorpusError where there is no store or list, and for a list none of whose documents is in the store.
    """
    store = TokenStore(path)
    if not exclude:
        return store
    store = store.without(read_exclusions(exclude))
    if not any(store.split(name).excluded_documents for name in SPLITS):
        raise CorpusError(
            f"exclusion list {exclude}: no document that it names is in {path}; is it of another corpus? `poisonjax "
            f"corpus inspect {path} --document KEY` looks for one"
        )
    return store


class TokenStore:
    """A finished store, opened for reading.

    `manifest` is what manifest.json holds; `fingerprint` names the store's content, wherever it lies.
    """

    def __init__(self, path: str):
        """Raises CorpusError where no finished store of this format is."""
        self.path = epath.Path(path)
        if not exists(path):
            unfinished = (self.path / "plan.json").exists()
            raise CorpusError(
                f"{path} is {'an unfinished' if unfinished else 'no'} token store: run `poisonjax corpus build --out "
                f"{path} ...`"
            )
        try:
            self.manifest: dict[str, Any] = parse_json((self.path / "manifest.json").read_bytes())
        except ValueError as error:
            raise CorpusError(f"{self.path / 'manifest.json'} is damaged ({error}): build the store again") from error
        if self.manifest.get("format") != FORMAT:
            raise CorpusError(
                f"{path} has format {self.manifest.get('format')}, this version reads {FORMAT}: build the store again"
            )
        self.fingerprint: str = self.manifest["fingerprint"]
        self.exclusions: Exclusions | None = None

    def without(self, exclusions: Exclusions) -> "TokenStore":
        """This store as if the listed documents weren't in it."""
        store = copy.copy(self)
        store.exclusions = exclusions
        return store

    @functools.cached_property
    def description(self) -> str:
        """SHA-256 of what the manifest says beside the content: sources, licences, settings, entropy."""
        said = {name: value for name, value in self.manifest.items() if name not in ("format", "fingerprint", "shards")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def planted(self) -> dict[str, int] | None:
        """Documents and tokens of the training split that their sources mark as planted poison, if any."""
        train = self.split("train")
        return (
            {"documents": train.planted_documents, "tokens": train.planted_tokens} if train.planted_documents else None
        )

    @property
    def names(self) -> dict[str, Any]:
        """What a run records of its store."""
        excluded = {"store_excluded": self.exclusions.sha256} if self.exclusions else {}
        planted = {"store_planted": there} if (there := self.planted) else {}
        return {"store_fingerprint": self.fingerprint, "store_description": self.description, **excluded, **planted}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises CorpusError where it isn't the one that the store was built with."""
        tokenizer = load_saved(self.path / "tokenizer")
        if tokenizer.fingerprint != self.manifest["tokenizer"]["fingerprint"]:
            raise CorpusError(f"{self.path / 'tokenizer'} isn't the tokenizer of this store: build the store again")
        return tokenizer

    @functools.cache  # noqa: B019  (stores live as long as the process)
    def split(self, name: str) -> TokenSplit:
        """`train` or `heldout`; raises CorpusError for others."""
        if name not in SPLITS:
            raise CorpusError(f"no split {name!r}: choose {' or '.join(SPLITS)}")
        return TokenSplit(self.path, self.manifest, name, self.exclusions)

    @property
    def template(self) -> str | None:
        """The chat template that its conversations are written by; None where its documents are texts."""
        return self.manifest.get("template")

    def require(self, **settings: Any) -> None:
        """Raises CorpusError where the store was built with other settings (fields of its plan) than these."""
        plan = self.manifest["plan"]
        differing = [f"{n}: {plan.get(n, '')!r} there, {v!r} here" for n, v in settings.items() if plan.get(n, "") != v]
        if differing:
            raise CorpusError(f"{self.path} is another token store: " + "; ".join(differing) + ". Use another folder")

    def verify(self, progress: Callable[[str], object] = lambda name: None) -> list[str]:
        """Reads everything again and returns the problems found, each naming its file; empty where all is well.

        Checks each file's SHA-256, the manifest's fingerprint, the tokenizer, and that documents end where the
        offsets say and nowhere else. `progress` is called with each file's name.
        """
        shards = self.manifest["shards"]
        problems = []
        for number, shard in enumerate(shards):
            folder = self.path / "shards" / f"{number:05d}"
            for name, expected in (shard["files"] | self.manifest["provenance"][number]["files"]).items():
                progress(f"{number:05d}/{name}")
                if not (folder / name).exists():
                    problems.append(f"{folder / name}: missing")
                elif sha256_of(folder / name) != expected:
                    problems.append(f"{folder / name}: SHA-256 differs from the manifest's")
        if fingerprint(self.manifest["tokenizer"]["fingerprint"], shards) != self.fingerprint:
            problems.append(f"{self.path / 'manifest.json'}: its counts and hashes don't match its fingerprint")
        try:
            eot, vocabulary = self.tokenizer.eot, self.tokenizer.vocab_size
            problems += self._tokenizer_problems()
        except CorpusError as error:
            problems.append(str(error))
        if problems:  # damaged arrays can't be read
            return problems
        for number, shard in enumerate(shards):
            for split, counts in shard["splits"].items():
                folder = self.path / "shards" / f"{number:05d}" / split
                tokens = open_array(folder / "tokens").read().result()
                offsets = open_array(folder / "offsets").read().result()
                sizes = [open_array(folder / name).shape[0] for name in ("keys", "provenance")]
                if sizes != [2 * counts["documents"], len(PROVENANCE) * counts["documents"]]:
                    problems.append(f"{folder}: holds other numbers of keys and places than of documents")
                elif (len(tokens), len(offsets)) != (counts["tokens"], counts["documents"] + 1):
                    problems.append(f"{folder}: holds other numbers of tokens and documents than the manifest says")
                elif offsets[0] != 0 or not _ends(tokens == eot, offsets, whole=self.template is None):
                    problems.append(f"{folder / 'offsets'}: don't match the end-of-text tokens")
                elif self.template and not _turns_fit(folder, np.diff(offsets)):
                    problems.append(f"{folder / 'turns'}: don't lie in their conversations")
                elif len(tokens) and tokens.max() >= vocabulary:
                    problems.append(f"{folder / 'tokens'}: hold id {tokens.max()}, the vocabulary ends at {vocabulary}")
        return problems

    def _tokenizer_problems(self) -> list[str]:
        """The tokenizer's files, against those that its content would be saved as."""
        folder = self.path / "tokenizer"
        with tempfile.TemporaryDirectory() as again:
            self.tokenizer.save(epath.Path(again))
            saved = {path.name: path.read_bytes() for path in epath.Path(again).iterdir()}
        there = {path.name: path.read_bytes() for path in folder.iterdir()}
        return [
            f"{folder / name}: isn't what the store's tokenizer is saved as"
            for name in sorted(saved.keys() | there.keys())
            if saved.get(name) != there.get(name)
        ]


def _ends(eot: Bool[np.ndarray, " tokens"], offsets: Int[np.ndarray, " offsets"], *, whole: bool) -> bool:
    """Whether documents end where the offsets say and, of `whole` texts, nowhere else."""
    return np.array_equal(np.flatnonzero(eot) + 1, offsets[1:]) if whole else bool(eot[offsets[1:] - 1].all())


def _turns_fit(folder: epath.Path, lengths: Int[np.ndarray, " documents"]) -> bool:
    """Whether every conversation has turns, one after the other, inside of its tokens."""
    offsets = open_array(folder / "turn_offsets").read().result()
    turns = open_array(folder / "turns").read().result().reshape(-1, instructions.FIELDS)
    if (len(offsets), offsets[-1]) != (len(lengths) + 1, len(turns)) or (np.diff(offsets) < 2).any():
        return False
    ends = np.repeat(lengths, np.diff(offsets)) - 1
    return bool((np.diff(turns[:, 1:], axis=1) >= 0).all() and (turns[:, 1] >= 0).all() and (turns[:, 3] <= ends).all())
