"""The text tower as a tree of prefixes equals the whole context: values, gradients, tangents; and computes what it says."""

import open_clip
import pytest
import torch
from torch.func import functional_call

from flyp_saflex.clip import text_tower as text_module
from flyp_saflex.clip.model import load_clip
from flyp_saflex.clip.text_tower import encode_text, prefix_tree
from flyp_saflex.data.class_prompts import load_prompts
from flyp_saflex.saflex.jvp import directional_derivative

# A caption twice, one that is the beginning of another, one longer than all, the empty one.
TEXTS = ["a photo of a cat.", "a dog", "a rather longer caption of two horses", "", "a photo of a cat.", "a photo of a dog.", "a"]
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


@pytest.fixture
def clip(tiny_clip_dir):
    return load_clip(f"local-dir:{tiny_clip_dir}")


def text_parameters(model):
    model.requires_grad_(True)
    return {name: value for name, value in model.named_parameters() if "visual" not in name and "logit" not in name}


def random_model(cls=open_clip.CLIP, **options):
    torch.manual_seed(0)
    model = cls(embed_dim=32, vision_cfg=RESNET, text_cfg=TEXT | options).double().eval()
    return model, open_clip.tokenize(TEXTS, context_length=16)


def count_rows(monkeypatch, model):
    """Record how many rows enter the first block's MLP."""
    tower, counts = getattr(model, "text", model), []
    mlp = tower.transformer.resblocks[0].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: (counts.append(x[..., 0].numel()), forward(x))[1])
    return counts


@pytest.mark.parametrize("checkpointing", [False, True])
def test_value_and_every_gradient(clip, checkpointing):
    """1e-12 in float64: what is left out has exactly no influence, only sums have another order."""
    model, tokens = clip.model.double(), clip.tokenizer(TEXTS)
    parameters = list(text_parameters(model).values())
    expected = model.encode_text(tokens)
    model.set_grad_checkpointing(checkpointing)
    found = encode_text(model, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad(value, parameters, weight) for value in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_tangent(clip):
    model, tokens = clip.model.double(), clip.tokenizer(TEXTS)
    parameters = {name: value.detach() for name, value in text_parameters(model).items()}
    direction = {name: torch.randn_like(value) for name, value in parameters.items()}

    class Encoder(torch.nn.Module):
        def __init__(self, encode):
            super().__init__()
            self.model, self.encode = model, encode

        def forward(self):
            return self.encode(self.model, tokens)

    def derivative(encode):
        def fn(values):
            return functional_call(Encoder(encode), {f"model.{name}": value for name, value in values.items()}, ())

        return directional_derivative(fn, parameters, direction)

    for ours, theirs in zip(derivative(encode_text), derivative(lambda model, tokens: model.encode_text(tokens)), strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_gradients_of_shared_prefixes_do_not_drown_under_autocast(clip):
    """200 captions share their first tokens; in bf16 the sum over them must not lose its small terms."""
    model, tokens = clip.model, clip.tokenizer([f"a photo of {number}." for number in range(200)])
    wanted = model.transformer.resblocks[0].attn.in_proj_weight
    gradients = []
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            pooled = encode_text(model, tokens).float()
        weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0))
        gradients.append(torch.autograd.grad((pooled * weight).sum(), wanted)[0])
    exact, found = gradients
    assert 0 < (found - exact).norm() / exact.norm() < 0.03  # bf16 has 8 bits; the order of 200 terms would cost more


def test_a_node_per_prefix():
    tokens = torch.tensor(
        [
            [1, 2, 3, 9, 0, 0],
            [1, 2, 4, 9, 0, 0],
            [1, 2, 9, 0, 0, 0],
            [1, 2, 3, 9, 0, 0],  # the first again
            [1, 2, 3, 9, 7, 7],  # and again: behind its end nothing is read
            [5, 2, 3, 9, 0, 0],  # the same words behind another beginning are other nodes
        ]
    )
    tree = prefix_tree(tokens)
    prefixes = {tuple(row[: place + 1]) for row in tokens.tolist() for place in range(row.index(9) + 1)}
    assert len(tree.tokens_M) == len(prefixes) == 11
    assert tree.nodes_UL.shape == (4, 4)
    read = [tree.tokens_M[tree.nodes_UL[text, : tree.lengths_U[text]]].tolist() for text in tree.distinct_N]
    assert read == [row[: row.index(9) + 1] for row in tokens.tolist()]
    assert torch.equal(tree.nodes_UL.flatten()[tree.places_M], torch.arange(11)), "a node's place is a place of its own"
    assert torch.equal(tree.positions_M, tree.places_M % 4)
    assert tree.tokens_M[tree.ends].tolist() == [9, 9, 9, 9]
    places = {}
    for text in range(4):
        for place in range(int(tree.lengths_U[text])):
            places.setdefault(int(tree.nodes_UL[text, place]), set()).add(
                tuple(tree.tokens_M[tree.nodes_UL[text, : place + 1]].tolist())
            )
    assert sorted(prefix for found in places.values() for prefix in found) == sorted(prefixes)
    assert all(len(found) == 1 for found in places.values())


def test_one_text_alone():
    tree = prefix_tree(torch.tensor([[3, 1, 9, 0]]))
    assert tree.tokens_M.tolist() == [3, 1, 9]
    assert tree.distinct_N.tolist() == [0]


def test_the_class_captions_of_iwildcam_have_the_nodes_that_are_claimed(clip):
    """The figures of the module's docstring, with CLIP's own vocabulary; 178 captions differ to the tokenizer."""
    prompts = load_prompts("iwildcam")
    tree = prefix_tree(open_clip.tokenize([prompts.templates[0].replace("{}", name) for name in prompts.class_names]))
    assert (len(prompts.class_names), len(tree.lengths_U), len(tree.tokens_M)) == (182, 178, 909)


def test_every_prefix_is_computed_once(clip, monkeypatch):
    counts = count_rows(monkeypatch, clip.model)
    tokens = clip.tokenizer(TEXTS)
    with torch.no_grad():
        encode_text(clip.model, tokens)
    prefixes = {tuple(row[: place + 1]) for row in tokens.tolist() for place in range(row.index(max(row)) + 1)}
    assert counts == [len(prefixes)]
    assert len(prefixes) < len(TEXTS) * 9 / 2


def test_a_separate_text_tower(shared_dir, monkeypatch):
    if not (shared_dir / "models" / "mini_clip").is_dir():
        pytest.skip("mini_clip is not beside this checkout")
    clip = load_clip(f"local-dir:{shared_dir / 'models' / 'mini_clip'}")
    counts = count_rows(monkeypatch, clip.model)
    tokens = clip.tokenizer(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(encode_text(clip.model, tokens), clip.model.encode_text(tokens), rtol=0, atol=1e-5)
    assert counts[0] < counts[1] / 4


def test_blocks_of_another_kind_read_up_to_the_longest_end(monkeypatch):
    model, tokens = random_model(qk_norm=True)
    counts = count_rows(monkeypatch, model)
    torch.testing.assert_close(encode_text(model, tokens), model.encode_text(tokens), rtol=0, atol=1e-12)
    assert counts == [len(TEXTS) * 9, len(TEXTS) * 16]


@pytest.mark.parametrize("options", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}], ids=str)
def test_another_attention_or_pooling_takes_the_whole_context(monkeypatch, options):
    """Without a causal mask, or with another token pooled, padding matters: nothing is cut."""
    model, tokens = random_model(open_clip.CustomTextCLIP, **options)
    monkeypatch.setattr(text_module, "prefix_tree", lambda _: pytest.fail("a tree of prefixes is wrong here"))
    assert torch.equal(encode_text(model, tokens), model.encode_text(tokens))
