"""OpenAI's API in front of an engine and a store."""

from loralab.serving.http.app import create_app
from loralab.serving.http.keys import ANYONE, Caller, Keys, add_key, read_keys
from loralab.serving.http.metrics import Metrics
from loralab.serving.http.quotas import Quota
from loralab.serving.http.server import check_bind, is_loopback, listen, make_server, run
from loralab.serving.http.service import Limits, Service

__all__ = [
    "ANYONE",
    "Caller",
    "Keys",
    "Limits",
    "Metrics",
    "Quota",
    "Service",
    "add_key",
    "check_bind",
    "create_app",
    "is_loopback",
    "listen",
    "make_server",
    "read_keys",
    "run",
]
