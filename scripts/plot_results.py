"""Draw the picture of README from `scripts/results.csv`: who keeps the worth of edits, half of which are wrong.

Run `python scripts/plot_results.py`; it writes docs/edits-worth-having.svg.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd

from flyp_saflex.evaluation.statistics import summarise

mpl.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "docs" / "edits-worth-having.svg"
BEDS = {
    "biased cameras": "Biased cameras:\nedits break a bias",
    "camera-trap conditions": "Camera-trap conditions:\nedits resemble the test",
    "PACS": "PACS:\nclean edits are worth nothing",
}
CONDITIONS = {
    ("no-edits", ""): ("no edits", "#6b7280"),
    ("trusted", "0.5"): ("all trusted", "#c2410c"),
    ("filter-argmax", "0.5"): ("argmax filter", "#a16207"),
    ("saflex", "0.5"): ("SAFLEX", "#15803d"),
    ("oracle", "0.5"): ("oracle", "#1d4ed8"),
}


def main() -> None:
    """Draw one panel per bed: every seed faint, the mean on top."""
    table = pd.read_csv(HERE / "results.csv", dtype={"rate": str}, keep_default_na=False)
    table = table[table.metric == "accuracy"]
    plt.rcParams.update({"svg.hashsalt": "flyp-saflex", "font.size": 9})
    figure, panels = plt.subplots(1, len(BEDS), figsize=(9, 2.6), layout="constrained")
    for panel, (bed, title) in zip(panels, BEDS.items(), strict=True):
        for place, ((condition, rate), (name, colour)) in enumerate(CONDITIONS.items()):
            rows = table[(table.bed == bed) & (table.condition == condition) & (table.rate == rate)]
            mean = summarise(rows.percent).mean
            panel.scatter(rows.percent, [-place] * len(rows), color=colour, alpha=0.3, s=14, linewidths=0)
            panel.scatter([mean], [-place], color=colour, s=46, marker="D", zorder=3)
            panel.annotate(f"{mean:.1f}", (mean, -place), xytext=(0, 6), textcoords="offset points", ha="center", color=colour)
            panel.set_yticks(range(0, -len(CONDITIONS), -1), [name for name, _ in CONDITIONS.values()])
        panel.set_title(f"{title} (n = {rows.seed.nunique()})", fontsize=9)
        panel.set_ylim(-len(CONDITIONS) + 0.5, 0.7)
        panel.grid(axis="x", color="#e5e7eb")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0, labelleft=panel is panels[0])
        panel.set_xlabel("OOD accuracy, %")
    figure.savefig(OUT, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
