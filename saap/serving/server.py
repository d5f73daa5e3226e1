"""An OpenAI-compatible server for pruned models, on transformers' own serving code."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from saap.accelerate import accelerate as accelerate_model
from saap.checkpoint_files import check_directory
from saap.data import check_tokenizer
from saap.opening import open_model, open_tokenizer
from saap.units import elements

if TYPE_CHECKING:
    from saap.serving.server_app import Served

PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where one listens, and what is called from the same machine
GRACE = 5  # seconds that answers under way get to end when the server is told to stop


def serve(
    path: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    dtype: str | None = None,
    accelerate: bool = False,
    bits: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the model directory ``path``, and nothing else, to OpenAI's clients until interrupted.

    Clients call it ``name`` (default: the directory's). ``port`` 0 takes a free one. ``accelerate`` runs the model on
    our kernels, with ``bits`` 8 or 4 quantised. ``say`` gets the address once the server answers.

    Raises, before anything listens: RuntimeError without the packages of ``saap[serve]``, OSError for a port that
    cannot be had (before the model is loaded), ValueError or FileNotFoundError for what is no complete model
    directory with a tokenizer.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise RuntimeError(f"serving needs {', '.join(missing)}: pip install 'saap[serve]'")
    folder = Path(path)
    if bits is not None and not accelerate:
        raise ValueError(f"bits={bits} quantises for our kernels: it needs accelerate (--accelerate)")
    with bound(host, port) as listener:
        served = open_served(folder, name, dtype, accelerate=accelerate, bits=bits)
        _run(served, listener, host, say)


def open_served(
    folder: Path,
    name: str | None = None, dtype: str | None = None, *, accelerate: bool = False,
    bits: int | None = None,
) -> "Served":  # fmt: skip
    """Check and load the model directory that is to be served; errors as ``serve``."""
    from saap.serving.server_app import Served

    check_directory(folder)
    tokenizer = open_tokenizer(str(folder))
    if tokenizer is None:
        raise FileNotFoundError(f"expected a tokenizer beside the model in {folder}, found none")
    model = open_model(str(folder), dtype)
    check_tokenizer(model, tokenizer)
    if accelerate:
        accelerate_model(model, bits=bits)
    return Served(name or folder.resolve().name, str(folder), model, tokenizer)


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has the port but does not listen yet: clients are refused until the model is there."""
    if not 0 <= port < 2**16:
        raise ValueError(f"port: expected 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"cannot listen on {host}: {error.strerror}") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise OSError(
                f"cannot listen on {host}, port {port}: {error.strerror}; --port 0 takes a free one"
            ) from error
        yield listener


def _run(served: "Served", listener: socket.socket, host: str, say: Callable[[str], None]) -> None:
    """Answer requests until SIGINT or SIGTERM."""
    import uvicorn

    from saap.serving.server_app import build_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            say(_greeting(served, host, listener.getsockname()[1]))

    config = uvicorn.Config(build_app(served), log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE)
    with _quiet_end():
        Server(config).run([listener])


@contextmanager
def _quiet_end() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more when all is closed: here that is no error."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _greeting(served: "Served", host: str, port: int) -> str:
    """What is served where, and a line that calls it."""
    name = EVERYWHERE.get(host, host)
    url = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
    routes = "completions and chat" if served.tokenizer.chat_template else "completions; no chat template"
    lines = [
        f"serving {served.name} ({described(served.model)}) at {url}/v1",
        *_remarks(served.model, host),
        f"""  curl {url}/v1/completions -H 'Content-Type: application/json' \\""",
        f"""    -d '{{"model": "{served.name}", "prompt": "Hello", "max_tokens": 16}}'""",
        f"""  OpenAI(base_url="{url}/v1", api_key="none")  # {routes}""",
        "Ctrl-C ends it",
    ]
    return "\n".join(lines)


def described(model: PreTrainedModel) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__}, {elements(model):,} parameters, {dtype} on {model.device.type}"


def _remarks(model: PreTrainedModel, host: str) -> Iterator[str]:
    if host not in LOOPBACK:
        yield "  anyone who reaches this address can use it: there are no keys"
    if model.device.type == "cpu" and model.dtype.itemsize == 2:
        yield "  16-bit weights are slow on many CPUs; --dtype float32 is often faster"
