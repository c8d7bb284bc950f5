"""Adapters: values, the modules that host them, routes that say who uses which, PEFT's format."""

from loralab.adapters.adapter import Adapter, Layer
from loralab.adapters.algebra import Combination, combination, combine
from loralab.adapters.attaching import attach, detach
from loralab.adapters.buffers import fresh_bytes
from loralab.adapters.certificate import MergeCertificate
from loralab.adapters.data_driven import eva_starts, lora_ga_starts
from loralab.adapters.decomposed import Decomposed, num_bytes
from loralab.adapters.difference import Difference, adapter_of_difference
from loralab.adapters.extracting import (
    adapter_parameters,
    count_parameters,
    dropout_tables,
    extract,
)
from loralab.adapters.fingerprint import check_fingerprint, fingerprint, is_from_base
from loralab.adapters.fitting import misfits
from loralab.adapters.heads import Head, label_names
from loralab.adapters.hosting import Pair, adapted_modules, hosted_items
from loralab.adapters.in_place import merge_in_place, restore
from loralab.adapters.members import Member, base_member, member_in_force, share
from loralab.adapters.merge import merge, save_merged
from loralab.adapters.merging import Change, change_at
from loralab.adapters.noise import stream_of, streams
from loralab.adapters.peft_format import (
    content_hash,
    outline_adapter,
    read_adapter,
    write_adapter,
)
from loralab.adapters.peft_names import CONFIG_FILE
from loralab.adapters.probes import Probe
from loralab.adapters.rereading import Blueprint, read_with_blueprint
from loralab.adapters.routes import carry
from loralab.adapters.rows import declare_rows, declare_tokens
from loralab.adapters.saving import (
    collector_paused,
    install,
    load_adapter,
    put_on,
    save_adapter,
)
from loralab.adapters.settings import LoRAConfig
from loralab.adapters.step import EVERY_ROW, SharedInput, draw_mask, project, project_backward
from loralab.adapters.streaming_merge import merge_checkpoint
from loralab.adapters.targets import walk
from loralab.adapters.tree import Choice, Tree, targets
from loralab.adapters.using import hosted, merged_name, use

__all__ = [
    "CONFIG_FILE",
    "EVERY_ROW",
    "Adapter",
    "Blueprint",
    "Change",
    "Choice",
    "Combination",
    "Decomposed",
    "Difference",
    "Head",
    "Layer",
    "LoRAConfig",
    "Member",
    "MergeCertificate",
    "Pair",
    "Probe",
    "SharedInput",
    "Tree",
    "adapted_modules",
    "adapter_of_difference",
    "adapter_parameters",
    "attach",
    "base_member",
    "carry",
    "change_at",
    "check_fingerprint",
    "collector_paused",
    "combination",
    "combine",
    "content_hash",
    "count_parameters",
    "declare_rows",
    "declare_tokens",
    "detach",
    "draw_mask",
    "dropout_tables",
    "eva_starts",
    "extract",
    "fingerprint",
    "fresh_bytes",
    "hosted",
    "hosted_items",
    "install",
    "is_from_base",
    "label_names",
    "load_adapter",
    "lora_ga_starts",
    "member_in_force",
    "merge",
    "merge_checkpoint",
    "merge_in_place",
    "merged_name",
    "misfits",
    "num_bytes",
    "outline_adapter",
    "project",
    "project_backward",
    "put_on",
    "read_adapter",
    "read_with_blueprint",
    "restore",
    "save_adapter",
    "save_merged",
    "share",
    "stream_of",
    "streams",
    "targets",
    "use",
    "walk",
    "write_adapter",
]
