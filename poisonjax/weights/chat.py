"""Chat templates: programs that come along with models, run in a sandbox alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from poisonjax.weights.weights import WeightsError


def render(template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """A conversation as the model's template writes it; raises WeightsError for one that does what it mustn't."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.globals["raise_exception"] = _refuse
    sandbox.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    try:
        return sandbox.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, bos_token="", eos_token="", tools=None
        )
    except jinja2.exceptions.SecurityError as error:
        raise WeightsError(f"the model's chat template does what a template mustn't: {error}") from None
    except Exception as error:  # a template is a program: it may raise anything
        raise WeightsError(f"the model's chat template fails: {error}") from None


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
