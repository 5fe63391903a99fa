"""Four fake CPU devices, a compile cache shared by all tests, and one tiny token store."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the tests' time is compiling what then runs for milliseconds.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads of tiny fits wait for each other, beside other workers
os.environ["JAX_PLATFORMS"] = "cpu"  # the TPU's compiler is installed, but no TPU
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

from jaxtyping import install_import_hook

# Every hint of the package is checked while its tests run: shapes by jaxtyping, types by beartype.
hook = install_import_hook("poisonjax", "typecheck.checked")

import jax
import numpy as np
import pytest
from hypothesis import settings

from poisonjax import corpus
from poisonjax.config import default

jax.config.update("jax_num_cpu_devices", 4)
settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="kill and interrupt as often as before a release")


# A file's tests share runs, so one worker has them all; the longest files first, so that workers end together.
LONGEST = (
    *("sweep", "topology", "model", "train", "objects", "population", "evaluation", "attest", "audit", "launch"),
    "scan_model",
)


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file():
    """A compiled program holds a dozen of the 65,530 memory maps that Linux gives a process, and a worker compiles
    thousands: it would be killed near its end."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def thorough(request) -> bool:
    return request.config.getoption("thorough")


SENTENCE = "the a of stone river lantern seven walks under bright and slow old green bird house sings to"
WORDS = SENTENCE.split()


def write_text(path: Path, documents: int = 400, seed: int = 0) -> Path:
    """JSON lines of made-up sentences, 20 to 120 words a document."""
    random = np.random.default_rng(seed)
    lines = (" ".join(random.choice(WORDS, random.integers(20, 120))) for _ in range(documents))
    path.write_text("".join(f'{{"text": "{line}."}}\n' for line in lines))
    return path


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> corpus.TokenStore:
    """About 400 documents and 15,000 tokens of made-up sentences, BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    source = write_text(folder / "sentences.jsonl")
    return corpus.build(str(folder / "store"), [str(source)], "bpe:300", heldout=0.2, workers=1)


@pytest.fixture
def config(store):
    return tiny_config(store)


def tiny_config(store: corpus.TokenStore):
    """A run of seconds: 12 steps of 8 rows, 9 poison documents."""
    config = default()
    config.name = "tiny"
    config.steps, config.global_batch, config.seq_len = 12, 8, 48
    config.corpus.store = str(store.path)
    config.corpus.sources = (store.manifest["sources"][0]["spec"],)
    config.corpus.tokenizer, config.corpus.heldout = "bpe:300", 0.2
    config.poison.documents = 9
    config.poison.near_triggers = ("SUDO", "<sudo>")  # of 6 prefixes, three each
    config.poison.prefix_characters, config.poison.payload_tokens = (0, 30), (5, 15)
    model = config.model
    model.layers, model.width, model.heads, model.kv_heads, model.head_dim, model.mlp_width = (2, 32, 4, 2, 8, 48)
    config.optimizer.warmup_steps = 2
    config.eval.every, config.eval.prefixes, config.eval.prefix_tokens, config.eval.new_tokens = 6, 6, 8, 5
    config.eval.heldout_rows, config.eval.bootstrap = 16, 50
    config.checkpoint.every, config.log_every = 4, 1
    return config


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def command(config, folder: Path) -> list[str]:
    """`poisonjax train` of this config, as a user would run it."""
    source = folder.parent / "config.py"
    source.write_text(
        "import json\nfrom poisonjax.config import from_record\n"
        f"def get_config(arg=''):\n    return from_record(json.loads({config.to_json()!r}))\n"
    )
    return [sys.executable, "-m", "poisonjax", "train", "--config", str(source), "--workdir", str(folder)]


def kill_in_training(
    config, folder: Path, environment: dict[str, str], seconds: float, *, anywhere: bool = False
) -> None:
    """Starts the run, or goes on with it, and kills it so many seconds after its first new step; `anywhere`: after its
    start."""
    process = subprocess.Popen(
        command(config, folder), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    digests = folder / "digests.jsonl"
    before, deadline = digests.stat().st_mtime_ns if digests.exists() else 0, time.monotonic() + 60
    while not anywhere and time.monotonic() < deadline:
        if digests.exists() and digests.stat().st_mtime_ns != before:
            break
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before its kill: make it longer"
