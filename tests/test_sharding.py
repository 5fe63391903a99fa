"""Where every parameter and every pinned activation lies, for each mesh, against a golden file.

A change of layout shows in review as a change of `shardings.txt`; `python tests/test_sharding.py` writes it anew.
"""

import re
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from poisonjax.config import default
from poisonjax.data.batches import Batch
from poisonjax.model.sharding import AXES, batch_sharding
from poisonjax.model.transformer import model_graph
from poisonjax.training.step import make_init, make_train_step

GOLDEN = Path(__file__).parent / "shardings.txt"
MESHES = [(1, 4, 1, 1), (1, 1, 8, 1), (1, 1, 2, 4), (1, 2, 2, 2), (2, 1, 4, 2)]


def described(sizes) -> str:
    """The train step, lowered for a mesh that nobody has."""
    config = default()
    config.global_batch, config.seq_len, config.optimizer.accumulate = 32, 64, 2
    m = config.model
    m.layers, m.width, m.heads, m.kv_heads, m.head_dim, m.mlp_width = 8, 32, 8, 4, 16, 96
    m.loss_tile, m.remat, m.dtype = 16, "block", "bfloat16"
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    _, state = make_init(config, 300, mesh)
    step = make_train_step(config, model_graph(config.model, 300), mesh, state)
    rows = jax.ShapeDtypeStruct((32, 65), "int32", sharding=batch_sharding(mesh))
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = step.trace(state, Batch(rows)).lower(lowering_platforms=("cpu",)).as_text()
    lines = [f"mesh {dict(zip(AXES, sizes, strict=True))}", "  parameters"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        names = [key.key for key in path if hasattr(key, "key")]
        lines.append(f"    {'.'.join(names):<24} {leaf.shape!s:<20} {leaf.sharding.spec}")
    moments = [x.sharding.spec for x in jax.tree.leaves(state.optimizer) if x.ndim]
    weights = [x.sharding.spec for x in jax.tree.leaves(state.params)]
    lines.append(f"    the optimizer's moments lie as their parameters: {moments == 2 * weights}")
    # Which of them come first, and how often each stands there, is a matter of JAX's version.
    lines.append("  activations and gathered weights")
    found = re.findall(r"sdy\.sharding_constraint %\S+ <@mesh, \[(.*?)\]> : tensor<(\S+)>", lowered)
    lines += sorted({f"    {shape:<24} {partition}" for partition, shape in found})
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("sizes", MESHES)
def test_layout_is_the_reviewed_one(sizes):
    assert described(sizes) in GOLDEN.read_text()


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(described(sizes) for sizes in MESHES))
