"""Errors in OpenAI's shape, so that the official clients raise their own exceptions for them."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from loralab.errors import (
    AdapterError,
    CapacityError,
    ConflictError,
    ForbiddenError,
    LoralabError,
    RequestError,
    UnknownAdapterError,
)

logger = logging.getLogger("loralab")
RETRY_AFTER_SECONDS = 2
CLIENT_GONE = 499  # nobody reads it


class ErrorBody(BaseModel):
    """What went wrong. `param` names the field at fault, `code` the kind of error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorDocument(BaseModel):
    """Every answer that is no success."""

    error: ErrorBody


class QuotaError(CapacityError):
    """An adapter has had its share for now; `retry_after_seconds` tells when there is more."""

    def __init__(self, cause: str, next_step: str, retry_after_seconds: float | int = 1) -> None:
        super().__init__(cause, next_step)
        self.retry_after_seconds = retry_after_seconds

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.cause, self.next_step, self.retry_after_seconds)


class AccessError(LoralabError):
    """No key, or one that this server does not know."""


class TookTooLongError(LoralabError):
    """An answer that took longer than the server waits."""


class ClientGoneError(Exception):
    """Nobody is there any more to be answered."""


# the most special first: the first that fits decides
STATUS: Sequence[tuple[type[LoralabError], int, str, str]] = (
    (AccessError, 401, "authentication_error", "invalid_api_key"),
    (ForbiddenError, 403, "permission_error", "forbidden"),
    (UnknownAdapterError, 404, "not_found_error", "model_not_found"),
    (QuotaError, 429, "rate_limit_error", "quota_exceeded"),
    (CapacityError, 503, "server_busy_error", "over_capacity"),
    (TookTooLongError, 504, "timeout_error", "timeout"),
    (AdapterError, 422, "invalid_request_error", "adapter_refused"),
    (ConflictError, 409, "conflict_error", "conflict"),
    (RequestError, 400, "invalid_request_error", "invalid_value"),
    (LoralabError, 500, "server_error", "internal_error"),
)
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of an operation, for the OpenAPI document."""
    common = (400, 401, 403, 413, 500, 503)
    return {status: {"model": ErrorDocument} for status in sorted({*common, *statuses})}


def body_of(error: LoralabError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(status, document, headers) of one of our errors."""
    status, kind, code = next((s, k, c) for cls, s, k, c in STATUS if isinstance(error, cls))
    message = f"{error.cause}. {error.next_step[:1].upper()}{error.next_step[1:]}"
    headers = {}
    if isinstance(error, CapacityError):
        seconds = getattr(error, "retry_after_seconds", RETRY_AFTER_SECONDS)
        headers["Retry-After"] = str(max(1, math.ceil(seconds)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return status, document(message, kind, code=code), headers


def document(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as JSON."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def respond(error: LoralabError) -> JSONResponse:
    """One of our errors as an answer."""
    status, content, headers = body_of(error)
    return JSONResponse(content, status, headers)


def install_handlers(app: FastAPI) -> None:
    """Every error of the application in this shape, whoever raises it."""

    @app.exception_handler(LoralabError)
    async def ours(request: Request, error: LoralabError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [(place(fault), str(fault["msg"])) for fault in error.errors()]
        listed = dict.fromkeys(f"{where}: {what}" if where else what for where, what in faults)
        param = faults[0][0] or None
        message = "; ".join(list(listed)[:10])
        return JSONResponse(
            document(message, "invalid_request_error", param=param, code="invalid_value"), 400
        )

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kind = TYPES.get(error.status_code, "invalid_request_error")
        message = f"{error.detail}: {request.method} {request.url.path}"
        headers = dict(error.headers or {})
        return JSONResponse(document(message, kind), error.status_code, headers)

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        logger.exception("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(document("the server failed", "server_error"), 500)


def place(fault: Mapping[str, Any]) -> str:
    """Where in the body a fault is, as a client writes it: `messages.0.content`."""
    parts = [str(part) for part in fault["loc"] if part != "body"]
    if fault["type"] == "json_invalid":
        return ""
    return ".".join(part for part in parts if "[" not in part and "-" not in part)
