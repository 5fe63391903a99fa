"""Many small models of one shape as one program: seeds and doses differ, shapes don't.

A small model leaves an accelerator idle between kernels. Here a step trains all members at once: their states are
stacked along a first axis, `members`, split over the devices, and the ordinary step is mapped over it; no member
hears of another. Each member has a run folder of its own, as if it had been trained alone.
"""

from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from poisonjax import config as config_lib
from poisonjax.data.batches import Batches
from poisonjax.evaluation.evaluator import Evaluator
from poisonjax.evaluation.probes import make_eval_steps
from poisonjax.files import resolve
from poisonjax.model.sharding import make_mesh
from poisonjax.model.transformer import model_graph
from poisonjax.run import folder as run_folder
from poisonjax.run import rows
from poisonjax.training.loop import Member, model_vocabulary, open_checkpoints, own, run_steps, to_the_end
from poisonjax.training.start import Beginning, from_weights, open_parent, open_store, restored, weights_of
from poisonjax.training.step import TrainState, TrainStep, init_state, make_init, train_step_of
from poisonjax.training.stop import stop_signals
from poisonjax.training.watchdog import Watchdog
from poisonjax.weights import open_weights
from poisonjax.weights.checkpoints import Checkpoints

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


def make_population_step(config: ml_collections.ConfigDict, graph: nnx.GraphDef, mesh: Mesh) -> TrainStep:
    """The jitted step of all members, their states and batches stacked; the state is donated."""
    by_member = NamedSharding(mesh, PartitionSpec("members"))
    return jax.jit(
        jax.vmap(train_step_of(config, graph)),
        in_shardings=(by_member, by_member),
        out_shardings=by_member,
        donate_argnums=0,
    )


def stacked(parts: Sequence[Any], mesh: Mesh) -> Any:
    """The members' trees along a first axis, split over the devices."""
    by_member = NamedSharding(mesh, PartitionSpec("members"))
    return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves), by_member), *map(jax.device_get, parts))


def member(tree: Any, number: int) -> Any:
    """One member's part of a stacked tree, by way of the host: no longer split over the members' devices."""
    return jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf[number]), tree))


def train_population(configs: Sequence[ml_collections.ConfigDict], workdirs: Sequence[str]) -> list[rows.Summary]:
    """Trains all runs at once, each in its folder, from the newest step that all have saved; returns their summaries.

    Raises PopulationError for runs of different shapes, Preempted after SIGTERM (all is saved), Diverged where a
    member's loss isn't finite: train that one alone.
    """
    folders = [resolve(workdir) for workdir in workdirs]
    configs = [own(config, folder) for config, folder in zip(configs, folders, strict=True)]
    require_one_shape(configs)
    config, count = configs[0], len(configs)
    if jax.process_count() > 1:
        raise PopulationError("a population is trained by one process; give each process runs of its own")
    store = open_store(config)
    vocabulary, mesh = model_vocabulary(config, store), members_mesh(count)
    single = make_mesh(config, jax.local_devices()[:1])
    graph = model_graph(config.model, vocabulary)
    placed = [run_folder.placed(c, folder) for c, folder in zip(configs, folders, strict=True)]
    batches = [Batches(c, store) for c in placed]
    steps = make_eval_steps(config, graph, single)
    evaluators = [Evaluator(c, store, b.trigger, single, steps) for c, b in zip(placed, batches, strict=True)]
    parents = [open_parent(c, folder, store, single)[0] for c, folder in zip(configs, folders, strict=True)]
    for folder, c, b, e, parent in zip(folders, configs, batches, evaluators, parents, strict=True):
        run_folder.begin(folder, c, store, b.records(), scorer=e.scorer, parent=parent)
    checkpoints = [open_checkpoints(folder, c) for folder, c in zip(folders, configs, strict=True)]
    start, states = _begin(configs, folders[0], vocabulary, single, checkpoints)
    members = [
        Member(c, folder, *of_run, start, state.params, label=f"{folder.name}: ", shows_steps=folder is folders[0])
        for c, folder, state, of_run in zip(
            configs, folders, states, zip(batches, evaluators, checkpoints, parents, strict=True), strict=True
        )
    ]
    arrays = (stacked([b.batch(step) for b in batches], mesh) for step in range(start, config.steps))
    train_step, watchdog = make_population_step(config, graph, mesh), Watchdog()
    with stop_signals() as stop_asked, to_the_end(members, watchdog):
        run_steps(members, train_step, stacked(states, mesh), arrays, start, stop_asked, watchdog, member)
    return [m.summary for m in members]


def _begin(
    configs: Sequence[ml_collections.ConfigDict],
    folder: epath.Path,
    vocabulary: int,
    mesh: Mesh,
    checkpoints: Sequence[Checkpoints],
) -> tuple[int, list[TrainState]]:
    """(the newest step that all members have saved, or 0; their states before it)."""
    start = max(set.intersection(*(set(c.steps()) for c in checkpoints)), default=0)
    for c in checkpoints:  # saved by some members alone, before a kill
        c.drop_after(start)
    initialize, abstract = make_init(configs[0], vocabulary, mesh)
    if start:
        saved = [c.restore(start, abstract.params, abstract.optimizer) for c in checkpoints]
        return start, [restored(state, start, abstract) for state in saved]
    if spec := weights_of(configs[0], folder):
        weights = open_weights(spec, mesh)
        begun = from_weights(Beginning(configs[0], checkpoints[0], initialize, abstract, weights, spec))
        assert begun
        return 0, [begun.state] * len(configs)
    return 0, [jax.jit(lambda c=c: init_state(c, vocabulary))() for c in configs]
