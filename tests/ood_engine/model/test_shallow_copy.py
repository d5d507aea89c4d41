from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from ood_engine.errors import TapError
from ood_engine.model.shallow_copy import shallow_twin, unwrap


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 2)
    )


X = torch.randn((3, 3, 4, 4), generator=torch.Generator().manual_seed(2))


def evaluate(model, x=X):
    with torch.no_grad():
        return model(x)


def assert_apart(model, twin, x=X, same_names=True):
    """The twin computes what the model computes in evaluation mode, from other modules over the same tensors."""
    if same_names:
        assert [name for name, _ in model.named_modules()] == [name for name, _ in twin.named_modules()]
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}
    ours, theirs = [*model.parameters(), *model.buffers()], [*twin.parameters(), *twin.buffers()]
    assert all(a is b for a, b in zip(ours, theirs, strict=True))
    assert not any(module.training for module in twin.modules())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = evaluate(twin, x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.eval()
    assert torch.equal(found, evaluate(model, x))


class Reused(nn.Module):
    """One module under two names and once more, and a parameter in two modules."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Conv2d(3, 3, 1)
        self.third = nn.Conv2d(3, 3, 1)
        self.third.weight = self.first.weight
        self.head = nn.Linear(48, 2)

    def forward(self, x):
        return self.head(self.third(self.second(self.first(x))).flatten(1))


class Config(dict):
    """A dict that is read by attributes, as configurations often are."""

    __getattr__ = dict.__getitem__


class Holders(nn.Module):
    """Modules where registration does not see them, bound methods, and a constructor with arguments."""

    def __new__(cls, scale):
        return super().__new__(cls)

    def __init__(self, scale):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(48, 2)
        self.config = Config(scale=scale)
        self.steps = [self.norm, nn.BatchNorm2d(3)]
        self.pair = (self.norm, [self.norm])
        self.members = {self.norm}
        self.by_name = defaultdict(list, norm=[self.norm])
        self.names = {self.norm: "norm"}
        self.ordered = OrderedDict(norm=self.norm)
        self.method = self.norm.forward
        self.bound = functools.partial(self.apply_norm, twice=True)
        self.steps.append(self.steps)

    def eval(self):
        self.steps[1].eval()
        return super().eval()

    def apply_norm(self, x, twice):
        return self.norm(self.norm(x)) if twice else self.norm(x)

    def forward(self, x):
        x = self.steps[-1][1](self.steps[0](self.config.scale * x))
        x = self.pair[1][0](self.by_name["norm"][0](x)) + len(self.names[self.norm])
        for module in self.members:
            x = module(x)
        return self.head(self.bound(self.method(self.ordered["norm"](x))).flatten(1))


@pytest.mark.parametrize(
    "make",
    [net, Reused, lambda: Holders(3.0), lambda: torch.fx.symbolic_trace(net().eval())],
)
def test_the_twin_computes_the_same_from_its_own_modules(make):
    torch.manual_seed(0)
    model = make().train()
    assert_apart(model, shallow_twin(model))
    assert shallow_twin(model) is not shallow_twin(model)


def test_references_stay_references_to_one_twin():
    twin = shallow_twin(Reused())
    assert twin.first is twin.second is not twin.third
    holders = Holders(1.0)
    twin = shallow_twin(holders)
    assert twin.steps is not holders.steps
    assert twin.steps[-1] is twin.steps
    assert twin.steps[0] is twin.pair[0] is twin.by_name["norm"][0] is twin.method.__self__ is twin.norm
    assert twin.by_name.default_factory is list
    assert twin.bound.func.__self__ is twin
    assert twin.members == {twin.norm}
    assert not twin.steps[1].training  # which eval() does not reach
    assert holders.steps[1].training


def by_closure(model):
    original, shift = model.forward, nn.Identity()(2.0)
    return lambda x, *, scale=3.0: original(x) + scale * shift


def by_method(model):
    original = model.forward
    return types.MethodType(lambda self, x: original(x) * 2, model)


def by_partial(model):
    return functools.partial(lambda inner, x: nn.Sequential.forward(inner, x), model)


def by_attribute(model):
    model.act = lambda x: model[2](x)
    return lambda x: nn.Sequential.forward(model, model.act(x))


def by_recursion(model):
    def countdown(x, n=2):
        return countdown(model[2](x), n - 1) if n else nn.Sequential.forward(model, x)

    return countdown


@pytest.mark.parametrize("make", [by_closure, by_method, by_partial, by_attribute, by_recursion])
def test_modules_in_a_forward_replaced_on_the_instance_are_led_to_the_twin(make):
    model = net().train()
    model.forward = make(model)
    assert_apart(model, shallow_twin(model))


def test_a_closure_with_an_empty_cell_is_copied():
    model = net()
    model.unset = lambda: later
    assert_apart(model, shallow_twin(model))
    later = 1
    assert model.unset() == 1


def test_hooks_that_make_the_model_what_it_is_run_on_the_twin():
    """And data in a user's hook stays the user's own."""

    class SelfHooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 4), nn.Linear(4, 2)
            self.kept = {}
            self.stem.register_forward_hook(lambda module, args, output: self.kept.update(stem=output))
            self.stem.register_forward_hook(lambda module, args, output: seen.append(module))

        def forward(self, x):
            return self.head(self.stem(x).flatten(1)) + self.kept["stem"].mean()

    seen = []
    model = SelfHooked()
    twin = shallow_twin(model)
    evaluate(twin)
    assert model.kept == {}
    assert seen == [twin.stem]
    assert_apart(model, twin)


def parametrized(model):
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[5])


@pytest.mark.parametrize("change", [parametrized, lambda model: prune.random_unstructured(model[5], "weight", 0.5)])
def test_reparametrised_weights_follow_the_model(change):
    model, other = net().train(), net()
    change(model)
    change(other)
    twin = shallow_twin(model)
    assert_apart(model, twin)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.1)
    model.load_state_dict(other.state_dict())
    assert torch.equal(evaluate(twin), evaluate(model))
    assert torch.equal(twin[5].weight, model[5].weight)


def test_old_style_norms_follow_the_model():
    model = net()
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model[5])
    torch.nn.utils.spectral_norm(model[0])
    twin = shallow_twin(model.train())
    assert_apart(model, twin)
    model.double()
    assert torch.equal(evaluate(twin, X.double()), evaluate(model, X.double()))


def test_an_eval_that_changes_weights_is_not_run():
    class Merging(nn.Linear):
        """An adapter that merges itself into the shared weight in eval(), as LoRA layers do."""

        def train(self, mode=True):
            self.weight.data += 0 if mode else 1
            return super().train(mode)

    model = nn.Sequential(nn.Flatten(), Merging(48, 2))
    before = model[1].weight.clone()
    shallow_twin(model)
    assert torch.equal(model[1].weight, before)


class CompiledForward(nn.Sequential):
    @torch.compile(backend="eager")
    def forward(self, x):
        return super().forward(x)


def compiled(what):
    model = net()
    if what == "part":
        model[0] = torch.compile(model[0], backend="eager")
    elif what == "in place":
        model.compile(backend="eager")
    elif what == "forward of the instance":
        model.forward = torch.compile(model.forward, backend="eager")
    return {"whole": torch.compile(model, backend="eager"), "forward": CompiledForward(*model)}.get(what, model)


@pytest.mark.parametrize("what", ["whole", "part", "in place", "forward", "forward of the instance"])
def test_a_compiled_model_runs_uncompiled_through_the_twins_hooks(what):
    model = compiled(what).eval()
    expected = evaluate(model)
    twin, fired = shallow_twin(model), []
    assert list(dict(twin.named_modules())) == ["", "0", "1", "2", "3", "4", "5"]
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}
    twin[0].register_forward_hook(lambda *_: fired.append("conv"))
    twin[5].register_forward_hook(lambda *_: fired.append("head"))
    torch.testing.assert_close(evaluate(twin), expected)
    assert fired == ["conv", "head"]
    torch.testing.assert_close(evaluate(model), expected)
    assert fired == ["conv", "head"]


def test_wrappers_are_taken_off_at_every_depth():
    model = net()
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(nn.DataParallel(torch.compile(model, backend="eager")), backend="eager")) is model
    nested = nn.Sequential(nn.DataParallel(net()), nn.Identity())
    assert_apart(nested, shallow_twin(nested), same_names=False)


def test_what_cannot_be_hooked_is_refused():
    with pytest.raises(TapError, match=r"model: expected a torch\.nn\.Module, got function"):
        shallow_twin(lambda x: x)
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(net())
    message = r"model: the TorchScript module 'Sequential' cannot be hooked; pass the nn\.Module it was scripted from"
    for model in (scripted, nn.Sequential(scripted, nn.Linear(2, 2))):
        with pytest.raises(TapError, match=message):
            shallow_twin(model)
