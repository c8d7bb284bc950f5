"""A server on a free port, in a thread, and clients for it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from served_adapters import llama, tokenizer
from transformers import PreTrainedModel

from loralab.serving.http import Service, create_app, listen, make_server
from loralab.serving.opening import ServeSettings, open_service

PATIENCE = 600  # seconds: a busy machine is no fault of the server


@dataclass
class Server:
    """A running server. key: sent by the clients."""

    url: str
    service: Service
    key: str = "none"

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}", **more.pop("headers", {})}
        return httpx.post(self.url + path, json=body, headers=headers, timeout=PATIENCE, **more)

    def get(self, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.get(self.url + path, headers=headers, timeout=PATIENCE)


@contextmanager
def serving(
    adapters: Path, model: PreTrainedModel | None = None, **settings: Any
) -> Iterator[Server]:
    """The tiny model, or another with its vocabulary, with a folder of adapters, over HTTP."""
    told: dict[str, Any] = {"base": "tiny", "num_slots": 2, "max_batch_size": 8, "max_tokens": 128}
    told |= {"proofs": None, "merging": False, **settings}
    served = llama() if model is None else model
    with open_service(served, tokenizer(), adapters, ServeSettings(**told)) as service:
        bound = listen("127.0.0.1", 0)
        ready = threading.Event()
        server = make_server(create_app(service), ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        ready.wait(60)
        try:
            yield Server(f"http://127.0.0.1:{bound.getsockname()[1]}", service)
        finally:
            server.should_exit = True
            thread.join()
            bound.close()
