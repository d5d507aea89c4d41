from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

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


class Holders(nn.Module):
    """Modules where registration does not see them, and bound methods."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(48, 2)
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
        x = self.steps[-1][1](self.steps[0](x))
        x = self.pair[1][0](self.by_name["norm"][0](x)) + len(self.names[self.norm])
        for module in self.members:
            x = module(x)
        return self.head(self.bound(self.method(self.ordered["norm"](x))).flatten(1))


class OwnNew(nn.Module):
    def __new__(cls, width):
        return super().__new__(cls)

    def __init__(self, width):
        super().__init__()
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(x.flatten(1))


class Config(dict):
    """A dict that is read by attributes, as configurations often are."""

    __getattr__ = dict.__getitem__


class Configured(OwnNew):
    def __init__(self, width):
        super().__init__(width)
        self.config = Config(scale=3.0)

    def forward(self, x):
        return self.config.scale * super().forward(x)


@pytest.mark.parametrize(
    "make",
    [net, Reused, Holders, lambda: OwnNew(48), lambda: Configured(48), lambda: torch.fx.symbolic_trace(net().eval())],
)
def test_the_twin_computes_the_same_from_its_own_modules(make):
    torch.manual_seed(0)
    model = make().train()
    assert_apart(model, shallow_twin(model))
    assert shallow_twin(model) is not shallow_twin(model)


def test_references_stay_references_to_one_twin():
    twin = shallow_twin(Reused())
    assert twin.first is twin.second is not twin.third
    holders = Holders()
    twin = shallow_twin(holders)
    assert twin.steps is not holders.steps
    assert twin.steps[-1] is twin.steps
    assert twin.steps[0] is twin.pair[0] is twin.by_name["norm"][0] is twin.method.__self__ is twin.norm
    assert twin.by_name.default_factory is list
    assert twin.bound.func.__self__ is twin
    assert twin.members == {twin.norm}
    assert not twin.steps[1].training  # which eval() does not reach
    assert holders.steps[1].training


def test_modules_in_a_forward_replaced_on_the_instance_are_led_to_the_twin():
    def wrap(model):
        original = model.forward

        def forward(x, *, shift=0.0):
            return original(x) + scale * shift

        scale = nn.Identity()(2.0)
        return forward

    by_closure, by_method, by_partial, by_lambda = net(), net(), net(), net()
    by_closure.forward = wrap(by_closure)
    original = by_method.forward
    by_method.forward = types.MethodType(lambda self, x: original(x) * 2, by_method)
    by_partial.forward = functools.partial(lambda model, x: nn.Sequential.forward(model, x), by_partial)
    by_lambda.act = lambda x: by_lambda[2](x)
    by_lambda.forward = lambda x: nn.Sequential.forward(by_lambda, by_lambda.act(x))
    for model in (by_closure, by_method, by_partial, by_lambda):
        assert_apart(model, shallow_twin(model.train()))


def test_a_recursive_closure_and_an_empty_cell_are_copied():
    model = net()

    def countdown(x, n=2):
        return countdown(model[2](x), n - 1) if n else nn.Sequential.forward(model, x)

    def unset():
        return later

    model.forward, model.unset = countdown, unset
    assert_apart(model, shallow_twin(model))
    later = 1
    assert model.unset() == 1


def test_data_in_a_users_hook_stays_the_users_own():
    model, seen = net(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(module))
    twin = shallow_twin(model)
    evaluate(twin)
    assert seen == [twin[0]]
    evaluate(model.eval())
    assert seen == [twin[0], model[0]]


def test_hooks_that_make_the_model_what_it_is_run_on_the_twin():
    class SelfHooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 4), nn.Linear(4, 2)
            self.kept = {}
            self.stem.register_forward_hook(lambda module, args, output: self.kept.update(stem=output))
            self.stem.register_forward_hook(self.double)

        def double(self, module, args, output):
            return 2 * output

        def forward(self, x):
            return self.head(self.stem(x).flatten(1)) + self.kept["stem"].mean()

    model = SelfHooked()
    twin = shallow_twin(model)
    evaluate(twin)
    assert model.kept == {}
    assert_apart(model, twin)


def parametrized():
    model = net()
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[5])
    return model


def pruned():
    model = net()
    prune.random_unstructured(model[5], "weight", 0.5)
    return model


@pytest.mark.parametrize("make", [parametrized, pruned])
def test_reparametrised_weights_follow_the_model(make):
    model = make().train()
    twin = shallow_twin(model)
    assert_apart(model, twin)
    other = make()
    with torch.no_grad():
        other[5].bias.add_(1)
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model.load_state_dict(other.state_dict())
    assert torch.equal(evaluate(twin), evaluate(model))
    assert torch.equal(twin[5].weight, model[5].weight)
    assert make is not parametrized or parametrize.is_parametrized(twin[5])


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

        merged = False

        def train(self, mode=True):
            if not mode and not self.merged:
                self.weight.data += 1
                self.merged = True
            return super().train(mode)

        def forward(self, x):
            return super().forward(x) + (0 if self.merged else x.sum(1, keepdim=True))

    model = nn.Sequential(nn.Flatten(), Merging(48, 2))
    before = model[1].weight.clone()
    shallow_twin(model)
    assert torch.equal(model[1].weight, before)
    assert not model[1].merged


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
