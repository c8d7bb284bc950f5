"""Stable Diffusion and SDXL from configuration, with random weights: a few thousand numbers."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

SIDE = 16
NUM_TOKENS = 16


def tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {word: number for number, word in enumerate(words)}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=NUM_TOKENS)


def text_encoder(kind: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    size = len(tokenizer())
    sizes = {"hidden_size": 8, "intermediate_size": 16, "projection_dim": 8}
    ids = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    blocks = {"num_hidden_layers": 2, "num_attention_heads": 2}
    places = {"vocab_size": size, "max_position_embeddings": NUM_TOKENS}
    return kind(CLIPTextConfig(**sizes, **ids, **blocks, **places)).eval()


def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=SIDE,
    ).eval()


def unet(kind: str, seed: int = 2) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    more: dict[str, Any] = {"cross_attention_dim": 8}
    if kind == "xl":
        more = {"cross_attention_dim": 16, "addition_embed_type": "text_time"}
        more |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 8}
        more |= {"transformer_layers_per_block": (1, 2)}
    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=2,
        **more,
    ).eval()


def save_pipeline(folder: Path, kind: str, **schedule: Any) -> None:
    """A pipeline's folder; kind: "sd" or "xl"."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    more = {"clip_sample": False, "steps_offset": 1, **betas, **schedule}
    parts: dict[str, Any] = {"vae": vae(), "unet": unet(kind), "scheduler": DDIMScheduler(**more)}
    parts |= {"tokenizer": tokenizer(), "text_encoder": text_encoder(CLIPTextModel, 3)}
    if kind == "xl":
        parts |= {"text_encoder_2": text_encoder(CLIPTextModelWithProjection, 4)}
        StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer()).save_pretrained(folder)
        return
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts).save_pretrained(folder)


def save_images(folder: Path, count: int = 6, caption: str | None = "a {} field") -> list[str]:
    """Noisy images of one colour each, of several sizes, with captions in `metadata.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = ("red", "green", "blue", "white", "olive", "navy")
    lines, names = [], []
    for number in range(count):
        colour = colours[number % len(colours)]
        size = (20 + 4 * number, 18)
        image = Image.new("RGB", size, colour)
        draw = torch.Generator().manual_seed(number)
        dots = torch.randint(size[0], (9,), generator=draw).tolist()
        for dot in dots:
            image.putpixel((dot, dot % size[1]), (255, 200, 10))
        names.append(f"{number}.png")
        image.save(folder / names[-1])
        lines.append(json.dumps({"file_name": names[-1], "text": (caption or "").format(colour)}))
    if caption is not None:
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return names
