"""docs/how-to/loops.md: every example is short, runs, and trains on weights and labels that SAFLEX decided."""

from __future__ import annotations

import pytest
import torch
from documents import Page

from flyp_saflex.saflex import for_module

PAGE = Page("docs/how-to/loops.md")
EXAMPLES = dict(zip(PAGE.headings, [text for kind, text in PAGE.blocks if kind == "python"], strict=True))
STEPS = {"PyTorch": 12, "Lightning": 4, "Hugging Face Trainer": 4, "timm": 4}


def test_there_are_four_examples_under_forty_lines():
    assert set(EXAMPLES) == set(STEPS)
    assert all(len(text.splitlines()) < 40 for text in EXAMPLES.values())


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")  # advice about workers and batch sizes of real data
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch's, in lightning's own code
@pytest.mark.parametrize("name", STEPS)
def test_an_example_trains_with_one_decision_per_step(name, tmp_path, monkeypatch):
    if name == "Lightning":
        pytest.importorskip("lightning", reason="lightning is in the extra `dev`")
    monkeypatch.chdir(tmp_path)
    decided, before, models, called = [], [], [], for_module.ModuleSaflex.__call__

    def record(self, step, *rows, **options):
        before.extend([value.detach().clone() for value in self.model.parameters()] if not before else [])
        weights, labels = called(self, step, *rows, **options)
        decided.append((step, weights, labels, self.saflex.diagnostics))
        models.append(self.model)
        return weights, labels

    monkeypatch.setattr(for_module.ModuleSaflex, "__call__", record)
    torch.manual_seed(0)
    exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "example"})
    assert [step for step, *_ in decided] == list(range(STEPS[name]))
    weights, labels = (torch.cat([row[place] for row in decided]) for place in (1, 2))
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(len(labels)))
    assert (weights >= 0).all()
    assert (weights > 0).any()
    assert all(told.num_rows > 0 and told.num_invalid == 0 and told.mean_gain != 0 for *_, told in decided), "gains were taken"
    pairs = zip(before, models[-1].parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in pairs if new.ndim > 1), "every matrix is trained"
