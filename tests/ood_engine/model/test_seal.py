"""Models that are changed after an engine was made of them, or fitted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import ood_engine as oe
from ood_engine.errors import TapError
from ood_engine.model.seal import Seal


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.fc = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def images(count=32, seed=1):
    return torch.randn((count, 3, 6, 6), generator=torch.Generator().manual_seed(seed))


def energy(model, x):
    was = model.training
    with torch.no_grad():
        found = model.eval()(x).logsumexp(1)
    model.train(was)
    return found


def replace_head(model):
    model.fc = nn.Linear(6, 4)


def replace_block(model):
    model.body[0] = nn.Conv2d(3, 6, 3)


def train(model):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimiser.step()


def update_statistics(model):
    with torch.no_grad():
        model.train()(images())


def prune_head(model):
    prune.l1_unstructured(model.fc, "weight", 0.5)


def normalise_head(model):
    parametrizations.weight_norm(model.fc)


def load_other(model):
    model.load_state_dict(Net(1).state_dict())


def assign_other(model):
    model.load_state_dict(Net(1).state_dict(), assign=True)


def remove_bias(model):
    model.fc.bias = None


SURGERY = [replace_head, replace_block, train, update_statistics, prune_head, normalise_head, load_other, assign_other]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_changed_signs_and_exchanged_weights_are_noticed(dtype):
    tensor = torch.ones((4096,), dtype=dtype)
    tensor[0] = 2
    model = nn.Module()
    model.register_buffer("weight", tensor)
    seal = Seal(model, {"": model})
    tensor.neg_()
    assert seal.change() == "weight"
    tensor.neg_()
    assert seal.change() is None
    for place in (1, 2048, 4095):
        tensor[[0, place]] = tensor[[place, 0]]
        assert seal.change() == "weight"
        tensor[[0, place]] = tensor[[place, 0]]


@pytest.mark.parametrize("change", [*SURGERY, remove_bias])
def test_a_change_before_fit_is_fitted(change):
    model = Net()
    engine = oe.Engine(model, ["energy"])
    change(model)
    assert torch.allclose(engine.fit([images()]).score(images())["energy"], energy(model, images()), atol=1e-6)


@pytest.mark.parametrize("loads", [False, True], ids=["fit", "load"])
@pytest.mark.parametrize("change", [*SURGERY, remove_bias])
def test_a_change_after_fit_or_load_is_noticed_until_the_next_fit(change, loads, tmp_path):
    model, path = Net(), tmp_path / "state.safetensors"
    engine = oe.Engine(model, ["energy"]).fit([images()])
    engine.save(path)
    if loads:
        engine = oe.Engine.load(path, model)
    change(model)
    for use in (
        lambda: engine.score(images()),
        lambda: engine.score_features(None, torch.zeros(2, 6)),
        lambda: engine.calibrate([images()]),
        lambda: engine.save(path),
        lambda: oe.explain(engine, images()[0], "energy"),
    ):
        with pytest.raises(
            TapError, match=r"the model has changed since it was fitted or loaded: '.+' is another now; call fit"
        ):
            use()
    assert torch.allclose(engine.fit([images()]).score(images())["energy"], energy(model, images()), atol=1e-6)


def same_again(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})


def same_assigned(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def there_and_back(model):
    with torch.no_grad():
        model.fc.weight.add_(1).sub_(1)
        model.fc.weight.copy_(Net().fc.weight)


UNCHANGED = {
    "mode": lambda model: model.train(),
    "same weights loaded": same_again,
    "same weights assigned": same_assigned,
    "there and back": there_and_back,
    "double": lambda model: model.double(),
    "half": lambda model: model.bfloat16(),
    "gradients": lambda model: model(images()).sum().backward() if not model.training else None,
    "hooks": lambda model: model.fc.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", UNCHANGED)
def test_what_leaves_the_weights_as_they_are_is_no_change(change):
    model = Net().eval()
    engine = oe.Engine(model, ["energy"]).fit([images()])
    UNCHANGED[change](model)
    for _ in range(2):
        engine.score(images())
    with torch.no_grad():
        model.fc.bias.add_(1)
    with pytest.raises(TapError, match=r"'fc\.bias'"):
        engine.score(images())


def test_values_assigned_unseen_are_found_by_save(tmp_path):
    model = Net()
    engine = oe.Engine(model, ["energy"]).fit([images()])
    model.body[0].weight.data[0, 0, 0, 0] += 1
    with pytest.raises(TapError, match=r"'body\.0\.weight'"):
        engine.save(tmp_path / "state.safetensors")


def test_nothing_is_read_while_nothing_happened(monkeypatch):
    model = Net()
    seal = Seal(model, dict(model.named_modules()))
    monkeypatch.setattr("ood_engine.model.seal._content", lambda tensor: pytest.fail("read"))
    assert seal.change() is None


def test_models_made_in_inference_mode_are_sealed():
    with torch.inference_mode():
        model = Net()
        engine = oe.Engine(model, ["energy"]).fit([images()])
        engine.score(images())
        model.fc = nn.Linear(6, 4)
        with pytest.raises(TapError, match="'fc'"):
            engine.score(images())
