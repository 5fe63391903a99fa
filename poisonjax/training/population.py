"""Many small models of one shape as one program: seeds and doses differ, shapes don't.

A small model leaves an accelerator idle between kernels. Here a step trains all members at once: their states are
stacked along a first axis, `members`, split over the devices, and the ordinary step is mapped over it; no member
hears of another. Each member has a run folder of its own, as if it had been trained alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from poisonjax import config as config_lib
from poisonjax.data.batches import Batches
from poisonjax.evaluation.evaluator import Evaluator, make_eval_steps
from poisonjax.evaluation.offline import load_scorer
from poisonjax.files import resolve
from poisonjax.model.sharding import make_mesh
from poisonjax.training import loop
from poisonjax.training.checkpoints import Checkpoints
from poisonjax.training.step import StepMetrics, TrainState, init_state, make_init, model_graph, train_step_of

# Fields in which members may differ: they change weights, rows and what is asked, not the program.
OWN = ("name", "seeds.", "poison.", "canary.")


class PopulationError(ValueError):
    """These runs can't be trained as one program."""


def shape(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields that members must share."""
    return {name: value for name, value in config_lib.flat(config).items() if not name.startswith(OWN)}


def require_one_shape(configs: Sequence[ml_collections.ConfigDict]) -> None:
    """Raises PopulationError naming the fields that keep the runs from being one program."""
    first = shape(configs[0])
    for number, config in enumerate(configs[1:], 1):
        other = shape(config)
        apart = [name for name in first if first[name] != other[name]]
        if apart:
            raise PopulationError(
                f"members 0 and {number} differ in {', '.join(apart)}: a population shares all but seeds and poison"
            )


def members_mesh(count: int) -> Mesh:
    """As many devices as divide the members evenly, along one axis."""
    devices = jax.local_devices()
    use = max(n for n in range(1, len(devices) + 1) if count % n == 0)
    return jax.make_mesh((use,), ("members",), axis_types=(AxisType.Auto,), devices=devices[:use])


def make_population_step(
    config: ml_collections.ConfigDict, graph: nnx.GraphDef, mesh: Mesh
) -> Callable[[TrainState, Int[Array, "members batch row_tokens"]], tuple[TrainState, StepMetrics]]:
    """The jitted step of all members; the stacked state is donated."""
    by_member = NamedSharding(mesh, PartitionSpec("members"))
    return jax.jit(
        jax.vmap(train_step_of(config, graph)),
        in_shardings=(by_member, by_member),
        out_shardings=by_member,
        donate_argnums=0,
    )


def stacked(states: Sequence[TrainState], mesh: Mesh) -> TrainState:
    """The members' states along a first axis, split over the devices."""
    by_member = NamedSharding(mesh, PartitionSpec("members"))
    return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves), by_member), *map(jax.device_get, states))


def member(tree: Any, number: int) -> Any:
    """One member's part of a stacked tree, by way of the host: no longer split over the members' devices."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf[number])), tree)


def train_population(configs: Sequence[ml_collections.ConfigDict], workdirs: Sequence[str]) -> list[dict[str, Any]]:
    """Trains all runs at once, each in its folder, from the newest step that all have saved; returns their summaries.

    Raises PopulationError for runs of different shapes, Preempted after SIGTERM (all is saved), Diverged where a
    member's loss isn't finite: train that one alone.
    """
    for config in configs:
        config_lib.check(config)
    require_one_shape(configs)
    config, count = configs[0], len(configs)
    if jax.process_count() > 1:
        raise PopulationError("a population is trained by one process; give each process runs of its own")
    for c in configs:
        c.corpus.store = str(resolve(c.corpus.store))
    store = loop.open_store(config)
    vocabulary, folders = store.tokenizer.vocab_size, [resolve(workdir) for workdir in workdirs]
    graph, mesh, single = (
        model_graph(config, vocabulary),
        members_mesh(count),
        make_mesh(config, jax.local_devices()[:1]),
    )
    _, abstract = make_init(config, vocabulary, single)
    batches = [Batches(c, store) for c in configs]
    ledgers = [b.plan.ledger() for b in batches]
    scorer, steps = load_scorer(config, store, single), make_eval_steps(config, graph, single)
    evaluators = [Evaluator(c, store, graph, single, scorer, steps) for c in configs]
    for folder, c, b, ledger in zip(folders, configs, batches, ledgers, strict=True):
        loop.begin_folder(folder, c, store, b, ledger)
    checkpoints = [Checkpoints(folder, c, clean_up=True) for folder, c in zip(folders, configs, strict=True)]
    start = max(set.intersection(*(set(c.steps()) for c in checkpoints)), default=0)
    for c in checkpoints:  # saved by some members alone, before a kill
        c.drop_after(start)
    if start:
        states = [c.restore(start, abstract) for c in checkpoints]
    else:
        states = [jax.jit(lambda c=c: init_state(c, vocabulary))() for c in configs]
    books = [
        loop.Books(
            c,
            store,
            folder,
            b,
            ledger,
            evaluator,
            state.params,
            start,
            True,
            label=f"{folder.name}: ",
            shows_steps=not number,
        )
        for number, (c, folder, b, ledger, evaluator, state) in enumerate(
            zip(configs, folders, batches, ledgers, evaluators, states, strict=True)
        )
    ]
    if start:
        for book, c in zip(books, checkpoints, strict=True):
            book.require(c.record(start).get("digest_chain", ""))
    train_step, state = make_population_step(config, graph, mesh), stacked(states, mesh)
    by_member = NamedSharding(mesh, PartitionSpec("members"))
    pending: tuple[int, StepMetrics] | None = None

    def write_down() -> None:
        """Takes the last step's figures from the device, and gives each member its own."""
        nonlocal pending
        if pending is None:
            return
        (step, metrics), pending = (pending[0], jax.device_get(pending[1])), None
        for number, book in enumerate(books):
            book.dispatched(step, jax.tree.map(lambda leaf, n=number: leaf[n], metrics))
            book.settle()

    status = "failed"
    try:
        with loop.stop_signals() as stop_asked:
            for step in range(start, config.steps):
                rows = jax.device_put(np.stack([b.rows(step) for b in batches]), by_member)
                state, metrics = train_step(state, rows)
                write_down()
                pending = (step, metrics)
                done = step + 1
                last, stopping = done == config.steps, stop_asked(done)
                if last or done % config.eval.every == 0:
                    write_down()
                    for number, book in enumerate(books):
                        book.evaluate(done, member(state.params, number))
                if last or stopping or done % config.checkpoint.every == 0:
                    write_down()
                    for number, (book, c) in enumerate(zip(books, checkpoints, strict=True)):
                        book.synced()
                        c.save(done, member(state, number), book.record())
                if stopping and not last:
                    status = "preempted"
                    raise loop.Preempted(
                        f"stopped after step {done} of {config.steps}; the same command goes on from there"
                    )
        status = "finished"
    finally:
        for c in checkpoints:
            c.close()
        summaries = [book.close(status) for book in books]
    return summaries
