"""Exporting: adapters and models in the forms that other engines take, and the proof of it."""

from loralab.exporting.asking import Reading, choose_model, read_server, served_models
from loralab.exporting.canonical import Canonical, canonical
from loralab.exporting.engines import ENGINES, Engine, find_engine, parts_of
from loralab.exporting.gguf_files import (
    GGUF_TYPES,
    GGUFType,
    write_gguf_adapter,
    write_gguf_model,
)
from loralab.exporting.launch import Exported, Launch, plan_launch
from loralab.exporting.making_probes import TEXTS, make_server_probes, probe_texts
from loralab.exporting.probe_file import ProbeFile, ServerProbe, read_probe_file, write_probe_file
from loralab.exporting.remote import Server, Unreachable, connect
from loralab.exporting.verdict import TOLERANCE_NATS, Verdict, judge, judge_texts

__all__ = [
    "ENGINES",
    "GGUF_TYPES",
    "TEXTS",
    "TOLERANCE_NATS",
    "Canonical",
    "Engine",
    "Exported",
    "GGUFType",
    "Launch",
    "ProbeFile",
    "Reading",
    "Server",
    "ServerProbe",
    "Unreachable",
    "Verdict",
    "canonical",
    "choose_model",
    "connect",
    "find_engine",
    "judge",
    "judge_texts",
    "make_server_probes",
    "parts_of",
    "plan_launch",
    "probe_texts",
    "read_probe_file",
    "read_server",
    "served_models",
    "write_gguf_adapter",
    "write_gguf_model",
    "write_probe_file",
]
