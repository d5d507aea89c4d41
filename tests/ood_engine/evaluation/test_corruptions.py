from __future__ import annotations

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from ood_engine.errors import InputError
from ood_engine.evaluation.corruptions import CORRUPTIONS, corrupt
from ood_engine.evaluation.corruptions.filters import (
    convolve,
    disk_kernel,
    displace,
    gaussian_blur,
    motion_kernels,
    pixel_scale,
)

DETERMINISTIC = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
SEVERITIES = range(1, 6)

every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)


def random_images(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def smooth_images(batch, channels, height, width):
    coarse = torch.rand((batch, channels, 6, 6), generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def digits():
    return torch.tensor(load_digits().images[:64] / 16, dtype=torch.float32).unsqueeze(1)


def deviation(images, name, severity):
    return (corrupt(images, name, severity) - images).abs().mean().item()


def test_the_fifteen_names_in_the_order_of_the_paper():
    words = """gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog
        brightness contrast elastic_transform pixelate jpeg_compression"""
    assert tuple(words.split()) == CORRUPTIONS


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(CORRUPTIONS),
    st.integers(1, 5),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(4, 19), st.integers(4, 19)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from(["random", "black", "white"]),
)
def test_any_image_gives_a_new_image_of_the_same_kind(name, severity, shape, dtype, content):
    images = random_images(*shape, dtype=dtype)
    if content != "random":
        images = torch.full_like(images, float(content == "white"))
    before = images.clone()
    corrupted = corrupt(images, name, severity)
    assert corrupted.shape == images.shape
    assert corrupted.dtype == dtype
    assert corrupted.min() >= 0
    assert corrupted.max() <= 1
    assert corrupted.is_contiguous()
    assert corrupted.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()
    assert torch.equal(images, before)


@every_corruption
def test_the_same_arguments_give_the_same_images_and_the_global_state_is_left_alone(name):
    images = random_images(3, 2, 12, 10)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = corrupt(images, name, 2, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(corrupt(images, name, 2, seed=7), first)
    assert torch.equal(corrupt(images, name, 2, seed=8), first) == (name in DETERMINISTIC)
    one, another = corrupt(smooth_images(1, 1, 16, 16).expand(2, -1, -1, -1), name, 3)
    assert torch.allclose(one, another, atol=1e-6) == (name in DETERMINISTIC)


@every_corruption
def test_severity_grows_the_strength_and_neither_leaves_nor_destroys_small_digits(name, digits):
    for images in (digits, smooth_images(4, 3, 64, 48)):
        strengths = [deviation(images, name, severity) for severity in SEVERITIES]
        coincide = name == "pixelate" and images is digits
        assert strengths[0] > 0
        assert all(a < b for a, b in pairwise(strengths[: 4 if coincide else 5])), strengths
        assert strengths[4] > 1.15 * strengths[0]
    both = zip(digits.numpy(), corrupt(digits, name, 3).numpy(), strict=True)
    assert np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in both]) > 0.3
    assert deviation(digits, name, 3) > 0.03


@every_corruption
def test_memory_format_gradients_and_emptiness_do_not_count(name):
    images = smooth_images(2, 3, 12, 16)
    expected = corrupt(images, name)
    assert torch.allclose(corrupt(images.to(memory_format=torch.channels_last), name), expected, atol=1e-6)
    assert torch.allclose(corrupt(images.mT.contiguous().mT, name), expected, atol=1e-6)
    assert not corrupt(images.requires_grad_(), name).requires_grad
    assert corrupt(images[:0], name).shape == (0, 3, 12, 16)


def test_gaussian_and_shot_noise_have_the_deviation_of_the_paper():
    gray = torch.full((8, 3, 64, 64), 0.25, dtype=torch.float64)
    noise = corrupt(gray + 0.25, "gaussian_noise", 1) - gray - 0.25
    assert abs(noise.mean()) < 0.001
    assert noise.std().item() == pytest.approx(0.08, rel=0.02)
    counts = corrupt(gray, "shot_noise", 2) * 25
    assert torch.allclose(counts, counts.round(), atol=1e-9)
    assert counts.mean().item() == pytest.approx(25 * 0.25, rel=0.02)
    assert counts.var().item() == pytest.approx(25 * 0.25, rel=0.05)


def test_impulse_noise_is_salt_and_pepper_in_equal_shares():
    corrupted = corrupt(torch.full((8, 3, 64, 64), 0.5), "impulse_noise", 5)
    assert set(corrupted.unique().tolist()) == {0.0, 0.5, 1.0}
    for value in (0, 1):
        assert (corrupted == value).double().mean().item() == pytest.approx(0.135, abs=0.005)


@pytest.mark.parametrize(
    "name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate"]
)
def test_moving_and_averaging_pixels_keeps_a_plain_image_and_the_range(name):
    plain = torch.full((2, 3, 11, 14), 0.3, dtype=torch.float64)
    assert torch.allclose(corrupt(plain, name, 5), plain, atol=1e-12)
    images = 0.2 + 0.5 * random_images(2, 3, 11, 14, dtype=torch.float64)
    corrupted = corrupt(images, name, 5)
    assert corrupted.min() >= images.min() - 1e-12
    assert corrupted.max() <= images.max() + 1e-12


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate"])
def test_blur_takes_detail_away(name):
    def detail(images):
        return (images.diff(dim=3).square().mean() + images.diff(dim=2).square().mean()).item()

    images = random_images(2, 1, 32, 32)
    details = [detail(images), *(detail(corrupt(images, name, severity)) for severity in SEVERITIES)]
    assert details[5] < 0.5 * details[0]
    assert max(details[1:]) < details[0]


def test_glass_scatters_to_all_sides_alike():
    slope = torch.linspace(0, 1, 64, dtype=torch.float64).expand(8, 1, 64, 64)
    moved = 63 * (corrupt(slope, "glass_blur", 5) - slope)[..., 8:-8, 8:-8]
    assert abs(moved.mean()) < 0.02
    assert moved.std() > 0.2


def test_motion_blur_smears_along_the_horizontal_more_than_across():
    corrupted = corrupt(random_images(16, 1, 64, 64), "motion_blur", 5)
    assert 2 * corrupted.diff(dim=3).square().mean() < corrupted.diff(dim=2).square().mean()


def test_zoom_blur_keeps_the_centre_and_smears_the_border():
    images = random_images(8, 1, 65, 65)
    change = (corrupt(images, "zoom_blur", 3) - images).abs().mean((0, 1))
    assert change[32, 32] < 1e-6
    assert change[31:34, 31:34].mean() < 0.5 * change[:8].mean()


@pytest.mark.parametrize("name", ["snow", "frost", "fog"])
def test_weather_lightens_a_black_image_unevenly(name):
    corrupted = corrupt(torch.zeros(4, 3, 64, 64), name, 3)
    assert corrupted.mean() > 0.1
    assert corrupted.std() > 0.05
    assert torch.equal(corrupted[:, 0], corrupted[:, 1])
    # Snow whitens what lies between the flakes.
    assert name != "snow" or corrupt(torch.zeros(4, 3, 64, 64), "snow", 1).min().item() == pytest.approx(0.2 * 0.5)


def test_fog_takes_contrast_away():
    images = random_images(4, 1, 64, 64)
    fogged = corrupt(images, "fog", 1)
    steps, fogged_steps = (some.diff(dim=3).abs().mean().item() for some in (images, fogged))
    assert fogged_steps == pytest.approx(steps / 2.5, rel=0.1)


def test_fog_drifts_at_coarse_and_fine_scales():
    haze = corrupt(torch.zeros(16, 1, 64, 64), "fog", 3)
    change = [(haze[..., lag:] - haze[..., :-lag]).abs().mean() for lag in (1, 4, 16)]
    assert change[0] < 0.7 * change[1] < 0.7 * change[2]
    assert haze.diff(n=2, dim=3).abs().mean() > 0.5 * change[0]


def test_brightness_by_hand():
    pixels = torch.tensor([[0.2, 0.4, 0.1], [0.0, 0.0, 0.0], [0.9, 0.45, 0.0]], dtype=torch.float64)
    images = pixels.T.reshape(1, 3, 1, 3).expand(1, 3, 4, 3)
    images = torch.cat([images, images], dim=3)
    corrupted = corrupt(images, "brightness", 2)[0, :, 0, :3].T
    expected = torch.tensor([[0.3, 0.6, 0.15], [0.2, 0.2, 0.2], [1.0, 0.5, 0.0]], dtype=torch.float64)
    assert torch.allclose(corrupted, expected)


def test_contrast_by_hand():
    images = random_images(2, 3, 6, 7, dtype=torch.float64)
    mean = images.mean((2, 3), keepdim=True)
    assert torch.allclose(corrupt(images, "contrast", 3), mean + 0.2 * (images - mean))


def test_elastic_transform_moves_by_the_stated_distance():
    side = 56
    slope = torch.linspace(0, 1, side, dtype=torch.float64).expand(1, 1, side, side)
    moved = [(corrupt(slope, "elastic_transform", 3, seed=seed) - slope)[..., 8:-8, 8:-8] for seed in range(20)]
    distance = torch.cat(moved).square().mean().sqrt().item() * (side - 1)
    assert distance == pytest.approx(4 * side / 224, rel=0.2)


def test_pixelate_by_hand():
    images = random_images(1, 2, 8, 16, dtype=torch.float64)
    expected = images.unflatten(3, (8, 2)).unflatten(2, (4, 2)).mean((3, 5))
    assert torch.allclose(corrupt(images, "pixelate", 2), expected.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_pixelate_weighs_cut_pixels_by_their_part():
    images = random_images(1, 1, 10, 15, dtype=torch.float64)
    # 6 boxes of 10 / 6 pixels high, 9 of 15 / 9 wide: whole numbers of pixels once each is split into 3.
    split = images.repeat_interleave(3, 2).repeat_interleave(3, 3)
    boxes = split.unflatten(3, (9, 5)).unflatten(2, (6, 5)).mean((3, 5))
    rows, columns = ((torch.arange(n) + 0.5) * 0.6 for n in (10, 15))
    expected = boxes[:, :, rows.long()][..., columns.long()]
    assert torch.allclose(corrupt(images, "pixelate", 1), expected)


@pytest.mark.parametrize(("severity", "quality"), [(1, 25), (2, 18), (3, 15), (4, 10), (5, 7)])
def test_jpeg_equals_that_of_pillow(severity, quality):
    image_module = pytest.importorskip("PIL.Image")
    pixels = (smooth_images(1, 1, 29, 37)[0, 0] * 255).round().to(torch.uint8)
    file = io.BytesIO()
    image_module.fromarray(pixels.numpy()).save(file, format="JPEG", quality=quality)
    pillow = torch.tensor(np.asarray(image_module.open(file)), dtype=torch.float64)
    ours = corrupt(pixels.double()[None, None] / 255, "jpeg_compression", severity)[0, 0] * 255
    inside = (slice(0, 24), slice(0, 32))
    # Pillow transforms in integers, so a coefficient half-way between two steps may fall on the other side.
    assert ((ours - pillow)[inside].abs() < 1.5).double().mean() > 0.9
    assert ((ours - pixels)[inside].abs() < 1.5).double().mean() < 0.6


def test_jpeg_quantises_the_mean_of_a_plain_block():
    plain = torch.full((1, 1, 8, 8), 140 / 255, dtype=torch.float64)
    # Quality 25 doubles the first entry of the table to 32, a step of 32 / 8 = 4 gray levels about 128.
    assert torch.allclose(corrupt(plain, "jpeg_compression", 1) * 255, torch.full_like(plain, 140.0))
    assert torch.allclose(corrupt(plain + 1.5 / 255, "jpeg_compression", 1) * 255, torch.full_like(plain, 140.0))


def test_pixel_constants_scale_with_the_shorter_side_down_to_32():
    assert pixel_scale(torch.zeros(1, 1, 448, 600)) == 2
    assert pixel_scale(torch.zeros(1, 1, 300, 56)) == 0.25
    assert pixel_scale(torch.zeros(1, 1, 8, 8)) == 32 / 224


def test_convolve_filters_each_image_with_its_kernel():
    images = random_images(2, 3, 5, 6, dtype=torch.float64)
    left, identity = torch.zeros(2, 3, 3, dtype=torch.float64)
    left[1, 0] = identity[1, 1] = 2.0
    filtered = convolve(images, torch.stack([left, identity]))
    assert torch.allclose(filtered[0, :, :, 1:], images[0, :, :, :-1])
    assert torch.allclose(filtered[0, :, :, 0], images[0, :, :, 0])
    assert torch.allclose(filtered[1], images[1])


def test_displace_reads_at_the_offset_and_mirrors_at_the_border():
    images = random_images(1, 2, 6, 7, dtype=torch.float64)
    offsets = torch.tensor([2.0, -1.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 6, 7)
    moved = displace(images, offsets)
    assert torch.allclose(moved[..., 1:, :-2], images[..., :-1, 2:])
    assert torch.allclose(moved[..., 1:, -1], images[..., :-1, -2])
    half = displace(images, offsets / 4)
    assert torch.allclose(
        half[..., 1:, :-1],
        (images[..., 1:, :-1] + images[..., 1:, 1:]) * 0.375 + 0.125 * (images[..., :-1, :-1] + images[..., :-1, 1:]),
    )


def test_kernels_have_the_shape_they_are_named_after():
    like = torch.zeros(1, dtype=torch.float64)
    assert disk_kernel(20.0, like).sum().item() == pytest.approx(math.pi * 400, rel=0.01)
    along_x, along_y = motion_kernels(torch.tensor([0.0, math.pi / 2], dtype=torch.float64), radius=3, sigma=2)
    assert along_x[3].tolist() == pytest.approx([math.exp(-(k**2) / 8) for k in range(-3, 4)])
    assert along_x.count_nonzero() == 7
    assert torch.allclose(along_y, along_x.T, atol=1e-12)


def test_gaussian_blur_has_the_stated_width():
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    spread = gaussian_blur(point, sigma=3.0)[0, 0]
    squares = (torch.arange(41) - 20).double().square()
    assert spread.sum().item() == pytest.approx(1)
    assert (spread.sum(0) * squares).sum().item() == pytest.approx(9, rel=0.05)
    assert (spread.sum(1) * squares).sum().item() == pytest.approx(9, rel=0.05)


SIZE = r"^images need at least 1 channel and 4x4 pixels, not "
SEVERITY = r"^severity must be an integer from 1 \(weak\) to 5 \(strong\), not "


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "images",
            torch.zeros(1, 3, 8, 8).byte(),
            r"^images must be fp16.* not torch.uint8; .*images.float\(\) / 255$",
        ),
        (
            "images",
            torch.full((1, 1, 8, 8), 1.5),
            r"^images must lie in \[0, 1\], not in \[1.5, 1.5\]; corrupt them before norm",
        ),
        ("images", torch.full((1, 1, 8, 8), -0.1), r"^images must lie in \[0, 1\], not in \[-0.1, -0.1\]"),
        ("images", torch.full((1, 1, 4, 4), math.nan), r"^images hold 16 values that are NaN or infinite; leave"),
        ("images", torch.full((1, 1, 4, 4), math.inf), r"^images hold 16 values"),
        ("images", torch.zeros(3, 8, 8), r"^images must have shape \[N, C, H, W\], not \[3, 8, 8\]; add the batch"),
        ("images", torch.zeros(1, 1, 3, 8), SIZE + r"\[1, 1, 3, 8\]$"),
        ("images", torch.zeros(1, 0, 8, 8), SIZE + r"\[1, 0, 8, 8\]$"),
        (
            "images",
            np.zeros((1, 1, 8, 8)),
            r"^images must be a torch tensor \[N, C, H, W\], not ndarray; convert them first$",
        ),
        *(("severity", bad, SEVERITY) for bad in (0, 6, 2.0, True, "3", None)),
        ("name", "rain", "^corruption 'rain' is unknown; choose one of: gaussian_noise, .*, jpeg_compression$"),
        ("seed", 0.5, r"^seed must be an integer, not 0.5$"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(name, value, message):
    arguments = {"images": torch.zeros(1, 1, 8, 8), "name": "fog", name: value}
    with pytest.raises(InputError, match=message) as caught:
        corrupt(**arguments)
    assert "\n" not in str(caught.value)
