"""uvicorn, started and stopped the way a server of long answers needs."""

import ipaddress
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from loralab.errors import ConfigError, OutputError
from loralab.serving.http.keys import Keys

SHUTDOWN_SECONDS = 120  # after SIGTERM, for answers that are being written
KEEP_ALIVE_SECONDS = 5


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends politely, the second at once; neither kills the process."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def check_bind(host: str, keys: Keys) -> None:
    """Raises `ConfigError` for a server without keys that others than this machine can reach."""
    if not keys.callers and not is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines in, and there are no keys: anybody could use and "
            "change this server",
            "make one with `loralab serve --add-key NAME --keys keys.toml` and give --keys "
            "keys.toml, or stay on 127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `OutputError` where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host.strip("[]"), port))
        made.listen(1024)
    except OSError as error:
        made.close()
        raise OutputError(
            f"{host}:{port} cannot be listened on ({error.strerror})",
            "choose another --port (0 takes a free one), or stop what uses it.",
        ) from None
    return made


def make_server(app: FastAPI, on_ready: Callable[[], None]) -> uvicorn.Server:
    """A server that, on SIGTERM or Ctrl-C, takes no new requests and writes answers to their end.

    A second signal, or `SHUTDOWN_SECONDS`, ends them at once.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return _Server(config, on_ready)


def run(app: FastAPI, made: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serves on a listening socket until it is told to stop."""
    make_server(app, on_ready).run(sockets=[made])
