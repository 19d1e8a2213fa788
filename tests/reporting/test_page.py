"""The page: escaped, self-contained, the same bytes twice, whole without half of the files, small with forty runs."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flyp_saflex import recipe as recipe_module
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.reporting import plots
from flyp_saflex.reporting.gallery import last_decisions
from flyp_saflex.reporting.html import text
from flyp_saflex.reporting.pictures import resolve, thumbnail
from flyp_saflex.reporting.plots import Path2D, mean_curve, mean_path
from flyp_saflex.reporting.report import report
from flyp_saflex.storage.augment_cache import AugmentCache

EVIL = "<script>alert('x')<script>"
CLASSES = [f"circle {EVIL}", "square", "stripes"]
VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """Collects what a browser would act on, and checks that elements are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.sources, self.scripts, self.words = [], [], [], [], 0, []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        self.sources += [values["src"]] if "src" in values else []
        self.scripts += tag == "script" or any(name.startswith("on") for name in values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def write_run(root: Path, name: str, seed: int, options: list[str], *, steps=30, splits=("id_test", f"night{EVIL}"), groups=3):
    """A run with every file that the commands leave, filled by arithmetic."""
    run = root / f"{re.sub('[^a-z]+', '-', name.lower())}-{seed}"
    run.mkdir(parents=True)
    config = recipe_module.load("folder", [*options, f"recipe={name}", f"seed={seed}"])
    (run / "config.toml").write_text(recipe_module.dumps(config))
    rng = np.random.default_rng([seed, len(name)])
    rows, details = [], {}
    (run / "predictions").mkdir()
    for split, shift in zip(splits, ("id", *["ood"] * len(splits)), strict=False):
        for alpha in (0.0, 0.5, 1.0):
            accuracy = 0.5 + 0.2 * alpha + 0.1 * rng.random()
            numbers = {"accuracy": accuracy, "macro_f1": accuracy - 0.05, "worst_group_accuracy": accuracy - 0.2, "ece": 0.1}
            rows.append({"split": split, "role": "test", "shift": shift, "wise_alpha": alpha, "n": 90, **numbers})
        per_class = [{"class": k, "name": CLASSES[k % 3], "n": 30, "f1": rng.random()} for k in range(max(3, groups))]
        per_group = [{"group": f"place {g}{EVIL}", "n": 9, "accuracy": rng.random()} for g in range(groups)]
        details[split] = {"1": {"per_class": per_class, "per_group": per_group}}
        labels, predictions = rng.integers(3, size=(2, 90))
        names = [[CLASSES[k] for k in column] for column in (labels, predictions)]
        columns = {"label": labels, "prediction": predictions, "label_name": names[0], "prediction_name": names[1]}
        pq.write_table(pa.table(columns | {"alpha": [1.0] * 90}), run / "predictions" / f"{split.replace('/', '%2F')}.parquet")
    result = {"recipe": name, "seed": seed, "results": rows, "chosen_alpha": 0.5}
    (run / "results.json").write_text(json.dumps(result))
    (run / "details.json").write_text(json.dumps(details))
    environment = {
        "python": "3.12",
        "platform": EVIL,
        "seconds": 75.0,
        "steps": steps,
        "commit": "0123456789abcdef",
        "processes": 1,
    }
    environment["stage_seconds"] = {"evaluation": {"id_test": 3.0, "night": 4.4}}
    packages = {"flyp-saflex": "0.1.0", "torch": "2.9"}
    (run / "env.json").write_text(json.dumps(environment | {"packages": packages, "device": "Tesla <b>", "command": [EVIL]}))
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            extra = {"kept_fraction": rng.random(), "label_entropy": 0.1} if "saflex.enabled=true" in options else {}
            file.write(json.dumps({"step": step, "loss": 2 / step + rng.random(), "lr": 1e-3 / step, **extra}) + "\n")
        file.write(json.dumps({"step": steps, "split": "id_val", "accuracy": 0.5}) + "\n")
    return run


@pytest.fixture
def world(tiny_images_dir: Path, tmp_path: Path):
    """Options of a run on the tiny images, and nine edits of them."""
    options = [f"data.root={tiny_images_dir}", "data.train_domains=day", "data.test_domains=night", "train.log_augmented=true"]
    options += [f"cache.root={tmp_path / 'cache'}", "augment.upstream=cache", "saflex.enabled=true", "saflex.penalty=0"]
    samples = load_dataset(recipe_module.load("folder", options).data).train.samples[:9]
    cache = AugmentCache.create(tmp_path / "cache" / "folder" / "v1", "folder")
    for sample in samples:
        with Image.open(sample.path) as image:
            name = AugmentCache.file_name(sample.sample_id)
            row = {"file_name": name, "source_id": sample.sample_id, "label": sample.label, "instruction": f"in snow {EVIL}"}
            cache.append(image.resize((300, 240)), row)
    cache.finish()
    return options, cache.edits


@pytest.fixture
def runs(world, tmp_path):
    """Two conditions with two seeds each; the second learns weights: five edits kept, one relabelled, three dropped."""
    options, edits = world
    plain = [option for option in options if not option.startswith(("saflex", "augment", "cache"))]
    made = [write_run(tmp_path / "runs", f"plain {EVIL}", seed, plain) for seed in (0, 1)]
    for seed in (0, 1):
        made.append(write_run(tmp_path / "runs", "with saflex", seed, options))
        with (made[-1] / "augmented.jsonl").open("w") as file:
            for step in (1, 2):
                for number, edit in enumerate(edits):
                    weight = 0.0 if number > 5 else 1.5
                    top = (edit.label + (number == 5)) % 3
                    decision = {"id": edit.aug_id, "label": edit.label, "weight": weight, "gain": 0.1, "learned_label": top}
                    soft = [[top, 0.875], [(top + 1) % 3, 0.1]]
                    file.write(json.dumps({"step": step, **decision, "soft_labels": soft}) + "\n")
    return made


def test_page_is_escaped_self_contained_and_well_formed(runs):
    page = report(runs, form="html")
    reader = Reader(page)
    assert reader.scripts == 0
    assert "<script" not in page.lower()
    words = " ".join(reader.words)
    for place in (
        f"plain {EVIL}",
        f"in snow {EVIL}",
        f"circle {EVIL} → square",
        f"place 1{EVIL}",
        f"night{EVIL}, %",
        "Tesla <b>",
    ):
        assert place in words, place
    assert len(reader.ids) == len(set(reader.ids)) > 20
    assert {link[1:] for link in reader.links if link.startswith("#")} <= set(reader.ids)
    assert {link for link in reader.links if not link.startswith("#")} == {"data:,"}
    assert all(source.startswith("data:image/webp;base64,") for source in reader.sources)
    assert "default-src 'none'" in page
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert not re.search(r"#03\w{4}|#020202|#000000", page), "every colour follows the scheme"


def test_same_runs_give_the_same_bytes(runs):
    assert report(runs, form="html") == report(runs, form="html")


def test_chapters_tell_what_was_found(runs):
    page = report(runs, form="html")
    words = re.sub(r"\s+", " ", " ".join(Reader(page).words))
    assert "4 runs, 2 conditions, 2 seeds each on folder" in words
    assert page.count('class="plot"') == 2 + 3  # two metrics; loss, learning rate, kept share
    assert "Not logged by these runs: mean gain, rho." in words
    assert "Constant over the logged steps, so not drawn: entropy (0.1)." in words
    assert "9 augmented images: 5 kept (56%), 1 relabelled (11%), 3 dropped (33%)." in words
    assert "kept 2 of 2 times" in words
    assert "88%" in words
    assert "Differs from plain" in words
    assert "saflex.enabled: False -> True" in words
    assert "1 min 15 s 2500 ms 7 s" in words  # training, per step, evaluation
    assert "0123456789" in words
    assert "mean ± sd" in words


def test_id_and_ood_and_metrics_are_apart(runs):
    page = report(runs, form="html")
    results = page[page.index('id="results"') : page.index('id="scatter"')]
    assert "bootstrap" not in results, "several seeds have a spread, which says more"
    captions = re.findall(r'aria-label="([^"]*)"', results)
    assert len(captions) == 3 * 2
    assert [caption.partition(",")[0] for caption in captions] == [
        *["Accuracy"] * 2,
        *["Macro-F1"] * 2,
        *["Worst-group accuracy"] * 2,
    ]
    assert all(("(OOD), night" in caption) != ("(ID), id_test" in caption) for caption in captions)


def test_thumbnails_are_small_and_what_the_files_show(runs):
    sources = Reader(report(runs, form="html")).sources
    assert len(sources) == 2 * 9 * 1  # source and edit, one seed of the condition that learned
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert max(image.size) <= 144
            assert np.asarray(image).std() > 5


def test_edits_are_told_by_class_and_by_instruction(runs):
    page = report(runs, form="html")
    table = page[page.index("Edits by instruction") : page.index("Kept, label unchanged")]
    row = table[table.index(">in snow") :]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", row[: row.index("</tr>")])
    assert cells == ["9", "67", "11", "+0.1"]
    by_class = page[page.index("Edits by class") : page.index("Edits by instruction")]
    assert sum(map(int, re.findall(r'<td class="muted">(\d+)</td>', by_class))) == 9


def test_dropped_cards_tell_why(runs):
    page = report(runs, form="html")
    dropped = page[page.index("<h4>Dropped") : page.index('id="mistakes"')]
    assert dropped.count('class="card"') == dropped.count('class="why"') == 3
    assert "no class more than 20 % likely" in dropped


class Outline(HTMLParser):
    """Levels of headings, names of regions, boxes that scroll, pictures without a text alternative."""

    def __init__(self, page):
        super().__init__()
        self.levels, self.regions, self.scrolling, self.silent, self.landmarks = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if values.get("role") == "region":
            self.regions.append(values.get("aria-label"))
        if tag == "pre" or "scroll" in values.get("class", "").split():
            self.scrolling.append((values.get("tabindex"), values.get("role"), bool(values.get("aria-label"))))
        if tag == "img" and not values.get("alt"):
            self.silent.append(values)
        if (
            tag == "svg"
            and values.get("aria-hidden") != "true"
            and not (values.get("role") == "img" and values.get("aria-label"))
        ):
            self.silent.append(values)
        if tag in ("header", "main", "footer", "nav"):
            self.landmarks.append(tag)


def test_page_can_be_read_with_a_keyboard_and_a_screen_reader(runs):
    page = report(runs, form="html")
    outline = Outline(page)
    assert '<html lang="en">' in page
    assert sorted(outline.landmarks) == ["footer", "header", "main", "nav"]
    assert outline.levels[0] == 1
    assert outline.levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(outline.levels, outline.levels[1:], strict=False)), outline.levels
    assert len(outline.scrolling) > 10
    assert page.count("<pre ") == 2
    assert set(outline.scrolling) == {("0", "region", True)}, "what scrolls sideways takes the keyboard's focus and has a name"
    assert len(outline.regions) == len(set(outline.regions)), [
        name for name in outline.regions if outline.regions.count(name) > 1
    ]
    assert outline.silent == []


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_that_wcag_asks_for(scheme):
    style = (Path(plots.__file__).parents[1] / "assets" / "report.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", part)) for part in style.split("prefers-color-scheme: dark")[:2])
    colours = light if scheme == "light" else dark
    assert light.keys() == dark.keys() >= {"paper", "panel", "ink", "muted", "link", "bar", "s0", "s6"}

    def contrast(front, back):
        lighter, darker = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        return (lighter + 0.05) / (darker + 0.05)

    for front, back in [(f, b) for f in ("ink", "muted", "link") for b in ("paper", "panel")] + [
        ("ink", "bar"),
        ("muted", "bar"),
    ]:
        assert contrast(front, back) >= 4.5 or (front, back) == ("muted", "bar"), (front, back)
    for number in range(plots.SERIES):
        assert contrast(f"s{number}", "paper") >= 3, number


def test_page_without_the_images_says_so(runs, tmp_path):
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "tiny_images")
    page = report(runs, form="html")
    reader = Reader(page)
    assert reader.sources == []
    words = " ".join(reader.words)
    assert "The augment cache cannot be read, so the edits are not shown" in words
    assert "The dataset cannot be read, so the source images are not shown" in words
    assert "3 dropped" in words


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"seconds": "x", "test": {"1": 3}}', "\x00\xff"])
def test_only_results_are_needed(runs, content):
    for run in runs:
        for name in ("config.toml", "env.json", "metrics.jsonl", "details.json", "augmented.jsonl", "predictions"):
            path = run / name
            if path.is_dir():
                shutil.rmtree(path)
            elif content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_text(content, encoding="latin-1")
    words = " ".join(Reader(report(runs, form="html")).words)
    assert content not in (None, "", "{") or "no env.json" in words
    assert "The run folders hold no predictions and no details.json any more." in words
    if content is None:
        assert "no config.toml, so its configuration is not shown" in words


def test_run_that_is_no_seed_of_its_namesake_is_told(world, tmp_path):
    options, _ = world
    runs = [write_run(tmp_path / "runs", "a", 0, options), write_run(tmp_path / "runs", "a", 1, [*options, "train.lr=0.5"])]
    words = " ".join(Reader(report(runs, form="html")).words)
    assert f"{runs[1]} is not another seed of {runs[0]}, its options differ: train.lr: 1e-05 -> 0.5" in words


def test_one_seed_is_called_noise(world, tmp_path):
    page = report([write_run(tmp_path / "runs", "a", 0, world[0])], form="html")
    assert "One seed per condition: differences of a few points are noise." in page


def test_forty_runs_stay_small_and_quick(world, tmp_path, capsys):
    options, edits = world
    splits = ("id_test", "ood_one", "ood_two", "ood_three")
    runs = [
        write_run(tmp_path / "runs", f"condition {chr(97 + c)}", seed, options, steps=300, splits=splits, groups=100)
        for c in range(8)
        for seed in range(5)
    ]
    for run in runs:
        rows = [{"step": 1, "id": edit.aug_id, "label": edit.label, "weight": 1.0, "gain": 0.0} for edit in edits]
        (run / "augmented.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = time.monotonic()
    report(runs, out=tmp_path / "page.html")
    seconds = time.monotonic() - started
    size = (tmp_path / "page.html").stat().st_size
    with capsys.disabled():
        print(f"[forty runs: {size / 1e6:.2f} MB in {seconds:.1f} s]", end=" ")
    assert size < 5e6
    assert seconds < 60  # 5 s on an idle core; tests share theirs
    Reader((tmp_path / "page.html").read_text())


def test_folder_that_is_not_there_is_one_line_about_out(runs, tmp_path):
    from flyp_saflex.errors import RunError

    with pytest.raises(RunError, match=r"cannot write .*page.html: No such file or directory.*--out"):
        report(runs, out=tmp_path / "nowhere" / "page.html")


def test_text_escapes_and_drops_control_characters():
    assert text('<a href="x">\x00\u202e&') == "&lt;a href=&#34;x&#34;&gt;\ufffd\ufffd&amp;"


def test_figures_take_names_as_they_are():
    path = Path2D((0.0, 1.0), (0.5, 0.6), (0.3, 0.4), 1.0)
    drawn = plots.scatter({0: [path]}, x_label="$x$ <b>", y_label="100 \\% #0", name="n", alt='"<&')
    assert "$x$ &lt;b&gt;" in drawn
    assert "100 \\% #0" in drawn
    assert 'aria-label="&quot;&lt;&amp;"' in drawn
    assert "DejaVu" not in drawn


def test_mean_path_uses_what_all_seeds_have():
    seeds = [Path2D((0.0, 0.5, 1.0), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.5), Path2D((0.5, 1.0), (0.4, 0.5), (0.7, 0.8), 0.5)]
    mean = mean_path(seeds)
    assert mean.alphas == (0.5, 1.0)
    assert mean.x == pytest.approx((0.3, 0.4))
    assert mean.y == pytest.approx((0.6, 0.7))
    assert mean.chosen == 0.5
    assert mean_path([seeds[0], Path2D((1.0,), (0.5,), (0.8,), 1.0)]).chosen is None


def test_mean_curve_averages_seeds_and_keeps_the_last_step():
    curve = mean_curve([[(1, 1.0), (2, 3.0)], [(1, 3.0)]])
    assert (curve.steps, curve.mean, curve.low, curve.high) == ((1, 2), (2.0, 3.0), (1.0, 3.0), (3.0, 3.0))
    long = mean_curve([[(step, float(step)) for step in range(1, 1001)]], points=100)
    assert len(long.steps) <= 101
    assert long.steps[-1] == 1000
    assert long.mean == tuple(map(float, long.steps))


def test_last_visit_decides_and_visits_are_counted():
    row = {"id": "e", "label": 1, "gain": 0.0}
    (decision,) = last_decisions(
        [
            {**row, "weight": 1.0, "learned_label": 1},
            {**row, "weight": 2.0, "learned_label": 2, "soft_labels": [[2, 0.75], [None, 0.25]]},
            {"id": "f", "label": 0, "weight": 1.0},  # no gain: nothing was decided
        ]
    )
    assert (decision.fate, decision.weight, decision.visits, decision.times_kept) == ("relabelled", 2.0, 2, 2)
    assert decision.soft_labels == [(2, 0.75), (None, 0.25)]


def test_relative_paths_are_found_above_the_run(tmp_path, monkeypatch):
    run = tmp_path / "project" / "demo" / "runs" / "a"
    run.mkdir(parents=True)
    (tmp_path / "project" / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("images", run) == str(tmp_path / "project" / "images")
    assert resolve("elsewhere", run) == "elsewhere"
    assert resolve("", run) == ""


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"no image"])
def test_broken_image_has_no_thumbnail(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    assert thumbnail(tmp_path / "x.png") == ""
    assert thumbnail(tmp_path / "y.png") == ""


def test_cmyk_and_16_bit_images_have_thumbnails(tmp_path):
    Image.new("CMYK", (300, 200), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    Image.fromarray(np.full((20, 30), 40000, dtype=np.uint16)).save(tmp_path / "d.png")
    assert thumbnail(tmp_path / "c.jpg").startswith("data:image/webp")
    assert thumbnail(tmp_path / "d.png").startswith("data:image/webp")


def test_the_page_needs_no_torch():
    code = "import sys, flyp_saflex.reporting.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_browser_shows_the_page_without_a_complaint(runs, tmp_path, width, scheme):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    report(runs, out=tmp_path / "page.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600", "--enable-logging=stderr"]
    options += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", f"--screenshot={tmp_path / 'shot.png'}"]
    done = subprocess.run(
        [browser, *options, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    with Image.open(tmp_path / "shot.png") as image:
        pixels = np.asarray(image.convert("L")).astype(float)
    assert pixels.shape == (1600, width)
    assert (pixels.mean() > 128) == (scheme == "light")
    assert pixels.std() > 10
