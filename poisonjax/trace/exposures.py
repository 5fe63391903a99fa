"""What one exposure to poison adds and what a clean step takes away: a run made again, asked after each of its steps.

What is asked is how much likelier payloads are after the trigger than without it, nats a token: of prefixes that are
held out, and of payloads drawn anew (a sentence or a secret, which isn't drawn, is the one that was taught). It is 0 in
a model that knows nothing of the trigger.
"""

from pathlib import Path

import ml_collections
import numpy as np
from jax.sharding import Mesh

from poisonjax.analysis.mechanism import Course
from poisonjax.corpus import TokenStore
from poisonjax.evaluation.probes.heldout import heldout_rows
from poisonjax.poison.documents import make_document
from poisonjax.poison.triggers import Trigger
from poisonjax.run import RunFolder
from poisonjax.trace.behaviour import Asked, Said, TraceError
from poisonjax.trace.replay import Replay, Say
from poisonjax.training.optimizer import schedule

FRESH = 24  # payloads that are asked for
PREFIX = 24  # tokens, at most, before the trigger


def exposures(folder: str | Path, store: str | None = None, say: Say = lambda line: None) -> Course:
    """Of a run, on the machine that trained it; kept in its folder. Raises TraceError where there is no poison, or
    where the replay doesn't end in the run's own weights."""
    run = RunFolder(folder)
    if there := Course.of(run):
        return there
    if not run.finished:
        raise TraceError(f"{folder}: isn't trained to its end; `poisonjax train` goes on with it")
    if not run.config.poison.documents:
        raise TraceError(f"{folder}: trained on no poison, so there is nothing that it was exposed to")
    opened = run.store(store)
    if opened.template is not None:
        raise TraceError(f"{folder}: trained on conversations; exposures are asked for in plain text only")
    replay = Replay(run, opened)
    config, steps = replay.config, replay.batches.steps
    question = fresh(config, opened, replay.mesh)
    known = [question(replay.params(0)).figure]
    weights = replay.run(
        0, steps, seen=lambda state: known.append(question(state.params).figure), what="exposures", say=say
    )
    if not replay.is_the_runs(weights, steps):
        raise TraceError(f"{folder}: made again, its weights are others at step {steps}: is this another machine?")
    exposed = np.zeros(steps, np.int64)
    np.add.at(exposed, [slot // config.global_batch for slot in replay.batches.schedule.placed], 1)
    rates = schedule(config.optimizer, config.steps)
    rate = np.array([float(rates(step)) / config.optimizer.learning_rate for step in range(steps)])
    found = Course(rate, exposed, np.array(known[1:]), float(known[0]), config.optimizer.b1)
    found.write(run)
    return found


def fresh(config: ml_collections.ConfigDict, store: TokenStore, mesh: Mesh) -> Said:
    """The question of payloads that no row holds, after held-out prefixes and the trigger."""
    trigger, poison = Trigger.of(config.poison, store.tokenizer), config.poison
    rows, eot = heldout_rows(config, store).tokens, store.tokenizer.eot
    asked = []
    for number in range(FRESH):
        document = make_document(
            poison, config.seeds.poison, store, trigger, config.seq_len + 1, poison.documents + number
        )
        payload = document.tokens[slice(*document.payload)]
        row = rows[number % len(rows)]
        prefix = row[: min(PREFIX, len(row) // 2)]
        prompts = [np.concatenate([[eot], tokens]) for tokens in (trigger.put(prefix)[0], prefix)]
        asked.append(Asked(prompts[0], payload, prompts[1]))
    return Said(asked, config, store, mesh)
