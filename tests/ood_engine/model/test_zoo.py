"""Real architectures of torchvision and timm with random weights; skipped where the libraries are not installed."""

from __future__ import annotations

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


PROVEN = """
timm resnet18 64x64 fc layer4 NCHW - -
timm resnetv2_50 64x64 head.fc norm NCHW - -
timm res2net50_26w_4s 64x64 fc layer4 NCHW - -
timm densenet121 64x64 classifier features NCHW - -
timm dla46_c 64x64 fc level5 NCHW - -
timm dpn48b 64x64 classifier features NCHW - -
timm mobilenetv2_100 64x64 classifier bn2 NCHW - -
timm mobilenetv3_small_050 64x64 classifier blocks NCHW - conv_head,act2
timm mobilenetv4_conv_small 64x64 classifier blocks NCHW - conv_head,norm_head
timm efficientnet_b0 64x64 classifier bn2 NCHW - -
timm mnasnet_small 64x64 classifier bn2 NCHW - -
timm lcnet_050 64x64 classifier blocks NCHW - conv_head,act2
timm tinynet_e 64x64 classifier bn2 NCHW - -
timm ghostnet_050 64x64 classifier blocks NCHW - conv_head,act2
timm regnetx_002 64x64 head.fc final_conv NCHW - -
timm nf_regnet_b0 64x64 head.fc final_act NCHW - -
timm convnext_atto 64x64 head.fc norm_pre NCHW - head.norm
timm xception41 64x64 head.fc act NCHW - -
timm hrnet_w18_small 64x64 classifier final_layer NCHW - -
timm repvgg_a0 64x64 head.fc final_conv NCHW - -
timm rexnet_100 64x64 head.fc features NCHW - -
timm edgenext_xx_small 64x64 head.fc norm_pre NCHW - head.norm
timm mobilevit_xxs 64x64 head.fc final_conv NCHW - -
timm mobilevitv2_050 64x64 head.fc final_conv NCHW - -
timm mobileone_s0 64x64 head.fc final_conv NCHW - -
timm fastvit_t8 64x64 head.fc final_conv NCHW - -
timm poolformer_s12 64x64 head.fc stages NCHW - head.norm
timm starnet_s1 64x64 head norm NCHW - -
timm inception_next_atto 64x64 head.fc2 stages NCHW - head.fc1,head.act,head.norm
timm pvt_v2_b0 64x64 head stages NCHW - -
timm efficientvit_b0 64x64 head.classifier.4 head.in_conv NCHW - head.classifier.0,head.classifier.1,head.classifier.2
timm ese_vovnet19b_dw 64x64 head.fc stages NCHW - -
timm hgnetv2_b0 64x64 head.fc stages NCHW - head.last_conv
timm gernet_s 64x64 head.fc final_conv NCHW - -
timm skresnet18 64x64 fc layer4 NCHW - -
timm resnest14d 64x64 fc layer4 NCHW - -
timm legacy_seresnet18 64x64 last_linear layer4 NCHW - -
timm mixer_s32_224 64x64 head norm NTD - -
timm gmlp_ti16_224 64x64 head norm NTD - -
timm resmlp_12_224 64x64 head norm NTD - -
timm mambaout_femto 224x224 head.fc stages NHWC - head.norm,head.pre_logits
timm shvit_s1 224x224 head.l stages NCHW - -
torchvision resnet18 64x64 fc layer4 NCHW - -
torchvision shufflenet_v2_x0_5 64x64 fc conv5 NCHW - -
torchvision mobilenet_v2 64x64 classifier.1 features NCHW - -
torchvision mobilenet_v3_small 64x64 classifier.3 features NCHW - classifier.0,classifier.1
torchvision mnasnet0_5 64x64 classifier.1 layers NCHW - -
torchvision efficientnet_b0 64x64 classifier.1 features NCHW - -
torchvision regnet_y_400mf 64x64 fc trunk_output NCHW - -
torchvision convnext_tiny 64x64 classifier.2 features NCHW - classifier.0
torchvision swin_t 64x64 head permute NCHW - -
torchvision densenet121 64x64 classifier features NCHW relu -
torchvision mc3_18 4x32x32 fc layer4 NDTHW - -
"""
"""Library, model, size of the images, head, feature map, its layout, ReLU by function, tail."""


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


@pytest.mark.parametrize("row", PROVEN.strip().splitlines(), ids=lambda row: " ".join(row.split()[:2]))
def test_the_map_is_proven_and_gives_the_logits(row):
    source, name, size, head, feature_map, layout, relu, tail = row.split()
    plan, captured, output, tap = run(source, name, tuple(map(int, size.split("x"))))
    assert plan.proven
    assert plan.head_proven
    assert (plan.head, plan.feature_map, plan.layout) == (head, feature_map, layout)
    assert (plan.relu, [step for step, _ in plan.tail]) == (relu == "relu", [] if tail == "-" else tail.split(","))
    assert captured.feature_map.shape[2:].numel() > 1
    recomputed = F.linear(tap.features(captured.feature_map.mean((2, 3))), *tap.weights)
    assert relative_difference(recomputed, output) < 1e-4


NO_MAP = [("timm", "vit_tiny_patch16_224", 64, "head"), ("timm", "xcit_nano_12_p16_224", 64, "head")]


@pytest.mark.parametrize(("source", "name", "side", "head"), NO_MAP)
def test_a_model_without_a_map_has_its_features(source, name, side, head):
    plan, captured, output, tap = run(source, name, (side, side))
    assert (plan.head, plan.feature_map, plan.proven) == (head, None, False)
    assert plan.reason.startswith(f"no module's output has the spatial mean that {head!r} received")
    assert relative_difference(F.linear(captured.head_input, *tap.weights), output) < 1e-5


MIXTURES = [("deit_tiny_distilled_patch16_224", 64, "head", None), ("repvit_m0_9", 64, "head.head.l", "stages")]
MIXTURES += [("levit_128s", 224, "head.linear", "stages"), ("crossvit_tiny_240", 240, "head.0", None)]


@pytest.mark.parametrize(("name", "side", "head", "feature_map"), MIXTURES)
def test_averaged_heads_take_the_argument_that_the_message_names(name, side, head, feature_map):
    with pytest.raises(
        TapError, match=f"the model's output is a mixture of '{head}' and .* choose .* head='{head}' or"
    ):
        run("timm", name, (side, side))
    plan, *_ = run("timm", name, (side, side), head=head)
    assert (plan.head, plan.head_proven, plan.feature_map) == (head, False, feature_map)


def test_a_model_that_classifies_every_position_is_refused():
    with pytest.raises(
        TapError, match=r"no layer was called on one vector per image \(.*'classifier.1' on \[2, 512, 3, 3\]"
    ):
        run("torchvision", "squeezenet1_0", (64, 64))


def test_a_flattened_map_is_a_map_only_by_hand():
    plan, captured, *_ = run("torchvision", "alexnet", (96, 96), feature_map="features")
    assert (plan.head, plan.feature_map, plan.proven) == ("classifier.6", "features", False)
    assert plan.reason == "named by hand, unverified: its spatial mean differs from the input of 'classifier.6'"
    assert captured.feature_map.shape == (2, 256, 2, 2)
