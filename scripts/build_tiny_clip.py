"""Make flyp_saflex/assets/tiny_clip: a CLIP of a few megabytes, pretrained on captioned pictures of the drawn world.

    python scripts/build_tiny_clip.py            # about five minutes on one CPU core
    python scripts/build_tiny_clip.py --work DIR # an interrupted run goes on from its newest checkpoint there

Pictures: scenes of a world with a seed that the demo never uses, but with every species before every kind of place alike, seen
by cameras that no world has, half of them mirrored. Every epoch draws new captions: whole ones (`a small brown deer in the
snow at noon`) or short ones (`a photo of a deer.`). Loss: the package's `clip_loss`, one column per distinct caption.
Printed last is the table of README.md in the folder: zero-shot on worlds that nothing was trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from flyp_saflex.assets import TINY_CLIP
from flyp_saflex.clip.model import load_clip
from flyp_saflex.config import Config, DataConfig
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.demo.places import PLACES
from flyp_saflex.demo.scene import Scene, render
from flyp_saflex.demo.world import CLASSES, EMPTY, SPECIES, plan, write_world
from flyp_saflex.evaluation.metrics import accuracy, macro_f1
from flyp_saflex.evaluation.predict import predict
from flyp_saflex.images.loader import ImageLoader
from flyp_saflex.runtime import keep_freed_memory
from flyp_saflex.saflex.losses import clip_loss
from flyp_saflex.tasks.clip_network import ClipNetwork
from flyp_saflex.tasks.clip_task import ClipTask
from flyp_saflex.tasks.proxy_classes import proxy_columns

SEED = 20_000_000  # of the scenes, the weights, the captions; worlds of the demo and of the figures have others
FIGURE_SEEDS = (30_000_000, 30_000_001)
SIZE_PX = 64
NUM_IMAGES = 6000
ANIMAL_SIZE = 0.62  # larger than in the demo's world: every detail is seen
NUM_CAMERAS = 20  # per place, numbered from 1000
BATCH = 100
EPOCHS = 8
LR = 2e-3
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIZE_PX, "layers": [1, 1, 1, 1], "width": 12},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {
    "size": SIZE_PX,
    "mode": "RGB",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
COLOURS = dict(
    zip(
        SPECIES,
        ("brown", "striped", "orange", "brown", "black", "grey", "yellow", "striped", "green", "grey"),
        strict=True,
    )
)
PLAIN = ("a photo of a {}.", "a {}.", "a camera trap photo of a {}.", "a photo of a {} in the wild.", "a drawing of a {}.")


def scenes() -> list[Scene]:
    """Return what the model sees: species and place independent of each other, everything else as cameras take it."""
    rng = np.random.default_rng(SEED)
    found = []
    for shot in plan(NUM_IMAGES, SEED, animal_size=ANIMAL_SIZE):
        place = str(rng.choice(list(PLACES)))
        camera = 1000 + int(rng.integers(NUM_CAMERAS))
        species = None if rng.random() < 1 / len(CLASSES) else str(rng.choice(SPECIES))
        hour = int(rng.integers(20, 29)) % 24 if place == "infrared night" else int(rng.integers(6, 20))
        when = f"{shot.scene.time[:11]}{hour:02d}{shot.scene.time[13:]}"
        found.append(dataclasses.replace(shot.scene, species=species, place=place, camera=camera, time=when))
    return sorted(found, key=lambda scene: (scene.place, scene.camera))  # a backdrop is drawn once


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption that is true of the scene: half of them tell everything, half only what animal it is."""
    hour = int(scene.time[11:13])
    time_of_day = "night" if hour >= 20 or hour < 5 else "morning" if hour < 11 else "noon" if hour < 15 else "evening"
    where = f"in the {scene.place.removeprefix('infrared ')} at {time_of_day}"
    if scene.species is None:
        return f"a {EMPTY} {where}" if rng.random() < 0.5 else str(rng.choice(PLAIN)).format(EMPTY)
    if rng.random() < 0.5:
        return str(rng.choice(PLAIN)).format(scene.species)
    size = "small" if scene.size < 0.5 else "large" if scene.size > 0.75 else "medium"
    colour = "grey" if PLACES[scene.place].infrared else COLOURS[scene.species]
    tone = "dark " if scene.tone < -0.6 else "pale " if scene.tone > 0.6 else ""
    return f"a {size} {tone}{colour} {scene.species} {where}"


def augmented(images_NSSC: NDArray[np.uint8], rows: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
    """Return normalised crops [B, 3, S, S] of 80..100 % of the side, half of them mirrored."""
    mean, std = torch.tensor(PREPROCESS["mean"]), torch.tensor(PREPROCESS["std"])
    images_BCSS = ((torch.from_numpy(images_NSSC[rows]).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    share = torch.from_numpy(rng.uniform(0.8, 1.0, size=len(rows)).astype(np.float32))
    shift_B2 = torch.from_numpy(rng.uniform(-1, 1, size=(len(rows), 2)).astype(np.float32)) * (1 - share[:, None])
    mirror = torch.from_numpy(rng.choice((-1.0, 1.0), size=len(rows)).astype(np.float32))
    theta_B23 = torch.zeros(len(rows), 2, 3)
    theta_B23[:, 0, 0], theta_B23[:, 1, 1], theta_B23[:, :, 2] = share * mirror, share, shift_B2
    grid = torch.nn.functional.affine_grid(theta_B23, list(images_BCSS.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images_BCSS, grid, align_corners=False, padding_mode="reflection")


def pretrain(work: Path) -> torch.nn.Module:
    """Train, writing `work/log.jsonl` and a checkpoint after every epoch; go on from it if it is there."""
    torch.manual_seed(SEED)
    model = open_clip.CLIP(**MODEL).to(memory_format=torch.channels_last)  # faster on a CPU
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim <= 1 or "embedding" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
    done, started = 0, time.monotonic()
    checkpoint = work / "checkpoint.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["epochs"]
        print(f"going on after epoch {done}", flush=True)
    world = scenes()
    images_file = work / "images.npy"
    if not images_file.is_file():
        np.save(images_file, np.stack([np.asarray(render(scene, SIZE_PX)) for scene in world]))
        print(f"{len(world)} pictures drawn in {time.monotonic() - started:.0f} s", flush=True)
    images_NSSC = np.load(images_file)
    steps = len(world) // BATCH
    for epoch in range(done, EPOCHS):
        rng = np.random.default_rng([SEED, epoch])
        order, losses = rng.permutation(len(world)), []
        model.train()
        for step in range(steps):
            progress = (epoch * steps + step) / (EPOCHS * steps)
            rate = min(1.0, (epoch * steps + step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = LR * rate
            rows = order[step * BATCH : (step + 1) * BATCH]
            texts = [caption(world[row], rng) for row in rows]
            distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
            columns_C, assignment_BC = proxy_columns(torch.tensor([distinct[text] for text in texts]))
            images_BD = normalize(
                model.encode_image(augmented(images_NSSC, rows, rng).contiguous(memory_format=torch.channels_last)), dim=-1
            )
            texts_CD = normalize(model.encode_text(tokenizer(list(distinct))), dim=-1)
            loss = clip_loss(model.logit_scale.exp() * images_BD @ texts_CD[columns_C].T, assignment_BC)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            losses.append(float(loss.detach()))
        row = {"epoch": epoch + 1, "loss": float(np.mean(losses)), "seconds": round(time.monotonic() - started)}
        with open(work / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
        torch.save(state, work / "checkpoint.new")
        (work / "checkpoint.new").replace(checkpoint)
    return model


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write the weights in half precision (counters stay integers) and open_clip's config."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: (value.half() if value.is_floating_point() else value) for key, value in model.state_dict().items()}
    weights = folder / "open_clip_model.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, weights)
    weights.chmod(0o644)  # safetensors writes for the owner only
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def figures(folder: Path) -> str:
    """Return zero-shot accuracy and macro-F1 on fresh worlds, in percent, as lines of a Markdown table."""
    clip = load_clip(f"local-dir:{folder}")
    lines = ["| world | split | shift | images | accuracy | macro-F1 |", "|---|---|---|--:|--:|--:|"]
    for seed in FIGURE_SEEDS:
        with tempfile.TemporaryDirectory() as where:
            root = write_world(Path(where), num_images=2000, seed=seed)
            dataset = load_dataset(DataConfig(name="iwildcam", root=where, prompts=str(root / "prompts")), seed=0)
            task = ClipTask(clip, ClipNetwork(clip.model), dataset, Config())
            loader = ImageLoader(clip.preprocess, batch_size=256, progress=False)
            for split in dataset.splits.values():
                _, (logits_NK,) = predict([task.predictor], loader.batches(split.samples))
                labels, predictions = [sample.label for sample in split.samples], logits_NK.argmax(dim=1).numpy()
                values = f"{100 * accuracy(labels, predictions):.1f} | {100 * macro_f1(labels, predictions):.1f}"
                lines.append(f"| seed {seed} | {split.name} | {split.shift} | {len(split)} | {values} |")
    return "\n".join(lines)


def main() -> None:
    """Pretrain, write the folder, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("tiny_clip_work"), help="checkpoints, pictures, log")
    parser.add_argument("--out", type=Path, default=TINY_CLIP, help="where the model goes")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    torch.use_deterministic_algorithms(True)
    save(pretrain(arguments.work), arguments.out)
    print(f"{(arguments.out / 'open_clip_model.safetensors').stat().st_size / 1e6:.2f} MB")
    print(figures(arguments.out))


if __name__ == "__main__":
    main()
