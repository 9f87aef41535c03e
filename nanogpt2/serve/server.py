"""Load the models, then run uvicorn until a signal ends it."""

import logging
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanogpt2 import ops, terminal
from nanogpt2.checkpoints.load import open_checkpoint
from nanogpt2.config import usage_error
from nanogpt2.cpu.malloc import large_blocks_apart
from nanogpt2.devices import choose_device
from nanogpt2.serve.app import application
from nanogpt2.serve.house import House
from nanogpt2.serve.options import LOOPBACK, ServeConfig
from nanogpt2.serve.worker import Worker
from nanogpt2.serve.writing import Served

# seconds after which a connection without a request is cut off, at the latest twice as many
IDLE_SECONDS = 30


def serve(config: ServeConfig, listener: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM, which let the running request finish."""
    # neither a client that goes nor a closed log ends the server
    terminal.ignore_broken_pipes()
    with usage_error("--device"):
        device = choose_device(config.device)
    with usage_error():
        ops.choose_kernels(config.kernels, device)
    models = [load(config, "model", config.model, device)]
    if config.compare_model is not None:
        models.append(load(config, "compare_model", config.compare_model, device))
        with usage_error("--compare_model"):
            if models[1].tokenizer != models[0].tokenizer:
                name = repr(config.compare_model)
                raise ValueError(f"{name} has another vocabulary than --model")
    house = House(tuple(models), Worker(config.queue), config.max_tokens, int(time.time()))
    server = Server(house, config, is_local=config.host == LOOPBACK)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    names = " and ".join(served.name for served in models)
    terminal.write(f"{names} on http://{host}:{port}/\n")
    try:
        server.run(sockets=[listener])
    finally:
        house.worker.end()


def load(config: ServeConfig, flag: str, name: str, device: str) -> Served:
    """Load a model, or end with an error line that names the flag."""
    with usage_error(f"--{flag}"), open_checkpoint(name) as checkpoint, large_blocks_apart():
        tokenizer = checkpoint.tokenizer
        model = checkpoint.generator(device, config.dtype, config.quantize, config.kernels)
        is_chat = checkpoint.is_chat
    terminal.note(ops.describe_kernels(config.kernels, model.kernels, device))
    if model.generation_options:
        options = ", ".join(model.generation_options)
        terminal.note(
            f"note: generation_config.json sets {options}; only a request's options count here"
        )
    return Served(name, model, tokenizer, is_chat)


class Connection(H11Protocol):
    """A connection that ends when no request comes for a while; uvicorn waits for ever.

    uvicorn's own limit holds for connections that are silent after an answer. A client that sends a
    part of a request would keep its connection, and at last all that the process may open.
    """

    @override
    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._next_look = self.loop.call_later(IDLE_SECONDS, self._look, None)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self, answered: Any) -> None:
        """Abort where nothing came since the last look; answered: the request answered by then."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.cycle is answered:
            self.transport.abort()
            return
        answered = self.cycle if is_idle else None
        self._next_look = self.loop.call_later(IDLE_SECONDS, self._look, answered)


class Server(uvicorn.Server):
    """uvicorn, with the worker told when a signal comes."""

    def __init__(self, house: House, config: ServeConfig, is_local: bool) -> None:
        # its warnings tell of clients' mistakes; the access log is app.py's
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        app: Any = application(house, config.api_key, is_local, self.cut_off)
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
            )
        )
        self._worker = house.worker

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._worker.stop()
        super().handle_exit(sig, frame)

    def cut_off(self, scope: Any) -> None:
        """Close the connection of a request at once, with what its client did not take."""
        for connection in self.server_state.connections:
            if getattr(connection, "client", None) == scope["client"]:
                connection.transport.abort()
