"""Measure flyp_saflex/assets/tiny_editor: does it do what it is told, and does the animal stay?

    python scripts/measure_tiny_editor.py          # about ten minutes on one CPU core

A small classifier of place and species, trained on drawn pictures (blurred and noisy ones too, so that softness alone does not
confuse it), judges edits of worlds that nothing was trained on. Printed are the classifier's own accuracy on pictures
of those worlds and on the same ones through the editor's autoencoder (what no edit can be better than), the part of
edits in which the place is the one asked for, the part in which the species is still the source's, and seconds per edit.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from build_tiny_editor import ANIMAL_SIZE, SIZE_PX, to_tensor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from flyp_saflex.assets import TINY_EDITOR
from flyp_saflex.demo.places import PLACES
from flyp_saflex.demo.scene import Scene, render
from flyp_saflex.demo.world import CLASSES, EMPTY, SPECIES, plan
from flyp_saflex.editing.diffusers_editor import DiffusersEditor
from flyp_saflex.editing.editor import Request, load_editor
from flyp_saflex.offline import EditorConfig
from flyp_saflex.runtime import keep_freed_memory

SEED = 50_000_000  # of the classifier's pictures
WORLD_SEEDS = (30_000_000, 30_000_001)
PLACE_NAMES = tuple(PLACES)
EPOCHS, BATCH, NUM_PICTURES = 6, 64, 12_000
NUM_EDITS = 300


class Judge(nn.Module):
    """A small convolutional classifier with two heads: place and species."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.place = nn.Linear(widths[-1], len(PLACE_NAMES))
        self.species = nn.Linear(widths[-1] * (SIZE_PX // 16) ** 2, len(CLASSES))

    def forward(self, images_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of places and of classes."""
        found = self.body(images_B3SS)
        return self.place(found.mean(dim=(2, 3))), self.species(found.flatten(1))


def pictures(number: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Return pictures with every species before every place alike, by cameras of their own, and their labels."""
    rng = np.random.default_rng(seed)
    found: list[Scene] = []
    for shot in plan(number, seed, animal_size=ANIMAL_SIZE):
        species = None if rng.random() < 1 / len(CLASSES) else str(rng.choice(SPECIES))
        camera = 500 + int(rng.integers(100))
        found.append(dataclasses.replace(shot.scene, species=species, place=str(rng.choice(PLACE_NAMES)), camera=camera))
    found.sort(key=lambda scene: (scene.place, scene.camera))
    images = np.stack([np.asarray(render(scene, SIZE_PX)) for scene in found])
    places = np.array([PLACE_NAMES.index(scene.place) for scene in found])
    return images, places, np.array([CLASSES.index(scene.species or EMPTY) for scene in found])


def soften(images_B3SS: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur and add noise: none, a little or more, the same for the whole batch."""
    side = int(rng.choice((1, 1, 3, 5)))
    blurred = nn.functional.avg_pool2d(images_B3SS, side, stride=1, padding=side // 2, count_include_pad=False)
    noise = torch.from_numpy(rng.standard_normal(blurred.shape, dtype=np.float32))
    return blurred + float(rng.choice((0.0, 0.05, 0.1))) * noise


def train_judge() -> Judge:
    """Train the classifier."""
    torch.manual_seed(SEED)
    images, places, species = pictures(NUM_PICTURES, SEED)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    total = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=total)
    for epoch in range(EPOCHS):
        rng = np.random.default_rng([SEED, epoch])
        order, right = rng.permutation(len(images)), []
        for start in range(0, len(images) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            batch = to_tensor(images[rows])
            if rng.random() < 0.5:
                batch = batch.flip(3)
            place, kind = judge(soften(batch, rng))
            target = torch.from_numpy(species[rows])
            loss = nn.functional.cross_entropy(place, torch.from_numpy(places[rows])) + nn.functional.cross_entropy(kind, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            right.append(float((kind.argmax(1) == target).float().mean()))
        print(f"classifier, epoch {epoch + 1}: species {np.mean(right):.1%} right in training", flush=True)
    return judge.eval()


@torch.no_grad()
def judged(judge: Judge, images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the predicted place and class of each picture."""
    parts = [judge(to_tensor(part)) for part in np.array_split(images, max(1, len(images) // 256))]
    place, species = (torch.cat(logits).argmax(1).numpy() for logits in zip(*parts, strict=True))
    return place, species


@torch.no_grad()
def reconstructed(editor: DiffusersEditor, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the pictures after the editor's autoencoder and back."""
    vae = editor._pipeline.vae
    found = [vae.decode(vae.encode(to_tensor(part)).latent_dist.mode()).sample for part in np.array_split(images, 8)]
    return ((torch.cat(found).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def held_out() -> list[Scene]:
    """Return scenes of worlds that nothing was trained on, every class about alike."""
    rng = np.random.default_rng(SEED)
    shots = [shot for seed in WORLD_SEEDS for shot in plan(2000, seed, animal_size=ANIMAL_SIZE)]
    by_class = {label: [shot.scene for shot in shots if shot.label == label] for label in range(len(CLASSES))}
    each = -(-NUM_EDITS // len(CLASSES))
    return [scenes[row] for scenes in by_class.values() for row in rng.choice(len(scenes), size=each, replace=len(scenes) < each)]


def figures(judge: Judge, config: EditorConfig, sheet: Path | None) -> None:
    """Print how well edits of held-out scenes follow their instruction and keep their animal."""
    editor = load_editor(config)
    scenes = held_out()
    rng = np.random.default_rng(SEED + 1)
    images = np.stack([np.asarray(render(scene, SIZE_PX)) for scene in scenes])
    species = np.array([CLASSES.index(scene.species or EMPTY) for scene in scenes])
    places = np.array([PLACE_NAMES.index(scene.place) for scene in scenes])
    targets = np.array([rng.choice([n for n in range(len(PLACE_NAMES)) if n != place]) for place in places])
    texts = [
        f"put the {CLASSES[kind]} in the {PLACE_NAMES[target]}"
        if PLACE_NAMES[target] != "lake"
        else f"put the {CLASSES[kind]} near a lake"
        for kind, target in zip(species, targets, strict=True)
    ]
    requests = [
        Request(image=Image.fromarray(image), text=text, seed=seed)
        for seed, (image, text) in enumerate(zip(images, texts, strict=True))
    ]
    edits: list[Image.Image] = []
    for start in range(0, len(requests), 16):
        edits += [edit for edit in editor.edit(requests[start : start + 16]) if isinstance(edit, Image.Image)]
    edited = np.stack([np.asarray(edit) for edit in edits])
    for name, shown in (("the pictures themselves", images), ("through the autoencoder", reconstructed(editor, images))):
        place, kind = judged(judge, shown)
        print(f"{name}: place {np.mean(place == places):.1%}, species {np.mean(kind == species):.1%} right")
    place, kind = judged(judge, edited)
    print(f"edits ({config.steps} steps, guidance {config.guidance}, image guidance {config.image_guidance}), n = {len(edits)}:")
    print(f"  place as asked for: {np.mean(place == targets):.1%}; still the source's place: {np.mean(place == places):.1%}")
    animals = species > 0
    print(
        f"  species kept: {np.mean((kind == species)[animals]):.1%} of {animals.sum()} animals; empty stays empty: "
        f"{np.mean((kind == species)[~animals]):.1%} of {(~animals).sum()}; animal lost: {np.mean((kind == 0)[animals]):.1%}"
    )
    for number, name in enumerate(PLACE_NAMES):
        here = targets == number
        obeyed, same = np.mean(place[here] == number), np.mean((kind == species)[here])
        print(f"  to {name:<15} n = {here.sum():>3}: place {obeyed:>4.0%}, species kept {same:>4.0%}")
    if sheet is not None:
        save_sheet(images, edited, sheet)


def save_sheet(images: NDArray[np.uint8], edited: NDArray[np.uint8], path: Path, columns: int = 14) -> None:
    """Write pairs, the edit below its source, three times enlarged."""
    rows = np.linspace(0, len(images) - 1, 4 * columns).round().astype(int)
    pairs = np.concatenate([images[rows], edited[rows]], axis=1)
    lines = [np.concatenate(list(pairs[start : start + columns]), axis=1) for start in range(0, len(pairs), columns)]
    whole = Image.fromarray(np.concatenate(lines))
    whole.resize((whole.width * 2, whole.height * 2), Image.Resampling.NEAREST).save(path)


def timing(config: EditorConfig) -> None:
    """Print seconds per edit on one core, alone and in a batch of 16."""
    torch.set_num_threads(1)
    editor = load_editor(config)
    image = render(held_out()[40], SIZE_PX)
    requests = [Request(image=image, text="put the animal in the snow", seed=seed) for seed in range(16)]
    editor.edit(requests[:1])
    seconds = {}
    for batch in (1, 16, 1, 16):
        started = time.perf_counter()
        editor.edit(requests[:batch])
        seconds[batch] = min(seconds.get(batch, 1e9), (time.perf_counter() - started) / batch)
    print(
        f"{config.steps} steps, one core: {seconds[1]:.2f} s for one edit, {seconds[16]:.2f} s each in a batch of 16: "
        f"{seconds[1] / seconds[16]:.2f} times faster"
    )


def main() -> None:
    """Train or load the classifier, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--editor", type=Path, default=TINY_EDITOR, help="folder of the pipeline")
    parser.add_argument("--judge", type=Path, default=Path("tiny_editor_judge.pt"), help="file that keeps the classifier")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0, help="of the text; 1: none")
    parser.add_argument("--image-guidance", type=float, default=1.0, help="of the source; only with --guidance above 1")
    parser.add_argument("--sheet", type=Path, help="write a picture of edits here")
    arguments = parser.parse_args()
    keep_freed_memory()
    judge = Judge()
    if arguments.judge.is_file():
        judge.load_state_dict(torch.load(arguments.judge, weights_only=True))
        judge.eval()
    else:
        judge = train_judge()
        torch.save(judge.state_dict(), arguments.judge)
    config = EditorConfig(
        model=str(arguments.editor),
        size_px=SIZE_PX,
        steps=arguments.steps,
        guidance=arguments.guidance,
        image_guidance=arguments.image_guidance if arguments.guidance > 1 else None,
        safety_checker=False,
    )
    figures(judge, config, arguments.sheet)
    timing(config)


if __name__ == "__main__":
    main()
