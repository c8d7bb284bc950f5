"""A server of somebody else, over HTTP: bounded in time and size, and believed in nothing."""

import http.client
import json
import os
import re
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from loralab.errors import ConfigError, ServerError

TIMEOUT_SECONDS = 60.0
MAX_ANSWER_BYTES = 1 << 24


class Unreachable(Exception):  # noqa: N818  (an outcome, not a fault of ours)
    """Nothing answers at that address."""


@dataclass(frozen=True)
class Answer:
    """What came back: an HTTP status and a JSON value."""

    status: int
    body: Any

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300

    @property
    def message(self) -> str:
        """What the server says is wrong, cut to one line."""
        body = self.body
        error = body.get("error", body) if isinstance(body, dict) else body
        text = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        return " ".join(str(text).split())[:300]


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server. `url` is its root, without `/v1`."""

    url: str
    key: str | None = field(default=None, repr=False)
    timeout_seconds: float | int = TIMEOUT_SECONDS

    def get(self, path: str) -> Answer:
        """As `post`, without a body."""
        return self._send(urllib.request.Request(self.url + path, headers=self._headers()))

    def post(self, path: str, body: dict[str, Any]) -> Answer:
        """Sends JSON. Raises `Unreachable` where nothing answers, `ServerError` for a server that
        redirects, wants another key, or answers what is no JSON."""
        headers = {**self._headers(), "Content-Type": "application/json"}
        data = json.dumps(body).encode()
        return self._send(urllib.request.Request(self.url + path, data, headers, method="POST"))

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {"Accept": "application/json", **key}

    def _send(self, request: urllib.request.Request) -> Answer:
        try:
            with _OPENER.open(request, timeout=self.timeout_seconds) as response:
                return self._answer(response.status, response)
        except urllib.error.HTTPError as error:
            with error:
                return self._answer(error.code, error, error.headers.get("Location"))
        except urllib.error.URLError as error:
            raise Unreachable(f"{self.url}: {_reason(error.reason)}") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{self.url}: {_reason(error)}") from None

    def _answer(self, status: int, response: Any, location: str | None = None) -> Answer:
        if location is not None and 300 <= status < 400:
            raise ServerError(
                f"{self.url} redirects to {location[:200]}",
                "give that address, if it is yours: keys are not sent on to other places.",
            )
        if status in (401, 403):
            raise ServerError(
                f"{self.url} refuses the request ({status})",
                "name the environment variable that holds its key: --key NAME.",
            )
        raw = response.read(MAX_ANSWER_BYTES + 1)
        if len(raw) > MAX_ANSWER_BYTES:
            raise ServerError(
                f"{self.url} answers more than {MAX_ANSWER_BYTES >> 20} MiB", "check the address."
            )
        try:
            return Answer(status, json.loads(raw) if raw else None)
        except (ValueError, RecursionError):
            if status >= 400:  # plain text beside an error status is usual
                return Answer(status, raw[:300].decode("utf-8", "replace"))
            raise ServerError(
                f"{self.url} is no OpenAI-compatible server: it answers {_kind(raw)}",
                "check host and port; the address is the server's root, such as"
                " http://localhost:8000.",
            ) from None


def connect(
    url: str, key_variable: str | None = None, timeout_seconds: float | int = TIMEOUT_SECONDS
) -> Server:
    """The server at `url` (with or without `/v1`); its key is read from the environment.

    Raises `ConfigError` for an address that is not http or https, and for a variable not set.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is no address ({error})", _EXAMPLE) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is no http or https address", _EXAMPLE)
    if parts.username or parts.password:
        raise ConfigError(
            "the address holds a user or a password",
            "leave them out; a key is named by its environment variable: --key NAME.",
        )
    if parts.query or parts.fragment:
        raise ConfigError(f"{url!r} has a query or a fragment", _EXAMPLE)
    path = re.sub(r"/(v1/?)?$", "", parts.path)
    key = None
    if key_variable is not None:
        key = os.environ.get(key_variable)
        if not key or not key.isascii() or not key.isprintable():
            raise ConfigError(
                f"the environment variable {key_variable} holds no key",
                f"set it first: export {key_variable}=...",
            )
    return Server(f"{parts.scheme}://{parts.netloc}{path}", key, timeout_seconds)


_EXAMPLE = "give the server's root, such as http://localhost:8000."


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a key would be sent on to wherever it leads."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay)


def _reason(error: Any) -> str:
    if isinstance(error, TimeoutError | socket.timeout):
        return "no answer in time"
    return str(getattr(error, "strerror", None) or error)


def _kind(raw: bytes) -> str:
    text = raw[:4096].decode("utf-8", "replace")
    if "<html" in text.lower() or "<!doctype" in text.lower():
        title = re.search(r"<title>\s*(.*?)\s*</title>", text, re.IGNORECASE | re.DOTALL)
        return f"a web page ({title[1][:80]!r})" if title else "a web page"
    return f"what is no JSON ({text[:60]!r})"
