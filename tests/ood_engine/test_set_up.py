"""Wrong set-ups are refused by `fit` before or without loss of its long pass, and what each refusal advises works."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torch.utils.data.sampler import BatchSampler, SequentialSampler

import ood_engine as oe
from ood_engine.errors import CalibrationError, InputError, OodEngineWarning
from ood_engine.features.loader import most_samples
from ood_engine.state import read_header

NAMES = ["energy", "low_dim_gradient"]


class Foldered(list):
    """A loader whose dataset has class folders."""

    def __init__(self, batches, names, **attributes):
        super().__init__(batches)
        self.dataset = SimpleNamespace(classes=list(names), **attributes)


def renumbered(batches, numbers):
    return [(x, torch.tensor(numbers)[y]) for x, y in batches]


def divided_twice(batches):
    return [(x / 255, y) for x, y in batches]


# labels that the model does not predict


@pytest.mark.parametrize("prepare", [divided_twice, lambda batches: renumbered(batches, [1, 2, 3, 4, 0])])
def test_chance_agreement_is_refused_and_nothing_extracted_is_lost(
    prepare, model, id_batches, fresh_batches, count_forwards, tmp_path
):
    engine = oe.Engine(model, NAMES)
    with pytest.raises(
        InputError, match=r"no more than by chance .*check mean and std, image size, channel order, the"
    ):
        engine.fit(prepare(id_batches))
    with pytest.raises(oe.errors.NotFittedError):
        engine.score(id_batches[0][0])
    done = len(count_forwards)
    with pytest.warns(OodEngineWarning, match="overruled by force: the model predicts"):
        engine.refit(force=True)
    assert len(count_forwards) == done
    engine.calibrate(fresh_batches).save(tmp_path / "state")
    (overruled,) = read_header(tmp_path / "state")["set_up"]["overruled"]
    assert "no more than by chance" in overruled
    loaded = oe.Engine.load(tmp_path / "state", model)
    assert loaded.set_up.record == engine.set_up.record
    with pytest.warns(OodEngineWarning, match="overruled by force"):
        direct = oe.Engine(model, NAMES).fit(prepare(id_batches), force=True)
    x = fresh_batches[0][0]
    assert torch.equal(direct.score(x)["low_dim_gradient"], engine.score(x)["low_dim_gradient"])


def test_a_refused_fit_can_go_on_with_other_detectors(model, id_batches, count_forwards):
    engine = oe.Engine(model, NAMES)
    with pytest.raises(InputError, match="by chance"):
        engine.fit(renumbered(id_batches, [1, 2, 3, 4, 0]))
    done = sum(count_forwards)
    cache = oe.FeatureCache.from_features(engine.cache.rows.features)
    other = oe.Engine(model, ["energy"]).fit_features(cache, id_batches[0][0][:4])
    assert sum(count_forwards) < done + 40
    assert other.score(id_batches[0][0])["energy"].isfinite().all()


@pytest.mark.filterwarnings("ignore:overruled by force", "ignore:the feature map")
def test_a_refused_fit_is_refitted_on_the_relu_that_it_decided_for(make_model, id_batches, test_images):
    model = make_model(nn.GELU)
    engine = oe.Engine(model, ["nap"])
    with pytest.raises(InputError, match="by chance"):
        engine.fit(id_batches)
    direct = oe.Engine(model, ["nap"]).fit(id_batches, force=True)
    assert direct.scorer.rectify
    assert torch.equal(engine.refit(force=True).score(test_images)["nap"], direct.score(test_images)["nap"])


@pytest.mark.parametrize(("numbers", "outcome"), [([1, 2, 3, 4, 0], InputError), ([1, 0, 2, 3, 4], OodEngineWarning)])
def test_permuted_classes_are_named_and_renumbered_as_said_they_fit(model, id_batches, numbers, outcome):
    batches = renumbered(id_batches, numbers)
    with (pytest.raises if outcome is InputError else pytest.warns)(outcome, match="once renumbered") as caught:
        oe.Engine(model, ["energy"]).fit(batches)
    message = str(caught.value if outcome is InputError else caught[0].message)
    said = {int(a): int(b) for a, b in re.findall(r"(\d) → (\d)", message)}
    assert said.items() <= {number: place for place, number in enumerate(numbers)}.items()
    assert (" and 2 more" in message) == (len(said) == 3)
    unlabelled = oe.Engine(model, NAMES).fit([x for x, _ in batches], labels="predicted")
    advised = oe.Engine(model, NAMES).fit(batches, labels="predicted")
    assert "or fit without them by labels='predicted'" in message
    assert not advised.set_up.are_numbers_known
    x = batches[0][0]
    assert torch.equal(advised.score(x)["low_dim_gradient"], unlabelled.score(x)["low_dim_gradient"])
    inverse = [numbers.index(number) for number in range(5)]
    assert oe.Engine(model, ["energy"]).fit(renumbered(batches, inverse)).set_up.label_agreement > 0.9


def test_labels_that_mislead_are_told_where_they_are_read_and_predicted_ones_are_as_none(model, id_batches):
    batches = [(x, torch.where(torch.arange(len(y)) % 4 > 0, y, (y + 1) % 5)) for x, y in id_batches]
    oe.Engine(model, ["energy"]).fit(batches)
    with pytest.warns(OodEngineWarning, match=r"the model predicts 7\d.* labels='predicted'"):
        misled = oe.Engine(model, ["low_dim_gradient"]).fit(batches)
    advised = oe.Engine(model, ["low_dim_gradient"]).fit(batches, labels="predicted")
    unlabelled = oe.Engine(model, ["low_dim_gradient"]).fit([x for x, _ in batches], labels="predicted")
    x = id_batches[0][0]
    scores = [engine.score(x)["low_dim_gradient"] for engine in (advised, unlabelled, misled)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.allclose(scores[0], scores[2])
    assert advised.set_up.label_agreement == misled.set_up.label_agreement
    assert torch.equal(advised.refit().score(x)["low_dim_gradient"], scores[0])
    with pytest.raises(InputError, match="labels='true': expected 'given' or 'predicted'"):
        oe.Engine(model, ["energy"]).fit(batches, labels="true")


# class folders


@pytest.mark.parametrize(
    ("folders", "known", "message"),
    [
        (
            "abcd",
            None,
            "4 class folders, such as 'a', for a head of 5 classes: they are numbered in sorted order, so that",
        ),
        ("abcdef", None, "6 class folders, such as 'a', for a head of 5 classes"),
        ("abcde", "bacde", "the class folder 'a' is number 0, the model's class 'a' is number 1"),
    ],
)
def test_class_folders_other_than_the_head_are_refused_at_once(
    folders, known, message, model, id_batches, count_forwards
):
    model = copy.copy(model)
    model.class_names = known and list(known)
    with pytest.raises(InputError, match=message):
        oe.Engine(model, ["energy"]).fit(Foldered(id_batches, folders))
    assert sum(count_forwards) < 64 * len(id_batches)
    engine = oe.Engine(model, NAMES).fit(Foldered(id_batches, folders), labels="predicted")
    assert engine.set_up.label_agreement is None
    for same in (
        Foldered(id_batches, known or "abcde"),
        Foldered(id_batches, folders, target_transform=int),
        Foldered([x for x, _ in id_batches], folders),
    ):
        assert oe.Engine(model, ["energy"]).fit(same).set_up.overruled == []
    with pytest.warns(OodEngineWarning, match=f"overruled by force: {message}"):
        oe.Engine(model, ["energy"]).fit(Foldered(id_batches, folders), force=True)


def test_a_wrapped_dataset_may_number_its_labels_anew(model, id_batches):
    """Such as one of 5 superclasses of a dataset with 20 classes."""
    images, labels = (torch.cat(parts) for parts in zip(*id_batches, strict=True))
    base = TensorDataset(images, labels)
    base.classes = list("abcdefghijklmnopqrst")

    class Super(Dataset):
        dataset = base

        def __len__(self):
            return len(base)

        def __getitem__(self, index):
            return base[index]

    assert oe.Engine(model, ["energy"]).fit(DataLoader(Super(), 64)).set_up.label_agreement > 0.9
    with pytest.raises(InputError, match="20 class folders, such as 'a', for a head of 5 classes"):
        oe.Engine(model, ["energy"]).fit(DataLoader(Subset(base, range(100)), 64))


def test_labels_of_more_classes_than_the_head_are_as_none_where_predicted_ones_are_read(
    model, id_batches, test_images, tmp_path
):
    """The way out of the message for a folder too many, whose labels no force fits."""
    batches = [(x, y + 1) for x, y in id_batches]
    with pytest.raises(InputError, match=r"6 class folders.*labels='predicted' \(--labels predicted\)$"):
        oe.Engine(model, NAMES).fit(Foldered(batches, "abcdef"))
    with pytest.raises(InputError, match=r"label 5 .* fit without them by labels='predicted' \(--labels predicted\)$"):
        oe.Engine(model, NAMES).fit(batches, force=True)
    unlabelled = oe.Engine(model, NAMES).fit([x for x, _ in batches], labels="predicted").score(test_images)
    for loader in (batches, Foldered(batches, "abcdef")):
        oe.Engine(model, NAMES).fit(loader, labels="predicted").save(tmp_path / "state")
        engine = oe.Engine.load(tmp_path / "state", model)
        assert (engine.set_up.label_agreement, engine.set_up.overruled) == (None, [])
        assert all(torch.equal(score, unlabelled[name]) for name, score in engine.score(test_images).items())


# heads that are not for one class of several


def test_only_nap_assumes_no_classes(model, id_batches, test_images):
    model = copy.deepcopy(model)
    engine = oe.Engine(model, oe.available_detectors()).fit(id_batches)
    before = engine.score(test_images)
    model[-1].weight.data.mul_(torch.linspace(0.5, 2, 5)[:, None])
    after = engine.score(test_images)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"nap", "grad_pca"}  # which is fitted to the classes
    assert [name for name, one in engine.detectors.items() if not one.assumes_one_class] == ["nap"]


@pytest.fixture(scope="module")
def multi_label(make_model):
    """(a model trained for several labels an image, images, multi-hot labels [n, 5])."""
    torch.manual_seed(0)
    model = make_model()
    labels = (torch.rand(300, 5) < 0.3).float()
    patterns = torch.rand(5, 3, 8, 8)
    images = torch.einsum("nc,cijk->nijk", labels, patterns) / 3 + 0.05 * torch.rand(300, 3, 8, 8)
    features = nn.Sequential(*list(model)[:-1])(images).detach()
    scale = features.std(0).clamp(min=1e-3)
    head, optimiser = nn.Linear(12, 5), None
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=300)

    def loss():
        optimiser.zero_grad()
        value = nn.functional.binary_cross_entropy_with_logits(head((features - features.mean(0)) / scale), labels)
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        model[-1].weight.copy_(head.weight / scale)
        model[-1].bias.copy_(head.bias - (features.mean(0) / scale) @ head.weight.T)
    assert ((model(images) > 0) == (labels > 0)).float().mean() > 0.95
    return model, images, labels


def test_multi_label_heads_are_refused_and_nap_scores_them(multi_label):
    model, images, labels = multi_label
    with pytest.raises(InputError, match=r"multi-hot labels \[300, 5\].* Engine\(model, \['nap'\]\), with a loader of"):
        oe.Engine(model, ["energy"]).fit([(images, labels)])
    with pytest.raises(InputError, match=r"'no class' or 'several classes', as of a multi-label model, .*'nap'"):
        oe.Engine(model, ["energy"]).fit([images])
    assert oe.Engine(model, ["nap"]).fit([images]).score(images)["nap"].isfinite().all()
    with pytest.warns(OodEngineWarning, match="overruled by force: the logits of"):
        oe.Engine(model, ["energy"]).fit([images], force=True)


def test_one_hot_labels_are_numbered_as_said(model, id_batches):
    batches = [(x, nn.functional.one_hot(y, 5)) for x, y in id_batches]
    with pytest.raises(InputError, match=r"one-hot or soft labels \[64, 5\]; pass labels.argmax\(1\)"):
        oe.Engine(model, ["energy"]).fit(batches)
    oe.Engine(model, ["energy"]).fit([(x, y.argmax(1)) for x, y in batches])


def test_sigmoid_outputs_are_refused_and_nap_scores_them(make_model, test_images):
    model = nn.Sequential(*make_model(), nn.Sigmoid())
    engine = oe.Engine(model, ["energy"], head="6")
    with pytest.raises(InputError, match=r"the outputs are sigmoids, which do not sum to 1: .*\['nap'\]"):
        engine.fit([test_images])
    with pytest.warns(OodEngineWarning, match="overruled by force: the outputs are sigmoids"):
        engine.fit([test_images], force=True)
    assert oe.Engine(model, ["nap"], head="6").fit([test_images]).score(test_images)["nap"].isfinite().all()


def test_one_logit_is_refused_and_its_two_class_head_scores(make_model, images):
    model, x = make_model(), images(60, 1)[0]
    single = nn.Linear(12, 1)
    model[-1] = single
    for force in (False, True):
        with pytest.raises(InputError, match=r"the head has one logit z, .*so energy mean nothing: .*\[\[0\], \[w\]\]"):
            oe.Engine(model, ["energy"]).fit([x], force=force)
    assert oe.Engine(model, ["nap"]).fit([x]).score(x)["nap"].isfinite().all()
    labelled = Foldered([(x, torch.arange(len(x)) % 2)], "ab")
    assert oe.Engine(model, ["nap"]).fit(labelled, labels="predicted").score(x)["nap"].isfinite().all()
    z = model(x)
    model[-1] = nn.Linear(12, 2)
    with torch.no_grad():
        model[-1].weight.copy_(torch.cat([torch.zeros(1, 12), single.weight]))
        model[-1].bias.copy_(torch.cat([torch.zeros(1), single.bias]))
    scores = oe.Engine(model, ["energy", "msp"]).fit([x]).score(x)
    assert torch.allclose(scores["msp"], torch.maximum(z.sigmoid(), 1 - z.sigmoid())[:, 0], atol=1e-6)


# sizes


def test_maps_of_other_sizes_than_in_fit_are_told_once(model, images, tmp_path):
    x = images(40, 1)[0]
    sizes = [nn.functional.interpolate(x, size) for size in ((6, 10), (8, 8), (12, 8))]
    engine = oe.Engine(model, ["nap", "energy"]).fit(sizes)
    assert engine.scorer.positions == (15, 24)
    engine.save(tmp_path / "state")
    for one in (engine, oe.Engine.load(tmp_path / "state", model)):
        for known in (*sizes, nn.functional.interpolate(x, (10, 8))):
            one.score(known)
        with pytest.warns(
            OodEngineWarning, match="a feature map of 8 × 8 positions, where fit saw 15 to 24 of them: nap"
        ):
            one.score(nn.functional.interpolate(x, (16, 16)))
        one.score(nn.functional.interpolate(x, (4, 4)))
    fixed = oe.Engine(model, ["nap"]).fit([x])
    small = fixed.scorer.run(x).feature_map[:, :, :2]
    with pytest.warns(OodEngineWarning, match="2 × 4 positions, where fit saw 16 to 16"):
        fixed.score_features(small)
    oe.Engine(model, ["energy"]).fit(sizes).score(nn.functional.interpolate(x, (16, 16)))


# calibration


def loaders(images, count):
    data = TensorDataset(images[:count])
    yield [images[:count]]
    yield DataLoader(data, 8)
    yield DataLoader(data, 8, shuffle=True, drop_last=True)


def test_too_few_images_or_an_impossible_rate_are_known_before_the_pass(make_engine, fresh_batches, count_forwards):
    engine, images = make_engine(("energy",)), fresh_batches[0][0]
    done = len(count_forwards)
    for loader in loaders(images, 12):
        with pytest.raises(CalibrationError, match=r"12 calibration samples for false_alarm_rate=0.05: .* at least 19"):
            engine.calibrate(loader)
    with pytest.raises(
        CalibrationError, match=r"64 calibration samples for false_alarm_rate=0.001: expected at least 999"
    ):
        engine.calibrate([images], 0.001)
    assert len(count_forwards) == done
    assert all(engine.calibrate(loader, 0.2).calibrations for loader in loaders(images, 12))


def test_most_samples_is_a_bound_or_unknown():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.rand(9, 3))

    data = TensorDataset(torch.rand(10, 3))
    own = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 4, False))
    cropping = DataLoader(data, 4, collate_fn=lambda rows: torch.cat([row[0] for row in rows for _ in range(10)]))
    unknown = (own, cropping, DataLoader(Stream()), iter([]), [object()], [])
    assert [most_samples(loader) for loader in unknown] == [None] * 6
    assert most_samples([torch.rand(3, 2), (torch.rand(4, 2), torch.zeros(4))]) == 7


def test_images_of_fit_end_a_calibration_at_their_batch(make_engine, id_batches, fresh_batches, count_forwards):
    engine = make_engine(("energy",))
    done = len(count_forwards)
    with pytest.raises(CalibrationError, match=r"calibration image 0 was used in fit: .* pass overlap='drop'"):
        engine.calibrate(id_batches)
    assert len(count_forwards) == done + 1
    engine.calibrate([*id_batches, *fresh_batches], overlap="drop")
    assert len(engine.scorer.calibration_cache) == 100


def test_the_flagged_share_of_every_predicted_class(engine, model, fresh_batches):
    images = torch.cat([x for x, _ in fresh_batches])
    predicted, flags = model(images).argmax(1), engine.predict(images)
    rows = engine.flagged_by_class
    assert sum(row["samples"] for row in rows) == 100
    for row in rows:
        members = predicted == row["class"]
        assert row["samples"] == int(members.sum())
        for name, share in row["flagged"].items():
            # A cached score may be an ulp off, where one equals the threshold.
            assert abs(share - float(flags[name][members].float().mean())) <= 1 / row["samples"] + 1e-6
    assert oe.Engine(model, ["energy"]).flagged_by_class == []
