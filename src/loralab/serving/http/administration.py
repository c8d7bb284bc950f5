"""`/v1/models`, loading and unloading, `/health`, `/metrics`."""

import asyncio
from concurrent.futures import Future

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from loralab.errors import CapacityError
from loralab.serving.http.answers import Done, Health, ModelCard, ModelList, Slots, proof_of
from loralab.serving.http.errors import documented
from loralab.serving.http.schemas import LoadBody, UnloadBody
from loralab.serving.http.service import Service
from loralab.serving.store import AdapterState, Lease


def router(service: Service) -> APIRouter:
    """The routes that write no text."""
    made = APIRouter()

    @made.get("/v1/models", response_model=ModelList, responses=documented())
    async def models(request: Request) -> ModelList:
        caller = service.caller(request)
        cards = await asyncio.to_thread(_cards, service)
        return ModelList(data=[card for card in cards if caller.may_use(card.id)])

    @made.get("/v1/models/{model}", response_model=ModelCard, responses=documented(404))
    async def model(request: Request, model: str) -> ModelCard:
        service.caller(request).check_use([model])
        cards = await asyncio.to_thread(_cards, service)
        found = next((card for card in cards if card.id == model), None)
        if found is None:
            raise service.unknown(model)
        return found

    @made.post("/v1/load_lora_adapter", response_model=Done, responses=documented(404, 409, 422))
    async def load(request: Request, body: LoadBody) -> Done:
        service.caller(request).check_admin()
        started = service.store.load(body.lora_name, body.lora_path, replace=body.load_inplace)
        (await _finished(service, started)).release()
        if body.pinned:
            (await _finished(service, service.store.pin(body.lora_name))).release()
        cards = await asyncio.to_thread(_cards, service)
        card = next((card for card in cards if card.id == body.lora_name), None)
        return Done(message=f"adapter {body.lora_name!r} is loaded", model=card)

    @made.post("/v1/unload_lora_adapter", response_model=Done, responses=documented(404))
    async def unload(request: Request, body: UnloadBody) -> Done:
        service.caller(request).check_admin()
        num_requests = service.store.unload(body.lora_name)
        message = f"adapter {body.lora_name!r} is unloaded"
        return Done(message=message, num_requests=num_requests)

    @made.get("/health", response_model=Health)
    async def health() -> Health:
        stats = service.engine.stats()
        stats.pop("tenants", None)  # whose adapters are busy is not for everybody
        stats.pop("merged", None)
        return Health(base=service.base, engine=stats, slots=slots_of(service))

    @made.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {CONTENT_TYPE_LATEST: {}}}, **documented()},
    )
    async def metrics(request: Request) -> Response:
        service.caller(request).check_admin()
        return Response(await asyncio.to_thread(_metrics, service), media_type=CONTENT_TYPE_LATEST)

    return made


def slots_of(service: Service) -> Slots:
    """Whether there are slots enough."""
    report = service.store.working_set.report(service.store.num_slots)
    return Slots(
        num_slots=report.num_slots,
        num_requests=report.num_requests,
        num_distinct=report.num_distinct,
        hit_rates={str(slots): rate for slots, rate in report.hit_rates.items()},
        warning=report.warning,
    )


async def _finished(service: Service, started: "Future[Lease]") -> Lease:
    try:
        return await asyncio.wait_for(asyncio.wrap_future(started), service.limits.lease_seconds)
    except TimeoutError:
        raise CapacityError(
            f"no slot was free for {service.limits.lease_seconds:g} seconds",
            "ask again in a moment, or start the server with more --slots.",
        ) from None


def _cards(service: Service) -> list[ModelCard]:
    base = ModelCard(
        id=service.base,
        created=service.created,
        root=service.base,
        version=service.fingerprint.rpartition("@")[2],
        max_model_len=service.max_tokens,
        labels=list(service.labels) or None,
    )
    return [base, *(_card(service, state) for state in service.store.describe())]


def _card(service: Service, state: AdapterState) -> ModelCard:
    return ModelCard(
        id=state.name,
        created=service.created,
        parent=service.base,
        root=state.folder,
        version=None if state.version is None else state.version.content,
        max_model_len=service.max_tokens,
        labels=None if state.version is None else list(state.version.labels) or None,
        proof=proof_of(state),
        tier=state.tier,
        pinned=state.pinned,
    )


def _metrics(service: Service) -> bytes:
    metrics = service.metrics
    states = service.store.describe()
    known = {state.name for state in states} | {service.base}
    metrics.running.clear()
    metrics.waiting.clear()
    for tenant, counts in service.engine.stats()["tenants"].items():
        if tenant in known:
            metrics.running.labels(tenant).set(counts["running"])
            metrics.waiting.labels(tenant).set(counts["waiting"])
    metrics.slot_queue.set(service.store.num_waiting())
    metrics.set_adapters(states)
    metrics.set_working_set(service.store.working_set.report(service.store.num_slots))
    return metrics.text()
