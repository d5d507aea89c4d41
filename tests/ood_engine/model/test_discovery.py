from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ood_engine.errors import InputError, TapError
from ood_engine.model.discovery import discover
from ood_engine.model.layouts import LAYOUTS
from ood_engine.model.outputs import agrees_with_logits, relative_difference, tensors_of
from ood_engine.model.tap import Tap

CLASSES, WIDTH = 4, 6


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def images(count=5, side=8, dtype=torch.float32):
    return torch.randn((count, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=dtype)


class Toy(nn.Module):
    """Named modules, called and returned as a test wants."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def linear(width=WIDTH):
    return nn.Linear(width, CLASSES)


def convolutions(*layers):
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), *layers)


def bottleneck():
    """Adds in place, and calls one ReLU twice."""
    layers = {"conv": nn.Conv2d(WIDTH, WIDTH, 1), "bn": nn.BatchNorm2d(WIDTH), "relu": nn.ReLU(inplace=True)}
    return Toy(lambda m, x: m.relu(m.bn(m.relu(m.conv(x))).add_(x)), **layers)


def resnet(scale=1):
    layers = {"conv1": convolutions(nn.ReLU(inplace=True)), "layer4": nn.Sequential(bottleneck(), bottleneck())}
    return Toy(lambda m, x: m.fc(scale * m.layer4(m.conv1(x)).mean((2, 3))), **layers, fc=linear())


def densenet(inplace):
    def run(m, x):
        return m.classifier(F.relu(m.features(x), inplace=inplace).mean((2, 3)))

    return Toy(run, features=convolutions(), classifier=linear())


def mobilenet():
    layers = {"features": convolutions(nn.ReLU6(inplace=True)), "classifier": nn.Sequential(nn.Dropout(0.5), linear())}
    return Toy(lambda m, x: m.classifier(m.features(4 * x).mean((2, 3))), **layers)


def one_relu():
    """Every activation is the same module, and the last of its calls is not on a map."""

    def run(m, x):
        return m.fc(m.relu(m.relu(m.conv2(m.relu(m.conv1(x))) + 1).mean((2, 3))))

    return Toy(run, conv1=nn.Conv2d(3, WIDTH, 3), conv2=nn.Conv2d(WIDTH, WIDTH, 3), relu=nn.ReLU(), fc=linear())


def channels_last(run=lambda m, x: m.head(m.norm(m.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))):
    """A map [N, H, W, D], as Swin and timm's ConvNeXt have it."""
    return Toy(run, stem=nn.Conv2d(3, WIDTH, 2, 2), norm=nn.LayerNorm(WIDTH), window=nn.Identity(), head=linear())


def rectified():
    """Changes the output of its norm in place."""
    return channels_last(lambda m, x: m.head(F.relu(m.norm(m.stem(x).mean((2, 3))), inplace=True)))


def projected(activation):
    """Has another number of channels behind the pooling, as MobileNetV3 has."""
    layers = {
        "stem": nn.Conv2d(3, WIDTH, 2, 2),
        "project": nn.Conv2d(WIDTH, 7, 1),
        "act": activation,
        "head": linear(7),
    }
    return Toy(lambda m, x: m.head(m.act(m.project(m.stem(x).mean((2, 3), keepdim=True))).flatten(1)), **layers)


def transformer(pool):
    """A ViT in small: patches, attention, and either the mean over tokens or the first of them."""
    layers = {"patches": nn.Conv2d(3, WIDTH, 4, 4), "norm": nn.LayerNorm(WIDTH), "head": linear()}
    block = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True)

    def run(m, x):
        return m.head(pool(m.norm(m.block(m.patches(x).flatten(2).transpose(1, 2)))))

    return Toy(run, block=block, **layers)


def vgg_gap():
    layers = [nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, linear())


def vgg_mlp():
    """torchvision's VGG: the head reads a flattened map through hidden layers."""
    layers = {
        "features": nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)),
        "avgpool": nn.AdaptiveAvgPool2d(7),
        "classifier": nn.Sequential(nn.Linear(WIDTH * 49, 10), nn.ReLU(True), linear(10)),
    }
    return Toy(lambda m, x: m.classifier(m.avgpool(m.features(x)).flatten(1)), **layers)


def pooled_norm(*layers):
    return nn.Sequential(nn.Conv2d(3, WIDTH, 2, 2), nn.GELU(), nn.AdaptiveAvgPool2d(1), *layers, linear())


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.ReLU(), linear(10))


def nudge(model):
    """Weights and statistics away from their neutral initial values, so that norms and biases do something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                noise = 0.3 * torch.rand(tensor.shape, generator=generator)
                tensor.add_(noise.to(tensor.dtype) if "var" in name else (noise - 0.1).to(tensor.dtype))
    return model


def build(make):
    torch.manual_seed(0)
    return nudge(make()).train()


# model → (feature_map, call, layout, relu, tail)
PROVEN = {
    "resnet": (resnet, ("layer4", 0, "NCHW", False, ())),
    "densenet": (lambda: densenet(False), ("features", 0, "NCHW", True, ())),
    "densenet in place": (lambda: densenet(True), ("features", 0, "NCHW", True, ())),
    "vgg with global pooling": (vgg_gap, ("2", 0, "NCHW", False, ())),
    "mobilenet": (mobilenet, ("features", 0, "NCHW", False, ())),
    "one relu": (one_relu, ("relu", 1, "NCHW", False, ())),
    "convnext": (lambda: pooled_norm(LayerNorm2d(WIDTH), nn.Flatten()), ("1", 0, "NCHW", False, ("3",))),
    "layer norm on vectors": (lambda: pooled_norm(nn.Flatten(), nn.LayerNorm(WIDTH)), ("1", 0, "NCHW", False, ("4",))),
    "channels last": (channels_last, ("norm", 0, "NHWC", False, ())),
    "projection in place": (lambda: projected(nn.Hardswish(True)), ("stem", 0, "NCHW", False, ("project", "act"))),
    "mean over tokens": (lambda: transformer(lambda tokens: tokens.mean(1)), ("norm", 0, "NTD", False, ())),
}


@pytest.mark.parametrize("style", PROVEN)
def test_the_map_of_every_style_is_found_and_gives_the_logits(style):
    make, expected = PROVEN[style]
    tolerances = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
    for dtype, tolerance in tolerances.items():
        model = build(make).to(dtype)
        x = images(dtype=dtype)
        tap = Tap(model)
        plan = tap.find(x)
        assert plan.proven, dtype
        assert (plan.feature_map, plan.call, plan.layout, plan.relu, tuple(name for name, _ in plan.tail)) == expected
        assert plan.reason.startswith("verified: its spatial mean")
        assert (not plan.tail) == ("through" not in plan.reason)
        captured = tap(x)
        assert captured.feature_map.shape[:2] == (5, WIDTH)
        features = tap.features(captured.feature_map.double().mean((2, 3)).to(dtype))
        logits = copy.deepcopy(model).eval()(x)
        assert relative_difference(features, captured.head_input) < tolerance
        assert relative_difference(F.linear(features, tap.head.weight, tap.head.bias), logits) < tolerance
        assert relative_difference(captured.logits, logits) < tolerance


def test_images_in_channels_last_memory_give_the_same():
    for style in ("resnet", "densenet in place", "mobilenet", "channels last"):
        model = build(PROVEN[style][0])
        x = images()
        tap, other = Tap(model), Tap(model.to(memory_format=torch.channels_last))
        plan = tap.find(x)
        assert other.find(x.to(memory_format=torch.channels_last)) == plan
        found = other(x.to(memory_format=torch.channels_last)).feature_map
        torch.testing.assert_close(found, tap(x).feature_map, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (mlp, "no module of the model has an output with more than one position (H·W > 1)"),
        (
            lambda: transformer(lambda tokens: tokens[:, 0]),
            "no module's output has the spatial mean that 'head' received",
        ),
        (vgg_mlp, "no module's output has the spatial mean that 'classifier.2' received"),
        (rectified, "no module's output has the spatial mean that 'head' received"),
    ],
)
def test_a_model_without_such_a_map_still_gives_its_features_and_says_why(make, reason):
    model = build(make)
    tap = Tap(model)
    plan = tap.find(images())
    assert (plan.feature_map, plan.proven) == (None, False)
    assert plan.reason.startswith(reason)
    assert "inf" not in plan.reason
    captured = tap(images())
    assert captured.feature_map is None
    torch.testing.assert_close(tap.head(captured.head_input), copy.deepcopy(model).eval()(images()))


def test_the_reason_names_the_closest_module():
    model = build(lambda: resnet(1.02))
    assert "; the closest, 'layer4', has a relative difference of 0.02" in Tap(model).find(images()).reason
    # In bfloat16 logits are compared loosely, the mean is not.
    assert not Tap(model.bfloat16()).find(images()).proven


def test_a_map_with_one_position_is_no_proof():
    model = build(vgg_gap)
    assert Tap(model).find(images()).proven
    model[2] = nn.MaxPool2d(8)
    plan = Tap(model).find(images())
    assert plan.feature_map is None
    assert plan.reason.startswith("no module's output has the spatial mean")


def test_a_map_named_by_hand_is_unproven_and_its_values_are_those_the_module_returned():
    model = build(vgg_mlp)
    tap = Tap(model, feature_map="features.0")
    plan = tap.find(images())
    assert (plan.feature_map, plan.proven, plan.relu, plan.layout) == ("features.0", False, False, "NCHW")
    assert plan.reason == "named by hand, unverified: its spatial mean differs from the input of 'classifier.2'"
    found = tap(images()).feature_map
    assert torch.equal(found, model.features[0](images()))  # and not what the ReLU in place behind it left
    assert Tap(model, feature_map="avgpool").find(images()).feature_map == "avgpool"


def test_a_map_named_by_hand_is_proven_where_it_can_be():
    model = build(resnet)
    assert Tap(model, feature_map="layer4.1").find(images()).proven
    assert Tap(model, feature_map="layer4.1.relu").find(images()).call == 1
    assert not Tap(model, feature_map="layer4.0").find(images()).proven


def test_the_layout_of_a_map_named_by_hand_is_the_one_with_the_heads_channels():
    def scaled(m, x):
        return m.head(2 * m.norm(m.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))

    tap = Tap(build(lambda: channels_last(scaled)), feature_map="norm")
    assert (tap.find(images(side=10)).layout, tap.plan.proven) == ("NHWC", False)
    assert tap(images(side=10)).feature_map.shape == (5, WIDTH, 5, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "3",
            r"feature_map='3': expected an output of 5 samples with more than one channel and position.* got \[5, 6, 1, 1\]",
        ),
        ("4", r"feature_map='4': .* got \[5, 6\]; name a layer before the pooling"),
        ("spare", "feature_map='spare': the module was not called, or its output is not a floating point tensor"),
    ],
)
def test_a_module_that_is_no_map_is_refused_by_name(name, message):
    class Skips(nn.Sequential):
        def forward(self, x):
            return nn.Sequential(*list(self)[:6])(x)

    model = Skips(*build(vgg_gap))
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(TapError, match=message):
        Tap(model, feature_map=name).find(images())


def test_windows_are_not_taken_for_samples():
    def windows(m, x):
        tokens = m.stem(x).flatten(2).transpose(1, 2)
        tokens = m.window(tokens.reshape(-1, 4, WIDTH)).reshape(len(x), -1, WIDTH)
        return m.head(m.norm(tokens[:, 0]))

    with pytest.raises(TapError, match=r"expected an output of 5 samples .* got \[20, 4, 6\]"):
        Tap(build(lambda: channels_last(windows)), feature_map="window").find(images())


def test_no_hook_stays_where_the_model_was_looked_at():
    model = build(resnet).eval()
    modules = dict(model.named_modules())
    assert discover(modules, lambda: model(images()), 5)[0].proven
    with pytest.raises(RuntimeError):
        discover(modules, lambda: model(images()[:, :2]), 5)
    assert not any(module._forward_hooks for module in modules.values())


def test_all_zero_features_prove_nothing():
    model = build(resnet)
    nn.init.constant_(model.layer4[1].bn.bias, -100.0)
    plan = Tap(model).find(images())
    assert plan.feature_map is None
    assert plan.reason == "'fc' received only zeros, which prove nothing; fit on real images"


def test_a_constant_behind_dead_units_proves_nothing():
    model = build(lambda: projected(nn.ReLU()))
    model.stem = nn.Sequential(model.stem, nn.ReLU())
    nn.init.constant_(model.stem[0].bias, -100.0)
    nn.init.constant_(model.project.bias, 1.0)
    plan = Tap(model).find(images())
    assert (plan.feature_map, plan.proven) == (None, False)


def pooled(run, bias=True, kind=nn.Linear):
    """A pooled convolution, and heads that are called and returned as a test wants."""
    heads = {"fc": kind(WIDTH, CLASSES, bias=bias), "aux": linear(), "wide": nn.Linear(WIDTH, 9)}
    return Toy(lambda m, x: run(m, m.conv(x).mean((2, 3))), conv=nn.Conv2d(3, WIDTH, 3), **heads)


class Outputs(NamedTuple):
    features: torch.Tensor
    scores: torch.Tensor


@dataclass
class Scored:
    parts: list


class Property:
    def __init__(self, z):
        self._kept = (z,)

    @property
    def logits(self):
        return self._kept[0]


RETURNS = {
    "tensor": lambda z, h: z,
    "tuple": lambda z, h: (z, h),
    "list": lambda z, h: [h, z, z.softmax(1)],
    "named tuple": lambda z, h: Outputs(h, z),
    "data class": lambda z, h: Scored([h, {"z": z}]),
    "dict": lambda z, h: {"loss": None, "logits": z, "other": z + 1},
    "object": lambda z, h: SimpleNamespace(logits=z, other=z + 1),
    "property": lambda z, h: Property(z),
    "with prototypes": lambda z, h: (z, torch.ones(3, 6), SimpleNamespace(layer=nn.Linear(6, 5))),
    "softmax": lambda z, h: z.softmax(1),
    "log softmax": lambda z, h: z.log_softmax(1),
}


def test_what_a_model_may_return():
    for form, wrap in RETURNS.items():
        tap = Tap(build(lambda wrap=wrap: pooled(lambda m, h: wrap(m.fc(h), h))))
        plan = tap.find(images())
        assert (plan.head, plan.feature_map, plan.proven, plan.head_proven) == ("fc", "conv", True, True), form
        assert agrees_with_logits(F.linear(tap(images()).head_input, *tap.weights), tap(images()).logits), form


CALLS = {
    "by keyword": (lambda m, h: m.fc(input=h), "fc", 0),
    "auxiliary head first": (lambda m, h: (m.aux(h), m.fc(h))[1], "fc", 0),
    "auxiliary head last": (lambda m, h: (m.fc(h), m.aux(2 * h))[0], "fc", 0),
    "used twice, first counts": (lambda m, h: (m.fc(h), m.fc(h + 1))[0], "fc", 0),
    "used twice, last counts": (lambda m, h: (m.fc(h + 1), m.fc(h))[1], "fc", 1),
    "wide head last": (lambda m, h: (m.fc(h), m.wide(h))[0], "fc", 0),
}


@pytest.mark.parametrize("style", CALLS)
def test_the_call_that_makes_the_logits_is_found(style):
    run, head, call = CALLS[style]
    model = build(lambda: pooled(run))
    tap = Tap(model)
    plan = tap.find(images())
    assert (plan.head, plan.head_call, plan.feature_map, plan.proven) == (head, call, "conv", True)
    torch.testing.assert_close(tap(images()).head_input, model.conv(images()).mean((2, 3)))


@pytest.mark.parametrize("bias", [True, False])
def test_a_zero_initialised_head_and_a_head_without_bias(bias):
    model = build(lambda: pooled(lambda m, h: (m.aux(2 * h), m.fc(h))[1], bias=bias))
    for parameter in (*model.fc.parameters(), *model.aux.parameters()):
        nn.init.zeros_(parameter)
    plan = Tap(model).find(images())
    assert (plan.head, plan.proven) == ("fc", True)  # of heads that cannot be told apart, the last


def test_a_bare_linear_layer_is_a_head():
    probe = nn.Linear(WIDTH, CLASSES)
    tap = Tap(probe)
    x = torch.randn(3, WIDTH)
    assert tap.find(x).feature_map is None
    assert torch.equal(tap(x).head_input, x)


def test_a_head_named_by_hand_must_have_been_called_on_vectors():
    model = build(lambda: pooled(lambda m, h: (m.fc(h), m.aux(h))[0]))
    assert Tap(model, head="fc").find(images()).head_proven
    with pytest.raises(
        TapError, match=r"head='wide' was not called: expected .*, called on \[5, D\].* are 'fc', 'aux'$"
    ):
        Tap(model, head="wide").find(images())
    model = build(lambda: pooled(lambda m, h: m.fc(h) + m.aux(h.expand(3, 5, WIDTH)).mean(0)))
    with pytest.raises(TapError, match=r"head='aux' was called on \[3, 5, 6\]: expected"):
        Tap(model, head="aux").find(images())


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m, h: m.fc(h)[:, :2], r"the model's output is not the output of 'fc' \(shapes \[5, 4\] and \[5, 2\]\)"),
        (lambda m, h: m.fc(h.expand(2, 5, WIDTH))[0], r"\('fc' on \[2, 5, 6\]\): expected the nn\.Linear or 1×1 conv"),
        (lambda m, h: h @ m.fc.weight.T, r"\(no linear layer was called\): expected the nn\.Linear or 1×1 convolution"),
        (
            lambda m, h: m.fc(h) / 0,
            r"the model's output has NaN or infinite values for finite images \(torch\.float32\)",
        ),
        (lambda m, h: m.fc(h)[:2], "returned 2 rows of logits for 5 images: expected one row per image"),
        (
            lambda m, h: m.fc(h)[:, :, None],
            r"expected logits \[N, C\], .* got torch\.float32 \[5, 4, 1\]; .* head='fc'",
        ),
        (lambda m, h: [m.fc(h).to_sparse()], r"expected logits \[N, C\], .* got list with '0' \[5, 4\]"),
        (lambda m, h: {"z": m.fc(h).argmax(1)}, r"expected logits \[N, C\], .* got dict with 'z' \[5\]"),
        (lambda m, h: (m.fc(h), ())[1], "the model's output: .* got tuple with no tensor"),
    ],
)
def test_an_output_that_is_not_the_heads_is_refused(run, message):
    tap = Tap(build(lambda: pooled(run)))
    with pytest.raises(TapError, match=message):
        tap.find(images())
    assert not tap.is_ready


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class SubCentres(nn.Linear):
    def forward(self, x):
        return super().forward(x).unflatten(1, (2, 2)).amax(2)


@pytest.mark.parametrize(
    ("make", "x", "source"),
    [
        (lambda: pooled(lambda m, h: m.fc(h), kind=Cosine), images(), "'conv' and head 'fc'"),
        (lambda: pooled(lambda m, h: m.fc(h), kind=SubCentres), images(), "'conv' and head 'fc'"),
        (lambda: Cosine(WIDTH, CLASSES), torch.ones(3, WIDTH), "'the input' and head ''"),
    ],
)
def test_a_linear_layer_that_computes_something_else_is_refused_and_leaves_nothing_behind(make, x, source):
    tap = Tap(build(make))
    with pytest.raises(TapError, match=f"logits recomputed from {source} differ from the model's own by up to"):
        tap.find(x)
    assert not tap.is_ready


def test_nan_images_of_the_first_batch_are_passed_over():
    x = images()
    x[0, 0, 0, 0], x[3, 1] = float("nan"), float("inf")
    assert Tap(build(resnet)).find(x).proven
    with pytest.raises(InputError, match=r"images \[5, 3, 8, 8\]: none is free of NaN and infinite values"):
        Tap(build(resnet)).find(x * float("nan"))
    with pytest.raises(InputError, match=r"images \[0, 3, 8, 8\]: none is free of NaN .*; expected at least one"):
        Tap(build(resnet)).find(x[:0])


def test_differences_are_relative_to_the_size_of_what_is_expected():
    expected = torch.tensor([[1.0, -100.0]])
    assert relative_difference(expected + 1, expected) == pytest.approx(0.01)
    assert relative_difference(expected[:, :1], expected) == float("inf")
    assert relative_difference(torch.ones(0, 2), torch.ones(0, 2)) == float("inf")
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_difference(torch.ones(2), torch.zeros(2)) == float("inf")


def test_logits_agree_as_they_are_or_as_their_softmax():
    logits = torch.randn(6, 4)
    for output in (logits, logits * (1 + 1e-6), logits.softmax(1), logits.log_softmax(1)):
        assert agrees_with_logits(logits, output)
    for output in (logits * 1.01, logits + 1, logits.softmax(0), logits.sigmoid(), logits.T):
        assert not agrees_with_logits(logits, output)
    close = logits * 1.01
    assert agrees_with_logits(logits.bfloat16(), close.bfloat16())
    assert agrees_with_logits(logits.bfloat16(), close)
    assert agrees_with_logits(logits, close, torch.bfloat16)
    assert not agrees_with_logits(logits, close, torch.float64)


def test_tensors_of_an_output_go_by_their_path():
    z = torch.zeros(2, 3)
    found = tensors_of({"a": (z, 1, [z]), "logits": SimpleNamespace(b=z, c=None)})
    assert list(found) == ["a/0", "a/2/0", "logits/b"]
    assert list(tensors_of(z)) == [""]
    endless = [z]
    endless.append(endless)
    assert len(tensors_of(endless)) < 10


LAYOUT_SHAPES = {"NHWC": (2, 4, 5, 3), "NCHW": (2, 3, 4, 5), "NTD": (2, 4, 3), "NDL": (2, 3, 4)}
LAYOUT_SHAPES |= {"NTHWD": (2, 4, 5, 6, 3), "NDTHW": (2, 3, 4, 5, 6)}


def test_every_layout_is_a_view_of_the_same_values():
    for name, read in LAYOUTS.items():
        x = torch.randn(LAYOUT_SHAPES[name])
        found = read(x)
        assert found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), name
        assert found.shape[:2] == (2, 3), name
        first = x if name[1] in "CD" else x.movedim(-1, 1)
        assert torch.equal(found.flatten(2), first.flatten(2)), name
