"""Do labels, folders and logits fit the model? Plain functions, against independent counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ood_engine.features.label_checks import (
    _binomial_tail,
    class_names_of,
    folder_problem,
    is_chance,
    multi_label_rows,
    renumbering,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("least", "count", "rate"), [(0, 5, 0.3), (3, 5, 0.3), (5, 5, 0.9), (40, 100, 0.25), (1, 7, 0)]
)
def test_binomial_tail(least, count, rate):
    exact = sum(math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(least, count + 1))
    assert _binomial_tail(least, count, rate) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("count", [40, 4000])
def test_independent_predictions_are_chance_and_others_are_not(classes, count):
    labels = torch.randint(classes, (count,), generator=generator(1))
    independent = torch.randint(classes, (count,), generator=generator(2))
    assert is_chance(labels, independent)[0]
    assert is_chance(labels, torch.full_like(labels, int(labels[0])))[0]  # collapsed to one class
    half = torch.where(torch.arange(count) % 3 > 0, labels, independent)
    assert not is_chance(labels, half)[0]


def test_frequent_classes_make_chance_frequent():
    labels = (torch.arange(1000) >= 900).long()
    always = torch.zeros(1000, dtype=torch.int64)
    assert is_chance(labels, always) == (True, pytest.approx(0.9))
    assert not is_chance(labels, labels)[0]


@pytest.mark.parametrize("labels", [[0] * 50, [3] * 50, [0, 1], [2]])
def test_too_few_labels_or_classes_decide_nothing(labels):
    assert not is_chance(torch.tensor(labels), torch.tensor(labels))[0]


@pytest.mark.parametrize("seed", range(5))
def test_rare_classes_are_not_by_chance_where_most_samples_are_of_one(seed):
    """A fifth of the rare samples is found, and almost every frequent one."""
    labels = torch.zeros(1000, dtype=torch.int64)
    labels[:50] = torch.arange(50) % 9 + 1
    predicted = labels * (torch.rand(1000, generator=generator(seed)) < 0.2)
    predicted[50:60] = 3
    assert not is_chance(labels, predicted)[0]
    assert is_chance(labels, predicted[torch.randperm(1000, generator=generator(seed))])[0]


def test_images_of_one_class_that_the_model_knows_are_not_by_chance():
    labels = torch.full((500,), 3)
    known, unknown = labels.clone(), torch.randint(10, (500,), generator=generator())
    known[:20] = unknown[:20]
    assert not is_chance(labels, known)[0]
    assert is_chance(labels, unknown)[0]  # such as labels that are all 0


def test_renumbering_finds_swaps_and_shifts_and_nothing_in_noise():
    labels = torch.randint(10, (2000,), generator=generator())
    noisy = torch.where(torch.rand(2000, generator=generator(1)) < 0.2, labels.flip(0), labels)
    assert renumbering(labels, noisy) == {}
    assert renumbering(labels, torch.randint(10, (2000,), generator=generator(3))) == {}
    assert renumbering(torch.arange(500), torch.arange(500).flip(0)) == {}  # one sample a class
    swapped = torch.arange(10).index_copy_(0, torch.tensor([2, 7]), torch.tensor([7, 2]))
    assert renumbering(labels, swapped[noisy]) == {2: 7, 7: 2}
    shifted = labels + (labels >= 4)  # the folder of class 4 is missing
    assert renumbering(labels, shifted) == {n: n + 1 for n in range(4, 10)}


def trained(loss, targets, features, classes):
    head = nn.Linear(features.shape[1], classes)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(300):
        optimiser.zero_grad()
        loss(head(features), targets).backward()
        optimiser.step()
    return head(features).detach()


@pytest.mark.parametrize("classes", [3, 10, 100])
def test_logits_of_multi_label_heads_and_of_others(classes):
    """Heads trained for several labels a sample, for one by cross-entropy and by binary losses, and not at all."""
    torch.manual_seed(0)
    several = (torch.rand(400, classes) < min(0.3, 3 / classes)).float()
    one = torch.arange(400) % classes
    mixing = torch.randn(classes, 128)
    noise = 0.1 * torch.randn(400, 128)
    binary = F.binary_cross_entropy_with_logits
    of_one = F.one_hot(one, classes).float() @ mixing + noise
    multi = trained(binary, several, several @ mixing + noise, classes)
    assert multi_label_rows(multi) > 120
    assert multi_label_rows(trained(F.cross_entropy, one, of_one, classes)) == 0
    assert multi_label_rows(trained(binary, F.one_hot(one, classes).float(), of_one, classes)) == 0
    for scale, shift in ((1, 0), (3, 5), (100, 0), (1e4, 0), (0, 0)):
        assert multi_label_rows(scale * torch.randn(400, classes) + shift) == 0, (scale, shift)
    assert multi_label_rows(torch.full((5, 1), -9.0)) == 0


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_a_softmax_may_be_shifted(classes, spread):
    """Of sure and of unsure models, by as much as the logarithm of a frequency in the initial bias, and more."""
    one = torch.arange(400) % classes
    margin = 3 * spread * torch.rand((400, 1), generator=generator())
    logits = F.one_hot(one, classes) * margin + 0.3 * spread * torch.randn((400, classes), generator=generator(1))
    found = {shift: multi_label_rows(logits + shift) for shift in range(-15, 6)}
    assert not any(found.values()), found


def test_no_class_means_nothing_where_each_sample_has_one():
    present = F.one_hot(torch.arange(400) % 5, 5).double()
    sigmoids = 12 * present - 6
    sigmoids[::5] = -6
    assert (multi_label_rows(sigmoids), multi_label_rows(sigmoids, have_class=True)) == (80, 0)
    several = 12 * (present + present.flip(0)).clamp(max=1) - 6
    assert multi_label_rows(several, have_class=True) == multi_label_rows(several) >= 240


@pytest.mark.parametrize(
    ("folders", "names", "problem"),
    [
        ("abc", None, None),
        ("ab", None, "2 class folders, such as 'a', for a head of 3 classes: they are numbered in sorted order"),
        ("abcd", None, "4 class folders, such as 'a', for a head of 3 classes"),
        ("abc", "abc", None),
        ("ab", "abc", None),
        ("ac", "abc", "the class folder 'c' is number 1, the model's class 'c' is number 2"),
        ("abc", "cab", "the class folder 'a' is number 0, the model's class 'a' is number 1"),
        ("abc", "xyz", None),
        ("abc", "cb", None),
    ],
)
def test_class_folders(folders, names, problem):
    found = folder_problem(list(folders), names and list(names), 3)
    assert found is None if problem is None else found.startswith(problem)


def test_names_of_classes():
    def named(**attributes):
        return type("Model", (), attributes)()

    config = named(id2label={1: "dog", 0: "cat"})
    assert class_names_of(named(class_names=["cat", "dog"])) == ["cat", "dog"]
    assert class_names_of(named(classes=("cat", "dog"))) == ["cat", "dog"]
    assert class_names_of(named(config=config)) == ["cat", "dog"]
    for unknown in (
        named(),
        named(classes=5),
        named(class_names=[]),
        named(config=named(id2label={0: "LABEL_0", 1: "LABEL_1"})),
        named(config=named(id2label={3: "cat"})),
        named(classes=torch.arange(3)),
    ):
        assert class_names_of(unknown) is None
