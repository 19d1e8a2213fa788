"""The whole loop on the drawn world with the tiny editor: pilot, run, plan, more edits, run; two useless texts are found."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from flyp_saflex import cli
from flyp_saflex.assets import TINY_CLIP, TINY_EDITOR
from flyp_saflex.demo.biased_cameras import biased_world

PLACES = ("in the snow", "in the dusk", "in the meadow", "near a lake")
USELESS = ("in the snow", "in the infrared night")
"""Places of the planted texts: with strong guidance the editor does as they say and removes the animal. Nonsense would not do: at
`lorem ipsum dolor` the tiny editor paints a forest, with the animal in it."""
PILOT, BUDGET = 198, 250


@pytest.mark.slow
def test_the_plan_finds_the_texts_that_lose_the_animal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = biased_world(tmp_path / "world", seed=2, num_images=1200)  # the rule for whole texts was chosen on seed 0
    edits = [(place, f"put the {{}} {place}") for place in PLACES]
    edits += [(f"nobody {place}", f"put the landscape without animals {place}") for place in USELESS]
    texts = "".join(f"[[edits]]\ndomain = '{domain}'\ninstruction = '{text}'\n" for domain, text in edits)
    (tmp_path / "texts.toml").write_text(f"dataset = 'iwildcam'\n{texts}", encoding="utf-8")
    options = [
        f"data.root={root}",
        f"data.prompts={root / 'prompts'}",
        f"model.name=local-dir:{TINY_CLIP}",
        f"cache.root={tmp_path / 'cache'}",
        "cache.key=loop",
        f"editor.model={TINY_EDITOR}",
        f"editor.prompts={tmp_path / 'texts.toml'}",
        "editor.texts_per_image=0",
        "augment.upstream=cache",
        "saflex.enabled=true",
        "train.steps=8",  # evidence decides before training
    ]

    def run(command: str, *more: str) -> str:
        overrides = [part for option in options for part in ("--set", option)]
        assert cli.main([command, "demo", *more, *overrides]) == 0
        return capsys.readouterr().out

    def domains() -> Counter[str]:
        manifest = tmp_path / "cache" / "iwildcam" / "loop" / "metadata.jsonl"
        return Counter(json.loads(line)["domain"] for line in manifest.read_text(encoding="utf-8").splitlines())

    run("generate", "--pilot", str(PILOT))
    pilot = domains()
    assert min(pilot.values()) >= 0.9 * PILOT / len(edits)  # two texts are one for pictures of nobody
    run("train", "--run-dir", str(tmp_path / "pilot"))
    assert cli.main(["plan", str(tmp_path / "pilot"), "--out", str(tmp_path / "plan.json")]) == 0
    table = capsys.readouterr().out
    print(table)
    shares = {line[:30].strip(): float(line.split()[-1]) for line in table.split("\n\n")[0].splitlines()[1:]}
    useful = {line[:30].strip(): float(line[30:].split()[2]) for line in table.split("\n\n")[0].splitlines()[1:]}
    planted = [f"nobody {place}" for place in USELESS]
    assert max(useful[name] for name in planted) < min(useful[place] for place in PLACES)
    assert min(shares[name] for name in planted) < 5 < min(shares[place] for place in PLACES)
    nobody = sum(shares[name] for name in planted)
    assert nobody < 100 * len(planted) / len(edits), "less than their even share; RESULTS says how much on five seeds"
    run("generate", "--plan", str(tmp_path / "plan.json"), "--set", f"editor.budget={BUDGET}")
    made = domains() - pilot
    assert made[min(planted, key=lambda name: shares[name])] < 0.05 * made.total()
    assert all(made[place] > 0 for place in PLACES)
    run("train", "--run-dir", str(tmp_path / "planned"))
    assert (tmp_path / "planned" / "DONE").is_file()
