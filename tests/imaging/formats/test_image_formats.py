"""LoRA files of the image world, with diffusers and PEFT as the oracle."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loralab.adapters import install, use
from loralab.errors import AdapterError
from loralab.imaging.formats import read_image_adapter, write_image_adapter

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def unet(seed=0, channels=8):
    from diffusers.models import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(channels, 2 * channels),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()


def sd3():
    from diffusers.models import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=4,
    ).eval()


def flux():
    from diffusers.models import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def answer(model: nn.Module) -> torch.Tensor:
    """What the model says to inputs that are always the same."""
    draw = torch.Generator().manual_seed(7)

    def random(*shape):
        return torch.randn(*shape, generator=draw)

    kind = type(model).__name__
    with torch.no_grad():
        if kind.startswith("UNet"):
            return model(random(2, 4, 8, 8), 5, random(2, 3, 8)).sample
        if kind.startswith("SD3"):
            return model(
                hidden_states=random(2, 4, 4, 4),
                encoder_hidden_states=random(2, 3, 8),
                pooled_projections=random(2, 8),
                timestep=torch.tensor([5, 5]),
            ).sample
        return model(
            hidden_states=random(2, 4, 4),
            encoder_hidden_states=random(2, 3, 8),
            pooled_projections=random(2, 8),
            timestep=torch.tensor([0.5, 0.5]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample


def with_peft(model, targets, rank=3, alpha=5, **more):
    """The model with PEFT's adapter, its B not zero."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **more))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def ours(file, model):
    """(the adapter in the file, the model's answer with it)."""
    adapter = read_image_adapter(file, model)
    base = answer(model)
    install(model, adapter, "style")
    with use(model, "style"):
        found = answer(model)
    assert (found - base).abs().max() > 1e-3  # it does something at all
    return adapter, found


@pytest.mark.parametrize(
    ("build", "more"),
    [
        (unet, ["conv1", "conv2", "conv_shortcut", "proj_in", "time_emb_proj"]),
        (sd3, ["add_q_proj", "ff.net.2", "norm1.linear"]),
        (flux, ["proj_mlp", "proj_out", "add_k_proj"]),
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_of_diffusers_gives_its_outputs_and_ours_gives_them_there(
    tmp_path, build, more, rslora
):
    theirs = with_peft(build(), ATTENTION + more, alpha_pattern={"to_q": 2}, use_rslora=rslora)
    theirs.save_lora_adapter(tmp_path)
    adapter, found = ours(tmp_path / "pytorch_lora_weights.safetensors", build())
    same(found, answer(theirs))
    written = tmp_path / "ours.safetensors"
    write_image_adapter(adapter, written)
    prefix = "unet" if build is unet else "transformer"
    back = build()
    back.load_lora_adapter(load_file(written), prefix=prefix)
    same(answer(back), found)
    same(ours(written, build())[1], found)


def kohya_keys(model, names, rank=2, alpha=3.0, prefix="lora_unet_"):
    """kohya-ss tensors for layers of the model; names: in the file -> in the model."""
    torch.manual_seed(3)
    modules, tensors = dict(model.named_modules()), {}
    for name, parts in names.items():
        weights = [modules[part].weight for part in parts]
        kernel = tuple(weights[0].shape[2:])
        rows = sum(len(weight) for weight in weights)
        stem = prefix + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, weights[0].shape[1], *kernel)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(rows, rank, *(1 for _ in kernel)) * 0.3
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


SGM = {
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.2.0.skip_connection": "up_blocks.1.resnets.0.conv_shortcut",
    "output_blocks.3.1.transformer_blocks.0.attn2.to_k": (
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k"
    ),
}


@pytest.mark.parametrize("original", [False, True])
def test_kohya_files_of_a_unet_give_what_diffusers_makes_of_them(tmp_path, original):
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    model = unet()
    names = {theirs if original else name: [name] for theirs, name in SGM.items()}
    file = tmp_path / "kohya.safetensors"
    save_file(kohya_keys(model, names), file)
    adapter, found = ours(file, unet())
    assert adapter.scale("mid_block.resnets.1.conv2") == 1.5
    theirs = unet()
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(file), unet_config=theirs.config
    )[:2]
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, network_alphas=alphas, unet=theirs)
    same(found, answer(theirs))


def test_a_kohya_file_of_ours_loads_in_diffusers(tmp_path):
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    theirs = with_peft(unet(), [*ATTENTION, "conv1", "proj_in"], alpha_pattern={"to_q": 2})
    theirs.save_lora_adapter(tmp_path)
    adapter, found = ours(tmp_path / "pytorch_lora_weights.safetensors", unet())
    file = tmp_path / "kohya.safetensors"
    write_image_adapter(adapter, file, "kohya")
    again, same_as_before = ours(file, unet())
    same(same_as_before, found)
    assert again.pairs.keys() == adapter.pairs.keys()
    back = unet()
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(file), unet_config=back.config
    )[:2]
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, network_alphas=alphas, unet=back)
    same(answer(back), found)


def test_fused_layers_of_flux_are_split_as_diffusers_splits_them(tmp_path):
    from diffusers.loaders import FluxLoraLoaderMixin

    block, single = "transformer_blocks.0.", "single_transformer_blocks.1."
    names = {
        "double_blocks.0.img_attn.qkv": [f"{block}attn.to_{x}" for x in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"{block}attn.add_{x}_proj" for x in "qkv"],
        "double_blocks.0.txt_mlp.0": [f"{block}ff_context.net.0.proj"],
        "single_blocks.1.linear2": [f"{single}proj_out"],
    }
    file = tmp_path / "flux.safetensors"
    save_file(kohya_keys(flux(), names), file)
    adapter, found = ours(file, flux())
    assert len(adapter.pairs) == 8
    theirs = flux()
    state = FluxLoraLoaderMixin.lora_state_dict(str(file))
    theirs.load_lora_adapter(state, prefix="transformer")
    same(found, answer(theirs))


def test_a_fused_layer_is_exactly_its_parts(tmp_path):
    """diffusers' converter knows linear1 of the full-sized Flux alone, so the rows are compared."""
    single = "single_transformer_blocks.1."
    parts = [*(f"{single}attn.to_{x}" for x in "qkv"), f"{single}proj_mlp"]
    tensors = kohya_keys(flux(), {"single_blocks.1.linear1": parts})
    save_file(tensors, tmp_path / "flux.safetensors")
    adapter = read_image_adapter(tmp_path / "flux.safetensors", flux())
    stem = "lora_unet_single_blocks_1_linear1"
    expected = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"] * 1.5
    found = torch.cat([adapter.scale(p) * adapter.pairs[p][1] @ adapter.pairs[p][0] for p in parts])
    same(found, expected)


def test_tuckers_core_is_multiplied_in(tmp_path):
    name = "mid_block.resnets.1.conv2"
    down, mid, up = torch.randn(2, 16, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(16, 2, 1, 1)
    stem = "lora_unet_" + name.replace(".", "_")
    file = tmp_path / "locon.safetensors"
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    tensors["alpha"] = torch.tensor(2.0)
    save_file({f"{stem}.{part}": tensor for part, tensor in tensors.items()}, file)
    A, B = read_image_adapter(file, unet()).pairs[name]
    x = torch.randn(1, 16, 6, 6)
    conv = nn.functional.conv2d
    expected = conv(conv(conv(x, down), mid, padding=1), up)
    same(conv(x, (B @ A).view(16, 16, 3, 3), padding=1), expected)


def test_every_fault_of_a_file_is_named_at_once(tmp_path):
    good = kohya_keys(unet(), {"conv_in": ["conv_in"], "conv_out": ["conv_out"]})
    del good["lora_unet_conv_in.alpha"], good["lora_unet_conv_out.lora_up.weight"]
    good["lora_unet_nowhere.lora_down.weight"] = torch.ones(2, 2)
    good["lora_te1_text_model_x.lora_down.weight"] = torch.ones(2, 2)
    good["unet.conv_in.lora_A.weight"] = torch.ones(2, 2)
    good["emb_params"] = torch.ones(2)
    file = tmp_path / "bad.safetensors"
    save_file(good, file)
    with pytest.raises(AdapterError) as raised:
        read_image_adapter(file, unet())
    for said in (
        "conv_in: its alpha is missing, others have one",
        "conv_out: its up is missing",
        "nowhere: the model has no such layer",
        "text_model_x: it belongs to the text_encoder, the model given is the unet",
        "it mixes formats: ",
        "emb_params: no key of a LoRA file that is known here",
    ):
        assert said in raised.value.cause
    assert "take the adapter of this base" in raised.value.next_step


def test_a_file_for_another_base_names_the_layers_that_differ(tmp_path):
    file = tmp_path / "wide.safetensors"
    save_file(kohya_keys(unet(channels=16), {"conv_in": ["conv_in"]}), file)
    with pytest.raises(
        AdapterError, match=r"conv_in: .*\(16, 2, 1, 1\).* weight is \(8, 4, 3, 3\)"
    ):
        read_image_adapter(file, unet())


def test_without_any_alpha_the_scale_is_one(tmp_path, caplog):
    tensors = kohya_keys(unet(), {"conv_in": ["conv_in"]})
    del tensors["lora_unet_conv_in.alpha"]
    file = tmp_path / "early.safetensors"
    save_file(tensors, file)
    assert read_image_adapter(file, unet()).scale("conv_in") == 1
    assert "the file has no alphas" in caplog.text


def test_pickles_are_refused_unopened(tmp_path):
    with pytest.raises(AdapterError, match="pickle"):
        read_image_adapter(tmp_path / "style.ckpt", unet())


def test_settings_that_are_damaged_are_a_fault(tmp_path):
    file = tmp_path / "odd.safetensors"
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 1, 1, 1),
    }
    told = json.dumps({"unet.lora_alpha": "much"})
    save_file(tensors, file, metadata={"lora_adapter_metadata": told})
    with pytest.raises(AdapterError, match="lora_adapter_metadata"):
        read_image_adapter(file, unet())


def test_settings_of_a_pipelines_file_hold_for_its_unet_alone(tmp_path):
    """The scale is told under the part's name, whether the model given is the part or the whole."""
    file = tmp_path / "told.safetensors"
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    save_file(tensors, file, metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 7}'})
    assert read_image_adapter(file, unet()).scale("conv_in") == 3.5
    whole = nn.ModuleDict({"unet": unet()})
    assert read_image_adapter(file, whole).scale("unet.conv_in") == 3.5


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("lora_up", torch.full((8, 2, 1, 1), torch.nan), r"lora_up\.weight holds NaN or Inf"),
        ("lora_down", torch.ones(1, 4, 3, 3), "its down has rank 1, its up 2"),
        ("lora_down", torch.tensor(1.0), r"down \(\) and up \(8, 2, 1, 1\) are no pair"),
        ("lora_up", torch.ones(8, 2, 1, 1).to(torch.int8), "its type is torch.int8"),
        ("alpha", torch.tensor(0.0), "its alpha is 0.0, not one number above 0"),
    ],
)
def test_damaged_tensors_are_named(tmp_path, part, value, said):
    tensors = kohya_keys(unet(), {"conv_in": ["conv_in"]})
    name = next(key for key in tensors if part in key)
    save_file(tensors | {name: value}, tmp_path / "bad.safetensors")
    with pytest.raises(AdapterError, match=said):
        read_image_adapter(tmp_path / "bad.safetensors", unet())
