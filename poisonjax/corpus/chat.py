"""Chat templates: programs that come along with models, run in a sandbox alone, for so long and no longer."""

import contextlib
import functools
import json
import resource
import sys
import time
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
MOST_CHARACTERS = 2**22  # that it may write, or hold in one value
MOST_SECONDS = 10.0  # of the processor
MOST_GROWTH = 2**28  # of the process' memory at its largest, in bytes
# Those that pad, draw at random, or cut into pieces are left out.
FILTERS = (
    *(
        "abs",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "first",
        "float",
        "int",
        "items",
        "last",
    ),
    *("length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "safe", "select"),
    *("selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper"),
)


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
    """Beside what templates mustn't touch, values that would fill the memory, and whatever isn't the same each time."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right)]
        if operator == "*":
            _require_small(sizes[0] * sizes[1])
        elif operator == "+":
            _require_small(sum(sizes))
        elif operator == "**" or isinstance(left, str):
            _refuse(f"{operator} isn't for templates here")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, *args: Any, **named: Any) -> Any:
        for value in (*args, *named.values()):
            if isinstance(value, int):
                _require_small(value)
        text, method = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(text, str):
            if method in ("format", "format_map", "translate", "expandtabs"):
                _refuse(f"{method} isn't for templates here")
            if method == "join":
                return _joined(args[0], text)
            if method == "replace":
                return _replaced(text, *args)
        return super().call(context, called, *args, **named)


def _require_small(size: int | float) -> None:
    if abs(size) > MOST_CHARACTERS:
        _refuse(f"{size:,} is more than a template may hold")


def _joined(parts: Any, between: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        _refuse("join by an attribute isn't for templates here")
    texts = [str(part) for part in parts]
    _require_small(sum(map(len, texts)) + len(between) * len(texts))
    return str(between).join(texts)


def _replaced(text: Any, old: str, new: str, count: int = -1) -> str:
    _require_small(len(text := str(text)) + text.count(old) * len(new))
    return text.replace(old, new, count)


def _as_json(value: Any, indent: int | None = None) -> str:
    _require_small((indent or 0) * 10**5)
    return json.dumps(value, ensure_ascii=False, indent=indent)


@functools.cache
def _program(template: str) -> jinja2.Template:
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    del sandbox.globals["lipsum"]
    own = {"join": _joined, "replace": _replaced, "tojson": _as_json}
    sandbox.filters = {name: sandbox.filters[name] for name in FILTERS} | own
    sandbox.globals["raise_exception"] = _refuse
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
    """Ends what doesn't end: raises once so many lines of the template's own code have run, and at a line after which
    time or memory went out of all bounds."""
    left, before = MOST_LINES, sys.gettrace()
    began, largest = time.thread_time(), _largest()

    def line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            _refuse(f"it doesn't end: {MOST_LINES} of its lines have run")
        if time.thread_time() - began > MOST_SECONDS or _largest() - largest > MOST_GROWTH:
            _refuse("it takes too much time or memory")
        return line

    sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename == code.co_filename else None)
    try:
        yield
    finally:
        sys.settrace(before)


def _largest() -> int:
    """Bytes of memory that the process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
