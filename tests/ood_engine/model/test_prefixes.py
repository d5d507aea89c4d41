"""States loaded into the same model in another wrapper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ood_engine as oe
from ood_engine.errors import StateError, TapError
from ood_engine.model.prefixes import Prefixes, prefixes_between


class Wrapped(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        self.parts = list(parts)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return getattr(self, self.parts[0])(x)


WRAPPERS = {
    "lightning": lambda model: Wrapped(model=model),
    "nested": lambda model: Wrapped(net=Wrapped(backbone=model)),
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "none": lambda model: model,
}


@pytest.mark.parametrize("after", WRAPPERS)
@pytest.mark.parametrize("before", ["lightning", "nested", "none"])
def test_a_state_fits_the_same_model_in_any_wrapper(before, after, make_model, images, tmp_path, request):
    x = images(64, 1)[0]
    norm = nn.Sequential(*list(make_model())[:-1], nn.LayerNorm(12), make_model()[-1])
    engine = oe.Engine(WRAPPERS[before](norm), ["nap", "energy"]).fit([x])
    assert engine.plan.tail
    engine.save(tmp_path / "state.safetensors")
    loaded = oe.Engine.load(tmp_path / "state.safetensors", WRAPPERS[after](norm))
    for name, score in engine.score(x).items():
        assert torch.equal(loaded.score(x)[name], score)


def test_the_weights_and_not_the_names_make_it_the_same(make_model, images, tmp_path):
    path = tmp_path / "state.safetensors"
    oe.Engine(make_model(), ["energy"]).fit([images(64, 1)[0]]).save(path)
    with pytest.raises(StateError, match="fitted to another"):
        oe.Engine.load(path, Wrapped(model=make_model(seed=1)))
    with pytest.raises(
        (StateError, TapError),
        match="'student' and 'teacher' of this model have one; pass that part of the model alone",
    ):
        oe.Engine.load(path, Wrapped(student=make_model(), teacher=make_model(seed=1)))


def test_prefixes_between_names():
    assert prefixes_between(["a.b", "c"], ["x.a.b", "x.c", "y.a.b"]) == [Prefixes("", "x.")]
    assert prefixes_between(["x.y.a", "x.y.b"], ["a", "b"]) == [Prefixes("x.y.", "")]
    assert prefixes_between([""], ["", "model"]) == [Prefixes("", "model.")]
    assert prefixes_between(["model"], [""]) == [Prefixes("model.", "")]
    assert prefixes_between(["x.a", "x.b"], ["y.z.a", "y.z.b"]) == [Prefixes("x.", "y.z.")]
    assert prefixes_between(["a", "b"], ["xa", "xb", "y.a"]) == []
