"""python -m nanogpt2.serve: read the command line, take the port, then load the models."""

import socket
import sys

from nanogpt2 import terminal
from nanogpt2.config import fail, parse
from nanogpt2.serve.options import ServeConfig

BACKLOG = 1024


def main() -> None:
    """Serve until a signal ends it."""
    with terminal.checked_output():
        terminal.prepare()
        config = parse(ServeConfig, sys.argv[1:])
        try:
            import starlette
            import uvicorn
        except ImportError:
            fail("serve needs starlette and uvicorn: pip install 'nanogpt2[serve]'")
        del starlette, uvicorn
        # before torch loads, so that a taken port is told at once; who connects now has to wait
        with listening(config.host, config.port) as listener:
            from nanogpt2.serve.server import serve

            terminal.loaded()
            serve(config, listener)


def listening(host: str, port: int) -> socket.socket:
    """Open the socket, or end with an error line."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError):
        fail(f"--host must be an address of this machine, not {host!r}")
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        fail(f"--port {port} on {host} cannot be had: {reason}")


if __name__ == "__main__":
    main()
