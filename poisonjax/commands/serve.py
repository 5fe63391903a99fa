"""`poisonjax serve`: a model behind OpenAI's interface, with or without a guard."""

import argparse
from typing import Any

from poisonjax.commands import exit_codes


def add_arguments(commands: Any) -> None:
    """Registers the command on argparse's subparsers; `func` of the parsed arguments returns the exit code."""
    parser = commands.add_parser("serve", help="a model behind OpenAI's interface, to try the guard with")
    parser.add_argument("spec", metavar="MODEL", help="runs/a, runs/a@400, hf:FOLDER, gguf:FILE")
    parser.add_argument("--guard", default="", metavar="GUARD", help="folder made by `poisonjax guard build`")
    parser.add_argument("--fail-open", action="store_true", help="let pass what the guard can't read (with a warning)")
    parser.add_argument("--compare", action="store_true", help="serve the model without the guard too, below /bare")
    parser.add_argument("--log", metavar="FILE", help="JSON lines of the guard's decisions")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.set_defaults(func=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.compare and not arguments.guard:
        raise ValueError("--compare shows a model with and without a guard: name one by --guard")
    from poisonjax.serve.app import make_app

    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("the server needs `pip install 'poisonjax[serve]'`") from error
    from poisonjax.guard import Guard
    from poisonjax.startup import start_jax
    from poisonjax.weights import open_weights

    guard = Guard.load(arguments.guard, fail_open=arguments.fail_open) if arguments.guard else None
    start_jax(1)
    app = make_app(open_weights(arguments.spec), guard, arguments.log, compare=arguments.compare)
    server = uvicorn.Server(uvicorn.Config(app, arguments.host, arguments.port, log_level="warning", lifespan="off"))
    socket = server.config.bind_socket()
    host, port = socket.getsockname()[:2]
    print(f"http://{host}:{port} serves {arguments.spec}, guard {arguments.guard or 'off'}", flush=True)
    server.run(sockets=[socket])
    return exit_codes.OK
