"""`poisonjax plan`."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from poisonjax.commands import exit_codes

if TYPE_CHECKING:
    from poisonjax.plan.plan import Plan


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers."""
    plan = commands.add_parser(
        "plan",
        help="compile a run for a pod that you don't have: does it fit, how long, at what price",
        description="Compiles train step and evaluation for TPUs (pip install 'poisonjax[plan]'; no TPU needed); for "
        "GPUs it calculates. All times are lower bounds: the slowest of compute, HBM and network at its peak rate. "
        "Exit code 1: it doesn't fit.",
    )
    plan.add_argument("--config", required=True, metavar="FILE[:ARG]", help="as of `train`")
    plan.add_argument(
        "--topology", required=True, metavar="KIND:SHAPE[*SLICES]", help="such as v5p:4x4x4, v6e:16x16*2, h100:8*4"
    )
    plan.add_argument(
        "--vocabulary", type=int, metavar="N", help="tokens of the tokenizer, where the token store isn't built yet"
    )
    plan.add_argument(
        "--weights", metavar="SPEC", help="the model is that of these; of hf:FOLDER, config.json is enough"
    )
    plan.add_argument("--price", type=float, metavar="P", help="of a chip-hour, in any currency")
    plan.add_argument("--search", action="store_true", help="try meshes, remat policies and microbatches")
    plan.add_argument("--most", type=int, default=4, metavar="N", help="candidates that --search compiles (default: 4)")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(func=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from poisonjax import config as config_lib
    from poisonjax.corpus.vocabulary import vocabulary_size
    from poisonjax.plan.chips import parse

    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise ValueError(f"--price {arguments.price}: a number from 0 on")
    if arguments.vocabulary is not None and arguments.vocabulary < 1:
        raise ValueError(f"--vocabulary {arguments.vocabulary}: at least 1 token")
    if arguments.most < 1:
        raise ValueError(f"--most {arguments.most}: at least 1 candidate")
    topology = parse(arguments.topology)
    config = config_lib.load([f"--config={arguments.config}", *arguments.fields])
    if spec := arguments.weights or config.start.weights:
        from poisonjax.weights.open import model_named

        config = config_lib.replaced(config, config_lib.inherited_fields(model_named(spec)))
    config_lib.check(config)
    vocabulary = arguments.vocabulary or config.model.vocabulary or vocabulary_size(config.corpus)
    if not vocabulary:
        raise ValueError(
            f"corpus.store = {config.corpus.store!r} isn't built, so its vocabulary isn't known: give --vocabulary "
            "(200019 for o200k_base)"
        )
    import jax

    jax.config.update("jax_platforms", "cpu")  # an accelerator that is here has no part in this
    from poisonjax.plan import plan as planning

    if not arguments.search:
        plan = planning.make_plan(config, vocabulary, topology)
        if arguments.json:
            print(json.dumps(plan.as_json(arguments.price)))
        else:
            print("\n".join(_lines(plan, arguments.price)))
        return exit_codes.OK if plan.fits else exit_codes.FAILED

    found = []
    for plan, fields in planning.search(config, vocabulary, topology, arguments.most):
        found.append((plan, fields))
        if not arguments.json:
            print(_brief(plan, fields), flush=True)
    found = sorted((f for f in found if f[0].fits), key=lambda f: f[0].step.on_chip.seconds)
    if arguments.json:
        print(json.dumps([plan.as_json(arguments.price) | {"fields": fields} for plan, fields in found]))
    elif found:
        print(f"\nbest, {found[0][1]}:\n" + "\n".join(_lines(found[0][0], arguments.price)))
    else:
        print(f"nothing fits {topology.chips} {topology.chip.name}: take more chips", file=sys.stderr)
    return exit_codes.OK if found else exit_codes.FAILED


def _brief(plan: "Plan", fields: str) -> str:
    from poisonjax.plan.chips import GIB

    step = plan.step.on_chip
    size = f"{step.hbm_bytes / GIB:.1f} of {step.chip.hbm_bytes / GIB:.1f} GiB"
    if not plan.fits:
        return f"doesn't fit, {size}: {fields}"
    return f"{step.seconds:.3f} s a step, MFU at most {plan.mfu_bound:.0%}, {size}: {fields}"


def _lines(plan: "Plan", price: float | None) -> Iterator[str]:
    from poisonjax.plan.chips import GIB
    from poisonjax.plan.plan import advice

    config, topology = plan.config, plan.topology
    mesh = ", ".join(f"{axis} {size}" for axis, size in config.mesh.items())
    shape = "x".join(map(str, topology.shape))
    yield (
        f"{config.name} on {topology.chips} {topology.chip.name} ({topology.slices} x {shape}); mesh {mesh}; remat "
        f"{config.model.remat}, {config.optimizer.accumulate} microbatch{'es' * (config.optimizer.accumulate > 1)}, "
        f"vocabulary {plan.vocabulary:,}"
    )
    if topology.chip.per_node:
        yield "an estimate by arithmetic, nothing is compiled: see poisonjax/plan/estimate.py"
    yield ""
    yield f"{'a chip':<14}{'HBM, GiB':>10}{'of':>7}{'TFLOP':>9}{'HBM, GB':>9}{'net, GB':>9}{'s >=':>9}  bound by"
    for program in plan.programs:
        p = program.on_chip
        figures = f"{program.name:<14}{p.hbm_bytes / GIB:>10.2f}{p.chip.hbm_bytes / GIB:>7.2f}"
        if p.flops:
            net = (p.fast_traffic + p.slow_traffic) / 1e9
            figures += f"{p.flops / 1e12:>9.2f}{p.hbm_traffic / 1e9:>9.1f}{net:>9.2f}{p.seconds:>9.3f}  {p.bound_by}"
        if not program.fits:
            figures += f"  doesn't fit: {(p.hbm_bytes - p.chip.hbm_bytes) / GIB:.2f} GiB too much"
        yield figures
    cost = plan.step.cost
    if cost and cost.collectives:
        yield ""
        yield "collectives of the train step, a chip:"
        totals: dict[tuple[str, int, bool], list[float]] = {}
        for (kind, moved, devices, far), times in cost.collectives.items():
            total = totals.setdefault((kind, devices, far), [0, 0, 0])
            total[0], total[1], total[2] = total[0] + times, total[1] + moved * times, max(total[2], moved)
        for (kind, devices, far), (count, bytes_moved, largest) in sorted(totals.items(), key=lambda t: -t[1][1]):
            where = f"{devices} devices" if kind != "collective-permute" else "neighbours"
            where = f"{devices} slices, through the hosts" if kind == "send" else where
            yield (
                f"  {kind:<20}{count:>7,} times  {bytes_moved / 1e9:>8.2f} GB  largest {largest / 1e6:>8.1f} MB  "
                f"{where}"
                f"{', between slices' if far and kind != 'send' else ''}"
            )
    for program in plan.programs:
        if program.cost and (program.cost.unknown_loops or program.cost.uncounted_kernels):
            yield (
                f"{program.name}: {program.cost.unknown_loops} loops of unknown length counted once; kernels not "
                f"counted: {', '.join(program.cost.uncounted_kernels) or 'none'}"
            )
    yield ""
    if plan.known:
        hours = plan.run_seconds / 3600
        yield (
            f"a step takes at least {plan.step.on_chip.seconds:.3f} s: at most {plan.tokens_per_second:,.0f} tokens/s, "
            f"MFU {plan.mfu_bound:.1%}"
        )
        yield (
            f"the run, {config.steps:,} steps and {plan.evaluations} evaluations, takes at least {hours:,.1f} hours, "
            f"{hours * topology.chips:,.0f} chip-hours" + (f", {plan.cost(price):,.0f} at that price" if price else "")
        )
    if plan.fits:
        yield "it fits"
    else:
        yield "it doesn't fit; what would help, by the estimate:"
        yield from (f"  {line}" for line in advice(plan) or ["nothing but more chips"])
