"""Make flyp_saflex/assets/tiny_editor: a StableDiffusionInstructPix2PixPipeline of a few megabytes for the drawn world.

    python scripts/build_tiny_editor.py            # about one and a half hours on two CPU cores
    python scripts/build_tiny_editor.py --work DIR # an interrupted run goes on from its newest checkpoint there

Trained on triplets (picture, instruction, picture): a scene of the drawn world, `put the deer in the desert`, and the same
scene there, seen by another camera. Species and place are independent of each other, cameras and seeds are none that a world
of the demo has. One after another: a byte-pair tokenizer of the instructions; an autoencoder (AutoencoderKL, 4 channels at a
quarter of the side), whose decoder is trained on to be sharp in the eyes of the tiny CLIP; and the UNet with its text encoder
(v-prediction, zero terminal signal-to-noise ratio, arXiv 2305.08891; text and source picture left out in 5 % of the rows each
and in another 5 % together, arXiv 2211.09800).
`scripts/measure_tiny_editor.py` prints the figures of README.md in the folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from flyp_saflex.assets import TINY_CLIP, TINY_EDITOR
from flyp_saflex.clip.model import load_clip
from flyp_saflex.demo.places import PLACES
from flyp_saflex.demo.scene import BAR, Scene, at, render
from flyp_saflex.demo.world import CLASSES, EMPTY, SPECIES, plan
from flyp_saflex.runtime import keep_freed_memory

SEED = 40_000_000  # of scenes, weights, noise; worlds of the demo and of the figures have others
SIZE_PX = 64
NUM_TRIPLETS = 16_000
ANIMAL_SIZE = 0.62  # larger than in the demo's world: every detail is seen
CAMERAS = range(100, 400)  # of every place; worlds have 0..39, the tiny CLIP saw 1000..1019
WHERE = {
    "savanna": ("in the savanna", "on the dry savanna", "in a savanna with acacia trees"),
    "forest": ("in the forest", "in a dense forest", "among the trees of a forest"),
    "desert": ("in the desert", "in a sandy desert", "in the desert among dunes"),
    "lake": ("near a lake", "at the lake", "in the lake shore"),
    "rocks": ("in the rocks", "among rocks", "on a rocky slope"),
    "meadow": ("in the meadow", "in a green meadow", "in a grassy field with flowers"),
    "dusk": ("in the dusk", "at dusk", "in the evening at sunset"),
    "autumn": ("in the autumn forest", "in autumn", "in a forest with autumn leaves"),
    "snow": ("in the snow", "in a snowy field", "in a snowy landscape"),
    "infrared night": ("in the infrared night", "in the forest at night", "at night under infrared light"),
}
VERBS = ("put the {} {}", "move the {} {}", "show the {} {}", "place the {} {}", "a photo of a {} {}", "make it a {} {}")
CONTEXT_TOKENS = 24
VAE_STEPS, VAE_BATCH, VAE_CROP_PX, VAE_LR = 3000, 32, 32, 2e-3
SHARP_STEPS, SHARP_LR, PERCEPTUAL = 1000, 1e-3, 1.0
STEPS, BATCH, LR, EMA = 4500, 32, 1e-3, 0.999
LEFT_OUT = 0.05
CHECKPOINT_EVERY = 250

UNET: dict[str, Any] = {
    "sample_size": SIZE_PX // 4,
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 128),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": SIZE_PX,
    "mid_block_add_attention": False,
    "scaling_factor": 1.0,
}
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
}


def scenes() -> list[tuple[Scene, Scene]]:
    """Return (before, after) of every triplet: the same scene at another place, taken by another camera."""
    rng = np.random.default_rng(SEED)
    found = []
    for shot in plan(NUM_TRIPLETS, SEED, animal_size=ANIMAL_SIZE):
        place, target = (str(name) for name in rng.choice(list(PLACES), size=2, replace=False))
        camera, other = (int(number) for number in rng.choice(CAMERAS, size=2))
        species = None if rng.random() < 1 / len(CLASSES) else str(rng.choice(SPECIES))
        before = dataclasses.replace(shot.scene, species=species, place=place, camera=camera)
        found.append((before, dataclasses.replace(at(before, target), camera=other)))
    return found


def draw(world: list[tuple[Scene, Scene]]) -> NDArray[np.uint8]:
    """Return the pictures [2, N, S, S, 3]; the timestamp bar of `before` stays in `after`, as an edit would leave it."""
    images = np.empty((2, len(world), SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    flat = [(scene, side, row) for row, pair in enumerate(world) for side, scene in enumerate(pair)]
    for scene, side, row in sorted(flat, key=lambda item: (item[0].place, item[0].camera)):  # a backdrop is drawn once
        images[side, row] = np.asarray(render(scene, SIZE_PX))
    bar_px = max(4, round(BAR * SIZE_PX))
    images[1, :, -bar_px:] = images[0, :, -bar_px:]
    return images


def instruction(scene: Scene, rng: np.random.Generator) -> str:
    """Return an instruction that `scene` is the outcome of; half of them do not name the species."""
    name = (scene.species or EMPTY) if rng.random() < 0.5 else "animal"
    return str(rng.choice(VERBS)).format(name, rng.choice(WHERE[scene.place]))


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn CLIP's kind of byte-pair encoding on the instructions, with every byte in its vocabulary."""
    texts = [verb.format(name, where) for verb in VERBS for name in (*CLASSES, "animal") for p in WHERE.values() for where in p]
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, min_frequency=1
    )
    learned.train_from_iterator(texts, trainer)
    state = json.loads(learned.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    pieces = alphabet + [f"{letter}</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    folder.mkdir(parents=True, exist_ok=True)
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT_TOKENS).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


class Progress:
    """A training state on disk, and a log row now and then."""

    def __init__(self, work: Path, name: str, parts: dict[str, Any]) -> None:
        self.file, self.log, self.name, self.parts = work / f"{name}.pt", work / "log.jsonl", name, parts
        self.done, self.started, self.losses = 0, time.monotonic(), list[float]()
        if self.file.is_file():
            state = torch.load(self.file, weights_only=True)
            for key, part in parts.items():
                part.load_state_dict(state[key])
            self.done = state["done"]
            print(f"{name}: going on after step {self.done}", flush=True)

    def step(self, done: int, total: int, loss: float) -> None:
        """Note a step; every now and then write a row and the state."""
        self.losses.append(loss)
        if done % CHECKPOINT_EVERY and done != total:
            return
        row = {
            "part": self.name,
            "step": done,
            "loss": round(float(np.mean(self.losses)), 5),
            "seconds": round(time.monotonic() - self.started),
        }
        self.losses.clear()
        print(row, flush=True)
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        new = self.file.with_suffix(".new")
        torch.save({"done": done} | {key: part.state_dict() for key, part in self.parts.items()}, new)
        new.replace(self.file)


def train_vae(images: NDArray[np.uint8], work: Path) -> AutoencoderKL:
    """Train the autoencoder on random crops, then shift and scale its latents to mean 0 and standard deviation 1."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(**VAE)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_LR, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    progress = Progress(work, "vae", {"model": vae, "optimizer": optimizer})
    flat = images.reshape(-1, SIZE_PX, SIZE_PX, 3)
    for step in range(progress.done, VAE_STEPS):
        _set_rate(optimizer, VAE_LR * _cosine(step, VAE_STEPS))
        rng = np.random.default_rng([SEED, 1, step])
        torch.manual_seed(SEED + step)
        rows, tops, lefts = (
            rng.integers(len(flat), size=VAE_BATCH),
            *rng.integers(0, SIZE_PX - VAE_CROP_PX + 1, size=(2, VAE_BATCH)),
        )
        crops = [flat[r, y : y + VAE_CROP_PX, x : x + VAE_CROP_PX] for r, y, x in zip(rows, tops, lefts, strict=True)]
        batch = to_tensor(np.stack(crops))
        posterior = vae.encode(batch).latent_dist
        difference = vae.decode(posterior.sample()).sample - batch
        loss = difference.abs().mean() + difference.square().mean() + 1e-4 * posterior.kl().mean() / batch[0].numel()
        _update(loss, optimizer, [vae])
        progress.step(step + 1, VAE_STEPS, float(loss.detach()))
    return vae.eval()


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images_NSSC: NDArray[np.uint8]) -> None:
    """Fold the latents' mean and standard deviation into the two 1x1 convolutions around them: `scaling_factor` is 1."""
    means = torch.cat([vae.encode(to_tensor(part)).latent_dist.mode() for part in np.array_split(images_NSSC, 16)])
    mean_C, std_C = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    before, after, channels = vae.quant_conv, vae.post_quant_conv, len(mean_C)
    after.bias += (after.weight[:, :, 0, 0] * mean_C).sum(dim=1)
    after.weight *= std_C[None, :, None, None]
    before.weight[:channels] /= std_C[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean_C) / std_C
    before.bias[channels:] -= 2 * std_C.log()


@torch.no_grad()
def encode(vae: AutoencoderKL, images_NSSC: NDArray[np.uint8]) -> Tensor:
    """Return the latents' modes [N, 4, S/4, S/4]."""
    return torch.cat(
        [vae.encode(to_tensor(part)).latent_dist.mode() for part in np.array_split(images_NSSC, len(images_NSSC) // 64)]
    )


def sharpen(vae: AutoencoderKL, images: NDArray[np.uint8], latents_2N: Tensor, work: Path) -> None:
    """Train the decoder on, its latents fixed, against absolute differences of pixels and of the tiny CLIP's early features.

    Mean absolute differences alone make fur and grass a smooth mush. Features: normalised per position, squared differences,
    summed over the stem and three stages, as LPIPS (arXiv 1801.03924) does with other networks.
    """
    torch.manual_seed(SEED)
    clip = load_clip(f"local-dir:{TINY_CLIP}")
    mean, std = (torch.tensor(clip.config["preprocess_cfg"][key])[:, None, None] for key in ("mean", "std"))
    clip.model.requires_grad_(False)
    tower = clip.model.visual

    def features(images_B3SS: Tensor) -> list[Tensor]:
        hidden = [tower.stem(((images_B3SS + 1) / 2 - mean) / std)]
        for stage in (tower.layer1, tower.layer2, tower.layer3):
            hidden.append(stage(hidden[-1]))
        return [F.normalize(values, dim=1) for values in hidden]

    trained = torch.nn.ModuleDict({"decoder": vae.decoder, "post": vae.post_quant_conv})
    optimizer = torch.optim.AdamW(trained.parameters(), lr=SHARP_LR, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    progress = Progress(work, "decoder", {"model": trained, "optimizer": optimizer})
    crop = VAE_CROP_PX // 4
    for step in range(progress.done, SHARP_STEPS):
        _set_rate(optimizer, SHARP_LR * _cosine(step, SHARP_STEPS))
        rng = np.random.default_rng([SEED, 3, step])
        sides, rows = rng.integers(2, size=VAE_BATCH), rng.integers(images.shape[1], size=VAE_BATCH)
        corners = rng.integers(0, SIZE_PX // 4 - crop + 1, size=(VAE_BATCH, 2))
        where = list(zip(sides, rows, corners, strict=True))
        inside = torch.stack([latents_2N[side, row, :, y : y + crop, x : x + crop] for side, row, (y, x) in where])
        pixels = [images[side, row, 4 * y : 4 * (y + crop), 4 * x : 4 * (x + crop)] for side, row, (y, x) in where]
        target, decoded = to_tensor(np.stack(pixels)), vae.decode(inside).sample
        pairs = zip(features(decoded), features(target), strict=True)
        loss = (decoded - target).abs().mean() + PERCEPTUAL * sum((a - b).square().sum(dim=1).mean() for a, b in pairs)
        _update(loss, optimizer, [trained])
        progress.step(step + 1, SHARP_STEPS, float(loss.detach()))


def train_unet(latents_2N: Tensor, world: list[tuple[Scene, Scene]], tokenizer: CLIPTokenizer, work: Path) -> tuple[Any, Any]:
    """Train UNet and text encoder together; return their running averages."""
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(**UNET)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(config)
    both = torch.nn.ModuleDict({"unet": unet, "text": text_encoder})
    average = torch.optim.swa_utils.AveragedModel(both, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA))
    optimizer = torch.optim.AdamW(both.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    progress = Progress(work, "unet", {"model": both, "average": average, "optimizer": optimizer})
    scheduler = DDIMScheduler(**SCHEDULER)
    for step in range(progress.done, STEPS):
        _set_rate(optimizer, LR * _cosine(step, STEPS))
        rng = np.random.default_rng([SEED, 2, step])
        generator = torch.Generator().manual_seed(SEED + step)
        rows = rng.integers(len(world), size=BATCH)
        before, after = latents_2N[0, rows], latents_2N[1, rows]
        left_out = rng.random(BATCH)
        texts = ["" if u < 2 * LEFT_OUT else instruction(world[row][1], rng) for u, row in zip(left_out, rows, strict=True)]
        no_picture = (left_out > LEFT_OUT) & (left_out < 3 * LEFT_OUT)
        before = before * torch.from_numpy(~no_picture)[:, None, None, None]
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT_TOKENS, return_tensors="pt").input_ids
        noise = torch.randn(after.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (BATCH,), generator=generator)
        noisy, target = scheduler.add_noise(after, noise, timesteps), scheduler.get_velocity(after, noise, timesteps)
        predicted = unet(torch.cat([noisy, before], dim=1), timesteps, text_encoder(ids)[0]).sample
        loss = F.mse_loss(predicted, target)
        _update(loss, optimizer, [both])
        average.update_parameters(both)
        progress.step(step + 1, STEPS, float(loss.detach()))
    return average.module["unet"].eval(), average.module["text"].eval()


def _update(loss: Tensor, optimizer: torch.optim.Optimizer, modules: list[torch.nn.Module]) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for module in modules:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def _cosine(step: int, total: int) -> float:
    return min(1.0, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total)))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def to_tensor(images_NSSC: NDArray[np.uint8]) -> Tensor:
    """Return [N, 3, S, S] in -1..1."""
    return torch.from_numpy(images_NSSC).permute(0, 3, 1, 2).float() / 127.5 - 1


def kept(file: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Return what an earlier start has kept in the file, or make it."""
    if not file.is_file():
        started = time.monotonic()
        with open(file.with_suffix(".new"), "wb") as out:
            np.save(out, make())
        file.with_suffix(".new").replace(file)
        print(f"{file.name} made in {time.monotonic() - started:.0f} s", flush=True)
    return np.load(file)


def save(vae: AutoencoderKL, unet: Any, text_encoder: Any, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write the pipeline's folder in half precision."""
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out)
    for file in out.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors writes for the owner only


def main() -> None:
    """Draw, train, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("tiny_editor_work"), help="checkpoints, pictures, log")
    parser.add_argument("--out", type=Path, default=TINY_EDITOR, help="where the pipeline goes")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    world = scenes()
    images = kept(work / "images.npy", lambda: draw(world))
    tokenizer = build_tokenizer(work / "tokenizer")
    vae = train_vae(images, work)
    normalise_latents(vae, images[1, :2000])
    latents = torch.from_numpy(kept(work / "latents.npy", lambda: torch.stack([encode(vae, side) for side in images]).numpy()))
    sharpen(vae, images, latents, work)
    unet, text_encoder = train_unet(latents, world, tokenizer, work)
    save(vae, unet, text_encoder, tokenizer, arguments.out)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{arguments.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
