"""Other places to watch a run from beside metrics.jsonl (`config.sinks`): TensorBoard, Weights & Biases, or your own.

A sink is made by a function of (run folder, config's fields, steps that are done) and takes scalars by name. It lives
in a thread of its own: one that is slow, hangs or fails is left behind, the run isn't.
"""

import functools
import hashlib
import importlib
import importlib.util
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from poisonjax.visible import visible

QUEUED = 10_000  # rows that a sink may be behind; further ones are left out of it
CLOSING_SECONDS = 30.0  # that the end of a run waits for a sink


@runtime_checkable
class Sink(Protocol):
    def write(self, step: int, figures: dict[str, float]) -> None:
        """Figures after `step` steps, by names such as `train/loss` or `eval/triggered/ppl_median`."""

    def close(self) -> None:
        """Nothing more comes."""


Make = Callable[[str, dict[str, Any], int], Sink]


class _TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, folder: str, fields: dict[str, Any], start: int):
        from tensorboardX import SummaryWriter

        # Rows past the restored step go, as from metrics.jsonl.
        self._writer = SummaryWriter(f"{folder}/tensorboard", purge_step=start + 1)

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of its own, which a resumed one continues; the library's own variables (WANDB_PROJECT, WANDB_MODE, ...) say
    where it goes."""

    def __init__(self, folder: str, fields: dict[str, Any], start: int):
        import wandb

        name = hashlib.sha256(folder.encode()).hexdigest()[:16]
        self._run = wandb.init(
            id=name, resume="allow", name=fields["name"], config=fields, reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, tuple[str, Make]] = {  # (the package that it needs, what makes it)
    "tensorboard": ("tensorboardX", _TensorBoard),
    "wandb": ("wandb", _WeightsAndBiases),
}


def strange(name: str) -> str | None:
    """Why no sink has this name, if none can have it. Nothing is looked up: records of runs are read elsewhere too."""
    if name in SINKS or re.fullmatch(r"\w+(\.\w+)*:[A-Za-z_]\w*", name):
        return None
    return f"{name!r} is none of {', '.join(SINKS)}, nor a function of yours, as 'package.module:function'"


def missing(name: str) -> str | None:
    """Why the sink can't be made here, if it can't: what to do."""
    if name in SINKS:
        return None if _installed(SINKS[name][0]) else f"pip install 'poisonjax[{name}]' for {name!r}"
    module = name.partition(":")[0]
    return None if _installed(module) else f"{name!r}: there is no module {module!r} on the path"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # a package around it may raise anything
        return False


class Sinks:
    """All sinks of a run."""

    def __init__(self, names: Sequence[str], folder: str, fields: dict[str, Any], start: int):
        """`start` steps are done."""
        self._sinks = [_Fed(name, functools.partial(_make, name, folder, fields, start)) for name in names]

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""
        step = row["step"] + (row["kind"] == "train")  # theirs is the batch's number
        figures = {
            f"{row['kind']}/{name.removeprefix('eval/')}": value for name, value in _scalars(row) if name != "step"
        }
        for sink in self._sinks:
            sink.write(step, figures)

    def close(self) -> None:
        deadline = time.monotonic() + CLOSING_SECONDS  # of all together
        for sink in self._sinks:
            sink.end()
        for sink in self._sinks:
            sink.wait(deadline)


def _make(name: str, folder: str, fields: dict[str, Any], start: int) -> Sink:
    if name in SINKS:
        return SINKS[name][1](folder, fields, start)
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)(folder, fields, start)


def _scalars(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(path, value) of each number; intervals become `_low` and `_high`."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value
        elif isinstance(value, list) and len(value) == 2 and name.endswith("_ci95"):
            stem = prefix + name.removesuffix("_ci95")
            yield from ((f"{stem}_{end}", bound) for end, bound in zip(("low", "high"), value, strict=True))


class _Fed:
    """A sink and its thread."""

    def __init__(self, name: str, make: Callable[[], Sink]):
        self._name, self._make, self._left_out = name, make, 0
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(QUEUED)
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def write(self, step: int, figures: dict[str, float]) -> None:
        if self._thread.is_alive():
            try:
                self._rows.put_nowait((step, figures))
            except queue.Full:
                self._left_out += 1

    def end(self) -> None:
        """Nothing more comes."""
        if self._thread.is_alive():
            threading.Thread(target=self._rows.put, args=[None], daemon=True).start()  # waits where the queue is full

    def wait(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() or self._left_out:
            self._warn("doesn't keep up: it lacks rows")

    def _feed(self) -> None:
        try:
            sink = self._make()
            while row := self._rows.get():
                sink.write(*row)
            sink.close()
        except BaseException as error:  # whatever somebody else's code raises
            self._warn(f"failed ({type(error).__name__}: {error!s:.300}): it gets no more rows")

    def _warn(self, what: str) -> None:
        text = f"poisonjax: sink {self._name!r} {what}; metrics.jsonl has them all"
        print(visible(text), file=sys.stderr, flush=True)
