"""Fuzzed recipes, options, tables, edit texts and caches: exit code 0 or 2, one line, nothing written elsewhere; seeded."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from flyp_saflex import recipe
from flyp_saflex.cli import main
from flyp_saflex.errors import UserError
from flyp_saflex.prompting.edit_prompts import parse_edit_prompts
from flyp_saflex.storage.augment_cache import AugmentCache

CASES = 100
"""Cases of each kind in every run of the suite; the slow test has many more."""
ODD: tuple[bytes, ...] = (
    b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b"'", b"[", b"]", b"{", b"}", b"=", b",", b";", b"\t", b"#",
    b"..", b"/", b"../../away", b"\\", b"inf", b"nan", b"-1", b"0", b"1e999", b"9" * 30, b"9" * 5_000, b"[" * 600, b"x" * 3_000,
    b"true", b"[]", b"{}", b"null", b"\xc3\xa9", b"e\xcc\x81", b"\x1b[31m", b"[1,1]", b'"a\\u0000b"', b"1979-05-27", b"NaN",
)  # fmt: skip
RECIPE = b'seed = 3\n[data]\nname = "folder"\n[train]\nlr = 1e-5\nbetas = [0.9, 0.98]\nsteps = 2\n[cache]\nkey = "a"\n'
TEXTS = b'dataset = "x"\n[[edits]]\ndomain = "snow"\ninstruction = "put the {} in snow"\nprompt = "a {} in snow"\n'
TABLE = b"path,label,split,domain\n" + b"".join(
    b"%d.png,%s,%s,%s\n" % (n, (b"cat", b"dog")[n % 2], (b"train", b"val", b"test")[n // 4 % 3], (b"a", b"b")[n // 2 % 2])
    for n in range(12)
)


def changed(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with up to four pieces cut out, doubled, or replaced by something odd."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, len(data))
        end = min(len(data), start + rng.choice((0, 0, 1, 3, 10, 40)))
        piece = rng.choice((b"", data[start:end] * 2, *[rng.choice(ODD)] * 4))
        data = data[:start] + piece + data[end:]
    return data


def told_by(read: Callable[[], object]) -> str:
    """Return the message of a user's mistake; the empty string where there is none."""
    try:
        read()
    except UserError as error:
        return str(error)
    return ""


def options() -> list[str]:
    """Return the names of all options of a recipe."""
    fields = [(name, type(getattr(recipe.Config(), name))) for name in recipe.SECTIONS]
    return [f"{section}.{name}" for section, kind in fields for name in kind.__dataclass_fields__] + ["seed", "recipe"]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a command in a folder of its own and hold it to the contract."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)

    def run(*argv: str) -> None:
        around = sorted(path for path in tmp_path.rglob("*") if home not in path.parents)
        code = main(argv)
        told = capsys.readouterr().err
        assert code in (0, 2), argv
        assert code == 0 or told.count("\n") == 1, (argv, told)
        assert len(told) < 1_500, (argv, told)
        assert sorted(path for path in tmp_path.rglob("*") if home not in path.parents) == around, argv

    return run


def fuzz_recipes(check: Callable[..., None], home: Path, rng: random.Random) -> None:
    """Try a changed recipe file."""
    (home / "mine.toml").write_bytes(changed(RECIPE, rng))
    check("train", "mine.toml", "--print-config")


def fuzz_overrides(check: Callable[..., None], home: Path, rng: random.Random) -> None:
    """Try two options with odd values."""
    sets = []
    for _ in range(2):
        value = rng.choice(ODD).decode("utf-8", "surrogateescape")
        sets += ["--set", f"{rng.choice(options())}={value}"]
    check("train", "folder", *sets, "--print-config")


def fuzz_tables(check: Callable[..., None], home: Path, rng: random.Random) -> None:
    """Try a changed table, read without opening an image."""
    for number in range(12):
        (home / f"{number}.png").touch()
    (home / "table.csv").write_bytes(changed(TABLE, rng))
    sets = ["data.root=.", "data.table=table.csv", "data.split_column=split", "data.domain_column=domain"]
    check("data", "table", "--dry-run", *(word for option in sets for word in ("--set", option)))


def fuzz_caches(check: Callable[..., None], home: Path, rng: random.Random) -> None:
    """Try a changed manifest."""
    entry = home / "cache" / "folder" / "key"
    shutil.rmtree(entry, ignore_errors=True)
    rows = []
    for number in range(3):
        name = AugmentCache.file_name(str(number))
        (entry / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(entry / name)
        rows.append(json.dumps({"file_name": name, "source_id": str(number), "label": 0, "sha256": "0" * 64}))
    (entry / "metadata.jsonl").write_bytes(changed("".join(row + "\n" for row in rows).encode(), rng))
    check("data", "folder", "--verify-cache", "--set", "cache.root=cache")
    assert "\n" not in told_by(lambda: AugmentCache.at(entry).edits)


def fuzz_texts(check: Callable[..., None], home: Path, rng: random.Random) -> None:
    """Try a changed file of edit texts."""
    (home / "texts.toml").write_bytes(changed(TEXTS, rng))
    told = told_by(lambda: parse_edit_prompts(home / "texts.toml"))
    assert "\n" not in told
    assert len(told) < 1_000


KINDS = (fuzz_recipes, fuzz_overrides, fuzz_tables, fuzz_caches, fuzz_texts)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_user_gives_ends_in_a_result_or_in_one_line(kind, check, tmp_path: Path):
    for seed in range(CASES):
        kind(check, tmp_path / "home", random.Random(f"{kind.__name__} {seed}"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_much_more_of_it(kind, check, tmp_path: Path):
    for seed in range(CASES, 12 * CASES):
        kind(check, tmp_path / "home", random.Random(f"{kind.__name__} {seed}"))
