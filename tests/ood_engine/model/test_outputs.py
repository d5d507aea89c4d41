"""Models whose output is not that of their last linear layer, or is several tensors."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ood_engine as oe
from ood_engine.errors import TapError
from ood_engine.model.outputs import explain
from ood_engine.model.tap import Tap

WIDTH, CLASSES = 6, 4


class Net(nn.Module):
    """A pooled convolution and several heads; returns what a test wants of them."""

    def __init__(self, returns):
        super().__init__()
        torch.manual_seed(0)
        self.returns = returns
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.embed, self.box = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.fc, self.dist = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.returns(self, self.conv(x).mean((2, 3)))


def images(count=8):
    return torch.randn((count, 3, 8, 8), generator=torch.Generator().manual_seed(1))


def by_embedding(m, h):
    e = m.embed(h)
    return e, m.fc(e)


def box_and_class(m, h):
    return m.box(h), m.fc(h)


def cosine(m, h):
    return m.embed(h), F.normalize(h) @ F.normalize(m.fc.weight).T


SEVERAL = {
    "embedding and logits": (
        by_embedding,
        "at '0' the output of 'embed', at '1' the output of 'fc'",
        "embed' or head='fc'",
    ),
    "box and class": (
        box_and_class,
        "at '0' the output of 'box', at '1' the output of 'fc'",
        "head='box' or head='fc'",
    ),
    "in a dict": (
        lambda m, h: {"box": [m.box(h)], "class": m.fc(h)},
        "at 'box/0' the output of 'box', at 'class' the output of 'fc'",
        "head='box' or head='fc'",
    ),
    "logits twice": (lambda m, h: {"logits": [m.fc(h)], "b": {"logits": m.dist(h)}}, "'fc'", "head='dist'"),
    "embedding and cosines": (
        cosine,
        "at '0' the output of 'embed', at '1' not the output of 'embed' (shapes",
        "'embed'",
    ),
}


@pytest.mark.parametrize("form", [form for form in SEVERAL if form != "logits twice"])
def test_outputs_of_several_layers_are_not_chosen_from(form):
    returns, seen, advice = SEVERAL[form]
    with pytest.raises(
        TapError, match=f"the model's output is {re.escape(seen)}.* choose the layer to score by .*{advice}"
    ):
        Tap(Net(returns)).find(images())


@pytest.mark.parametrize("returns", [by_embedding, box_and_class])
def test_the_head_named_by_the_message_is_verified_at_its_place_in_the_output(returns):
    model, x = Net(returns), images()
    tap = Tap(model, head="fc")
    plan = tap.find(x)
    assert (plan.head, plan.head_proven, plan.output) == ("fc", True, "1")
    assert plan.head_reason == "verified: the model's output at '1' is that of 'fc', or its softmax"
    with torch.no_grad():
        assert torch.equal(tap(x).logits, model(x)[1])


def test_keys_of_the_output_may_hold_a_slash():
    model, x = Net(lambda m, h: {"a": {"b": m.box(h)[:, 0]}, "a/b": {"c/d": [m.fc(h)]}, "": 0}), images(40)
    tap = Tap(model)
    assert tap.find(x).output == "a/b/c/d/0"
    with torch.no_grad():
        assert torch.equal(tap(x).logits, model(x)["a/b"]["c/d"][0])


MIXED = {
    "temperature": (lambda m, h: m.fc(h) / 2, "0.5 times the output of 'fc'"),
    "sigmoid": (lambda m, h: m.fc(h).sigmoid(), "the sigmoid of 'fc'"),
    "averaged heads": (lambda m, h: (m.fc(h) + m.dist(h)) / 2, "a mixture of 'fc' and 'dist'"),
    "ensemble": (
        lambda m, h: m.fc(h).softmax(1) + m.dist(h).softmax(1),
        "a mixture of the softmaxes of 'fc' and 'dist'",
    ),
    "something else": (lambda m, h: m.fc(h) ** 3, "not the output of 'fc' (largest relative difference "),
    "no [N, C]": (lambda m, h: {"probability": m.fc(h).softmax(1).amax(1)}, None),
}


@pytest.mark.parametrize("form", MIXED)
def test_a_head_named_by_hand_is_taken_at_its_word_and_labelled(form):
    returns, seen = MIXED[form]
    model, x = Net(returns), images()
    with pytest.raises(TapError, match="head='fc'") as caught:
        Tap(model).find(x)
    seen = f"the model's output is {seen}" if seen else "the model returns no [N, C]"
    if form != "no [N, C]":
        assert str(caught.value).startswith(seen)
    tap = Tap(model, head="fc")
    plan = tap.find(x)
    assert (plan.head, plan.head_proven, plan.feature_map, plan.proven) == ("fc", False, "conv", True)
    assert plan.head_reason.startswith(f"named by hand, unverified: {seen}")
    with torch.no_grad():
        torch.testing.assert_close(tap(x).logits, model.fc(model.conv(x).mean((2, 3))))


SQUASHED = {
    "alone": (lambda m, h: m.fc(h).sigmoid(), True),
    "beside its logits": (lambda m, h: (m.fc(h), m.fc(h).sigmoid()), True),
    "in an ensemble": (lambda m, h: (m.fc(h).sigmoid() + m.dist(h).sigmoid()) / 2, True),
    "boxes beside it": (lambda m, h: {"boxes": m.box(h).sigmoid(), "class": m.fc(h)}, False),
    "boxes beside its temperature": (lambda m, h: {"boxes": m.box(h).sigmoid(), "class": m.fc(h) / 2}, False),
    "none": (lambda m, h: (m.fc(h) + m.dist(h)) / 2, False),
}


@pytest.mark.parametrize("form", SQUASHED)
def test_sigmoids_are_those_of_the_head(form):
    returns, expected = SQUASHED[form]
    model, x = Net(returns), images(64)
    assert Tap(model, head="fc").find(x).sigmoid == expected
    if expected:
        with pytest.raises(
            oe.errors.InputError, match=r"the outputs are sigmoids, .* choose .* detectors=\['nap'\] \("
        ):
            oe.Engine(model, ["energy"], head="fc").fit([x])
        oe.Engine(model, head="fc", detectors=["nap"], rectify=True).fit([x])
    else:
        oe.Engine(model, ["energy"], head="fc").fit([x])


class Averaging(nn.Module):
    """Averages the logits of all positions, or makes them of the average."""

    def __init__(self, *, first):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.conv, self.fc = first, nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, x):
        x = self.conv(x)
        return (self.fc(x.mean((2, 3), keepdim=True)) if self.first else self.fc(x)).mean((2, 3))


def test_logits_averaged_over_positions_are_those_of_the_average_as_said():
    x = images()
    with pytest.raises(TapError, match=r"'fc' on .* take the mean of its input instead, which gives the same logits"):
        Tap(Averaging(first=False)).find(x)
    with torch.no_grad():
        torch.testing.assert_close(Averaging(first=True)(x), Averaging(first=False)(x))
    plan = Tap(Averaging(first=True)).find(x)
    assert (plan.head, plan.feature_map, plan.proven, plan.head_proven) == ("fc", "conv", True, True)


def test_a_head_used_by_its_weight_is_called_as_said():
    by_weight = Net(lambda m, h: F.linear(h, m.fc.weight, m.fc.bias))
    with pytest.raises(TapError, match=r"no linear layer was called\): .* call it as a module"):
        Tap(by_weight).find(images())
    assert Tap(Net(lambda m, h: m.fc(h))).find(images()).head == "fc"


def test_logits_of_every_position_are_no_layer_to_name():
    with pytest.raises(TapError, match=r"got torch.float32 \[8, 3, 4\]; return one row of them per image$"):
        Tap(Net(lambda m, h: (m.embed(h), m.fc(h))[1][:, None].expand(-1, 3, -1))).find(images())
    with pytest.raises(TapError, match=r"one row of them per image, or name the layer that makes them by head='fc'"):
        Tap(Net(lambda m, h: m.fc(h)[:, :, None, None])).find(images())


def test_an_engine_scores_by_an_unverified_head_and_keeps_it(tmp_path):
    model, x = Net(MIXED["temperature"][0]), images(64)
    engine = oe.Engine(model, ["energy"], head="fc").fit([x])
    with torch.no_grad():
        expected = model.fc(model.conv(x).mean((2, 3))).logsumexp(1)
    torch.testing.assert_close(engine.score(x)["energy"], expected)
    engine.save(tmp_path / "state.safetensors")
    loaded = oe.Engine.load(tmp_path / "state.safetensors", model)
    assert loaded.plan == engine.plan
    assert not loaded.plan.head_proven
    torch.testing.assert_close(loaded.score(x)["energy"], expected)
    assert loaded.fit([x]).plan == engine.plan  # by the same head


def conv_net(dims):
    conv, pool = (nn.Conv1d, nn.AdaptiveAvgPool1d) if dims == 1 else (nn.Conv2d, nn.AdaptiveAvgPool2d)
    return nn.Sequential(conv(3, WIDTH, 3), nn.ReLU(), pool(1), conv(WIDTH, CLASSES, 1), nn.Flatten())


@pytest.mark.parametrize("dims", [1, 2])
def test_a_convolution_on_one_position_is_a_head(dims):
    torch.manual_seed(0)
    model, x = conv_net(dims), torch.randn(40, 3, *[8] * dims)
    engine = oe.Engine(model, ["energy", "low_dim_gradient"]).fit([x], labels="predicted")
    assert (engine.plan.head, engine.plan.feature_map, engine.plan.proven) == ("3", "1", True)
    assert engine.head.weight.shape == (CLASSES, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(engine.score(x)["energy"], model(x).logsumexp(1))


def test_a_convolution_that_is_no_linear_layer_is_no_head():
    grouped = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten())
    with pytest.raises(TapError, match=r"Sequential has no nn\.Linear and no 1×1 convolution"):
        Tap(grouped)


def test_few_equations_explain_nothing():
    z = torch.randn(2, 3)
    heads = [(f"head {number}", torch.randn(2, 3)) for number in range(6)]
    assert explain(z, heads) is None
    assert explain(3 * z, [("fc", z)]) == "3 times the output of 'fc'"
