"""The application: routes, guards, errors."""

from collections.abc import Sequence
from importlib.metadata import version

from fastapi import FastAPI

from loralab.serving.http import administration, completions, vectors
from loralab.serving.http.errors import install_handlers
from loralab.serving.http.guards import BodyLimit, HostCheck
from loralab.serving.http.service import Service

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def create_app(service: Service, *, hosts: Sequence[str] = LOOPBACK) -> FastAPI:
    """The HTTP face of a service whose engine is started.

    hosts: names that requests may be for, where there are no keys.
    """
    app = FastAPI(
        title="loralab",
        version=version("loralab"),
        description="Many adapters on one frozen base, in OpenAI's API.",
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(completions.router(service))
    app.include_router(vectors.router(service))
    app.include_router(administration.router(service))
    install_handlers(app)
    limits = service.limits
    app.add_middleware(BodyLimit, max_bytes=limits.body_bytes, seconds=limits.body_seconds)
    if not service.keys.callers:
        app.add_middleware(HostCheck, hosts=hosts)
    app.openapi()  # makes the routes here, which otherwise the first request waits for
    return app
