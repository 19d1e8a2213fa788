"""`flyp-saflex prompts` with a real captioner and a real chat model, both tiny; nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language_models import WORDS, build_tiny_blip, build_tiny_chat

from flyp_saflex import recipe
from flyp_saflex.cli import main
from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ConfigError, DataError, ModelError, UserError
from flyp_saflex.prompting.captions import draw
from flyp_saflex.prompting.domains import complaint, parse, request
from flyp_saflex.prompting.edit_prompts import load_edit_prompts
from flyp_saflex.prompting.language_models import Captioner, ChatModel
from flyp_saflex.prompting.prompts import caption_images, prompts

CLASSES = ("circle", "square", "stripes")
CAPTIONS = ("a red circle in the forest at night", "stripes near a lake", "a square on a dirt trail") * 3
BAD = "Here are the settings:\n- in the forest at night\n- near two circles\n- near a lake"
GOOD = "- in the forest at night\n- near a lake\n- on a dirt trail"
OUT = Path("prompts") / "folder.auto.toml"


@pytest.fixture(scope="session")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_blip(tmp_path_factory.mktemp("captioner") / "blip", seed=2)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with random weights."""
    return build_tiny_chat(tmp_path_factory.mktemp("chat") / "stranger")


@pytest.fixture(scope="session")
def pupil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that answers the request about CAPTIONS badly, and well once it is told what was wrong."""
    question = request(CAPTIONS, CLASSES, 4)
    again = question + complaint(parse(BAD, CLASSES, 4))
    return build_tiny_chat(tmp_path_factory.mktemp("chat") / "pupil", [(question, BAD), (again, GOOD)])


@pytest.fixture
def options(tiny_images_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [
        f"data.root={tiny_images_dir}",
        "data.train_domains=day",
        "data.test_domains=night",
        "data.select_per_class=2",
        "prompts.captioner=no/captioner",
        "prompts.llm=no/model",
        "prompts.num_captions=7",
        "prompts.max_domains=4",
        "prompts.batch_size=3",
        "prompts.max_new_tokens=60",
        "seed=3",
    ]


@pytest.fixture
def make(options: list[str]) -> Callable[..., Config]:
    return lambda *overrides: recipe.load("folder", [*options, *overrides])


@pytest.fixture
def own_captions(tmp_path: Path) -> str:
    (tmp_path / "captions.csv").write_text("caption\n" + "\n".join(CAPTIONS) + "\n", encoding="utf-8")
    return "prompts.captions=captions.csv"


def set_options(options: list[str]) -> list[str]:
    return [part for option in options for part in ("--set", option)]


def test_from_images_to_a_file_of_edit_texts(
    make: Callable[..., Config], options: list[str], blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = make()
    dataset = load_dataset(config.data, seed=config.seed)
    captions = caption_images(Captioner(str(blip)), draw(dataset.train.samples, 7, seed=3), 3)
    assert len({caption.text for caption in captions}) > 1, "the captioner sees the images"
    question = request([caption.text for caption in captions], dataset.class_names, 4)
    chat = build_tiny_chat(tmp_path / "chat", [(question, GOOD)])
    capsys.readouterr()

    arguments = ["prompts", "folder", *set_options([*options, f"prompts.captioner={blip}", f"prompts.llm={chat}"])]
    assert main(arguments) == 0
    assert "put the {} near a lake" in capsys.readouterr().out
    texts = load_edit_prompts("", "folder")
    assert texts.path == OUT
    assert [edit.instruction for edit in texts.edits] == [
        "put the {} in the forest at night",
        "put the {} near a lake",
        "put the {} on a dirt trail",
    ]
    assert texts.edits[1].prompt == "a photo of a {} near a lake"
    assert texts.positive == dataset.templates[:1]
    assert texts.negative
    assert texts.made == {
        "seed": 3,
        "captioner": str(blip),
        "captioner_revision": "",
        "llm": str(chat),
        "llm_revision": "",
        "answers": [GOOD],
        "captions": [{"path": caption.sample_id, "caption": caption.text} for caption in captions],
    }
    train = {sample.sample_id for sample in dataset.train.samples}
    assert {row["path"] for row in texts.made["captions"]} <= train

    first = OUT.read_bytes()
    assert main(arguments) == 2
    assert "may have been edited by hand: give --force" in capsys.readouterr().err
    OUT.write_text("edited", encoding="utf-8")
    assert main([*arguments, "--force"]) == 0
    assert OUT.read_bytes() == first, "the same seed and models give the same file"


def test_malformed_lines_are_reported_and_asked_again(
    make: Callable[..., Config], pupil: Path, own_captions: str, capsys: pytest.CaptureFixture[str]
):
    path = prompts(make(own_captions, f"prompts.llm={pupil}", "prompts.num_captions=9"))
    printed = capsys.readouterr().out
    assert "'Here are the settings:' does not begin with a hyphen and a space" in printed
    assert "'- near two circles' names the class 'circle'" in printed
    assert "answer 2 of at most 3: 3 domains, 0 malformed lines" in printed
    texts = load_edit_prompts(str(path), "folder")
    assert [edit.domain for edit in texts.edits] == ["in the forest at night", "near a lake", "on a dirt trail"]
    assert texts.made["answers"] == [BAD, GOOD]
    assert texts.made["captions_file"] == "captions.csv"
    assert texts.made["captions"][0].keys() == {"caption"}
    assert "captioner" not in texts.made


def test_valid_lines_are_kept_when_no_answer_is_clean(
    make: Callable[..., Config], pupil: Path, own_captions: str, capsys: pytest.CaptureFixture[str]
):
    path = prompts(make(own_captions, f"prompts.llm={pupil}", "prompts.num_captions=9", "prompts.attempts=1"))
    assert "after 1 answers some lines are still malformed; 2 valid domains are kept" in capsys.readouterr().out
    assert [edit.domain for edit in load_edit_prompts(str(path), "").edits] == ["in the forest at night", "near a lake"]


def test_an_answer_cut_at_max_new_tokens_loses_its_last_line(make: Callable[..., Config], pupil: Path, own_captions: str):
    whole, ended = ChatModel(str(pupil)).answer(request(CAPTIONS, CLASSES, 4), 60)
    assert (whole, ended) == (BAD, True)
    cut, ended = ChatModel(str(pupil)).answer(request(CAPTIONS, CLASSES, 4), 5)
    assert not ended
    assert BAD.startswith(cut)


def test_garbage_is_reported_retried_and_never_passed_on(
    make: Callable[..., Config], stranger: Path, own_captions: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(ModelError, match=r"gave no valid domain in 2 answers .*write the file of edit texts by hand"):
        prompts(make(own_captions, f"prompts.llm={stranger}", "prompts.attempts=2", "prompts.max_new_tokens=30"))
    assert capsys.readouterr().out.count("not used: ") >= 2
    assert not OUT.exists()


def test_checks_come_before_any_model(make: Callable[..., Config], own_captions: str, capsys: pytest.CaptureFixture[str]):
    """The models named do not exist: nobody has looked for them."""
    assert prompts(make(), dry_run=True) == OUT
    assert "captions by no/captioner of 7 of 12 training images" in capsys.readouterr().out
    assert prompts(make(own_captions), dry_run=True) == OUT
    assert "7 captions of captions.csv, have no/model name at most 4 domains" in capsys.readouterr().out
    prompts(make(), dry_run=True, limit=3)
    assert "of 3 of 3 training images" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"none.csv' cannot be read"):
        prompts(make("prompts.captions=none.csv"), dry_run=True)
    with pytest.raises(ConfigError, match=r"prompts.name = '../x' goes into a file name"):
        prompts(make("prompts.name=../x"), dry_run=True)
    with pytest.raises(DataError, match=r"data\.root"):
        prompts(make("data.root=nowhere"), dry_run=True)
    assert not OUT.parent.exists()
    OUT.parent.mkdir()
    OUT.write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match=r"folder.auto.toml exists .* or choose prompts.name"):
        prompts(make())
    assert prompts(make("prompts.name=other"), dry_run=True).name == "folder.other.toml"


def test_a_language_model_that_is_not_here_is_told_before_images_are_captioned(
    make: Callable[..., Config], blip: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(ModelError, match=r"prompts.llm = './none' cannot be loaded"):
        prompts(make(f"prompts.captioner={blip}", "prompts.llm=./none"))
    assert "captions" not in capsys.readouterr().err


def test_only_the_main_process_works(make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    assert prompts(make()) == OUT
    assert not OUT.exists()


def test_unreadable_images_are_skipped_and_counted(make: Callable[..., Config], blip: Path, capsys: pytest.CaptureFixture[str]):
    samples = load_dataset(make().data, seed=3).train.samples
    captioner = Captioner(str(blip))
    whole = caption_images(captioner, samples[:5], 2)
    assert capsys.readouterr().out == ""
    samples[1].path.write_bytes(b"")
    samples[2].path.write_bytes(samples[2].path.read_bytes()[:90])
    some = caption_images(captioner, samples[:5], 2)
    assert some == [whole[0], whole[3], whole[4]], "and the others are captioned as before, whatever batch they are in"
    printed = capsys.readouterr().out
    assert "2 of 5 images cannot be read and are left out" in printed
    assert "the file is empty" in printed
    with pytest.raises(DataError, match="none of the 2 images drawn can be read, first: image"):
        caption_images(captioner, samples[1:3], 2)


def test_empty_captions_are_left_out(make: Callable[..., Config], blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mute = Path(shutil.copytree(blip, tmp_path / "mute"))
    weights = load_file(mute / "model.safetensors")
    (bias,) = (name for name in weights if name.endswith("cls.predictions.bias"))
    weights[bias][3] = 1e4  # always ends at once
    save_file(weights, mute / "model.safetensors", metadata={"format": "pt"})
    samples = load_dataset(make().data, seed=3).train.samples
    with pytest.raises(ModelError, match="gave empty captions only"):
        caption_images(Captioner(str(mute)), samples[:3], 2)
    assert "3 images got an empty caption" in capsys.readouterr().out


def test_captions_are_words_and_depend_on_the_image_only(make: Callable[..., Config], blip: Path):
    samples = load_dataset(make().data, seed=3).train.samples
    captioner = Captioner(str(blip))
    together, alone = caption_images(captioner, samples[:4], 4), caption_images(captioner, samples[:4], 1)
    assert together == alone
    assert {word for caption in together for word in caption.text.split()} <= set(WORDS)


def test_half_precision_weights(blip: Path, stranger: Path):
    captioner = Captioner(str(blip), precision="bf16")
    assert {parameter.dtype for parameter in captioner._model.parameters()} == {torch.bfloat16}
    model = ChatModel(str(stranger), precision="bf16")
    model.load()
    assert {parameter.dtype for parameter in model._model.parameters()} == {torch.bfloat16}


def broken(model: Path, folder: Path, kind: str) -> Path:
    """Return a copy of a model's folder with something wrong in it."""
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    if kind == "no weights":
        weights.unlink()
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "a tensor missing":
        tensors = load_file(weights)
        tensors.pop(next(name for name in sorted(tensors) if "layers.1" in name or "layer.1" in name))
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "broken config":
        (folder / "config.json").write_text("{", encoding="utf-8")
    elif kind == "another size":
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for part in (settings, settings.get("text_config", {})):
            part["intermediate_size"] = 96
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["no weights", "cut weights", "a tensor missing", "broken config", "another size"])
@pytest.mark.parametrize("option", ["captioner", "llm"])
def test_a_model_that_is_not_whole_is_one_line(option: str, kind: str, blip: Path, stranger: Path, tmp_path: Path):
    load = Captioner if option == "captioner" else ChatModel
    folder = broken(blip if option == "captioner" else stranger, tmp_path / "broken", kind)
    reason = "copy it again" if kind in ("no weights", "cut weights", "broken config") else "tensors are not in its file"
    with pytest.raises(ModelError, match=reason) as caught:
        loaded = load(str(folder))
        if isinstance(loaded, ChatModel):
            loaded.load()
    check_line(caught.value, f"prompts.{option} = '{folder}'")


def check_line(error: UserError, start: str) -> None:
    assert str(error).startswith(start)
    assert "\n" not in str(error)
    assert len(str(error)) < 600


@pytest.mark.parametrize("name", ["some-org/some-model", "./nowhere", "a/b/c"])
def test_weights_that_are_not_here_offline_are_one_line(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for load, option in ((Captioner, "captioner"), (ChatModel, "llm")):
        with pytest.raises(ModelError, match=r"cannot be loaded or used .*model's folder; or") as caught:
            load(name)
        check_line(caught.value, f"prompts.{option} = '{name}'")


def test_a_model_of_another_kind_is_one_line(blip: Path, stranger: Path, tmp_path: Path):
    base = build_tiny_chat(tmp_path / "base", template="")
    for load, folder, reason in (
        (Captioner, stranger, "is a chat model, expected one that captions an image"),
        (Captioner, base, "cannot be loaded or used"),
        (ChatModel, base, "has no chat template, expected an instruction-tuned chat model: take its instruct"),
        (ChatModel, blip, "has no chat template"),
    ):
        with pytest.raises(ModelError, match=reason) as caught:
            load(str(folder))
        print(caught.value)
        check_line(caught.value, "prompts.")


def test_a_chat_template_that_refuses_is_one_line(tmp_path: Path):
    strict = build_tiny_chat(tmp_path / "strict", template="{{ raise_exception('no users') }}")
    with pytest.raises(ModelError, match=r"its chat template refuses the request \(no users\)"):
        ChatModel(str(strict)).answer("hello", 5)


def test_a_request_too_long_for_the_model_is_one_line(tmp_path: Path):
    model = ChatModel(str(build_tiny_chat(tmp_path / "short", positions=64)))
    with pytest.raises(ModelError, match=r"at most 64 tokens, but the request has \d+ .*30: lower prompts.num_captions"):
        model.answer("x" * 50, 30)


CONDITIONS = 'prompts.conditions=["at dusk", "near a lake", "infrared at night"]'


def test_named_conditions_come_before_the_domains_of_the_captions(make, pupil: Path, own_captions: str):
    path = prompts(make(own_captions, f"prompts.llm={pupil}", CONDITIONS))
    texts = load_edit_prompts(str(path), "folder")
    assert [edit.instruction for edit in texts.edits] == [
        "put the {} at dusk",
        "put the {} near a lake",  # named by the model as well
        "make it infrared at night",
        "put the {} in the forest at night",
        "put the {} on a dirt trail",
    ]
    assert texts.edits[2].prompt == "a photo of a {}, infrared at night"
    assert texts.made["conditions"] == ["at dusk", "near a lake", "infrared at night"]


def test_conditions_alone_load_no_model(make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in ("Captioner", "ChatModel"):
        monkeypatch.delattr(f"flyp_saflex.prompting.prompts.{name}")
    alone = make(CONDITIONS, "prompts.max_domains=0")
    assert not prompts(alone, dry_run=True).exists()
    assert "3 conditions" in capsys.readouterr().out
    assert [edit.domain for edit in load_edit_prompts(str(prompts(alone)), "folder").edits] == [
        "at dusk",
        "near a lake",
        "infrared at night",
    ]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ('["at {}"]', "expected one line of words such as 'at dusk'"),
        ('[" at dusk"]', "expected one line of words"),
        ('["at dusk\\nin snow"]', "expected one line of words"),
        ('["at dusk", "At dusk"]', "'at dusk' is there twice"),
        ("[]", "leave nothing to write"),
    ],
)
def test_conditions_that_cannot_be_texts_are_one_line(make, conditions: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        prompts(make(f"prompts.conditions={conditions}", "prompts.max_domains=0"))
    check_line(caught.value, "prompts.")
