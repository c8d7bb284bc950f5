"""What an adapter of a latent diffusion UNet can adapt, by the endings of diffusers' names."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Self- and cross-attention: what most style LoRAs in the world adapt, and the default."""

FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
PROJECTIONS = ("proj_in", "proj_out")
"""Into and out of each transformer."""

CONVOLUTIONS = ("conv_in", "conv1", "conv2", "conv_shortcut", "conv", "conv_out", "time_emb_proj")
"""Residual blocks, resamplers and the ends (LoCon)."""
