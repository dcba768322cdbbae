"""Makes test/fixtures/sdxl-unet/uneven.safetensors: a small UNet that uses what SDXL's own leaves at its default, and
what diffusers computes with it. No two levels are alike, the time embedding is sine first with a frequency shift, sizes
and crops are five numbers (the refiner's), and a guidance scale is embedded (LCM).

    python tools/unet_fixture.py      # needs torch (CPU), diffusers, safetensors
"""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parent.parent / "test" / "fixtures" / "sdxl-unet" / "uneven.safetensors"
ENTERS_A_STREAM = r"conv_in|conv2|proj_in|proj_out|to_out|net\.2|(shortcut|samplers.*)\.bias"
IMAGES, TOKENS, POOLED, TIMESTEP = 2, 11, 10, 333.25

torch.manual_seed(5)
torch.set_num_threads(1)
unet = UNet2DConditionModel(
    out_channels=3,
    block_out_channels=(8, 16, 12),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=(1, 3, 2),
    transformer_layers_per_block=(2, 1, 3),
    attention_head_dim=(2, 4, 3),
    cross_attention_dim=20,
    norm_num_groups=4,
    addition_embed_type="text_time",
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=POOLED + 5 * 6,
    time_cond_proj_dim=14,
    flip_sin_to_cos=False,
    freq_shift=1,
    use_linear_projection=True,
).eval()
for name, parameter in unet.named_parameters():
    # Norms and biases are not left at ones and zeros. What enters a residual stream is small, so that the epsilon of
    # each norm shows in the result. Every weight is a number of f16.
    scale = 0.01 if re.search(ENTERS_A_STREAM, name) else 1
    parameter.data = (scale * (parameter.data + 0.1 * torch.randn_like(parameter))).half().float()

inputs = {
    "latent": torch.randn(IMAGES, 4, 13, 9),
    "encoder_hidden_states": torch.randn(IMAGES, TOKENS, 20),
    "text_embeds": torch.randn(IMAGES, POOLED),
    "time_ids": torch.randint(0, 1024, (IMAGES, 5)).float(),
    "timestep": torch.tensor([TIMESTEP]),
    "guidance": torch.tensor([0.5, 6.5]),
}
embed_guidance = StableDiffusionXLPipeline.get_guidance_scale_embedding
with torch.no_grad():
    out = unet(
        inputs["latent"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        timestep_cond=embed_guidance(None, inputs["guidance"] - 1, unet.config.time_cond_proj_dim),
        added_cond_kwargs={"text_embeds": inputs["text_embeds"], "time_ids": inputs["time_ids"]},
    ).sample

OUT.parent.mkdir(exist_ok=True)
weights = {f"unet.{name}": tensor.half() for name, tensor in unet.state_dict().items()}
save_file({**weights, **inputs, "out": out}, OUT)
print(f"{OUT.stat().st_size} bytes, out {out.std():.3f} standard deviation")
