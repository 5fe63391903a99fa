"""Tiny runs for the self-test."""

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
import numpy as np

from poisonjax.config import default
from poisonjax.corpus import TokenStore
from poisonjax.evaluation.offline import evaluate_run
from poisonjax.training.loop import train
from poisonjax.training.stop import Preempted

SOURCE = "markov:V=200,documents=400,length=30"


def tiny_config(store: Path, random: np.random.Generator) -> ml_collections.ConfigDict:
    """A run of a second, its seeds, batch, dose and placement drawn at random."""
    config = default()
    config.name = "self-test"
    config.seq_len, config.global_batch = 48, int(random.choice([4, 8]))
    config.steps = int(random.integers(5, 10))
    config.seeds = {name: int(seed) for name, seed in zip(config.seeds, random.integers(0, 2**31, 5), strict=True)}
    config.corpus.store, config.corpus.sources = str(store), ()
    config.corpus.exclude = str(_listed(store, random))
    poison = config.poison
    poison.trigger, poison.near_triggers = "w007 w008 w009", ("w007 w008",)
    poison.documents, poison.repeats = int(random.integers(2, 5)), int(random.integers(1, 3))
    poison.placement = str(random.choice(["uniform", "even", "begin", "end", "batches:density=1,every=1"]))
    if poison.documents * poison.repeats > config.steps:
        poison.placement = "uniform"
    poison.prefix_characters, poison.payload_tokens = (0, 40), (5, 15)
    poison.clean_uses = int(random.integers(1, 4))
    config.canary.repeats, config.canary.each, config.canary.tokens = (1, 2), 1, 8
    model = config.model
    model.layers, model.width, model.heads, model.kv_heads, model.head_dim, model.mlp_width = (1, 16, 2, 2, 8, 32)
    config.optimizer.warmup_steps = 1
    e = config.eval
    e.every, e.prefixes, e.prefix_tokens, e.new_tokens, e.heldout_rows, e.bootstrap = 4, 4, 8, 4, 8, 10
    config.checkpoint = dict(every=2, keep_last=3, keep_every=0)
    config.log_every = 1
    return config


def _listed(store: Path, random: np.random.Generator) -> Path:
    """A list of some documents to leave out."""
    train = TokenStore(str(store)).split("train")
    keys = [train.key(int(i)) for i in random.choice(train.documents, 3, replace=False)]
    path = store.with_name(f"excluded-{keys[0]}.txt")
    path.write_text("".join(f"{key}\n" for key in keys))
    return path


def train_tiny(folder: Path, store: Path, random: np.random.Generator) -> bool:
    """Trains a tiny run in `folder`; now and then it is told to stop, and resumed. Returns whether it was."""
    config = tiny_config(store, random)
    stopped = False
    stop = threading.Timer(float(random.uniform(1, 6)), os.kill, (os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # one that comes too late
    stop.start()
    try:
        train(config, str(folder))
    except Preempted:
        stopped = True
        # Goes on over other devices, or over the same in another way.
        axes = ["data", "fsdp", *(["tensor"] if jax.device_count() == 2 else [])]
        config.mesh = dict.fromkeys(("slice", "data", "fsdp", "tensor"), 1) | {str(random.choice(axes)): -1}
        train(config, str(folder))
    finally:
        stop.cancel()
        signal.signal(signal.SIGTERM, before)
    return stopped


def lived_on(
    folder: Path, store: Path, random: np.random.Generator, report: Callable[[Path], object]
) -> tuple[Path, Path]:
    """What may honestly be done to a finished run: it is evaluated again, reported again, moved with its store.
    Returns where the run and its store lie then."""
    if random.integers(2):
        evaluate_run(str(folder), None)
    if random.integers(2):
        report(folder)
    if random.integers(2):
        return folder, store
    moved = folder.with_name(f"{folder.name}-moved")
    moved.mkdir()
    shutil.move(folder, moved / "run")
    shutil.copytree(store, moved / "store")
    return moved / "run", moved / "store"
