"""What the original releases call the layers of Stable Diffusion, SD3 and Flux.

Each table is built from the model's own blocks, so that it fits every size of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

Modules = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Piece:
    """A module of the model. swapped: its rows are (shift, scale) where ours are (scale, shift)."""

    module: str
    swapped: bool = False


# a name in the file -> the modules whose rows it holds, one below another
Table = dict[str, tuple[Piece, ...]]

RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
SD3_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
SD3_BLOCK = {
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}
FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
FLUX_DOUBLE = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
FLUX_SINGLE = {
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}


def original_names(modules: Modules) -> Table:
    """The original names of the model's layers; empty for models of other families."""
    if "single_transformer_blocks" in modules:
        found = _flux(modules)
    elif "transformer_blocks" in modules and "pos_embed" in modules:
        found = _sd3(modules)
    elif "down_blocks" in modules and "up_blocks" in modules:
        found = _unet(modules)
    else:
        found = {}
    return {
        name: pieces for name, pieces in found.items() if all(p.module in modules for p in pieces)
    }


def _unet(modules: Modules) -> Table:
    """CompVis' and SGM's numbering: each resnet opens a block, a resampler is one or closes one."""
    table = _table(UNET_ENDS)
    blocks = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    blocks["middle_block.1"] = "mid_block.attentions.0"
    number = 1
    for block in _numbered(modules, "down_blocks"):
        for place, resnet in enumerate(_numbered(modules, f"{block}.resnets")):
            blocks[f"input_blocks.{number}.0"] = resnet
            blocks[f"input_blocks.{number}.1"] = f"{block}.attentions.{place}"
            number += 1
        if f"{block}.downsamplers.0" in modules:
            table[f"input_blocks.{number}.0.op"] = (Piece(f"{block}.downsamplers.0.conv"),)
            number += 1
    number = 0
    for block in _numbered(modules, "up_blocks"):
        for place, resnet in enumerate(_numbered(modules, f"{block}.resnets")):
            blocks[f"output_blocks.{number}.0"] = resnet
            blocks[f"output_blocks.{number}.1"] = f"{block}.attentions.{place}"
            number += 1
        place = 2 if f"{block}.attentions.0" in modules else 1
        name = f"output_blocks.{number - 1}.{place}.conv"
        table[name] = (Piece(f"{block}.upsamplers.0.conv"),)
    for original, ours in blocks.items():
        for name in _inside(modules, ours):
            if name not in RESNET.values():
                table[f"{original}.{name}"] = (Piece(f"{ours}.{name}"),)
        for theirs, name in RESNET.items():
            table[f"{original}.{theirs}"] = (Piece(f"{ours}.{name}"),)
    return table


def _sd3(modules: Modules) -> Table:
    table = _table(SD3_ENDS)
    table["final_layer.adaLN_modulation.1"] = (Piece("norm_out.linear", swapped=True),)
    blocks = list(_numbered(modules, "transformer_blocks"))
    for number, block in enumerate(blocks):
        table |= _table(SD3_BLOCK, f"joint_blocks.{number}.", f"{block}.")
    if blocks:  # the last block has no context behind it: a norm of the same kind as the model's
        name = f"joint_blocks.{len(blocks) - 1}.context_block.adaLN_modulation.1"
        table[name] = (Piece(f"{blocks[-1]}.norm1_context.linear", swapped=True),)
    return table


def _flux(modules: Modules) -> Table:
    table = _table(FLUX_ENDS)
    table["final_layer.adaLN_modulation.1"] = (Piece("norm_out.linear", swapped=True),)
    for number, block in enumerate(_numbered(modules, "transformer_blocks")):
        table |= _table(FLUX_DOUBLE, f"double_blocks.{number}.", f"{block}.")
    for number, block in enumerate(_numbered(modules, "single_transformer_blocks")):
        table |= _table(FLUX_SINGLE, f"single_blocks.{number}.", f"{block}.")
    return table


def _table(names: Mapping[str, str], theirs: str = "", ours: str = "") -> Table:
    return {
        theirs + name: tuple(Piece(ours + part) for part in parts.split())
        for name, parts in names.items()
    }


def _numbered(modules: Modules, path: str) -> Iterator[str]:
    number = 0
    while f"{path}.{number}" in modules:
        yield f"{path}.{number}"
        number += 1


def _inside(modules: Modules, path: str) -> list[str]:
    return [name.removeprefix(f"{path}.") for name in modules if name.startswith(f"{path}.")]
