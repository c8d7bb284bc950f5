"""What is checked of a request before anything reads it: its size, its pace, its Host."""

import asyncio
import json
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loralab.serving.http.errors import document


class BodyLimit:
    """Refuses bodies that are too large (413), and those that do not come (408)."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float | int) -> None:
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self.max_bytes:
            await _refuse(send, 413, f"the body has more than {self.max_bytes} bytes")
            return
        body = await self._read(receive, send)
        if body is None:
            return
        replayed = False

        async def again() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    async def _read(self, receive: Receive, send: Send) -> bytes | None:
        """The whole body; None where it was refused, or the client went away."""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size > self.max_bytes:
                        await _refuse(send, 413, f"the body has more than {self.max_bytes} bytes")
                        return None
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            await _refuse(send, 408, f"the body did not come within {self.seconds:g} seconds")
            return None


class HostCheck:
    """Refuses requests for other hosts: pages of the web, whose name leads to this machine.

    For servers without keys, which listen on the loopback alone.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower().strip("[]") not in self.hosts:
                await _refuse(send, 403, "this server answers requests for this machine alone")
                return
        await self.app(scope, receive, send)


async def _refuse(send: Send, status: int, message: str) -> None:
    kind = "permission_error" if status == 403 else "invalid_request_error"
    content = json.dumps(document(message, kind)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),  # the rest of the body is not read
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
