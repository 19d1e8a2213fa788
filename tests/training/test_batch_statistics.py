"""Statistics of all processes' rows: those of one batch, with its derivatives, and two processes that train what one trains."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import run_ranks, with_overrides
from disc_sets import draw_discs
from safetensors.torch import load_file
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp

from flyp_saflex import recipe
from flyp_saflex.saflex.jvp import forward_mode
from flyp_saflex.tasks.task import Processes
from flyp_saflex.training.batch_statistics import SharedBatchNorm, can_share, share_statistics
from flyp_saflex.training.train import train


def together(*works: Callable[[Processes], torch.Tensor]) -> list[torch.Tensor]:
    """Run functions side by side, each with the communication of a process."""
    barrier, slots = threading.Barrier(len(works), timeout=60), [None] * len(works)
    found: list = [None] * len(works)

    def gather_of(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def gather(tensor: torch.Tensor) -> torch.Tensor:
            slots[rank] = tensor.detach()
            barrier.wait()
            everything = torch.cat(slots)
            barrier.wait()
            return everything

        return gather

    def run(rank: int) -> None:
        found[rank] = works[rank](Processes(gather=gather_of(rank), rank=rank, count=len(works)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_derivatives_and_running_averages_are_those_of_one_batch(momentum: float | None) -> None:
    torch.manual_seed(0)
    rows, tangents, pulls = (torch.randn(6, 3, 4, 4).double() for _ in range(3))
    rows = 50 + rows * torch.arange(1, 7)[:, None, None, None]  # halves with other means and variances
    whole = nn.BatchNorm2d(3, momentum=momentum).double()
    nn.init.normal_(whole.weight)
    leaf = rows.clone().requires_grad_()
    expected = whole(leaf)
    (expected * pulls).sum().backward()
    with torch.no_grad(), forward_mode():
        derivative = jvp(
            lambda x: nn.functional.batch_norm(x, None, None, whole.weight, whole.bias, training=True), (rows,), (tangents,)
        )[1]
    state = whole.state_dict()

    def work(processes: Processes) -> dict[str, torch.Tensor]:
        network = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum).double())
        network.load_state_dict({"0.weight": state["weight"], "0.bias": state["bias"]}, strict=False)
        parameter = network[0].weight
        share_statistics(network, processes, freeze_batchnorm=False)
        assert network[0].weight is parameter
        own = slice(3 * processes.rank, 3 * processes.rank + 3)
        inputs = rows[own].clone().requires_grad_()
        outputs = network(inputs)
        (outputs * pulls[own]).sum().backward()
        moved = {name: value.clone() for name, value in network.named_buffers()}
        with torch.no_grad():
            dual = forward_ad.make_dual(rows[own].clone(), tangents[own])
            tangent = forward_ad.unpack_dual(functional_call(network, moved, (dual,))).tangent
        assert all(torch.equal(moved[name], value) for name, value in network.named_buffers()), "gains move no statistic"
        evaluated = network.eval()(inputs)
        return moved | {"out": outputs, "in": inputs.grad, "weight": parameter.grad, "tangent": tangent, "evaluated": evaluated}

    with forward_mode(), forward_ad.dual_level():  # one level for both threads: levels are counted for all of them together
        first, second = together(work, work)
    for name, wanted in (("out", expected), ("in", leaf.grad), ("tangent", derivative), ("evaluated", whole.eval()(rows))):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), wanted)
    torch.testing.assert_close(first["weight"] + second["weight"], whole.weight.grad)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(first[f"0.{name}"], state[name])
        assert torch.equal(first[f"0.{name}"], second[f"0.{name}"])


def test_norms_are_exchanged_only_where_that_matters() -> None:
    class Odd(nn.BatchNorm2d):
        """A norm that does more."""

    norms = nn.BatchNorm1d(2), Odd(2), nn.BatchNorm2d(2, track_running_stats=False)
    assert [can_share(norm) for norm in norms] == [True, False, False]
    for count, freeze, exchanged in ((2, False, True), (2, True, False), (1, False, False)):
        network = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2)))
        share_statistics(network, Processes(count=count), freeze_batchnorm=freeze)
        assert isinstance(network[0][0], SharedBatchNorm) == exchanged


IMAGES = ("network.width=4", "train.steps=6", "train.batch_size=8", "train.evaluate_every=0", "train.checkpoint_every=0")
CASES = {
    "table, CutMix, all gains": ("tabular-qsar", "saflex.preset=paper-log", "saflex.estimator=exact"),
    "table, Mixup, head scope": ("tabular-qsar", "augment.upstream=mixup", "saflex.preset=robust"),
    "images, exact gains in the joint batch": ("medmnist-breast", *IMAGES, "saflex.estimator=exact"),
    "images, estimated gains, compared": ("medmnist-breast", *IMAGES, "saflex.estimator=one-sided", "saflex.check_every=2"),
    "images in parts, head scope": ("medmnist-breast", *IMAGES, "saflex.preset=robust", "train.accumulation=2"),
    "views, all gains": ("contrastive-retina", *IMAGES, "network.projection=8", "saflex.validation_rows=6"),
    "views, head scope": ("contrastive-retina", *IMAGES, "network.projection=8", "saflex.preset=robust"),
}


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., list[str]]:
    """`options("tabular-qsar", ...)`: the recipe's options on drawn data, with SAFLEX."""

    def make(name: str, *changes: str) -> list[str]:
        common = [
            f"data.root={tmp_path}",
            "train.eps=1e-3",
            "train.log_every=1",
            "train.log_augmented=true",
            "evaluate.bootstrap=0",
        ]
        if name.startswith("tabular"):
            torch.manual_seed(0)
            cells = torch.randn(160, 3)
            lines = [f"{a:.4f},{b:.4f},{c:.4f},{int(a + b > 0)}" for a, b, c in cells.tolist()]
            (tmp_path / "toy.csv").write_text("\n".join(["a,b,c,ill", *lines]), encoding="utf-8")
            card = 'title = "Toy"\nfile = "toy.csv"\ntarget = "ill"\n'
            (tmp_path / "toy.toml").write_text(card, encoding="utf-8")
            common += [f"data.card={tmp_path / 'toy.toml'}", "network.hidden=[8,8]", "train.steps=8", "train.batch_size=16"]
        else:
            draw_discs(tmp_path, "breast", (32, 12, 16))
            common += ["data.card=breast", "data.accept_altered=true"]
        return [*common, "saflex.enabled=true", *changes]

    return make


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(options: Callable[..., list[str]], tmp_path: Path, case: str) -> None:
    """Sums over the batch are taken in another order, and a finite difference enlarges that; a large epsilon holds AdamW back."""
    name, *changes = CASES[case]
    tolerance = 1e-3 if "estimated" in case else 1e-4
    overrides = options(name, *changes)
    train(recipe.load(name, overrides), tmp_path / "one")
    out, _ = run_ranks(with_overrides("train", name, "--run-dir", str(tmp_path / "two"), overrides=overrides), tmp_path)
    assert "2 processes" in out
    assert "do not train what one trains" not in out
    one, two = (load_file(tmp_path / run / "model/weights.safetensors") for run in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")
    logs = [[row["loss"] for row in rows_of(tmp_path / run / "metrics.jsonl") if "loss" in row] for run in ("one", "two")]
    assert logs[1] == pytest.approx(logs[0], abs=tolerance)
    assert len(set(logs[0])) == len(logs[0])
    decided = [
        sorted((row["step"], row["id"], row["weight"] > 0) for row in rows_of(tmp_path / run / "augmented.jsonl"))
        for run in ("one", "two")
    ]
    assert decided[0] == decided[1]
    assert any(kept for *_, kept in decided[0])
