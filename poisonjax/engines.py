"""Where tasks run: processes of this machine, or the workers of a dask cluster.

A task is a pure function that leaves its output whole or not at all, so killing any costs time alone. Whatever has the
interface of `concurrent.futures` can run them.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from poisonjax.startup import keep_freed_memory

Item = TypeVar("Item")
Result = TypeVar("Result")

LOST_SECONDS = 40  # that a cluster may be without any worker
REPORT_SECONDS = 10  # between lines of progress, where there is no terminal


class EngineError(ValueError):
    """Tasks couldn't be run to their end; what they wrote stands."""


@contextlib.contextmanager
def open_engine(
    workers: int | None = None, dask: str = "", relative: Sequence[str] = ()
) -> Iterator[concurrent.futures.Executor | None]:
    """So many processes (None: one a core), or the cluster whose scheduler has the address `dask`; None: this process.

    Processes are spawned: a script that calls this needs `if __name__ == "__main__":`. Raises EngineError where no
    cluster answers, or where its workers, which stand in folders of their own, would look for `relative` paths.
    """
    if dask:
        if relative:
            raise EngineError(f"--dask: give {', '.join(relative)} by its whole path: workers stand in other folders")
        with _cluster(dask) as client:
            yield client.get_executor(pure=False)
        return
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        keep_freed_memory()
        yield None
        return
    # Spawned, not forked: the parent may run threads (JAX, tensorstore).
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Any]:
    try:
        import distributed
    except ImportError as error:
        raise EngineError("--dask needs `pip install 'poisonjax[dask]'`, here and on the workers") from error
    try:
        client = distributed.Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise EngineError(f"--dask {address}: no scheduler answers there ({error})") from error
    try:
        yield client
    finally:
        client.close(timeout=5)


def _start_worker() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all processes of a job: the parent says how it ends
    keep_freed_memory()
    os.environ["RAYON_NUM_THREADS"] = "1"  # the tokenizer's threads: there is a process a core already
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Or the workers of a killed program would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def run_tasks(
    engine: concurrent.futures.Executor | None,
    work: Callable[[Item], Result],
    items: Iterable[Item],
    size: Callable[[Item], int] = lambda item: 1,
    *,
    what: str,
    unit: str = "shard",
) -> list[Result]:
    """What `work` returns for each item, in their order; the first error stops the rest.

    Progress is shown as `what`, in `unit`s by the items' sizes. Raises EngineError where a worker dies, or where a
    cluster stays without any.
    """
    items = [*items]
    with Progress(what, sum(map(size, items)), unit) as progress:
        if engine is None:
            return [_told(work(item), size(item), progress) for item in items]
        futures = {engine.submit(work, item): number for number, item in enumerate(items)}
        results: list[Any] = [None] * len(items)
        try:
            for future in _completed(engine, {*futures}):
                number = futures[future]
                results[number] = _told(future.result(), size(items[number]), progress)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise EngineError(
                f"{what}: a worker died, perhaps for want of memory; the same command goes on from here, with fewer "
                "--workers it needs less"
            ) from error
        except Exception as error:
            if type(error).__name__ in ("KilledWorker", "CancelledError", "FutureCancelledError", "CommClosedError"):
                raise EngineError(f"{what}: the cluster lost its work ({error}); the same command goes on") from error
            raise
        finally:
            for future in futures:
                future.cancel()
        return results


def _told(result: Result, size: int, progress: "Progress") -> Result:
    progress.add(size)
    return result


def _completed(engine: concurrent.futures.Executor, waiting: set) -> Iterator[concurrent.futures.Future]:
    client, last = getattr(engine, "_client", None), time.monotonic()
    while waiting:
        done, waiting = concurrent.futures.wait(waiting, timeout=2, return_when=concurrent.futures.FIRST_COMPLETED)
        yield from done
        if client is None or done or (client.status == "running" and client.scheduler_info()["workers"]):
            last = time.monotonic()
        elif time.monotonic() - last > LOST_SECONDS:
            raise EngineError(
                f"the cluster {client.scheduler.address} has no worker; the same command goes on from here"
            )


class Progress:
    """A bar on a terminal, with rate and time left; a line now and then elsewhere."""

    def __init__(self, what: str, total: int, unit: str):
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._began = self._last = time.monotonic()
        self._bar = tqdm(
            total=total, unit=unit, unit_scale=total > 10_000, desc=what, leave=False, disable=not sys.stderr.isatty()
        )

    def add(self, size: int) -> None:
        """So much more is done."""
        self._done += size
        self._bar.update(size)
        now = time.monotonic()
        if self._bar.disable and now - self._last > REPORT_SECONDS and self._done:
            left = (now - self._began) * (self._total - self._done) / self._done
            share = f"{self._done:,} of {self._total:,} {self._unit}s"
            print(f"poisonjax: {self._what}: {share}, {left:,.0f} s left", file=sys.stderr, flush=True)
            self._last = now

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
