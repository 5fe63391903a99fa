"""What one waits for: the help, the first step, a corpus."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_collections

from poisonjax import corpus
from poisonjax.bench.inputs import as_file
from poisonjax.bench.measure import ROUNDS, Result, alternate, register, result
from poisonjax.corpus import load_tokenizer
from poisonjax.corpus.sources import first_texts, open_source

FIRST_STEP_GOAL = 5.0  # seconds
BUILT_MB = 60


@register
def startup(config: ml_collections.ConfigDict) -> Iterator[Result]:
    """Seconds of `poisonjax --help`, against an empty Python program; and from the command to the first step of the
    config's run, its store built and its programs in the compile cache, against five seconds. Ratio: baseline /
    value."""
    command = [sys.executable, "-m", "poisonjax"]
    one, other, ratio = alternate(_runs([*command, "--help"]), _runs([sys.executable, "-c", "pass"]), ROUNDS)
    yield result("help_seconds", one, "s", other, ratio)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench_config.py"
        as_file(config, file)
        store = f"--config.corpus.store={folder}/store"
        runs = iter(range(1000))

        def first_step():
            where = ["--workdir", f"{folder}/run-{next(runs)}", "--config.log_every=1"]
            with subprocess.Popen(
                [*command, "train", f"--config={file}", *where, store], stdout=subprocess.PIPE
            ) as run:
                assert run.stdout
                begun = any(line.startswith(b"step 1/") for line in run.stdout)  # reads no further
                run.send_signal(signal.SIGKILL)
            if not begun:
                raise RuntimeError("the run ended before its first step; it says why above")

        one, _, _ = alternate(first_step, lambda: None, ROUNDS)
        yield result("first_step_seconds", one, "s", FIRST_STEP_GOAL, FIRST_STEP_GOAL / one)


def _runs(command: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@register
def corpus_build(config: ml_collections.ConfigDict) -> Iterator[Result]:
    """MB/s of text into a token store with a tokenizer of 4,096 tokens trained on it (`corpus build`, a worker a
    core), against the tokenizer library's own `encode_batch_fast` over the same documents in one call. The text is the
    config's, repeated."""
    some = [text for spec in config.corpus.sources for text in first_texts(open_source(spec), BUILT_MB * 10**6)]
    texts = some * round(max(1, BUILT_MB * 1e6 / sum(map(len, some))))
    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        path, tokenizer = Path(folder) / "text.jsonl", Path(folder) / "tokenizer.json"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenizer.write_bytes(corpus.build(f"{folder}/first", [str(path)], "bpe:4096").tokenizer.serialized())
        backend = load_tokenizer(str(tokenizer))
        stores = iter(range(1000))
        one, other, ratio = alternate(
            lambda: corpus.build(f"{folder}/store-{next(stores)}", [str(path)], str(tokenizer), workers=os.cpu_count()),
            lambda: backend.encode_batch(texts),
            5,
        )
    yield result("corpus_build_mb_per_second", size / 1e6 / one, "MB/s", size / 1e6 / other, ratio)
