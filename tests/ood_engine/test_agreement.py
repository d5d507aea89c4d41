"""Samples whose features or logits are not the model's own have no score, however the model was verified in `fit`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ood_engine as oe
from ood_engine.errors import TapError
from ood_engine.model.checks import rounding_of

DETECTORS = ("nap", "opnp", "energy")


class Pooled(nn.Module):
    """A CNN whose pooling, between its last map and its head, is `pool`."""

    def __init__(self, model, pool):
        super().__init__()
        self.body, self.head, self.pool = nn.Sequential(*list(model)[:4]), model[-1], pool

    def forward(self, x):
        return self.head(self.pool(self.body(x), x))


class AdaptedLinear(nn.Linear):
    """A head with a low-rank adapter beside its weight, as of LoRA."""

    def __init__(self, head):
        super().__init__(head.in_features, head.out_features)
        self.load_state_dict(head.state_dict())
        self.up = nn.Parameter(torch.zeros(head.out_features, 1))

    def forward(self, x):
        return super().forward(x) + (1 + x[:, :1]) @ self.up.T


def clamped(feature_map, x):
    return F.relu6(feature_map).mean((2, 3))


def masked(feature_map, x):
    """The mean over the positions whose pixels are not all padding (0)."""
    positions = (x[:, :, ::2, ::2].abs().amax(1, keepdim=True) > 0).float()
    return (feature_map * positions).sum((2, 3)) / positions.sum((2, 3)).clamp(min=1)


def largest(feature_map, x):
    return feature_map.amax((2, 3))


def fitted(model, batches, names=DETECTORS):
    return oe.Engine(model, names).fit(batches)


def padded(images):
    images = images.clone()
    images[..., 4:] = 0
    return images


@pytest.fixture
def batches(images):
    return [images(64, seed)[0] for seed in (0, 1)]


@pytest.mark.parametrize(("pool", "change"), [(clamped, lambda x: 1e4 * x), (masked, padded)], ids=["clamp", "padding"])
def test_images_on_which_the_pooling_does_something_else_have_no_score(make_model, batches, images, pool, change):
    engine = fitted(Pooled(make_model(), pool), batches)
    assert engine.plan.proven
    known = images(6, 7)[0]
    both = engine.score(torch.cat([known, change(known)]))
    assert int(both.mismatched_rows) == 6
    assert int(both.bad_rows) == 0
    alone = engine.score(known)
    for name, scores in both.items():
        assert torch.isnan(scores[6:]).all(), name
        assert torch.equal(scores[:6], alone[name]), name
    assert int(alone.mismatched_rows) == 0


def test_they_are_reported_and_flagged(make_model, batches, images):
    engine = fitted(Pooled(make_model(), clamped), batches).calibrate([images(64, 3)[0]])
    far = 1e4 * images(4, 7)[0]
    with pytest.warns(oe.OodEngineWarning, match="4 of 4 inputs have no score .* clamp"):
        engine.score_loader([far])
    assert all(flags.all() for flags in engine.predict(far).values())


def test_a_map_that_only_the_first_batch_proves_is_refused_and_other_detectors_fit(make_model, batches):
    black = torch.zeros(8, 3, 8, 8)
    flat = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 12, 1), nn.ReLU(), *list(make_model())[4:]).eval()
    model = Pooled(flat, largest)
    with pytest.raises(TapError, match=r"64 of 64 images .* spatial mean of 'body' .* such as 'energy'"):
        fitted(model, [black, *batches])
    assert fitted(model, [black, *batches], ["energy"]).score(batches[0])["energy"].isfinite().all()


def test_padding_in_a_later_batch_of_fit_is_refused(make_model, batches):
    with pytest.raises(TapError, match="64 of 64 images"):
        fitted(Pooled(make_model(), masked), [batches[0], padded(batches[1])])


@pytest.mark.parametrize("names", [DETECTORS, ["energy"]], ids=["with a map", "without"])
def test_an_adapter_trained_after_fit_is_noticed(make_model, batches, names):
    model = make_model()
    model[-1] = AdaptedLinear(model[-1])
    engine = fitted(model, batches, names)
    assert int(engine.score(batches[0]).mismatched_rows) == 0
    model[-1].up.data.fill_(0.5)  # which leaves no trace on the parameter
    scores = engine.score(batches[0])
    assert int(scores.mismatched_rows) == 64
    with pytest.raises(TapError, match="merge adapters"):
        engine.calibrate([batches[1]])


class Output(nn.Module):
    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x):
        return self.function(self.model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["logits", "softmax", "log_softmax"])
def test_every_output_form_and_dtype_agrees_at_any_magnitude(make_model, batches, form, dtype):
    functions = {"logits": nn.Identity(), "softmax": nn.Softmax(1), "log_softmax": nn.LogSoftmax(1)}
    engine = fitted(Output(make_model(), functions[form]).to(dtype), batches)
    assert engine.scorer.agreement.output == form
    for scale in (0.0, 1e-3, 1.0, 1e3):
        assert int(engine.score(scale * batches[0]).mismatched_rows) == 0, scale


class Mixed(nn.Module):
    """A CNN whose parts run in the dtypes of `steps`: its body, the pooling and its head, the latter under autocast."""

    def __init__(self, model, body, pooled, head):
        super().__init__()
        self.body, self.head, self.dtypes = nn.Sequential(*list(model)[:4]).to(body), model[-1], (body, pooled, head)

    def forward(self, x):
        body, pooled, head = self.dtypes
        vector = self.body(x.to(body)).to(pooled).mean((2, 3)).float()
        with torch.autocast("cpu", head, enabled=head != torch.float32):
            return self.head(vector).float()


@pytest.mark.parametrize("names", [DETECTORS, ["energy"]], ids=["with a map", "without"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", ["half body", "half body, fp32 pooling", "half head"])
def test_a_model_partly_in_half_precision_agrees_with_itself(make_model, batches, names, half, steps):
    full = torch.float32
    dtypes = {
        "half body": (half, half, full),
        "half body, fp32 pooling": (half, full, half),
        "half head": (full, full, half),
    }
    engine = fitted(Mixed(make_model(), *dtypes[steps]).eval(), batches, names)
    for scale in (0.0, 1e-3, 1.0, 1e3):
        assert int(engine.score(scale * batches[0]).mismatched_rows) == 0, scale


@pytest.mark.parametrize("fit_in_half", [False, True])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_around_fit_or_score_alone_agrees(make_model, batches, half, fit_in_half):
    model = Output(make_model(), lambda logits: logits.float())
    with torch.autocast("cpu", half, enabled=fit_in_half):
        engine = fitted(model, batches)
    with torch.autocast("cpu", half, enabled=not fit_in_half):
        for scale in (0.0, 1.0, 1e3):
            assert int(engine.score(scale * batches[0]).mismatched_rows) == 0, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "form", [nn.Identity(), nn.Softmax(1), nn.LogSoftmax(1)], ids=["logits", "softmax", "log_softmax"]
)
def test_large_logits_that_almost_tie_agree(make_model, batches, form, dtype):
    model = make_model()
    with torch.no_grad():
        model[-1].weight[0] = model[-1].weight[0].abs()
        model[-1].weight[1] = model[-1].weight[0] * torch.linspace(0.999, 1.001, model[-1].in_features)
    engine = fitted(nn.Sequential(model, form).to(dtype).eval(), batches)
    for scale in (1e2, 1e3, 1e4):
        assert int(engine.score(scale * batches[0]).mismatched_rows) == 0, scale


def test_overflow_in_half_precision_is_not_a_mismatch(make_model, batches):
    model = make_model()
    with torch.no_grad():
        model[-1].weight.abs_().mul_(300)
    engine = fitted(model.half(), batches, ["energy"])
    far = (5e4 * batches[0][:4]).clamp(-6e4, 6e4)
    _, features, logits, _ = engine.scorer.run(far)
    assert features.isfinite().all()
    assert not logits.isfinite().all(1).any()
    scores = engine.score(far)
    assert (int(scores.mismatched_rows), int(scores.bad_rows)) == (0, 4)


class RoundedLinear(nn.Linear):
    """A head that multiplies in less than its dtype, as in TF32; with 7 bits of mantissa, so that few features show it."""

    def forward(self, x):
        return F.linear(x.bfloat16().float(), self.weight.bfloat16().float(), self.bias)


def test_a_head_in_tf32_agrees(make_model, batches, monkeypatch):
    model = make_model()
    head = RoundedLinear(model[-1].in_features, model[-1].out_features)
    head.load_state_dict(model[-1].state_dict())
    model[-1] = head
    with pytest.raises(TapError, match=r"merge adapters|recomputed"):
        fitted(model, batches)
    monkeypatch.setattr("ood_engine.model.tap.rounding_of", lambda head, output: torch.float16)
    assert int(fitted(model, batches).score(1e3 * batches[0]).mismatched_rows) == 0


@pytest.mark.parametrize(("head", "setting"), [(nn.Linear(2, 2), "cuda.matmul"), (nn.Conv2d(2, 2, 1), "cudnn.conv")])
def test_tf32_has_the_precision_of_fp16(monkeypatch, head, setting):
    on_gpu = SimpleNamespace(dtype=torch.float32, is_cuda=True)
    assert rounding_of(head, torch.zeros(1, 2)) == torch.float32
    for precision, expected in (("ieee", torch.float32), ("tf32", torch.float16)):
        monkeypatch.setattr(f"torch.backends.{setting}", SimpleNamespace(fp32_precision=precision))
        assert rounding_of(head, on_gpu) == expected


def test_a_refused_fit_leaves_the_tolerances_of_the_last(make_model, batches, images):
    engine = fitted(Pooled(make_model(), clamped), batches)
    before, far = engine.scorer.agreement, 1e4 * images(4, 7)[0]
    with pytest.raises(TapError, match="4 of 68"):
        engine.fit([torch.cat([batches[0], far])])
    assert engine.scorer.agreement == before
    assert engine.image_shape == (3, 8, 8)
    assert int(engine.score(far).mismatched_rows) == 4


def test_what_was_seen_in_fit_travels_with_the_state(make_model, batches, tmp_path):
    engine = fitted(Pooled(make_model(), clamped), batches)
    engine.save(tmp_path / "state")
    loaded = oe.Engine.load(tmp_path / "state", Pooled(make_model(), clamped))
    assert loaded.scorer.agreement == engine.scorer.agreement
    assert int(loaded.score(1e4 * batches[0]).mismatched_rows) == 64


def test_given_features_other_than_the_map_s_own_have_no_score(make_model, batches):
    engine = fitted(make_model(), batches)
    feature_map, features, *_ = engine.scorer.run(batches[0][:4])
    assert int(engine.score_features(feature_map, features).mismatched_rows) == 0
    assert int(engine.score_features(feature_map, features.roll(1, 0)).mismatched_rows) == 4
