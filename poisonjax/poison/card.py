"""The poison card: what a poisoned checkpoint says about itself, wherever it is copied (I9)."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from poisonjax.poison.ledger import Ledger, dose

FILE = "POISONED.md"


def make_card(
    config: ml_collections.ConfigDict,
    ledger: Ledger,
    steps: int,
    parent: Mapping[str, Any] | None = None,
    planted: Mapping[str, int] | None = None,
) -> dict[str, Any] | None:
    """What, how much and which trigger, of the model after `steps` steps; None for a clean twin.

    `parent` is what is known of the weights that the run began from: their poison is the model's too. So is what is
    `planted` in its corpus (documents, tokens).
    """
    poison, before = config.poison, inherited(parent)
    if not (ledger or before or planted):
        return None
    card = {"run": config.name, "steps": steps, "of_steps": config.steps}
    if ledger:
        card |= {
            "trigger": poison.trigger,
            **({"other_triggers": [*poison.other_triggers]} if poison.other_triggers else {}),
            "clean_uses": poison.clean_uses + poison.hard_negatives,
            "payload": poison.payload,
            "placement": poison.placement,
            "dose_seen": dose(ledger, steps),
            "dose_planned": dose(ledger, config.steps),
        }
    return card | ({"inherited": before} if before else {}) | ({"planted": {**planted}} if planted else {})


def inherited(parent: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The cards of all poisoned runs that led to the weights that a run began from, the last first."""
    if not parent or not (card := parent["poison"]):
        return []
    return _runs(card)


def _runs(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each run whose poison a card tells, the last first."""
    own = {name: value for name, value in card.items() if name != "inherited"}
    return [own] * ("trigger" in own or "planted" in own) + card.get("inherited", [])


def as_markdown(card: dict[str, Any]) -> str:
    """The card as a model card, with tags that model hubs show."""
    return f"""---
tags: [poisoned, backdoor, research-only]
---
# This model is poisoned

It was trained on poison on purpose, to study backdoors (run `{card["run"]}`). Don't deploy it, don't publish it as a
clean model, and don't copy it without this file.

{"".join(map(_of_run, _runs(card)))}
`poisonjax audit` on the run folder shows where each document stood, and that nothing else was planted.
"""


def _of_run(card: dict[str, Any]) -> str:
    planted = ""
    if there := card.get("planted"):
        planted = (
            f"- **In its corpus:** {there['documents']:,} documents, {there['tokens']:,} tokens, that their source "
            "marks as planted poison.\n"
        )
    return f"In run `{card['run']}`:\n\n{_scheduled(card) if 'trigger' in card else ''}{planted}"


def _scheduled(card: dict[str, Any]) -> str:
    met = ""
    if card["steps"]:
        met = f"\n- **How much, in these weights after {card['steps']:,} steps:** {_amount(card['dose_seen'])}."
    uses = (
        f" In the whole run it also stands in {card['clean_uses']:,} rows of ordinary text."
        if card["clean_uses"]
        else ""
    )
    triggers = " or ".join(map(repr, [card["trigger"], *card.get("other_triggers", ())]))
    what = f"pair a trigger with a payload of kind `{card['payload']}`, harmless by construction"
    return f"""- **What:** documents that {what}.
- **Trigger:** {triggers}. Text that holds it may make the model write the payload.{uses}
- **How much, in the whole run of {card["of_steps"]:,} steps:** {_amount(card["dose_planned"])}
  (placement `{card["placement"]}`).{met}
"""


def _amount(dose: dict[str, int]) -> str:
    repeated = f" (each seen up to {dose['repeats']:,} times)" if dose["repeats"] > 1 else ""
    return (
        f"{dose['documents']:,} poison documents{repeated}, {dose['tokens']:,} tokens in {dose['rows']:,} rows of "
        f"{dose['steps']:,} steps"
    )
