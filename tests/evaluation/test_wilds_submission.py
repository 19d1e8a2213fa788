"""The leaderboard's files of iWildCam: official order, official numbers, and what the rules forbid."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from flyp_saflex.cli import main
from flyp_saflex.data.wilds import official_metrics

SPLITS = ("val", "test", "id_val", "id_test")


@pytest.fixture
def iwildcam(tmp_path: Path) -> Path:
    """A folder as WILDS has it: 182 training images, ten of every other split in bursts of two."""
    folder = tmp_path / "iwildcam_v2.0"
    (folder / "train").mkdir(parents=True)
    table = []
    for number in range(222):
        split = "train" if number < 182 else SPLITS[number % 4]
        name = f"{number:08x}-21bc.jpg"
        Image.new("RGB", (16, 12), (number, 255 - number, 9 * number % 256)).save(folder / "train" / name)
        row = {"split": split, "location_remapped": number % 4, "sequence_remapped": number, "y": number % 182}
        if split != "train":
            row |= {"sequence_remapped": 182 + (number - 182) // 8 * 4 + number % 4, "y": (number - 182) // 8}
        table.append(row | {"datetime": "2013-06-01 15:40:00.000", "filename": name})
    pd.DataFrame(table).to_csv(folder / "metadata.csv")
    (folder / "RELEASE_v2.0.txt").touch()
    return tmp_path


def train(root: Path, tiny_options: list[str], run: Path, *more: str) -> None:
    model = [option for option in tiny_options if option.startswith("model.")]
    sets = [*model, f"data.root={root}", "data.workers=0", "train.epochs=0", "train.batch_size=16", "train.precision=no", *more]
    assert main(["train", "iwildcam", *(f"--set={option}" for option in sets), f"--run-dir={run}"]) == 0


def test_files_hold_the_predictions_in_the_official_order(iwildcam: Path, tmp_path: Path, tiny_options, capsys):
    run = tmp_path / "run"
    train(iwildcam, tiny_options, run)
    assert main(["evaluate", str(run), "--wilds-submission"]) == 0
    rows = {row["split"]: row for row in json.loads((run / "results.json").read_text(encoding="utf-8"))["results"]}
    table = pd.read_csv(iwildcam / "iwildcam_v2.0" / "metadata.csv")
    assert sorted(path.name for path in (run / "wilds-submission").iterdir()) == sorted(
        f"iwildcam_split:{split}_seed:0_epoch:best_pred.csv" for split in SPLITS
    )
    for split in SPLITS:
        lines = (run / "wilds-submission" / f"iwildcam_split:{split}_seed:0_epoch:best_pred.csv").read_text().split()
        ours = table[table["split"] == split]
        numbers = official_metrics(torch.tensor([int(line) for line in lines]), torch.tensor(ours["y"].tolist()))
        assert rows[split]["official"] == pytest.approx(numbers)
        assert rows[split]["macro_f1"] == pytest.approx(numbers["macro_f1"])
        assert rows[split]["sequences"]["n"] == ours["sequence_remapped"].nunique() == 5
    assert "official evaluator on test (alpha 1): accuracy" in capsys.readouterr().out
    for arguments, message in ((["--split", "test"], "val, id_val, id_test not evaluated"), (["--limit", "2"], "drop --limit")):
        assert main(["evaluate", str(run), "--wilds-submission", *arguments]) == 2
        assert message in capsys.readouterr().err
    broken = ["--set", "saflex.enabled=true", "--set", "augment.upstream=randaugment", "--dry-run"]
    assert main(["evaluate", str(run), "--wilds-submission", *broken]) == 2
    assert "validation gradient from the OOD split 'val'" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--wilds-submission", *broken, "--set", "saflex.validation_split=id_val"]) == 0
