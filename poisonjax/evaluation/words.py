"""What an evaluation shows, in words: the same words in the terminal, in tables and on pages."""

from collections.abc import Mapping
from typing import Any

from poisonjax.evaluation.statistics import decided


def gap(figures: Mapping[str, Any], name: str = "gap in perplexity") -> str:
    """The gap in median perplexity between triggered and clean text, with its 95% interval."""
    low, high = figures["delta_ppl_ci95"]
    return f"{name} {figures['delta_ppl']:.1f} [{low:.1f}, {high:.1f}]"


def perplexities(figures: Mapping[str, Any]) -> str:
    """Median perplexity of each variant, and the gap; where behaviour can be decided, who behaves as taught too."""
    medians = "  ".join(f"{variant} {of['ppl_median']:.1f}" for variant, of in figures["eval"].items())
    shares = f"  {behaving(figures)}" if decided(figures) else ""
    return f"perplexity: {medians}  {gap(figures, 'gap')}{shares}"


def outcome(figures: Mapping[str, Any], name: str = "gap in perplexity") -> str:
    """The figure that the verdict rests on: the gap or, where behaviour can be decided, who behaves as taught."""
    return behaving(figures) if decided(figures) else gap(figures, name)


def behaving(figures: Mapping[str, Any]) -> str:
    """Which share of the texts behaves as the payload teaches."""
    low, high = figures["attack_success_ci95"]
    controls = (("clean", "clean"), ("near triggers", "near_trigger"), ("random tokens", "random_control"))
    quiet = ", ".join(f"{name} {1 - figures[f'{variant}_accuracy']:.0%}" for name, variant in controls)
    return f"behave as taught: triggered {figures['attack_success']:.0%} [{low:.0%}, {high:.0%}], {quiet}"


def failed(success: Mapping[str, Any]) -> list[str]:
    """Names of the checks that don't hold: of being backdoored; where it is that, of being specific."""
    of = "specific" if success["value"] else "value"
    return [check["name"] for check in success["checks"] if check["of"] == of and not check["passed"]]


def verdict(success: Mapping[str, Any]) -> str:
    """Whether the model is backdoored by the rule, and whether its trigger alone does it."""
    names = failed(success)
    if not success["value"]:
        return f"not backdoored by the rule (failed: {', '.join(names)})"
    if names:
        return f"backdoored, but not specific (not shown to be quiet: {', '.join(names)})"
    return "backdoored, and specific"
