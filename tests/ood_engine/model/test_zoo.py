"""Real architectures of torchvision and timm with random weights; skipped where the libraries are not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import import_beside_torch
from ood_engine.errors import TapError
from ood_engine.model.outputs import relative_difference
from ood_engine.model.tap import Tap


def library(name):
    """The library, or a skip."""
    try:
        return import_beside_torch(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")


def build(source, name, size):
    torch.manual_seed(0)
    if source == "torchvision":
        return library("torchvision").models.get_model(name, weights=None, num_classes=10)
    takes_size = name.startswith(("mixer", "gmlp", "resmlp", "vit", "deit"))
    options = {"img_size": size} if takes_size else {}
    return library("timm").create_model(name, pretrained=False, num_classes=10, **options)


DOCUMENT = Path(__file__).parents[3] / "docs/models.md"
ROWS = [
    tuple(cell.strip(" `") for cell in line.strip().strip("|").split("|"))
    for line in DOCUMENT.read_text().splitlines()
    if line.startswith(("| timm", "| torchvision"))
]


def sides(text):
    return tuple(map(int, text.split("×")))


def run(source, name, size, **names):
    """Plan, what is caught, the model's output in evaluation mode, and the tap; the model keeps its mode and statistics."""
    model = build(source, name, size).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.rand((2, 3, *size), generator=torch.Generator().manual_seed(1))
    tap = Tap(model, **names)
    plan, captured = tap.find(images), tap(images)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        output = model.eval()(images)
    return plan, captured, output, tap


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:2]))
def test_the_documented_layers_are_found_and_give_the_logits(row):
    source, name, size, argument, head, feature_map, layout, tail = row
    key, _, value = argument.partition("=")
    plan, captured, output, tap = run(source, name, sides(size), **({key: value.strip('"')} if key else {}))
    assert (plan.head, plan.head_proven) == (head, key != "head")
    if plan.head_proven:
        assert relative_difference(F.linear(captured.head_input, *tap.weights), output) < 1e-5
    if feature_map == "none":
        assert (plan.feature_map, plan.proven) == (None, False)
        assert plan.reason.startswith(f"no module's output has the spatial mean that {head!r} received")
        return
    assert (plan.feature_map, plan.relu) == (feature_map.removeprefix("ReLU of `"), feature_map.startswith("ReLU"))
    assert (plan.layout, plan.proven) == (layout, key != "feature_map")
    assert [step for step, _ in plan.tail] == [step.strip(" `") for step in tail.split(",") if step]
    assert captured.feature_map.shape[2:].numel() > 1
    if plan.proven:
        assert relative_difference(tap.features(captured.feature_map.mean((2, 3))), captured.head_input) < 1e-4


MIXTURES = [row for row in ROWS if row[3].startswith("head")]


@pytest.mark.parametrize("row", MIXTURES, ids=lambda row: row[1])
def test_averaged_heads_take_the_argument_that_the_message_names(row):
    source, name, size, argument, *_ = row
    with pytest.raises(TapError, match="the model's output is a mixture of ") as caught:
        run(source, name, sides(size))
    assert argument.replace('"', "'") in str(caught.value)


def test_a_model_that_classifies_every_position_is_refused():
    with pytest.raises(
        TapError, match=r"no layer was called on one vector per image \(.*'classifier.1' on \[2, 512, 3, 3\]"
    ):
        run("torchvision", "squeezenet1_0", (64, 64))
