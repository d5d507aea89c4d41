"""Modules that a model reaches otherwise than by attributes."""

from __future__ import annotations

import weakref
from collections import UserDict, deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import ood_engine as oe
from ood_engine.errors import OodEngineError, TapError
from ood_engine.model.tap import Tap


class Pair(NamedTuple):
    module: Any
    number: int


@dataclass(frozen=True)
class Frozen:
    module: Any


class Slots:
    __slots__ = ("module",)

    def __init__(self, module):
        self.module = module


class Config(dict):
    __getattr__ = dict.__getitem__


class Caller:
    def __init__(self, module):
        self.inner = SimpleNamespace(module=module, owner=self)

    def __call__(self, x):
        return self.inner.owner.inner.module(x)


WORLD = {}


class Sealed:
    """Not copied, since something may be cleaned up with it."""

    def __init__(self, module):
        self.module = module

    def __del__(self):
        pass


HOLDERS = {
    "namespace": (SimpleNamespace, lambda held: held.module, {"by_name": True}),
    "named tuple": (lambda module: Pair(module, 1), lambda held: held.module, {}),
    "frozen data class": (Frozen, lambda held: held.module, {}),
    "slots": (Slots, lambda held: held.module, {}),
    "dict by attribute": (lambda module: Config(module=module), lambda held: held.module, {}),
    "user dict": (lambda module: UserDict(a=[module]), lambda held: held["a"][0], {}),
    "deque": (lambda module: deque([module], maxlen=3), lambda held: held[0], {}),
    "weak reference": (weakref.ref, lambda held: held(), {}),
    "proxy": (lambda module: [weakref.proxy(module)], lambda held: held[0], {}),
    "callable": (Caller, lambda held: held, {}),
    "nested": (lambda module: [SimpleNamespace(a={"b": Slots(module)})], lambda held: held[0].a["b"].module, {}),
}
REFUSED = {
    "global variable": (lambda module: WORLD.update(module=module), lambda held: WORLD["module"]),
    "what is cleaned up": (Sealed, lambda held: held.module),
}


class Net(nn.Module):
    def __init__(self, hold, get):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.fc, self.get = nn.Linear(6, 4), get
        self.held = hold(self.backbone)

    def forward(self, x):
        return self.fc(self.get(self.held)(x).mean((2, 3)))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", HOLDERS)
def test_modules_held_by_plain_objects_are_copied(kind):
    hold, get, options = HOLDERS[kind]
    model = Net((lambda module: hold(module=module)) if options else hold, get).train()
    held, before, x = model.held, state(model), torch.randn(8, 3, 6, 6)
    engine = oe.Engine(model, ["nap", "energy"]).fit([x])
    scores = engine.score(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.held is held
    with torch.no_grad():
        torch.testing.assert_close(scores["energy"], model.eval()(x).logsumexp(1))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_module_that_cannot_be_copied_is_refused_before_it_runs(kind):
    model = Net(*REFUSED[kind]).train()
    before, x = state(model), torch.randn(8, 3, 6, 6)
    with pytest.raises(
        TapError, match=r"calls its Sequential 'backbone' through an object .* call self.module\(\.\.\.\)"
    ):
        Tap(model).find(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.get = lambda held: None
    model.forward = lambda x: model.fc(model.backbone(x).mean((2, 3)))
    assert Tap(model).find(x).proven


def test_a_state_is_held_to_it_too(tmp_path):
    good, x = Net(lambda module: None, lambda held: None), torch.randn(8, 3, 6, 6)
    good.forward = lambda x: good.fc(good.backbone(x).mean((2, 3)))
    oe.Engine(good, ["energy"]).fit([x]).save(tmp_path / "state.safetensors")
    model = Net(*REFUSED["global variable"])
    for _ in range(2):
        with pytest.raises(OodEngineError, match="'backbone'"):
            oe.Engine.load(tmp_path / "state.safetensors", model).score(x)


def test_layers_without_weights_made_on_the_way_are_no_strangers():
    model = Net(lambda module: None, lambda held: None)
    model.forward = lambda x: model.fc(nn.Sequential(model.backbone, nn.Hardtanh())(x).mean((2, 3)))
    assert Tap(model).find(torch.randn(8, 3, 6, 6)).head == "fc"


def test_other_threads_and_later_passes_are_not_watched():
    tap = Tap(Net(lambda module: None, lambda held: None))
    other = nn.Linear(2, 2)
    with tap._guard.watch():
        import threading

        failed = []
        thread = threading.Thread(target=lambda: failed.append(other(torch.ones(1, 2)) is None))
        thread.start()
        thread.join()
        assert failed == [False]
        with pytest.raises(TapError, match="Linear ''"):
            other(torch.ones(1, 2))
    other(torch.ones(1, 2))
