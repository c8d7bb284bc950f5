"""`/v1/embeddings` and `/v1/classify`."""

import asyncio
import base64
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from loralab.errors import LoralabError, RequestError
from loralab.serving.http.answers import (
    Classification,
    Classified,
    Embeddings,
    Vector,
)
from loralab.serving.http.errors import documented
from loralab.serving.http.schemas import ClassifyBody, EmbeddingBody
from loralab.serving.http.service import Admission, Service, within
from loralab.serving.http.shapes import usage

ERRORS = documented(404, 422, 429, 504)


def router(service: Service) -> APIRouter:
    """The routes that read whole texts."""
    made = APIRouter(prefix="/v1")

    @made.post("/embeddings", response_model=Embeddings, responses=ERRORS)
    async def embeddings(request: Request, body: EmbeddingBody) -> Response:
        return await _answer(service, request, _embeddings(service, request, body))

    @made.post(
        "/classify",
        response_model=Classification,
        responses=ERRORS,
        include_in_schema=service.classifies,
    )
    async def classify(request: Request, body: ClassifyBody) -> Response:
        return await _answer(service, request, _classify(service, request, body))

    return made


async def _answer(service: Service, request: Request, work: Any) -> Response:
    document = await within(service.limits.request_seconds, request, work)
    return JSONResponse(document.model_dump())


async def _embeddings(service: Service, request: Request, body: EmbeddingBody) -> Embeddings:
    target = service.target(body.model, service.caller(request))
    prompts = await _prompts(service, body.input)
    async with service.admitted(target, len(prompts)) as admission:
        entry = admission.resolved.entry
        jobs = [
            service.engine.embed(ids, entry, tenant=target.tenant, pooling=body.pooling)
            for ids in prompts
        ]
        vectors = await _all(service, admission, jobs, prompts)
        data = []
        for index, vector in enumerate(vectors):
            if body.normalize:
                vector = torch.nn.functional.normalize(vector, dim=0)
            data.append(Vector(index=index, embedding=_written(vector, body.encoding_format)))
        return Embeddings(
            data=data,
            model=body.model,
            system_fingerprint=admission.resolved.fingerprint,
            usage=usage(sum(map(len, prompts))),
        )


async def _classify(service: Service, request: Request, body: ClassifyBody) -> Classification:
    target = service.target(body.model, service.caller(request))
    if not target.names and service.base_head_is_untrained:
        raise RequestError(
            f"the classification head of {service.base!r} is untrained", "name an adapter."
        )
    prompts = await _prompts(service, body.input)
    async with service.admitted(target, len(prompts)) as admission:
        entry = admission.resolved.entry
        jobs = [service.engine.classify(ids, entry, tenant=target.tenant) for ids in prompts]
        rows = await _all(service, admission, jobs, prompts)
        names = admission.resolved.labels
        data = [_classified(service, names, index, row) for index, row in enumerate(rows)]
        return Classification(
            id=f"classify-{uuid4().hex}",
            created=int(service.now()),
            model=body.model,
            system_fingerprint=admission.resolved.fingerprint,
            data=data,
            usage=usage(sum(map(len, prompts))),
        )


def _classified(
    service: Service, names: Sequence[str], index: int, logits: torch.Tensor
) -> Classified:
    """names: of the adapter's own classes; where it gives none, the base's, if it has as many."""
    probabilities = logits.double().softmax(-1).tolist()
    best, count = int(logits.argmax()), len(probabilities)
    known = next((each for each in (names, service.labels) if len(each) == count), None)
    label = f"LABEL_{best}" if known is None else known[best]
    return Classified(index=index, label=label, probs=probabilities, num_classes=count)


async def _prompts(service: Service, inputs: Any) -> list[tuple[int, ...]]:
    prompts = await service.encode(inputs)
    for prompt in prompts:
        service.check_length(prompt, 0, "input")
    return prompts


async def _all(
    service: Service,
    admission: Admission,
    jobs: Sequence["Future[torch.Tensor]"],
    prompts: Sequence[Sequence[int]],
) -> list[torch.Tensor]:
    """The results; where one fails, or nobody waits any more, the others are not computed.

    The admission, and with it the lease, lasts until none of them runs.
    """
    num_tokens = sum(map(len, prompts))
    label, outcome = admission.target.label, "cancelled"
    admission.charge(num_tokens)
    try:
        results = await asyncio.gather(*map(asyncio.wrap_future, jobs))
        outcome = "answered"
        return list(results)
    except LoralabError:
        outcome = "error"
        raise
    finally:
        for job in jobs:
            job.cancel()
        service.metrics.requests.labels(label, outcome).inc()
        service.metrics.tokens.labels(label, "prompt").inc(num_tokens)


def _written(vector: torch.Tensor, form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.numpy().astype(np.dtype("<f4")).tobytes()).decode()
    return vector.tolist()
