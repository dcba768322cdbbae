"""What diffusers computes for test/models/schedulers.test.ts and test/models/vae.test.ts.

    python tools/sdxl_fixtures.py

needs diffusers, torch (CPU) and Pillow, and rewrites test/fixtures/sdxl-schedulers and test/fixtures/sdxl-vae. Two latents go through each
sampler with `model` as the network and `noise` as what it draws; the tests hold the same formulas.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from PIL import Image

FIXTURES = Path(__file__).parent.parent / "test" / "fixtures"

SDXL = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
SAMPLERS = {
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "lcm": LCMScheduler,
}
KARRAS = ("euler", "dpmpp_2m")

START = torch.tensor([0.4, -1.3])  # standard normal, so to speak
IMAGE = torch.tensor([0.9, -0.5])


def model(x, timestep):
    j = torch.arange(2.0)
    return 0.8 * torch.tanh(0.7 * x + 0.3 * j) + 0.2 * torch.cos(timestep / 150 + j)


def noise(i):
    return torch.tensor([math.sin(3 * i + 1), math.cos(2 * i + 0.5)])


def digits(values):
    return [float(f"{float(v):.7g}") for v in values]


def run(sampler, steps, config, karras=False, strength=None):
    options = {**SDXL, **config}
    if sampler == "ddim":
        options["clip_sample"] = False
    if karras:
        options["use_karras_sigmas"] = True
    scheduler = SAMPLERS[sampler].from_config(options)
    scheduler.set_timesteps(steps)

    draws = itertools.count()
    for module in (scheduling_euler_ancestral_discrete, scheduling_lcm):
        module.randn_tensor = lambda *args, **kwargs: noise(next(draws))

    first = 0 if strength is None else steps - min(int(steps * strength), steps)
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    if strength is None:
        x = START * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(IMAGE, START, timesteps[:1])

    latents, predicted = [x], None
    for i, t in enumerate(timesteps):
        result = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x)
        x = result.prev_sample
        latents.append(x)
        if i == 0:
            predicted = getattr(result, "denoised", getattr(result, "pred_original_sample", None))
    case = {"sampler": sampler, "steps": steps, "config": config}
    if karras:
        case["karras"] = True
    if strength is not None:
        case["strength"] = strength
    case["timesteps"] = digits(timesteps)
    case["start"] = digits(latents[0])
    if predicted is not None:
        case["predicted"] = digits(predicted)
    # All of a short run; of a long one where it ends.
    case["latents"] = [digits(x) for x in (latents[1:] if steps <= 8 else latents[-1:])]
    return case


def cases():
    for sampler in SAMPLERS:
        for prediction, spacing, karras, steps in itertools.product(
            ("epsilon", "v_prediction", "sample"),
            ("leading",) if sampler == "lcm" else ("leading", "trailing", "linspace"),
            (False, True) if sampler in KARRAS else (False,),
            (1, 2, 8, 30),
        ):
            if sampler == "euler_ancestral" and prediction == "sample":
                continue  # diffusers does not have it
            yield run(sampler, steps, {"prediction_type": prediction, "timestep_spacing": spacing}, karras)
        for strength in (0.3, 0.75, 1.0):
            yield run(sampler, 8, {}, strength=strength)
        yield run(sampler, 8, {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02})
        yield run(sampler, 8, {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"})
        yield run(
            sampler,
            8,
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        )
    yield run("dpmpp_2m", 20, {}, strength=0.5)
    yield run("ddim", 8, {"set_alpha_to_one": False, "steps_offset": 0})
    yield run("lcm", 4, {"original_inference_steps": 100})
    # Down to timestep 2, where the latents themselves are a part of what is taken for the image.
    yield run("lcm", 7, {"num_train_timesteps": 21, "original_inference_steps": 21})


def encoded():
    """The latent means of the golden image, a row a latent [12 * 16, 4], with and without the convolution at the end."""
    folder = FIXTURES / "sdxl-tiny"
    vae = AutoencoderKL.from_pretrained(folder / "pipeline/vae", variant="fp16", torch_dtype=torch.float32)
    pixels = np.asarray(Image.open(folder / "image.png").convert("RGB"), dtype=np.float32) / 127.5 - 1
    with torch.no_grad():
        moments = vae.encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        for means in (vae.quant_conv(moments)[0, :4], moments[0, :4]):
            yield [digits(row) for row in means.permute(1, 2, 0).reshape(-1, 4)]


def write(name, rows):
    file = FIXTURES / name
    file.parent.mkdir(exist_ok=True)
    text = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    file.write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    write("sdxl-schedulers/trajectories.json", cases())
    write("sdxl-vae/means.json", encoded())
