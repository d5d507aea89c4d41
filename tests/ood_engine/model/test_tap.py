from __future__ import annotations

import copy
import dataclasses
import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from ood_engine.errors import InputError, NotFittedError, TapError
from ood_engine.model.plan import TapPlan
from ood_engine.model.tap import Captured, Tap

WIDTH, CLASSES = 6, 4


class Net(nn.Module):
    """Batch norm, dropout, ReLU in place, and a norm between pooling and head; run as a test wants."""

    def __init__(self, run=None):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)
        self.pool, self.drop = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.run = run

    def logits(self, x):
        x = self.pool(self.relu(self.bn(self.conv(x)))).flatten(1)
        return self.head(self.drop(self.norm(x.to(self.norm.weight.dtype)).to(self.head.weight.dtype)))

    def forward(self, x):
        return self.logits(x) if self.run is None else self.run(self, x)


def net(seed=0):
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for tensor in (*model.bn.parameters(), *model.norm.parameters(), model.bn.running_mean, model.bn.running_var):
            tensor.add_(0.4 * torch.rand_like(tensor))
    return model


def images(count=5, seed=1, dtype=torch.float32):
    return torch.randn((count, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def found(model, x=None, **names):
    tap = Tap(model, **names)
    tap.find(images() if x is None else x)
    return tap


def expected(model, x):
    """Map, head input and logits of a copy in evaluation mode, step by step."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        feature_map = model.relu(model.bn(model.conv(x)))
        head_input = model.norm(feature_map.mean((2, 3)))
        logits = model.head(head_input)
        return Captured(feature_map, head_input, logits, logits.dtype)


def assert_equal(captured, wanted, exact=False):
    tolerance = {"atol": 0, "rtol": 0} if exact else {"atol": 1e-6, "rtol": 1e-5}
    for ours, theirs in zip(captured[:3], wanted[:3], strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    assert captured.rounding == wanted.rounding


HOOK_TABLES = [name for name in vars(nn.Module()) if "hooks" in name]


def snapshot(model):
    """Everything about a model that a tap must leave as it is."""
    modules = dict(model.named_modules())
    return (
        {name: (tensor.clone(), tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict().items()},
        {
            name: (id(parameter), parameter.requires_grad, parameter.grad)
            for name, parameter in model.named_parameters()
        },
        {name: (type(module), module.training, sorted(vars(module))) for name, module in modules.items()},
        {(name, table): dict(vars(module)[table]) for name, module in modules.items() for table in HOOK_TABLES},
    )


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    for name, (tensor, dtype, pointer) in before[0].items():
        now = after[0][name]
        assert torch.equal(now[0], tensor), name
        assert now[1:] == (dtype, pointer), name


def test_what_is_caught_is_what_the_model_computes():
    model = net().train()
    tap = found(model)
    assert (tap.plan.feature_map, tap.plan.tail, tap.plan.head) == ("relu", (("norm", (WIDTH,)),), "head")
    for count in (5, 1, 40):
        assert_equal(tap(images(count)), expected(model, images(count)))
    pooled = tap(images()).feature_map.mean((2, 3))
    torch.testing.assert_close(tap.features(pooled), tap(images()).head_input)
    assert tap.features(pooled).requires_grad is False


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_untouched(training):
    model = net().train(training)
    model.bn.train(not training)
    model.conv.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.relu.register_forward_hook(lambda *_: None)
    model.head.register_forward_pre_hook(lambda *_: None)
    model.conv.register_full_backward_hook(lambda *_: None)
    before = snapshot(model)
    tap = Tap(model)
    assert_untouched(model, before)
    tap.find(images())
    assert_untouched(model, before)
    tap(images(7))
    tap.features(torch.randn(2, WIDTH))
    assert_untouched(model, before)
    with pytest.raises(InputError):
        tap(torch.randn(2, 4, 8, 8))
    with pytest.raises(TapError):
        found(model, head="conv")
    assert_untouched(model, before)


def test_the_users_hooks_keep_firing_for_the_users_calls_and_are_part_of_the_model():
    model, maps, gradients = net().eval(), [], []
    model.relu.inplace = False  # which backward hooks do not bear
    model.relu.register_forward_hook(lambda module, args, output: maps.append(3 * output) or maps[-1])
    model.relu.register_full_backward_hook(lambda module, before, after: gradients.append(after[0]))
    tap = found(model)
    captured = tap(images())
    assert (tap.plan.feature_map, tap.plan.proven) == ("relu", True)
    maps.clear()
    logits = model(images())
    logits.sum().backward()
    assert len(maps) == len(gradients) == 1
    torch.testing.assert_close(captured.feature_map, maps[0].detach())
    torch.testing.assert_close(captured.logits, logits.detach())


def test_several_taps_on_one_model_do_not_meet():
    model = net()
    proven, by_hand, fresh = found(model), found(model, feature_map="conv"), Tap(model)
    x = images(6)
    wanted = expected(model, x)
    assert not by_hand.plan.proven
    for _ in range(2):
        assert_equal(proven(x), wanted)
        conv = by_hand(x)
        torch.testing.assert_close(conv.feature_map, copy.deepcopy(model).conv(x).detach())
        torch.testing.assert_close(conv.head_input, wanted.head_input)
        assert not fresh.is_ready
    by_hand.find(x)
    del by_hand
    assert_equal(proven(x), wanted)


@pytest.mark.parametrize("names", [{}, {"feature_map": "conv"}])
def test_threads_get_what_one_gets_while_another_trains_the_model(names):
    model = net().train()
    model.bn.momentum = 0.0
    tap = found(model, **names)
    batches = [images(1 + i % 4 * 3, seed=10 + i) for i in range(8)]
    alone = [tap(batch) for batch in batches]
    barrier = threading.Barrier(9)

    def work(index):
        barrier.wait(60)
        for _ in range(20):
            if index == 8:
                model(images(3, seed=9))
            else:
                assert_equal(tap(batches[index]), alone[index], exact=True)

    with ThreadPoolExecutor(9) as pool:
        list(pool.map(work, range(9)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_gradient_mode_of_the_caller_does_not_matter(mode):
    model, seen = net(), []
    plain = found(model)(images())
    model.conv.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    with mode():
        was = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        x = images()
        if mode is torch.enable_grad:
            x.requires_grad_()
        captured = found(model, x)(x)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == was
    assert seen == [False, False, False]
    assert_equal(captured, plain, exact=True)
    for tensor in captured[:3]:
        assert not tensor.requires_grad
        assert not tensor.is_inference()


def test_what_a_model_keeps_between_calls_is_no_inference_tensor():
    kept = []
    with torch.inference_mode():
        found(Net(lambda model, x: kept.append(x.new_ones(1)) or model.logits(x)))
    assert kept
    assert not any(tensor.is_inference() for tensor in kept)


def test_images_that_a_model_changes_in_place_stay_as_they_were():
    x = images()
    found(Net(lambda model, x: model.logits(x.sub_(0.5).mul_(2))), x)(x)
    assert torch.equal(x, images())


def spoiling(name):
    """A forward that overwrites its map or its features after use."""

    def run(model, x):
        used = {"map": model.relu(model.conv(x))}
        used["features"] = used["map"].mean((2, 3))
        logits = model.head(used["features"])
        used[name].zero_()
        return logits

    return run


def test_features_that_a_model_changes_in_place_afterwards_are_caught_before():
    tap = found(Net(spoiling("features")))
    captured = tap(images())
    assert tap.plan.proven
    torch.testing.assert_close(captured.head_input, captured.feature_map.mean((2, 3)))
    assert captured.head_input.abs().max() > 0
    with pytest.raises(
        TapError, match=r"logits recomputed from 'relu' and head 'head' differ .* relative to their size"
    ):
        found(Net(spoiling("map")))


def test_the_map_is_a_view_where_it_is_proven_and_a_copy_where_it_is_not():
    model, returned = net(), []
    for module in (model.conv, model.relu):
        module.register_forward_hook(lambda module, args, output: returned.append(output))
    proven = found(model)(images()).feature_map
    assert proven.untyped_storage().data_ptr() == returned[-1].untyped_storage().data_ptr()
    by_hand = found(model, feature_map="conv")(images()).feature_map
    assert by_hand.untyped_storage().data_ptr() not in {output.untyped_storage().data_ptr() for output in returned}


def test_nothing_of_a_call_is_kept():
    tap = found(net())
    captured = tap(images())
    kept = [weakref.ref(tensor) for tensor in captured[:3]]
    del captured
    assert [reference() for reference in kept] == [None] * 3


def test_later_changes_of_the_users_model_are_seen():
    model = net()
    tap = found(model)
    model.load_state_dict(net(seed=5).state_dict())
    assert_equal(tap(images()), expected(model, images()))
    model.load_state_dict({name: tensor.clone() for name, tensor in net(6).state_dict().items()}, assign=True)
    assert_equal(tap(images()), expected(model, images()))
    model.double()
    captured = tap(images())
    assert {tensor.dtype for tensor in captured[:3]} == {torch.float64}
    assert_equal(captured, expected(model, images(dtype=torch.float32).double()))
    model.bfloat16()
    assert {tensor.dtype for tensor in tap(images())[:3]} == {torch.bfloat16}
    assert tap.head.weight is model.head.weight
    assert tap.head.bias is model.head.bias


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_a_parametrised_head_follows_the_model(norm):
    model = net().train()
    norm(model.head)
    before = snapshot(model)
    tap = found(model)
    assert_untouched(model, before)
    assert_equal(tap(images()), expected(model, images()))
    with torch.no_grad():
        model.head.parametrizations.weight[0].train(False)
        for parameter in model.head.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(tap.head.weight, model.eval().head.weight)
    assert_equal(tap(images()), expected(model, images()))


@pytest.mark.parametrize("wide", ["norm", "head"])
def test_stem_tail_and_head_run_in_their_own_dtypes(wide):
    model = Net().bfloat16()
    getattr(model, wide).float()
    tap = found(model)
    assert ([name for name, _ in tap.plan.tail], tap.plan.proven) == (["norm"], True)
    captured = tap(images())
    assert (captured.feature_map.dtype, captured.logits.dtype) == (torch.bfloat16, model.head.weight.dtype)
    features = tap.features(captured.feature_map.float().mean((2, 3)))
    assert features.dtype == model.norm.weight.dtype
    torch.testing.assert_close(features.float(), captured.head_input.float(), atol=0.05, rtol=0.05)


def test_head_before_find_is_the_last_linear_or_the_named_one():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    assert Tap(model).head.weight is model[3].weight
    assert Tap(model, head="1").head.weight is model[1].weight
    assert Tap(model).device == torch.device("cpu")


def test_a_module_that_is_registered_twice_may_be_named_either_way():
    model = net()
    model.classifier, model.last = model.head, model.relu
    tap = found(model, head="classifier", feature_map="last")
    assert (tap.plan.head, tap.plan.feature_map, tap.plan.call, tap.plan.proven) == ("head", "relu", 0, True)
    other = Tap(model)
    other.adopt(dataclasses.replace(tap.plan, head="classifier", feature_map="last"))
    assert_equal(other(images()), expected(model, images()))


def test_a_plan_may_be_adopted_without_running_the_model():
    model = net()
    tap = Tap(model)
    assert not tap.is_ready
    tap.adopt(found(model).plan)
    assert tap.is_ready
    assert_equal(tap(images()), expected(model, images()))
    tap.adopt(TapPlan("head", None))
    assert tap(images()).feature_map is None


def test_before_find_there_is_nothing_to_ask():
    tap = Tap(net())
    for ask in (lambda: tap.plan, lambda: tap(images()), lambda: tap.features(torch.zeros(1, WIDTH))):
        with pytest.raises(NotFittedError, match=r"head and feature map are not known yet: call fit\(loader\) first"):
            ask()


def test_a_failed_find_keeps_the_plan_that_there_was():
    model = Net()
    tap = found(model)
    model.run = lambda model, x: model.logits(x) / 0
    with pytest.raises(TapError, match="the model's output has NaN or infinite values for finite images"):
        tap.find(images())
    assert tap.plan.proven
    assert_equal(tap(images()), expected(model, images()))


def broken(name, value):
    model = net()
    model.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    model.state_dict()[name].view(-1)[:2] = value
    return model


UNKNOWN = "the model has no module of that name"
TWELVE = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
CONVOLUTIONS = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
NO_LINEAR = "has no nn.Linear and no 1×1 convolution: expected a classifier whose logits come from one"


@pytest.mark.parametrize(
    ("make", "names", "message"),
    [
        (lambda: "resnet18", {}, r"model: expected a torch\.nn\.Module, got str"),
        (lambda: CONVOLUTIONS, {}, f"Sequential {NO_LINEAR}"),
        (net, {"head": "fc"}, f"head='fc': {UNKNOWN}; its last modules are conv, bn, relu, pool, drop, norm, head"),
        (lambda: TWELVE, {"head": "fc"}, r"its last modules are 4, 5, 6, 7, 8, 9, 10, 11$"),
        (net, {"feature_map": "layer4"}, f"feature_map='layer4': {UNKNOWN}"),
        (
            net,
            {"head": "norm"},
            r"head='norm': expected an nn\.Linear or a 1×1 convolution, got a LayerNorm; name the layer that makes the logits",
        ),
        (
            lambda: broken("conv.weight", math.nan),
            {},
            "'conv.weight' has 2 NaN or infinite values of 162: expected finite",
        ),
        (lambda: broken("head.bias", -math.inf), {}, "'head.bias' has 2 NaN or infinite values of 4"),
        (lambda: broken("bn.running_var", math.inf), {}, "'bn.running_var' has 2 NaN or infinite values of 6"),
        (lambda: broken("mask", math.nan), {}, "'mask' has 2 NaN or infinite values of 16"),
        (
            lambda: net().to("meta"),
            {},
            "'conv.weight' has no values yet .*: expected loaded weights; run the model once",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(3)), {}, "'0.weight' has no values yet"),
    ],
)
def test_a_model_or_a_name_that_does_not_fit_is_refused(make, names, message):
    with pytest.raises(TapError, match=message):
        Tap(make(), **names)


def test_a_mask_of_minus_infinity_is_no_fault():
    assert found(broken("mask", -math.inf)).plan.proven


def test_a_head_of_whole_numbers_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    model[1].weight = nn.Parameter(torch.ones(CLASSES, 192, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TapError, match=r"the head '1' has torch\.int8 weights: expected floating point"):
        Tap(model).adopt(TapPlan("1", None))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (TapPlan("fc", None), f"'fc' was fitted as the head: {UNKNOWN}"),
        (
            TapPlan("norm", None),
            r"'norm' was fitted as the head: expected an nn\.Linear or a 1×1 convolution, got a LayerNorm",
        ),
        (TapPlan("head", "layer4"), f"'layer4' was fitted: {UNKNOWN}"),
        (TapPlan("head", "relu", tail=(("tail", (6,)),)), f"'tail' was fitted: {UNKNOWN}"),
    ],
)
def test_a_plan_of_another_model_is_refused_and_changes_nothing(plan, message):
    tap = found(net())
    with pytest.raises(TapError, match=message):
        tap.adopt(plan)
    assert_equal(tap(images()), expected(net(), images()))


@pytest.mark.parametrize("plan", [TapPlan("head", "relu", call=1), TapPlan("spare", "relu"), TapPlan("head", "spare")])
def test_a_module_that_is_not_called_is_named(plan):
    model = net()
    model.spare = nn.Linear(2, 2)
    tap = Tap(model)
    tap.adopt(plan)
    with pytest.raises(TapError, match=f"the model bypassed its modules '{plan.head}' and '{plan.feature_map}'"):
        tap(images())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1, 2], r"images: expected a floating point batch \[N, C, H, W\], got list$"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"got torch\.uint8 \[2, 3, 8, 8\]; .*images\.float\(\) / 255"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.complex64), r"got torch\.complex64 \[2, 3, 8, 8\]"),
        (torch.zeros(8), r"got torch\.float32 \[8\]"),
        (torch.zeros(2, 4, 8, 8), r"\[2, 4, 8, 8\]: the model rejects them; expected the channels and size"),
        (torch.zeros(2, 3), r"images \[2, 3\]: the model rejects them"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(bad, message):
    tap = found(net())
    for call in (tap, tap.find, Tap(net()).find):
        with pytest.raises(InputError, match=message) as caught:
            call(bad)
        assert "\n" not in str(caught.value)
    tap(images())


@pytest.mark.parametrize(
    "kind",
    [
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        ZeroDivisionError,
        AssertionError,
        torch.OutOfMemoryError,
    ],
)
def test_what_a_model_raises_is_the_images_fault_but_for_memory(kind, monkeypatch):
    tap = found(net())

    def fail(*args, **kwargs):
        raise kind("of another\nheight")

    monkeypatch.setattr(F, "linear", fail)
    is_memory = kind is torch.OutOfMemoryError
    raised, message = (kind, "of another\nheight") if is_memory else (InputError, r"trained on \(of another height\)$")
    with pytest.raises(raised, match=message):
        tap(images())


def test_a_wrong_number_of_rows_is_refused_later_too():
    tap = found(Net(lambda model, x: model.logits(torch.cat(x.split(8, 3)))))
    with pytest.raises(TapError, match="the model returned 10 rows of logits for 5 images: expected one row per image"):
        tap(torch.randn(5, 3, 8, 16))
