"""`minimind serve`: a model behind OpenAI's API, and a page to talk to it."""

from __future__ import annotations

import importlib.util
import inspect
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.chat.loading import AnswerOptions, check_positions, description
from minimind.environment import wait_briefly
from minimind.errors import UserError
from minimind.flags import flag, parse_flags
from minimind.paths import pip_install
from minimind.threads import in_own_thread

if TYPE_CHECKING:
    from minimind.chat.inference import InferenceModel
    from minimind.server.answers import Served
    from minimind.tokenizer import Tokenizer

KEY = "MINIMIND_API_KEY"
MAKE_KEY = "openssl rand -hex 24"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class ServeOptions(AnswerOptions):
    host: str = flag("127.0.0.1", "address to listen at; any but this machine's own needs a key")
    port: int = flag(8000, "port to listen at; 0: any that is free")
    api_key: str | None = flag(None, f"key that clients must send; {KEY} in the environment hides it better")
    lora_name: tuple[str, ...] = flag(
        (), "adapters to serve too, each with the weights alone, as the models minimind:NAME"
    )
    rows: int = flag(16, "answers that are written at once, of each model")
    queue: int = flag(64, "answers that may wait beyond them; then clients are told to come again (429)")
    max_seq_len: int = flag(2048, "tokens of a prompt and its answer together")
    grace: int = flag(30, "seconds in which answers may still end after SIGTERM or Ctrl-C")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least, most in (
            ("port", 0, 65535),
            ("rows", 1, 4096),
            ("queue", 0, 1_000_000),
            ("max_seq_len", 2, 1_000_000),
            ("grace", 0, 86_400),
        ):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be {least} to {most}")


def main(argv: Sequence[str] | None = None) -> int:
    """Answer requests with a model.

    OpenAI's API is at /v1, a page to talk to the model at /, and figures are at /metrics.

        minimind serve                                            out/full_sft_512.pth, on this machine alone
        minimind serve --model_mode 3 --port 9000                 a reasoning model at another port
        minimind serve --load 1 --hf_dir FOLDER                   a model in a transformers directory
    """
    options = parse_flags(ServeOptions, argv, inspect.getdoc(main))
    for package in NEEDED:
        if not importlib.util.find_spec(package):
            raise UserError(f"the server needs {package}: {pip_install('serve')}")
    key = checked_key(options.api_key or os.environ.get(KEY))
    listener = bind(options.host, options.port, key)
    with listener:
        return serve(options, listener, key)


def checked_key(key: str | None) -> str | None:
    """Raises: UserError for a key that a header cannot carry."""
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"the API key may hold visible ASCII characters only; make one with: {MAKE_KEY}")
    return key or None


def bind(host: str, port: int, key: str | None) -> socket.socket:
    """A socket that listens; who connects before the model is loaded waits for it.

    Raises: UserError when the address is no good, taken, or open to others without a key.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(
            f"--host {host} is no address; leave it out to listen on this machine alone"
        ) from None
    if key is None and not ip_address(str(address[0]).split("%")[0]).is_loopback:
        raise UserError(
            f"--host {host} lets others ask too, which needs a key: put one into the environment as {KEY}; "
            f"make one with: {MAKE_KEY}"
        )
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was closed a moment ago
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen at {host} port {port}: {error.strerror}; choose another --port"
        ) from None
    return listener


def serve(options: ServeOptions, listener: socket.socket, key: str | None) -> int:
    """Load the models and answer until a signal comes. Returns the exit code: 1 if an engine broke."""
    wait_briefly()
    from minimind.server.app import Service, create_app
    from minimind.server.connection import Server

    path = options.find_weights(sys.stdout)
    tokenizer = options.load_tokenizer()
    # OpenMP's helpers end with the thread that had them. Beside those of the engines' thread there would be
    # more than cores, and GNU's OpenMP then lets them sleep after each loop: one answer took twice as long.
    models = in_own_thread(lambda: load_models(path, options, tokenizer)).result()

    def stop() -> None:
        server.should_exit = True

    def announce() -> None:
        host, port = listener.getsockname()[:2]
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"models: {', '.join(service.models)}")
        print(f"page: {where}/   API: {where}/v1   (Ctrl-C ends)", flush=True)

    service = Service(models, tokenizer, options.queue, on_failure=stop)
    app = create_app(service, key, on_ready=announce)
    server = Server(app, options.grace, service.scheduler.give_up)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it anew at its end, which is no failure
    server.run(sockets=[listener])
    return int(service.scheduler.failed)


def load_models(path: Path, options: ServeOptions, tokenizer: Tokenizer) -> list[Served]:
    """The model in `path`, then the same with each adapter alone, each with an engine of its own.

    Raises: UserError as `LoadOptions.load_model`, and when there is not the memory for their answers.
    """
    from minimind.chat.engine import Engine
    from minimind.chat.inference import InferenceModel
    from minimind.server.answers import Served

    models = []
    for adapter in (None, *options.adapters):
        model = options.load_model(path, [adapter] if adapter else [], tokenizer)
        check_positions(model.config, "max_seq_len", options.max_seq_len)
        name = f"minimind:{adapter}" if adapter else "minimind"
        print(f"{name}: {description(path.name, model)}", flush=True)
        ready = InferenceModel(model, options.weights)
        check_memory(ready, options)
        engine = Engine(ready, options.rows, options.max_seq_len)
        engine.warm_up()
        models.append(Served(name, options.stage, adapter, int(path.stat().st_mtime), engine))
    return models


def check_memory(model: InferenceModel, options: ServeOptions) -> None:
    """Raises: UserError when keys and values of so many tokens are more than the device holds."""
    from minimind.train.cost import total_memory

    tokens = (1 + len(options.adapters)) * options.rows * options.max_seq_len
    needed = tokens * model.network.bytes_of_position
    there = total_memory(model.device)
    if needed > 0.8 * there:
        raise UserError(
            f"the answers' keys and values would take {needed / 1e9:.1f} GB, and {model.device} has "
            f"{there / 1e9:.1f} GB; lower --rows or --max_seq_len"
        )
