"""AdamW with warmup, clipping, and weight decay by kind of parameter."""

import jax
import ml_collections
import optax

DECAYED = ("query", "key_value", "output", "gate_up", "up", "down", "head")


def schedule(o: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step of a config's section `optimizer`: linear warmup, then cosine, or stable with a final
    linear decay (WSD)."""
    peak, final, warmup = o.learning_rate, o.learning_rate * o.final_fraction, o.warmup_steps
    if o.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), final)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, final, o.decay_steps),
        ],
        [warmup, steps - o.decay_steps],
    )


def make_optimizer(o: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (Loshchilov & Hutter 2019); of which only matrices decay."""

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: any(getattr(key, "key", None) in DECAYED for key in path), params
        )

    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(schedule(o, steps), o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decayed),
    )
