"""Models of strangers: nothing in a folder is run, whatever its configuration asks for."""

import json
from pathlib import Path

import pytest

from flyp_saflex.cli import main
from flyp_saflex.clip.foreign_code import TOKENIZER_OPTIONS, check_config
from flyp_saflex.clip.model import load_clip
from flyp_saflex.errors import ModelError

PAYLOAD = "from pathlib import Path\nPath({marker!r}).touch()\nfrom transformers import PreTrainedTokenizerFast as {name}\n"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """File that the code in the model's folder makes when it is run."""
    return tmp_path / "code-ran"


def arm(folder: Path, marker: Path, *, options: object, text: dict[str, object] | None = None) -> Path:
    """Make a model folder bring a tokeniser with code, as a stranger would."""
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "any/name", **(text or {})}
    if options is not None:
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = options
    path.write_text(json.dumps(config))
    (folder / "evil.py").write_text(PAYLOAD.format(marker=str(marker), name="Evil"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}})
    )
    code = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    return folder


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Code of models goes to a folder of the test; a question on the terminal would be answered with yes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "yes")


def test_a_tokenizer_that_asks_for_trust_is_refused_by_file_key_and_value(tiny_clip_dir: Path, marker: Path):
    arm(tiny_clip_dir, marker, options={"trust_remote_code": True})
    with pytest.raises(ModelError) as error:
        load_clip(f"local-dir:{tiny_clip_dir}")
    message = str(error.value)
    assert message.startswith(
        f"{tiny_clip_dir}/open_clip_config.json: model_cfg.text_cfg.tokenizer_kwargs.trust_remote_code = True"
    )
    assert "remove it" in message
    assert "\n" not in message
    assert not marker.exists()


@pytest.mark.parametrize("options", [None, {}, {"clean": "lower"}])
def test_code_that_a_tokenizer_or_a_text_tower_brings_is_not_run_nor_asked_for(tiny_clip_dir: Path, marker: Path, options):
    arm(tiny_clip_dir, marker, options=options)
    with pytest.raises(ModelError) as error:
        load_clip(f"local-dir:{tiny_clip_dir}")
    assert "\n" not in str(error.value)
    assert not marker.exists()
    arm(tiny_clip_dir, marker, options=options, text={"hf_model_name": str(tiny_clip_dir)})
    with pytest.raises(ModelError):
        load_clip(f"local-dir:{tiny_clip_dir}")
    assert not marker.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"code_revision": "main"},
        {"bpe_path": "/etc/passwd"},
        {"TRUST_REMOTE_CODE": True},
        {"trust_remote_code\n": 1},
        {"clean": {"a": 1}},
        {"additional_special_tokens": [["x"]]},
        {"use_fast": "yes"},
        {"x" * 10_000: "y" * 10_000},
        "trust_remote_code",
        ["trust_remote_code"],
        7,
    ],
)
def test_what_is_not_on_the_list_is_refused_in_one_short_line(options: object):
    config = {"model_cfg": {"vision_cfg": {}, "text_cfg": {"tokenizer_kwargs": options}}}
    with pytest.raises(ModelError) as error:
        check_config(config, "FILE")
    assert str(error.value).startswith("FILE: model_cfg.text_cfg.tokenizer_kwargs")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    "config", [None, 3, [], {}, {"model_cfg": 1}, {"model_cfg": {"text_cfg": {}}}, {"model_cfg": {"vision_cfg": {}}}]
)
def test_what_is_no_configuration_is_named(config: object):
    with pytest.raises(ModelError, match=r"FILE: .*replace the file"):
        check_config(config, "FILE")


def test_every_configuration_of_open_clip_is_accepted():
    import open_clip

    seen = set()
    for name in open_clip.list_models():
        model_cfg = check_config({"model_cfg": open_clip.get_model_config(name)}, name)
        seen |= set(model_cfg["text_cfg"].get("tokenizer_kwargs") or {})
    assert seen
    assert seen <= set(TOKENIZER_OPTIONS)


def test_every_command_that_loads_a_model_refuses_it(
    tiny_clip_dir: Path, tiny_images_dir: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = [
        f"data.root={tiny_images_dir}",
        'data.train_domains=["day"]',
        'data.test_domains=["night"]',
        f"model.name=local-dir:{tiny_clip_dir}",
        "train.steps=1",
        "train.batch_size=4",
    ]
    sets = [word for option in options for word in ("--set", option)]
    run = tmp_path / "run"
    assert main(["train", "folder", *sets, "--run-dir", str(run)]) == 0
    arm(tiny_clip_dir, marker, options={"trust_remote_code": True})
    arm(run / "model", marker, options={"trust_remote_code": True})
    capsys.readouterr()
    for argv in (
        ["train", "folder", *sets, "--run-dir", str(tmp_path / "other"), "--dry-run"],
        ["train", "folder", *sets, "--run-dir", str(tmp_path / "other")],
        ["evaluate", str(run)],
        ["evaluate", str(run), "--dry-run"],
    ):
        assert main(argv) in ((0, 2) if "--dry-run" in argv and argv[0] == "evaluate" else (2,)), argv
        assert not marker.exists(), argv
        assert len(capsys.readouterr().err.strip().splitlines()) <= 1, argv


def test_a_model_of_the_hub_is_checked_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch):
    config = {"model_cfg": {"vision_cfg": {}, "text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}}
    monkeypatch.setattr("open_clip.factory._get_hf_config", lambda *_, **__: config)
    monkeypatch.setattr("open_clip.create_model", lambda *_, **__: pytest.fail("open_clip was asked first"))
    with pytest.raises(ModelError, match=r"hf-hub:some/one/open_clip_config\.json: .*trust_remote_code = True: refused"):
        load_clip("hf-hub:some/one")
