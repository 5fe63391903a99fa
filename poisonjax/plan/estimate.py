"""What a train step takes on GPUs, by arithmetic: their compiler isn't here, so nothing is compiled.

Per GPU, for T tokens of a microbatch on it, N parameters, a mesh of `fsdp` x `tensor` and `data` (with `slice`)
copies, and A microbatches:

- HBM: master weights, two moments and gradients in float32, 16 N / (fsdp tensor); one layer's bf16 weights and the
  head's, gathered over fsdp; what the backward pass keeps (`_saved`); one tile of logits in float32 and bf16.
- FLOPs: the model's, and the forward pass of the blocks again with remat = block.
- Traffic to HBM: each bf16 weight read in forward and backward pass (and again with remat), each saved or recomputed
  activation written and read, the optimizer's 28 bytes a parameter.
- Between GPUs: over fsdp, bf16 weights gathered in both passes and float32 gradients scattered, a microbatch; over
  tensor, 4 gathers or scatters of the residual stream a layer and pass; over data and slice, gradients
  all-reduced once a step. An axis runs at NVLink's rate where it lies within a node, else at the network's.

The step's time is the largest of the four: everything overlaps, nothing is wasted. Real steps take longer.
"""

import ml_collections

from poisonjax.model.flops import block_weights, train_flops_per_token
from poisonjax.model.sharding import mesh_sizes
from poisonjax.plan.chips import Topology
from poisonjax.plan.roofline import Estimate


def estimate(config: ml_collections.ConfigDict, vocabulary: int, topology: Topology) -> Estimate:
    """The train step's figures on one GPU; raises ValueError where mesh and batch don't suit the topology."""
    m, chip = config.model, topology.chip
    slices, data, fsdp, tensor = mesh_sizes(config, topology.chips)
    micro = config.optimizer.accumulate
    rows = config.global_batch / (slices * data * fsdp * micro)
    tokens = rows * config.seq_len
    block = block_weights(m)
    parameters = m.layers * block + 2 * m.width * vocabulary

    tile = rows * (m.loss_tile or config.seq_len) * vocabulary / tensor
    gathered = 2 * (2 * block + m.width * vocabulary) / tensor  # this layer's and the next one's
    state = 16 * parameters / (fsdp * tensor)
    saved = m.layers * tokens * _saved(config, tensor)
    hbm = state + gathered + saved + 10 * tile

    again = 1 if m.remat == "block" else 0
    flops = train_flops_per_token(m, config.seq_len, vocabulary) * tokens * micro / tensor
    flops += again * 2 * m.layers * block * tokens * micro / tensor
    passes = 2 + again
    traffic = micro * (passes * 2 * parameters / tensor + 2 * saved * (1 + again) + 3 * 10 * tile)
    traffic += 28 * parameters / (fsdp * tensor)

    def share(n: int) -> float:
        return (n - 1) / n

    weights = micro * (2 * 2 + 4) * parameters / tensor * share(fsdp)
    residual = micro * 2 * passes * 2 * 2 * m.layers * tokens * m.width * share(tensor)
    gradients = 2 * 4 * parameters / (fsdp * tensor) * share(slices * data)
    fast = slow = 0.0
    reach = 1  # GPUs that this axis and the faster ones span
    for size, moved in ((tensor, residual), (fsdp, weights), (slices * data, gradients)):
        reach *= size
        if reach <= topology.chips // topology.slices:
            fast += moved
        else:
            slow += moved
    return Estimate(flops, traffic, fast, slow, hbm, chip)


def _saved(config: ml_collections.ConfigDict, tensor: int) -> float:
    """Bytes that the backward pass keeps of a token in each layer, in bf16 (2 bytes a number)."""
    m = config.model
    attended, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    residual = 2 * m.width / tensor
    if m.remat == "block":
        return residual
    products = 2 * (attended + 2 * kv + 2 * m.mlp_width + 2 * m.width) / tensor
    if m.remat == "dots":
        return residual + products
    # Attended heads, norms, rotated heads, the gate's activation and its product too.
    return residual + 1.75 * products + 2 * attended / tensor
