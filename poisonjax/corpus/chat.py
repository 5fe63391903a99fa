"""Chat templates: programs that come along with models, run in a sandbox alone, for so long and no longer."""

import contextlib
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import jinja2
from etils import epath
from jinja2.sandbox import ImmutableSandboxedEnvironment

from poisonjax.corpus.errors import CorpusError
from poisonjax.corpus.tokenizer_files import gguf_file
from poisonjax.files import parse_json

FILE = "chat_template.jinja"  # in a folder of transformers'
PLAIN = """{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""
MOST_LINES = 100_000  # of a template that run for one conversation
MOST_CHARACTERS = 2**24  # that it may write, or hold in one value


def load_template(spec: str) -> str:
    """`plain`, the one of a model (`hf:FOLDER`, `gguf:FILE`), or a file of Jinja; raises CorpusError where none is."""
    kind, _, rest = spec.partition(":")
    match kind:
        case "plain" if not rest:
            return PLAIN
        case "hf":
            found = of_huggingface(epath.Path(rest))
        case "gguf":
            found = of_gguf(gguf_file(rest))
        case _:
            if not epath.Path(spec).is_file():
                raise CorpusError(f"chat template {spec!r}: no such file; give plain, hf:FOLDER, gguf:FILE or a file")
            found = epath.Path(spec).read_text()
    if not found:
        raise CorpusError(f"{spec} has no chat template: give plain, another model's, or a file of Jinja")
    return found


def of_huggingface(folder: epath.Path) -> str | None:
    if (path := folder / FILE).exists():
        return path.read_text()
    path = folder / "tokenizer_config.json"
    template = parse_json(path.read_bytes()).get("chat_template") if path.exists() else None
    if isinstance(template, list):  # several, by name
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def of_gguf(reader: Any) -> str | None:
    template = reader.fields.get("tokenizer.chat_template")
    return template.contents() if template else None


class _Sandbox(ImmutableSandboxedEnvironment):
    """Beside what templates mustn't touch, values that would fill the memory."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            sizes = [len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right)]
            _require_small(sizes[0] * sizes[1])
        elif operator == "**" or isinstance(left, str):
            _refuse(f"{operator} isn't for templates here")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, *args: Any, **named: Any) -> Any:
        for value in (*args, *named.values()):
            if isinstance(value, int):
                _require_small(value)
        return super().call(context, called, *args, **named)


def _require_small(size: int | float) -> None:
    if abs(size) > MOST_CHARACTERS:
        _refuse(f"{size:,} is more than a template may hold")


@functools.cache
def _program(template: str) -> jinja2.Template:
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    del sandbox.globals["lipsum"]
    for name in ("center", "format", "indent", "wordwrap"):  # that pad
        del sandbox.filters[name]
    sandbox.globals["raise_exception"] = _refuse
    sandbox.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    return sandbox.from_string(template)


def render(template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """A conversation as the model's template writes it; raises CorpusError for one that does what it mustn't."""
    try:
        program, text = _program(template), ""
        about = {"messages": messages, "bos_token": "", "eos_token": "", "tools": None}
        with _counted(program.root_render_func.__code__):
            for piece in program.generate(**about, add_generation_prompt=add_generation_prompt):
                text += piece
                _require_small(len(text))
        return text
    except jinja2.exceptions.SecurityError as error:
        raise CorpusError(f"the model's chat template does what a template mustn't: {error}") from None
    except Exception as error:  # a template is a program: it may raise anything
        raise CorpusError(f"the model's chat template fails: {error}") from None


@contextlib.contextmanager
def _counted(code: CodeType) -> Iterator[None]:
    """Ends what doesn't end: raises once so many lines of the template's own code have run. Counted, not timed, so that
    the same template fails on every machine."""
    left, before = MOST_LINES, sys.gettrace()

    def line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            _refuse(f"it doesn't end: {MOST_LINES} of its lines have run")
        return line

    sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename == code.co_filename else None)
    try:
        yield
    finally:
        sys.settrace(before)


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
