"""README and pages of docs/ as blocks of code, and the small data on which their commands are executed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from flyp_saflex.assets import TINY_CLIP, TINY_EDITOR
from flyp_saflex.demo.world import FOLDER, write_world

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
NAMED = re.compile(r"^# (\S+\.(?:toml|csv))\n")
"""First line of a block that is a file: its name."""
ELSEWHERE = ("pip install", "./scripts/", "python scripts/", "mkdocs ")
"""Starts of lines that are no command of the package: other tests look at them, or the environment."""
WITH_RECIPE = ("data", "prompts", "generate", "filter", "train", "compare")
SMALL = (
    f"model.name=local-dir:{TINY_CLIP}",
    "model.pretrained=",
    f"editor.model={TINY_EDITOR}",
    "editor.precision=no",
    "editor.steps=1",
    "editor.size_px=64",
    "editor.safety_checker=false",
    "data.workers=0",
    "data.materialised_px=64",
    "train.precision=no",
    "train.steps=2",
    "train.batch_size=4",
    "train.warmup_steps=1",
    "train.evaluate_every=0",
    "evaluate.bootstrap=0",
    "compare.seeds=[0]",
    "filter.drop=semantic",  # thresholds from two images would drop every edit
)
"""Overrides that make every command a matter of seconds: tiny models, two steps."""


@dataclass(frozen=True)
class Page:
    """A document: its blocks as (language, text)."""

    name: str

    @property
    def text(self) -> str:
        return (ROOT / self.name).read_text(encoding="utf-8")

    @property
    def blocks(self) -> list[tuple[str, str]]:
        return re.findall(r"```(\w*)\n(.*?)```", self.text, flags=re.DOTALL)

    @property
    def headings(self) -> list[str]:
        """Headings of the second level."""
        return re.findall(r"^## (.+)$", self.text, flags=re.MULTILINE)

    @property
    def shell(self) -> list[str]:
        """Lines of the shell blocks, continued lines joined, without comments."""
        lines = [
            line
            for kind, text in self.blocks
            if kind == "bash"
            for line in text.replace("\\\n", " ").splitlines()
            if line.strip() and not line.startswith("#")
        ]
        return [line.partition(" #")[0].strip() for line in lines]

    @property
    def commands(self) -> list[list[str]]:
        """Arguments of the package's commands, those under `accelerate launch` included."""
        starts = ("flyp-saflex ", "accelerate launch -m flyp_saflex ")
        return [shlex.split(line.removeprefix(start)) for line in self.shell for start in starts if line.startswith(start)]

    def write_files(self, folder: Path) -> None:
        """Write the blocks that are files; a TOML block without a name is `mine.toml`."""
        for kind, text in self.blocks:
            named = NAMED.match(text)
            if named or kind == "toml":
                path = folder / (named[1] if named else "mine.toml")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text if kind == "toml" or not named else text[named.end() :], encoding="utf-8")


def on_small_data(words: list[str]) -> list[str]:
    """Return a command with overrides that make it small."""
    if words[0] not in WITH_RECIPE:
        return words
    own = [f"data.prompts=data/{FOLDER}/prompts"] if words[1].startswith("iwildcam") else []
    return [*words, *(part for override in (*SMALL, *own) for part in ("--set", override))]


def make_small_data(folder: Path, images: Path, page: str) -> None:
    """Write what a page's commands read: my_images, data/iwildcam_v2.0 or data/CUB_200_2011.

    Args:
        folder: current folder of the commands.
        images: root/<domain>/<class>/N.png with the domains day and night and the classes circle and square.
        page: name of the page.
    """
    for domain, name in (("day", "photo"), ("night", "sketch")):
        shutil.copytree(images / domain, folder / "my_images" / name)
    for path in (folder / "my_images").glob("*/stripes"):
        shutil.rmtree(path)
    if page.endswith("iwildcam.md"):
        write_world(folder / "data", num_images=400, size_px=64)
    if page.endswith("cub.md"):
        write_birds(folder / "data" / "CUB_200_2011", next((folder / "my_images").rglob("*.png")))


def write_birds(birds: Path, picture: Path) -> None:
    """Write a folder in CUB's layout: 200 classes, each with one image to train on, five held out and one to test, all alike."""
    lines: dict[str, list[str]] = {
        name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes", "classes")
    }
    for label in range(1, 201):
        name = f"{label:03d}.Bird_{label}"
        (birds / "images" / name).mkdir(parents=True)
        lines["classes"].append(f"{label} {name}")
        for number in range(7):
            shutil.copy(picture, birds / "images" / name / f"{number}.jpg")
            index = 7 * (label - 1) + number + 1
            lines["images"].append(f"{index} {name}/{number}.jpg")
            lines["image_class_labels"].append(f"{index} {label}")
            lines["train_test_split"].append(f"{index} {int(number < 6)}")
            lines["bounding_boxes"].append(f"{index} 5.0 5.0 30.0 30.0")
    for name, rows in lines.items():
        (birds / f"{name}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")


def cells(notebook: Path) -> list[str]:
    """Return the code cells of a notebook."""
    read = json.loads(notebook.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in read["cells"] if cell["cell_type"] == "code"]
