from __future__ import annotations

import pytest

from ood_engine.bench.curves import bases, latency, memory
from ood_engine.bench.drawing import NothingToShowError, duration, factor, times_as_fast
from ood_engine.bench.figures import overhead, peers, roofline, write_figures
from ood_engine.bench.limits import COPY

PNG = b"\x89PNG\r\n"
PICTURES = ["roofline.png", "latency.png", "bases.png", "memory.png", "overhead.png", "peers.png"]
PROVIDERS = {"ood-engine": 1.0, "reference": 4.0, "torch.compile": 2.0, "matmul and reduce": 1.5}


def single_pass(row):
    """10 GB/s of a copy, 100 GFLOP/s of a product; ood-engine at half of the limit."""
    rows = []
    for samples in (1, 16, 256):
        sizes = {"N": samples, "D": 2048, "C": 1000, "sweeps": ["N"]}
        flops, least = 10**8 * samples, 10**7 + 10**5 * samples
        limit = max(flops / 1e8, least / 1e7)
        for provider, weight in PROVIDERS.items():
            work = {"flops": flops, "bytes": least, "gb_per_s": 1.0}
            share = {"limit_ms": limit, "share_of_limit": 0.5 / weight, "peak_extra_mib": weight * samples}
            rows.append(row(provider, 2 * limit * weight, **sizes, **work, **share))
        copied = least / 1e7
        rows.append(row(COPY, copied, **sizes, flops=0, bytes=least, gb_per_s=10.0, peak_extra_mib=0.0))
    return rows


def projections(row):
    return [
        row(
            p50_ms=0.1 * size**power,
            subject=f"project {form}",
            sweeps=[along],
            **{"N": 64, "K": 32, along: size},
        )
        for form, along, power in (("dual", "K", 1), ("dual", "n", 1), ("explicit", "K", 2), ("factored", "K", 1))
        for size in (16, 64, 256)
    ]


def engines(row):
    return [
        row(provider, milliseconds * samples, subject="engine around a forward", N=samples, D=2048)
        for samples in (1, 16)
        for provider, milliseconds in (("forward alone", 50.0), ("ood-engine, scores alone", 0.5))
    ]


def methods(row):
    times = {"ood-engine": 1.0, "pytorch-ood": 12.0, "oodeel": 0.5}
    return [
        row(provider, samples * time, subject="gradnorm", N=samples, ms_per_sample=time)
        for samples in (8, 64)
        for provider, time in times.items()
    ]


@pytest.fixture(scope="module")
def everything(row):
    return [*single_pass(row), *projections(row), *engines(row), *methods(row)]


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def lines(figure):
    return [list(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines]


def test_every_picture_is_written(everything, tmp_path):
    written, left_out = write_figures({"rows": everything}, tmp_path)
    assert [path.name for path in written] == PICTURES
    assert all(path.read_bytes().startswith(PNG) for path in written)
    assert left_out == {}


def test_pictures_without_rows_are_left_out_and_named(everything, row, tmp_path):
    written, left_out = write_figures({"rows": methods(row)}, tmp_path)
    assert [path.name for path in written] == ["peers.png"]
    assert list(left_out) == PICTURES[:-1]
    assert left_out["latency.png"] == "no series of 'score' along N"
    refused = [{**one, "p50_ms": None, "share_of_limit": None} for one in everything]
    assert list(write_figures({"rows": refused}, tmp_path)[1]) == PICTURES


def test_the_roofline_says_the_share_and_draws_the_measured_roof(everything):
    figure = roofline(everything)
    assert titles(figure) == ["ood-engine reaches 50 % of what the machine can do, the reference 12 %"]
    assert "matrix product, 100 GFLOP/s" in texts(figure)
    roof = lines(figure)[-1]
    assert roof[0][1] == pytest.approx(10 * roof[0][0])
    assert roof[-1][1] == pytest.approx(100)
    assert len(lines(figure)) == 1 + 2 * 3


def test_without_a_row_that_the_product_bounds_there_is_no_such_roof(everything):
    bound_by_traffic = [one for one in everything if one["N"] == 1 and one["subject"] == "score"]
    assert not any("product" in text for text in texts(roofline(bound_by_traffic)))


def test_the_roofline_is_of_one_dtype(everything, row):
    other = row("ood-engine", 1.0, dtype="bfloat16", flops=10, bytes=10, limit_ms=0.9, share_of_limit=0.9)
    assert len(lines(roofline([*everything, other]))) == len(lines(roofline(everything)))


def test_latency_shows_every_provider_and_the_limit(everything):
    figure = latency(everything)
    assert titles(figure) == ["A single pass over 256 samples takes 510 ms, 4 × as fast as the reference"]
    assert len(lines(figure)) == len(PROVIDERS) + 1
    assert [(samples, limit) for samples, limit in lines(figure)[-1]] == [(1, 1.01), (16, 16), (256, 256)]
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"


def test_latency_does_not_hide_that_it_is_slower(everything):
    worse = [{**one, "p50_ms": 8 * one["p50_ms"]} if one["provider"] == "ood-engine" else one for one in everything]
    assert "2 × as slow as the reference" in titles(latency(worse))[0]


def test_a_provider_of_fewer_samples_is_not_drawn_against_their_number(everything):
    partial = [{**one, "samples_run": 4} if one["provider"] == "torch.compile" else one for one in everything]
    assert len(lines(latency(partial))) == len(lines(latency(everything))) - 1


def test_memory_is_that_of_the_rows(everything):
    figure = memory(everything)
    assert titles(figure) == ["Scoring 256 samples needs 260 MiB beside its inputs, the reference 1,000 MiB"]
    assert len(lines(figure)) == len(PROVIDERS)


def test_bases_have_a_panel_an_axis_and_say_the_growth(everything):
    figure = bases(everything)
    assert titles(figure) == ["Time grows as K^1.0 to K^2.0", "Time grows as n^1.0"]
    assert "dual K^1.0, explicit K^2.0, factored K^1.0, between the two largest sizes" in texts(figure)
    assert [len(axes.lines) for axes in figure.axes] == [3, 1]


def test_overhead_is_scores_by_forward(everything):
    figure = overhead(everything)
    assert titles(figure) == ["Scores cost 1 % of the forward of R50 at N=16"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([1, 1])
    assert "1 % (8 ms by 800 ms)" in texts(figure)


def test_peers_are_compared_where_they_are_largest(everything):
    figure = peers(everything)
    assert titles(figure)[0].startswith("ood-engine is 6.2 × as fast as its peers")
    assert any("slower than the peer in 1" in text for text in texts(figure))
    ends = [bar.get_x() + bar.get_width() for bar in figure.axes[0].patches]
    assert ends == pytest.approx([12, 0.5])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["gradnorm, R50 N=64"] * 2


@pytest.mark.parametrize("picture", [roofline, latency, memory, bases, overhead, peers])
def test_no_rows_is_nothing_to_show(picture):
    with pytest.raises(NothingToShowError):
        picture([])


def test_figures_in_words():
    assert [duration(value) for value in (0.0123, 3.42, 1234.0, 98765.0)] == ["12 µs", "3.4 ms", "1.2 s", "99 s"]
    assert [factor(value) for value in (0.456, 3.21, 45.6, 1234.0)] == ["0.46", "3.2", "46", "1,200"]
    assert [times_as_fast(1.0, theirs) for theirs in (5.0, 1.0, 0.5)] == [
        "5 × as fast as",
        "as fast as",
        "2 × as slow as",
    ]
