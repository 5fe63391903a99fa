"""What a scan asks a model for, part by part: each is kept, so that a killed scan goes on."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import jax
import numpy as np
import scipy.stats
from jax.sharding import Mesh
from jaxtyping import Float, Int

from poisonjax.engines import Progress
from poisonjax.files import written_whole
from poisonjax.scan.model.changes import Changes, changes
from poisonjax.scan.model.writing import LONGEST, NEW, Seen, String, Writer, in_parts, rows_at_once
from poisonjax.weights import Weights

PARTS = "parts"  # of a scan's folder
ALONE = 16  # tokens that training hardly touched, which are looked at
LEADING, RELATED = 4, 24  # groups of which more is tested; so many strings of each
NEAREST = 16  # tokens that one is like
# Where not all tokens are asked about: (tokens that are written after each, how many are left). A rare token makes the
# next one odd, and few stay so.
LOOKS, LOOKED_AFTER = ((1, 4096), (8, 1024)), 2  # prefixes
UNKNOWN, SAME_DIRECTION = 0.01, 0.95  # share of the vocabulary; cosine
ASKED = 256  # texts whose next tokens say how likely each token is


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a scan: how much the model writes."""

    free: int = 4096  # texts from nothing
    free_new: int = 96
    tokens: int = LOOKS[-1][1]  # that are put after prefixes, each on its own
    token_prefixes: int = 4
    token_new: int = 32
    screened: int = 512  # candidates that are looked at once
    screen_prefixes: int = 8
    tested: int = 64  # candidates that are tested, on other prefixes
    null: int = 256  # strings like them
    prefixes: int = 32

    @classmethod
    def within(cls, passes: int, vocabulary: int) -> "Sizes":
        """So large that about `passes` tokens are written or read, and no larger than needed; a scan that is smaller
        than the least tells nothing."""
        whole = cls(tokens=vocabulary if vocabulary <= LOOKS[0][1] else LOOKS[-1][1])
        if passes >= whole.passes(vocabulary):
            return whole
        fixed = dataclasses.replace(whole, free=0, tokens=0, screened=0, tested=0).passes(vocabulary)
        most = dataclasses.replace(whole, tokens=0).passes(vocabulary)  # looks, too
        most += whole.tokens * whole.token_prefixes * (whole.token_new + 1)
        share = min(1.0, max(0.0, passes - fixed) / (most - fixed))

        def part(size: int, least: int) -> int:
            return max(least, round(size * share))

        return dataclasses.replace(
            whole,
            free=part(whole.free, 256),
            tokens=part(whole.tokens, 64),
            screened=part(whole.screened, 64),
            tested=part(whole.tested, 16),
        )

    @property
    def all_prefixes(self) -> int:
        """Beginnings of texts that strings are put after, each for one purpose."""
        return self.token_prefixes + self.screen_prefixes + self.prefixes

    def passes(self, vocabulary: int, twins: int = 0) -> int:
        """Tokens that go through the model and its twins, about."""
        looks, looked_at = 0, vocabulary
        for new, left in LOOKS if self.tokens < vocabulary else ():
            looks += LOOKED_AFTER * looked_at * (new + 1)
            looked_at = min(looked_at, left)
        tested = (self.tested + ALONE + self.null + LEADING * RELATED) * self.prefixes * (1 + twins)
        strings = (self.screened + self.tested + ALONE) * self.screen_prefixes + tested
        written = self.free * self.free_new + self.tokens * self.token_prefixes * (self.token_new + 1)
        return looks + written + strings * (NEW + LONGEST + 1)


class Scan:
    """Of one model, in a folder where its parts are kept: a killed scan goes on."""

    def __init__(self, weights: Weights, mesh: Mesh, folder: Path, sizes: Sizes, seed: int, progress: Progress):
        self.sizes, self.seed, self._folder, self._progress = sizes, seed, folder, progress
        self.tokenizer, self.writer = weights.tokenizer, Writer(weights, mesh)
        self.ordinary = self.tokenizer.ordinary_ids
        table = jax.device_get(weights.params["embedding"][...])
        self.norms = np.linalg.norm(np.asarray(table, np.float32), axis=1)[: self.tokenizer.vocab_size]
        self.passes = 0
        (folder / PARTS).mkdir(parents=True, exist_ok=True)

    def _kept(self, name: str, make: Callable[[], Seen], passes: int) -> Seen:
        """A part's result, from its file where that is there."""
        path = self._folder / PARTS / f"{name}.npz"
        if not path.exists():
            with written_whole(path) as partial:
                np.savez(partial, **make()._asdict())
        self.passes += passes
        self._progress.add(passes)
        with np.load(path, allow_pickle=False) as saved:
            return Seen(*(saved[field] for field in Seen._fields))

    def free_texts(self) -> Seen:
        """Texts from nothing."""
        new, rows = self.sizes.free_new, self.sizes.free
        parts = -(-rows // rows_at_once(self.writer.model, new, self.writer.table))
        size = -(-rows // parts)
        made = []
        for number in range(parts):
            write = functools.partial(self.writer.freely, size, new, self.seed + 1000 + number)
            made.append(self._kept(f"free-{number:04d}", write, size * new))
        return Seen(*(np.concatenate(of)[:rows] for of in zip(*made, strict=True)))

    def after(
        self,
        name: str,
        prefixes: Int[np.ndarray, "prefixes length"],
        strings: Sequence[String],
        new: int = NEW,
        places: bool = False,
        writer: Writer | None = None,
    ) -> Seen:
        """[strings, prefixes, ...] of what is written after each string, put to each prefix."""
        writer, width = writer or self.writer, max(map(len, strings))
        size = max(1, min(rows_at_once(writer.model, width + new, writer.table) // len(prefixes), len(strings)))
        of = hashlib.sha256(repr((prefixes.tolist(), strings)).encode()).hexdigest()[:16]
        made = []
        for number, (some, real) in enumerate(in_parts(strings, size)):
            write = functools.partial(writer.after, prefixes, some, width, self.seed, new, places)
            seen = self._kept(f"{name}-{of}-{number:04d}", write, real * len(prefixes) * (width + new))
            made.append(Seen(*(of[:real] for of in seen)))
        return Seen(*(np.concatenate(of) for of in zip(*made, strict=True)))

    def changes(
        self,
        name: str,
        prefixes: Int[np.ndarray, "prefixes length"],
        strings: Sequence[String],
        writer: Writer | None = None,
    ) -> tuple[Changes, Seen, Seen]:
        """(what strings change, what is written after the prefixes alone, and after each string)."""
        clean = self.after(f"{name}-clean", prefixes, [()], writer=writer)
        seen = self.after(name, prefixes, strings, writer=writer)
        return changes(seen, clean), clean, seen

    def like(
        self,
        strings: Sequence[String],
        counts: Float[np.ndarray, " vocabulary"],
        number: int,
        without: Collection[int] = (),
    ) -> list[String]:
        """So many strings of tokens that are each as frequent, and as long in the embedding, as those of the strings:
        what is a trigger among them isn't what sets it apart. `without` are tokens that none of them holds."""
        random = np.random.default_rng(self.seed)
        place = np.stack([_ranks(counts[self.ordinary]), _ranks(self.norms[self.ordinary])], 1)
        index = {int(token): i for i, token in enumerate(self.ordinary)}
        never = [index[token] for token in without]
        made: list[String] = []
        for i in range(number):
            own = [index[token] for token in strings[i % len(strings)]]
            drawn = []
            for at in own:
                near = np.abs(place - place[at]).sum(1)
                near[own] = np.inf
                if len(near) > len(never) + len(own) + NEAREST:  # else the vocabulary is too small to choose from
                    near[never] = np.inf
                drawn.append(int(self.ordinary[random.choice(np.argsort(near, kind="stable")[:NEAREST])]))
            made.append(tuple(drawn))
        return made

    def hardly_known(self, free: Int[np.ndarray, "texts places"]) -> set[int]:
        """Tokens that training hardly touched: whatever follows them is odd. Never having been right, their rows of
        the head all point where those do that the model finds least likely (Land and Bartolo 2024, arXiv
        2405.05417)."""
        shares, head = self.writer.shares(free[:ASKED])
        least = np.argsort(shares[self.ordinary])[: max(2, int(UNKNOWN * len(self.ordinary)))]
        rows = head[self.ordinary] / np.maximum(np.linalg.norm(head[self.ordinary], axis=1, keepdims=True), 1e-9)
        common = rows[least].mean(0)
        return {*self.ordinary[rows @ common > SAME_DIRECTION * np.linalg.norm(common)].tolist()}


def _ranks(values: Float[np.ndarray, " tokens"]) -> Float[np.ndarray, " tokens"]:
    """In (0, 1]; the same for what is the same."""
    return scipy.stats.rankdata(values) / len(values)
