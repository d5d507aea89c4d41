from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ood_engine.demo import SmallCNN, small_cnn
from ood_engine.errors import InputError, OodEngineWarning
from ood_engine.model.loading import load_model, load_weights

SPEC = "ood_engine.demo:small_cnn"


@pytest.fixture
def user_code(tmp_path):
    """A file with factories, beside a module that it imports."""
    (tmp_path / "sizes_of_user.py").write_text("CLASSES = 4\n")
    path = tmp_path / "net.py"
    path.write_text(
        textwrap.dedent(
            """
            import torch
            from sizes_of_user import CLASSES

            def make():
                return torch.nn.Linear(3, CLASSES).train()

            def broken():
                raise RuntimeError("no data\\nhere")

            def number():
                return 3

            value = torch.nn.Linear(1, 1)
            """
        )
    )
    return path


def state():
    return SmallCNN(seed=1).state_dict()


def same_weights(model):
    return all(torch.equal(value, state()[name]) for name, value in model.state_dict().items())


def message(spec, weights=None):
    with pytest.raises(InputError) as caught:
        load_model(spec, weights)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_file_may_import_its_neighbours_and_the_path_stays_clean(user_code):
    before = list(sys.path)
    model = load_model(f"{user_code}:make")
    assert isinstance(model, nn.Linear)
    assert model.out_features == 4
    assert not model.training
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("broken", "broken() raised RuntimeError: no data here"),
        ("number", "number() returned a int; expected an nn.Module"),
        ("missing", "a function missing() that returns an nn.Module; there is none"),
        ("value", "it is a Linear"),
    ],
)
def test_a_wrong_factory_is_named(user_code, name, expected):
    assert expected in message(f"{user_code}:{name}")


def test_a_spec_without_factory_and_files_that_cannot_be_imported(tmp_path):
    (tmp_path / "bad.py").write_text("raise SystemExit('stop')")
    assert "importing" in message(f"{tmp_path}/bad.py:make")
    assert "expected package.module:factory" in message("ood_engine.model.loading")
    assert "no such file" in message(f"{tmp_path}/none.py:make")
    assert "No module named 'nowhere_at_all'" in message("nowhere_at_all:make")


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "net", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_checkpoints_of_every_kind_are_loaded(tmp_path, key, prefix):
    path = tmp_path / "net.pt"
    found = {prefix + name: value for name, value in state().items()}
    torch.save(found if key is None else {key: found, "epoch": 3}, path)
    assert same_weights(load_model(SPEC, path))


def test_prefixes_of_wrappers_are_told(tmp_path):
    path = tmp_path / "net.pt"
    inside = {f"model.{name}": value for name, value in state().items()}
    torch.save({"state_dict": inside | {"loss.weight": torch.ones(8)}}, path)
    with pytest.warns(
        OodEngineWarning,
        match=r"their prefix is 'model\.', that of the model ''; 1 other tensors of the file are ignored",
    ):
        assert same_weights(load_model(SPEC, path))
    torch.save(inside | {f"teacher.net.{name}": value + 1 for name, value in state().items()}, path)
    assert "'model.' and 'teacher.net.' both hold this model; save the state_dict of one" in message(SPEC, path)
    torch.save({name: value for name, value in inside.items() if "head" not in name}, path)
    assert "lacks" in message(SPEC, path)


def test_a_wrapped_model_takes_plain_weights(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom ood_engine.demo import SmallCNN\n"
        "class Lit(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.model = SmallCNN(seed=2)\n"
    )
    torch.save(state(), tmp_path / "net.pt")
    with pytest.warns(OodEngineWarning, match=r"their prefix is '', that of the model 'model\.'"):
        assert same_weights(load_model(f"{tmp_path}/net.py:Lit", tmp_path / "net.pt").model)


def test_safetensors_are_loaded(tmp_path):
    save_file(state(), tmp_path / "net.safetensors")
    assert same_weights(load_model(SPEC, tmp_path / "net.safetensors"))


def test_a_pickled_model_is_not_unpickled(tmp_path):
    torch.save(SmallCNN(), tmp_path / "whole.pt")
    assert "nothing is unpickled" in message(SPEC, tmp_path / "whole.pt")


def test_missing_unknown_and_mismatched_names_are_told(tmp_path):
    path = tmp_path / "net.safetensors"
    lacking = {name: value for name, value in state().items() if not name.startswith("head")}
    save_file(lacking | {"fc.weight": torch.zeros(2)}, path)
    text = message(SPEC, path)
    assert "lacks 'head.weight' (and 1 more) and has the unknown 'fc.weight'" in text
    save_file(state() | {"head.weight": torch.zeros(3, 64)}, path)
    assert "'head.weight' has shape [3, 64], the model expects [8, 64]" in message(SPEC, path)


def test_damaged_and_missing_weights(tmp_path):
    for name in ("net.safetensors", "net.pt"):
        path = tmp_path / name
        assert "no such file" in message(SPEC, path)
        path.write_bytes(b"PK\x03\x04 not much")
        assert str(path) in message(SPEC, path)


@pytest.mark.parametrize("found", [[1, 2], {}, {"epoch": 3}])
def test_what_is_no_state_dict_is_refused(tmp_path, found):
    torch.save(found, tmp_path / "net.pt")
    with pytest.raises(InputError, match="holds no state_dict"):
        load_weights(tmp_path / "net.pt")


def test_small_cnn_is_seeded_and_leaves_the_random_state():
    before = torch.random.get_rng_state()
    first, second, other = SmallCNN(seed=1), SmallCNN(seed=1), SmallCNN(seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    images = torch.rand(3, 1, 8, 8)
    assert small_cnn()(images).shape == (3, 8)
    feature_map = small_cnn().eval().body(images)
    assert feature_map.shape == (3, 64, 8, 8)
    assert feature_map.min() >= 0
