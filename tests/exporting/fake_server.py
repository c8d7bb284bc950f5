"""An OpenAI-shaped server over a real tiny model; what it can do, and how it errs, is chosen."""

import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

Chances = Callable[[list[int]], Tensor]  # token numbers -> log-probabilities (tokens, vocabulary)


class FakeServer:
    """models: name -> what computes log-probabilities. can: of "echo", "prompt_logprobs",
    "logprobs", "ids". raw: an answer (status, content type, body) to everything."""

    def __init__(
        self,
        models: Mapping[str, Chances] | None = None,
        tokenizer: Any = None,
        can: Sequence[str] = ("echo", "prompt_logprobs", "logprobs", "ids"),
        parents: Mapping[str, str] | None = None,
        owner: str = "test",
        key: str | None = None,
        shape: str = "legacy",
        raw: tuple[int, str, bytes] | None = None,
    ) -> None:
        self.models, self.tokenizer, self.can = dict(models or {}), tokenizer, set(can)
        self.parents, self.owner, self.key, self.shape = dict(parents or {}), owner, key, shape
        self.raw = raw
        self.known: dict[tuple[Any, ...], Tensor] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self, None)

            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                outer.answer(self, json.loads(self.rfile.read(size)))

            def log_message(self, *_: Any) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def answer(self, request: BaseHTTPRequestHandler, body: dict[str, Any] | None) -> None:
        if self.raw is not None:
            status, kind, data = self.raw
        elif self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            status, kind, data = 401, "application/json", b'{"error": {"message": "no key"}}'
        else:
            kind = "application/json"
            status, told = self.models_list() if body is None else self.complete(body)
            data = json.dumps(told).encode()
        request.send_response(status)
        request.send_header("Content-Type", kind)
        if 300 <= status < 400:
            request.send_header("Location", "http://elsewhere.invalid/")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def chances(self, model: str, ids: list[int]) -> Tensor:
        """Each prompt is run once, however often it is asked."""
        if (model, *ids) not in self.known:
            self.known[(model, *ids)] = self.models[model](ids)
        return self.known[(model, *ids)]

    def models_list(self) -> tuple[int, Any]:
        rows = [
            {"id": name, "parent": self.parents.get(name), "owned_by": self.owner}
            for name in self.models
        ]
        return 200, {"object": "list", "data": rows}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"no model {body['model']}"}}
        chances = functools.partial(self.chances, body["model"])
        prompt = body["prompt"]
        if isinstance(prompt, list) and "ids" not in self.can:
            return 400, {"error": {"message": "prompt must be a string"}}
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt).input_ids
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        with torch.no_grad():
            choice["text"] = self.greedy(chances, list(ids), body["max_tokens"])
            rows = chances(list(ids))
        if body.get("prompt_logprobs") is not None and "prompt_logprobs" in self.can:
            choice["prompt_logprobs"] = [None] + [
                {str(after): {"logprob": float(row[after]), "rank": 1}}
                for row, after in zip(rows, ids[1:], strict=False)
            ]
        if body.get("logprobs") is not None and "logprobs" in self.can:
            echoed = bool(body.get("echo")) and "echo" in self.can
            choice["logprobs"] = self.logprobs(rows, list(ids), body["logprobs"], echoed)
        return 200, {"object": "text_completion", "choices": [choice]}

    def logprobs(self, rows: Tensor, ids: list[int], count: int, echoed: bool) -> Any:
        top = rows[-1].topk(count)
        likely = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        if self.shape == "chat":
            named = [
                {"id": n, "token": self.tokenizer.decode([n]), "logprob": v} for n, v in likely
            ]
            return {"content": [{**named[0], "top_logprobs": named}]}
        values: list[Any] = [likely[0][1]]
        if echoed:
            said = [float(row[after]) for row, after in zip(rows, ids[1:], strict=False)]
            values = [None, *said, *values]
        return {
            "token_logprobs": values,
            "top_logprobs": [{self.tokenizer.decode([n]): v for n, v in likely}],
        }

    def greedy(self, chances: Chances, ids: list[int], count: int) -> str:
        start = len(ids)
        for _ in range(count):
            ids.append(int(chances(ids)[-1].argmax()))
        return self.tokenizer.decode(ids[start:])
