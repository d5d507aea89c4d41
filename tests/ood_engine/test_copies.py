"""Engines that are copied, pickled, sent to other processes, compiled, or made of unusual weights."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import ood_engine as oe
from ood_engine.errors import TapError

NAMES = ["nap_energy", "opnp", "low_dim_gradient"]

CHILD = """
import pickle, sys
import torch
from ood_engine.demo import small_cnn
engine, images = pickle.load(sys.stdin.buffer)
pickle.dump(dict(engine.score(images)), sys.stdout.buffer)
"""


def saved(engine):
    buffer = io.BytesIO()
    torch.save(engine, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class Holder(nn.Module):
    def __init__(self, engine):
        super().__init__()
        self.engine = engine


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        saved,
        lambda engine: pickle.loads(pickle.dumps(engine)),
        lambda engine: copy.deepcopy(Holder(engine)).engine,
    ],
)
def test_a_copy_scores_alike_and_on_its_own(duplicate, make_engine, test_images, assert_same_scores):
    engine = make_engine(NAMES)
    expected = engine.score(test_images)
    other = duplicate(engine)
    assert_same_scores(other.score(test_images), expected, 0)
    assert all(
        torch.equal(flags, engine.predict(test_images)[name]) for name, flags in other.predict(test_images).items()
    )
    other.refit(opnp={"weight_range": (0.5, 0.9)})
    if duplicate is not copy.copy:
        assert_same_scores(engine.score(test_images), expected, 0)


def test_another_process_scores_alike(assert_same_scores):
    from ood_engine.demo import small_cnn

    images = torch.rand(256, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    engine = oe.Engine(small_cnn(), NAMES).fit([images[:128]], labels="predicted")
    sent = pickle.dumps((engine, images[:5]))
    answer = subprocess.run([sys.executable, "-c", CHILD], input=sent, capture_output=True, check=True).stdout
    assert_same_scores(pickle.loads(answer), engine.score(images[:5]), 0)


def test_a_model_that_changed_is_not_copied_as_if_it_had_been_fitted(make_model, id_batches):
    model = make_model()
    engine = oe.Engine(model, ["energy"]).fit([images for images, _ in id_batches])
    model[0].weight.data += 1
    with pytest.raises(TapError, match=r"has changed since it was fitted or loaded: .* call fit"):
        copy.deepcopy(engine)


def test_a_cache_in_files_stays_behind(model, id_batches, test_images, tmp_path):
    engine = oe.Engine(model, ["energy"]).fit(id_batches, cache_limit_bytes=0, cache_directory=tmp_path)
    assert engine.cache.directory is not None
    assert copy.deepcopy(engine).cache is None
    assert engine.refit(energy={}).cache is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_calls_the_engine_untraced(make_engine, test_images):
    engine = make_engine(NAMES)
    expected = engine.score(test_images)["opnp"]
    assert torch.equal(torch.compile(engine.score, backend="eager")(test_images)["opnp"], expected)
    around = torch.compile(lambda x: engine.score(x + 0)["opnp"] + 1, backend="eager")
    assert torch.equal(around(test_images), expected + 1)


def test_a_head_of_buffers_scores_as_one_of_parameters(
    make_model, id_batches, test_images, assert_same_scores, tmp_path
):
    model, frozen = make_model(), make_model()
    for module in frozen.modules():
        for name, weight in list(module._parameters.items()):
            del module._parameters[name]
            module.register_buffer(name, weight.detach())
    batches = [images for images, _ in id_batches]
    engine, other = (oe.Engine(one, ["energy", "max_logit"]).fit(batches) for one in (model, frozen))
    assert_same_scores(other.score(test_images), engine.score(test_images), 0)
    other.save(tmp_path / "state.safetensors")
    assert_same_scores(
        oe.Engine.load(tmp_path / "state.safetensors", model).score(test_images), engine.score(test_images), 0
    )
