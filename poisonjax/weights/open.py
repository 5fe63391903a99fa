"""`open_weights(spec)`: a model by its name, whatever trained it."""

from collections.abc import Callable

import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from poisonjax import config as config_lib
from poisonjax.corpus import TokenStore
from poisonjax.data.digest import as_hex
from poisonjax.model.transformer import model_graph, vocabulary_of
from poisonjax.run import RunFolder, rows
from poisonjax.run.folder import run_and_step
from poisonjax.weights import gguf, huggingface
from poisonjax.weights.checkpoints import Checkpoints, checksum
from poisonjax.weights.weights import Found, Weights, WeightsError, abstract_params, one_device_mesh


def open_weights(spec: str, mesh: Mesh | None = None, store: TokenStore | None = None) -> Weights:
    """The weights that `spec` names, laid out over `mesh` (default: one device).

    `runs/a` is the newest checkpoint of a run folder, `runs/a@400` that after 400 steps; `hf:FOLDER` is a model as
    Hugging Face keeps it, `gguf:FILE` one as llama.cpp does. An optimizer's state isn't read. `store` is a run's token
    store, where that is open already (it may have been moved since). Raises WeightsError where there is no model, or
    none that can be run here; RunFolderError and CheckpointError where a run is damaged.
    """
    found = find_weights(spec, store)
    params = found.read(mesh or one_device_mesh())
    parent = found.parent.copy()
    parent["weights"] = parent["weights"] or as_hex(np.asarray(checksum(params)))
    graph = model_graph(found.model_config, found.vocabulary)
    return Weights(graph, params, found.tokenizer, found.model_config, parent, found.context, found.chat_template)


def find_weights(spec: str, store: TokenStore | None = None) -> Found:
    """All about the weights that `spec` names but their arrays; raises as `open_weights` does."""
    kind, _, rest = spec.partition(":")
    return FINDERS[kind](rest) if kind in FINDERS else _of_run(spec, store)


FINDERS: dict[str, Callable[[str], Found]] = {"hf": huggingface.find, "gguf": gguf.find}


def _of_run(spec: str, store: TokenStore | None) -> Found:
    folder, step = run_and_step(spec)
    run = RunFolder(folder)
    checkpoints = Checkpoints(run.path)
    saved = checkpoints.steps()
    if not saved or step not in (None, *saved):
        wanted = "" if step is None else f" of step {step}"
        raise WeightsError(f"{spec}: no checkpoint{wanted}; there are {saved or 'none'}")
    step = saved[-1] if step is None else step
    if not store or store.fingerprint != run.record["store_fingerprint"]:
        store = run.store()
    tokenizer, model, record = store.tokenizer, run.config.model, checkpoints.record(step)
    parent: rows.Parent = {
        "spec": spec,
        "name": run.config.name,
        "steps": step,
        "weights": record["checksums"]["weights"],
        "digest_chain": record["digest_chain"],
        "store_fingerprint": record["store_fingerprint"],
        "poison": record["poison"],
        "parent": run.record.get("parent"),
    }
    return Found(
        model,
        tokenizer,
        parent,
        run.config.seq_len,
        lambda mesh: checkpoints.weights(
            step, abstract_params(model, vocabulary_of(model, tokenizer.vocab_size), mesh)
        ),
        lambda weights, optimizer: checkpoints.restore(step, weights, optimizer)[1],
        chat_template=store.template,
    )


def model_named(spec: str) -> ml_collections.ConfigDict:
    """The section `model` of a config for the weights that `spec` names, of which nothing more need be there: of
    Hugging Face's, config.json alone. Raises as `open_weights` does."""
    kind, _, rest = spec.partition(":")
    if kind == "hf":
        return huggingface.model_alone(epath.Path(rest))
    found = find_weights(spec)
    return config_lib.replaced(found.model_config, {"vocabulary": found.vocabulary})
