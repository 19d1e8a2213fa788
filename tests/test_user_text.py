"""Text that users write: every file ends as values or as one line that says what to mend."""

from pathlib import Path

import pytest

from flyp_saflex import recipe
from flyp_saflex.cli import main
from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.prompting.edit_prompts import parse_edit_prompts
from flyp_saflex.user_text import LONGEST_QUOTE, is_file_name, quoted

BROKEN = {
    "latin": (b'[data]\nroot = "caf\xe9"\n', "is not UTF-8 text (line 2), expected UTF-8"),
    "utf-16": ("seed = 1\n".encode("utf-16"), "is UTF-16 text (line 1), expected UTF-8"),
    "nested": (b"a = " + b"[" * 5_000 + b"]" * 5_000, "nested too deeply"),
    "nested-less": (b"a = " + b"[" * 100 + b"]" * 100, "nested too deeply"),
    "tables": (b"[" + b".".join([b"a"] * 500) + b"]\n", "nested too deeply"),
    "digits": (b"seed = " + b"9" * 6_000, "not valid TOML"),
    "fewer-digits": (b"seed = " + b"9" * 4_000, "seed is a number of"),
    "hexadecimal": (b"seed = 0x" + b"f" * 20_000, "seed is a number of 80000 bits"),
    "nul": (b'[data]\nroot = "a\\u0000b"\n', "data.root has a NUL character"),
    "nul-in-key": (b'"a\\u0000b" = 1\n', "NUL character"),
    "key": (b"x" * 10_000 + b" = 1\n", "xxx"),
    "value": (b'data = "' + b"x" * 10_000 + b'"\n', "xxx"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("read", [lambda path: recipe.load(str(path)), parse_edit_prompts])
def test_a_broken_file_is_one_short_line(name: str, read, tmp_path: Path):
    text, words = BROKEN[name]
    path = tmp_path / "mine.toml"
    path.write_bytes(text)
    words = words if read is not parse_edit_prompts or "nul" not in name else "unknown key"
    with pytest.raises((ConfigError, DataError)) as error:
        read(path)
    message = str(error.value)
    if name not in ("key", "value"):
        assert words in message
    assert "mine.toml" in message
    assert "\n" not in message
    assert len(message) < LONGEST_QUOTE + 500


def test_a_byte_order_mark_is_left_out(tmp_path: Path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfseed = 7\n")
    assert recipe.load(str(tmp_path / "a.toml")).seed == 7
    (tmp_path / "b.toml").write_bytes(b'\xef\xbb\xbfdataset = "x"\n[[edits]]\ninstruction = "snow"\n')
    assert [edit.instruction for edit in parse_edit_prompts(tmp_path / "b.toml").edits] == ["snow"]


@pytest.mark.parametrize(
    "override",
    [
        "seed=" + "9" * 6_000,
        "seed=" + "9" * 400,
        "data.root=" + "[" * 5_000,
        "train.lr=" + "[" * 100 + "]" * 100,
        ".".join(["a"] * 3_000) + "=1",
        "x" * 5_000,
        "x" * 5_000 + "=1",
        'data.root="a\\u0000b"',
        "data.root=caf\udce9",
        "train.lr=caf\udce9",
        "data.name=" + "x" * 5_000,
        "train.lr=inf",
        "train.lr=nan",
        "train.eps=inf",
        "train.weight_decay=inf",
        "train.max_loss=nan",
        "saflex.penalty=inf",
        "saflex.penalty=nan",
        "saflex.temperature=inf",
        "train.betas=[1,1]",
        "train.betas=[0.9,1.0]",
        "train.epochs=inf",
    ],
)
def test_an_override_that_no_option_takes_is_one_short_line(override: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "folder", "--set", override, "--print-config"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert len(told) < 2 * LONGEST_QUOTE + 600


@pytest.mark.parametrize("name", ["x" * 5_000, "a\nb", "x" * 300 + ".toml", "a\tb.toml"])
def test_a_recipe_of_any_name_is_one_short_line(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", name, "--print-config"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert len(told) < LONGEST_QUOTE + 600


@pytest.mark.parametrize("key", ["../x", "/etc", "a/b", "..", ".", "a\\b", "a\nb", "x" * 300, "a:b"])
@pytest.mark.parametrize("option", ["cache.key", "cache.scores"])
def test_names_below_the_cache_cannot_leave_it(option: str, key: str):
    assert not is_file_name(key)
    config = recipe.load("folder")
    section, _, field = option.partition(".")
    with pytest.raises(ConfigError, match=rf"{option} = .*: expected a plain name"):
        recipe.build({section: {field: key}}, "here")
    assert config.cache.key == ""


@pytest.mark.parametrize("command", ["generate", "filter", "train", "data"])
def test_no_command_follows_a_key_out_of_the_cache(
    command: str, tmp_path: Path, tiny_images_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for key in ("../../../away", str(tmp_path / "away"), "a/../../../../away"):
        sets = ["--set", f"cache.root={tmp_path / 'deep' / 'cache'}", "--set", f"cache.key={key}"]
        assert main([command, "folder", "--set", f"data.root={tiny_images_dir}", *sets]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "cache.key = " in told
    assert sorted(tmp_path.rglob("*")) == before


def test_quotes_are_short_and_printable():
    assert quoted("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    assert len(quoted("x" * 10_000)) == LONGEST_QUOTE + 3
    assert is_file_name("instruct-pix2pix-0123abcd")
    assert is_file_name("größe 2")
