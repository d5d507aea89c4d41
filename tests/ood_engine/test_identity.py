"""Whether a model is the one that a state was fitted to."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import ood_engine as oe
from ood_engine.errors import OodEngineWarning, StateDriftWarning, StateError
from ood_engine.identity import ModelDigest, SyntheticInputs
from ood_engine.scorer import Scorer


def digest(model: nn.Module) -> ModelDigest:
    return ModelDigest.of((*model.parameters(), *model.buffers()))


def in_other_memory(model):
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.data = weight.data.mT.contiguous().mT if weight.ndim > 1 else weight.data
    return other


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5))


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, copy.deepcopy, in_other_memory])
def test_wrappers_and_memory_leave_the_digest_alone(wrap, network):
    assert digest(wrap(network)) == digest(network)


def test_casts_are_the_same_model_in_both_directions(network):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        original = copy.deepcopy(network).to(dtype)
        for cast in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            assert digest(original).matches(digest(copy.deepcopy(original).to(cast))), (dtype, cast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "1.num_batches_tracked", "2.bias"])
def test_one_other_value_anywhere_is_another_model(name, dtype, network):
    other = copy.deepcopy(network)
    changed = other.state_dict()[name].view(-1)
    changed[-1] = changed[-1] * 1.5 + 1
    assert not digest(network).matches(digest(other.to(dtype)))


def test_every_chunk_counts(network, monkeypatch):
    monkeypatch.setattr("ood_engine.identity._CHUNK", 5)
    in_chunks = digest(network)
    monkeypatch.undo()
    assert in_chunks == digest(network)


def test_the_formula_is_the_same_everywhere():
    inputs = SyntheticInputs((1, 2, 3), -1.0, 3.0)
    images = inputs.images()
    for row in range(4):
        for place in range(6):
            hashed = ((place // 4**row + 97 * row + 1) * 2654435761) % 2**32
            assert images[row].flatten()[place] == pytest.approx(-1 + 4 * hashed / 2**32)
    assert images.min() >= -1
    assert images.max() <= 3
    batch = torch.tensor([[0.5, torch.nan], [-2.0, torch.inf]])
    assert SyntheticInputs.like(batch) == SyntheticInputs((2,), -2.0, 0.5)


def other_stem(model):
    model[0].reset_parameters()


def other_batch_statistics(model):
    model[2].bias.data += 3


def rounded(model):
    for weight in model.parameters():
        step = weight.data.abs().max() / 127
        weight.data = (weight.data / step).round() * step


def a_single_bit(model):
    model[-1].bias.data[0] = torch.nextafter(model[-1].bias.data[0], torch.tensor(99.0))


@pytest.fixture(scope="module")
def default_state(model, id_batches, fresh_batches, tmp_path_factory):
    path = tmp_path_factory.mktemp("identity") / "state.safetensors"
    oe.Engine(model).fit(id_batches).calibrate(fresh_batches, 0.1).save(path)
    return path


@pytest.mark.parametrize("change", [other_stem, other_batch_statistics])
def test_another_backbone_is_refused_unless_forced(change, default_state, model):
    other = copy.deepcopy(model)
    change(other)
    message = r"fitted to another model: .* scores synthetic inputs .* % away .*; force=True \(--force\) goes on anyway"
    with pytest.raises(StateError, match=message):
        oe.Engine.load(default_state, other)
    with pytest.warns(StateDriftWarning, match=message):
        assert oe.Engine.load(default_state, other, force=True).calibrations


def test_without_scores_of_synthetic_inputs_no_other_model_is_taken(model, id_batches, tmp_path, monkeypatch):
    path, other = tmp_path / "state.safetensors", copy.deepcopy(model)
    engine = oe.Engine(model, ["energy"]).fit(id_batches)
    monkeypatch.setattr(Scorer, "_agrees", lambda _, signals, __: torch.zeros(len(signals.features), dtype=torch.bool))
    engine.save(path)
    oe.Engine.load(path, model)
    other_stem(other)
    message = "fitted to another model: .*, and no synthetic input has a score by which to compare them; load"
    with pytest.raises(StateError, match=message):
        oe.Engine.load(path, other)
    with pytest.warns(StateDriftWarning, match=message):
        oe.Engine.load(path, other, force=True)


@pytest.mark.parametrize("change", [rounded, a_single_bit])
def test_a_quantised_model_is_told_its_drift(change, default_state, model):
    other = copy.deepcopy(model)
    change(other)
    with pytest.warns(
        OodEngineWarning, match=r"another model: .* but '.*' scores synthetic inputs [\d.e-]+ % away"
    ) as told:
        oe.Engine.load(default_state, other)
    assert told[0].filename == __file__


def test_no_image_of_a_user_is_kept(default_state, id_batches):
    from safetensors.torch import load_file

    assert all(tensor.ndim < 4 for tensor in load_file(default_state).values())


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta state:UserWarning")
@pytest.mark.parametrize(
    "of",
    [
        lambda ones: ones.to_sparse(),
        lambda ones: ones.to_sparse_csr(),
        lambda ones: ones.to_sparse_csc(),
        lambda ones: (ones * (1 + 2j)).conj(),
        lambda ones: (ones * (1 + 2j)).conj().imag,
        lambda ones: ones.to(torch.float8_e4m3fn),
        lambda ones: ones.to(torch.float8_e8m0fnu),
    ],
    ids=["coo", "csr", "csc", "conjugate", "negative", "float8", "float8 exponents"],
)
def test_buffers_of_any_layout_and_dtype_are_known(of, make_model, id_batches, tmp_path):
    model, path = make_model(), tmp_path / "state.safetensors"
    model.register_buffer("extra", of(torch.ones(3, 3)))
    oe.Engine(model, ["energy"]).fit([images for images, _ in id_batches]).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OodEngineWarning)
        oe.Engine.load(path, model)
    model.extra = of(torch.full((3, 3), 2.0))
    with pytest.warns(OodEngineWarning, match="fitted to another model"):
        oe.Engine.load(path, model)


def test_buffers_of_a_model_are_in_its_state(make_model, id_batches, tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(3), *make_model()).eval()
    path = tmp_path / "state.safetensors"
    oe.Engine(model, ["energy"]).fit([images for images, _ in id_batches]).save(path)
    model[0].num_batches_tracked += 1
    with pytest.warns(
        OodEngineWarning, match="weights or buffers do not, but 'energy' scores synthetic inputs 0 % away"
    ):
        oe.Engine.load(path, model)
