"""Real architectures of torchvision and timm with random weights; skipped where the libraries are not installed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import import_beside_torch
from ood_engine.model.discovery import relative_difference
from ood_engine.model.tap import Tap


def library(name):
    """The library, or a skip."""
    try:
        return import_beside_torch(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")


def build(source, name):
    torch.manual_seed(0)
    if source == "torchvision":
        return library("torchvision").models.get_model(name, weights=None, num_classes=10)
    return library("timm").create_model(name, pretrained=False, num_classes=10)


# library, model, side of the images → head, feature map, layout, ReLU by function, tail
PROVEN = [
    ("torchvision", "resnet18", 64, ("fc", "layer4", "NCHW", False, None)),
    ("torchvision", "densenet121", 64, ("classifier", "features", "NCHW", True, None)),
    ("torchvision", "mobilenet_v2", 64, ("classifier.1", "features", "NCHW", False, None)),
    ("torchvision", "convnext_tiny", 64, ("classifier.2", "features", "NCHW", False, "classifier.0")),
    ("torchvision", "swin_t", 64, ("head", "permute", "NCHW", False, None)),
    ("timm", "resnet18", 64, ("fc", "layer4", "NCHW", False, None)),
    ("timm", "convnext_atto", 64, ("head.fc", "norm_pre", "NCHW", False, "head.norm")),
    ("timm", "mobilenetv2_100", 64, ("classifier", "bn2", "NCHW", False, None)),
    ("timm", "densenet121", 64, ("classifier", "features", "NCHW", False, None)),
]


def run(source, name, side, **names):
    """Plan, what is caught, the model's logits in evaluation mode, and the tap; the model keeps its mode and statistics."""
    model = build(source, name).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.rand((2, 3, side, side), generator=torch.Generator().manual_seed(1))
    tap = Tap(model, **names)
    plan, captured = tap.find(images), tap(images)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        logits = model.eval()(images)
    assert relative_difference(captured.logits, logits) < 1e-5
    return plan, captured, logits, tap


@pytest.mark.parametrize(("source", "name", "side", "expected"), PROVEN, ids=[f"{row[0]} {row[1]}" for row in PROVEN])
def test_the_map_is_proven_and_gives_the_logits(source, name, side, expected):
    plan, captured, logits, tap = run(source, name, side)
    assert plan.proven
    assert (plan.head, plan.feature_map, plan.layout, plan.relu, plan.tail) == expected
    pooled = captured.feature_map.mean((2, 3))
    assert captured.feature_map.shape[2] * captured.feature_map.shape[3] > 1
    with torch.no_grad():
        recomputed = F.linear(tap.features(pooled), tap.head.weight, tap.head.bias)
    assert relative_difference(recomputed, logits) < 1e-4


@pytest.mark.parametrize(
    ("source", "name", "side", "head"),
    [("torchvision", "vit_b_32", 224, "heads.head"), ("timm", "vit_tiny_patch16_224", 224, "head")],
)
def test_a_vision_transformer_has_no_map_and_still_its_features(source, name, side, head):
    plan, captured, logits, tap = run(source, name, side)
    assert (plan.head, plan.feature_map, plan.proven) == (head, None, False)
    assert plan.reason.startswith(f"no module's output has the spatial mean that {head!r} received")
    with torch.no_grad():
        assert relative_difference(tap.head(captured.head_input), logits) < 1e-5


def test_vgg_has_a_map_only_by_hand():
    plan, captured, *_ = run("torchvision", "vgg11_bn", 64, feature_map="features")
    assert (plan.head, plan.feature_map, plan.proven) == ("classifier.6", "features", False)
    assert plan.reason == "named by hand, unverified: its spatial mean differs from the input of 'classifier.6'"
    assert captured.feature_map.shape == (2, 512, 2, 2)
