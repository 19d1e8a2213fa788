"""Weights of a file: what is taken for them is told, and files that cannot be read come with the way out."""

import subprocess
import sys
import warnings

import open_clip
import pytest
import torch

from flyp_saflex.clip.model import load_clip
from flyp_saflex.errors import ModelError

NAME = "ViT-S-32"


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return open_clip.create_model(NAME).eval()


def save_archive(model, path):
    """Save a model as OpenAI did."""
    inputs = (torch.randn(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the form is deprecated, its files are not
        torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), path)


def test_activation_and_preprocessing_of_a_file_are_told(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "weights.pt")
    notes = load_clip(NAME, str(tmp_path / "weights.pt")).notes
    assert any("are run with GELU; those of OpenAI, DFN and MetaCLIP need QuickGELU" in note for note in notes)
    assert any("mean 0.481 0.458 0.408, std 0.269 0.261 0.276, interpolation bicubic" in note for note in notes)
    assert not any("positions" in note for note in notes)


def test_interpolated_positions_are_told(tmp_path):
    torch.save(open_clip.create_model(NAME, force_image_size=320).state_dict(), tmp_path / "large.pt")
    notes = load_clip(NAME, str(tmp_path / "large.pt")).notes
    assert any("101 positions, the model 50: they are interpolated" in note for note in notes)


def test_a_file_is_prepared_as_all_published_weights_of_its_architecture(tmp_path):
    name = "MobileCLIP2-S0"
    torch.save(open_clip.create_model(name, load_weights=False).state_dict(), tmp_path / "mobile.pt")
    found = load_clip(name, str(tmp_path / "mobile.pt")).config["preprocess_cfg"]
    tag = open_clip.get_pretrained_cfg(name, open_clip.list_pretrained_tags_by_model(name)[0])
    assert (list(found["mean"]), list(found["std"]), found["interpolation"]) == ([0, 0, 0], [1, 1, 1], "bilinear")
    assert found["interpolation"] == tag["interpolation"]


def test_foreign_checkpoints_come_with_the_way_out(small, tmp_path):
    torch.save(small, tmp_path / "module.pt")
    save_archive(small, tmp_path / "archive.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    cases = {
        (NAME, str(tmp_path / "module.pt")): "holds pickled Python objects",
        (NAME, str(tmp_path / "archive.pt")): "is a TorchScript archive",
        (f"local-dir:{tmp_path / 'folder'}", ""): "has the layout of transformers",
    }
    for (name, pretrained), words in cases.items():
        with pytest.raises(ModelError, match=words) as caught:
            load_clip(name, pretrained)
        assert "\n" not in str(caught.value)
        assert "the path of a checkpoint file" not in str(caught.value), "it was given"


def test_the_advice_for_an_archive_is_a_command_that_works(small, tmp_path, monkeypatch):
    save_archive(small, tmp_path / "archive.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_clip(NAME, "archive.pt")
    command = str(caught.value).split('python -c "')[1].split('"')[0]
    subprocess.run([sys.executable, "-c", command], check=True)
    loaded = load_clip(NAME, "archive-state.pt").model
    assert torch.equal(loaded.visual.proj, small.visual.proj)
