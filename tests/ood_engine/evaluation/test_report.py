from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import ood_engine.evaluation.report
from ood_engine.errors import InputError, OodEngineError
from ood_engine.evaluation import metrics
from ood_engine.evaluation.report import (
    Evaluation,
    markdown_table,
    print_table,
    rows,
    write_figures,
    write_html,
    write_json,
)
from ood_engine.evaluation.report.curves import histogram, roc_curve
from ood_engine.evaluation.report.table import summarise

SCRIPT = "<script>alert(1)</script>"
METRICS = ("auroc", "aupr_id", "aupr_ood", "fpr95_id", "fpr95_ood")
VOID_TAGS = {"meta", "img", "br", "hr", "input", "link"}


def evaluation_of(n_detectors=3, n_sets=2, n=60, **fields):
    """Detector k is the better the smaller k; set j is the farther the larger j."""
    rng = np.random.default_rng(0)
    detectors = [f"detector_{k}" for k in range(n_detectors)]
    id_scores = {name: rng.normal(2.0, 1.0, n) for name in detectors}
    ood_scores = {
        f"set_{j}": {name: rng.normal(-0.7 * j + 0.3 * k, 1.0, n) for k, name in enumerate(detectors)}
        for j in range(n_sets)
    }
    scores = {"id_scores": id_scores, "ood_scores": ood_scores}
    return Evaluation(**{"title": "A title", "id_name": "digits", **scores, **fields})


def hostile_evaluation(name):
    """The same text as every name and value there is."""
    scores = {name: np.arange(20.0)}
    far = {name: {name: np.append(np.arange(20.0) - 8, np.nan)}, "second": {name: np.arange(20.0) - 15}}
    return Evaluation(
        title=name,
        id_name=f"ID {name}",
        id_scores=scores,
        ood_scores=far,
        kinds={name: name},
        information={name: name},
        example_images={name: np.zeros((1, 2, 2))},
        thresholds={name: 3.0},
        accuracy=0.5,
    )


def printed(evaluation, width=120, styled=False):
    colours = "standard" if styled else None
    console = Console(file=io.StringIO(), width=width, force_terminal=styled, color_system=colours, _environ={})
    print_table(evaluation, console)
    return console.file.getvalue()


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that do not match."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(evaluation, folder):
    return Page(write_html(evaluation, folder / "report.html").read_text(encoding="utf-8"))


class TestRows:
    def test_hold_the_metrics_of_each_detector_and_set(self):
        evaluation = evaluation_of(n_detectors=2, n_sets=2, kinds={"set_1": "far"})
        table = rows(evaluation)
        assert [(row["detector"], row["ood_set"], row["mean"]) for row in table] == [
            (detector, ood_set, ood_set == "mean")
            for detector in ("detector_0", "detector_1")
            for ood_set in ("set_0", "set_1", "mean")
        ]
        expected = metrics.evaluate(evaluation.id_scores["detector_1"], evaluation.ood_scores["set_0"]["detector_1"])
        assert {name: table[3][name] for name in METRICS} == {name: expected[name] for name in METRICS}
        assert [row["kind"] for row in table[:3]] == [None, "far", None]

    def test_mean_is_over_the_sets_and_only_with_several(self):
        *of_sets, mean = rows(evaluation_of(n_detectors=1, n_sets=3))
        for name in METRICS:
            assert mean[name] == pytest.approx(sum(row[name] for row in of_sets) / 3, abs=1e-12)
        assert (mean["n_id"], mean["n_ood"], mean["n_invalid"]) == (60, 180, 0)
        assert [row["mean"] for row in rows(evaluation_of(n_detectors=1, n_sets=1))] == [False]

    def test_non_finite_scores_are_left_out_and_counted(self):
        evaluation = evaluation_of(n_detectors=1)
        clean = rows(evaluation)
        broken = Evaluation(
            "t",
            "digits",
            {"detector_0": np.append(evaluation.id_scores["detector_0"], [np.nan, np.inf])},
            {name: {"detector_0": np.append(s["detector_0"], -np.inf)} for name, s in evaluation.ood_scores.items()},
        )
        table = rows(broken)
        assert [row["n_invalid"] for row in table] == [3, 3, 4]
        assert [{**row, "n_invalid": 0} for row in table] == clean

    def test_nothing_finite_gives_no_metric_and_no_mean(self):
        evaluation = evaluation_of(n_detectors=2)
        evaluation.ood_scores["set_0"]["detector_0"][:] = np.nan
        nothing, something, mean, *others = rows(evaluation)
        assert all(nothing[name] is None and mean[name] is None for name in METRICS)
        assert (nothing["n_ood"], nothing["n_invalid"]) == (0, 60)
        assert all(isinstance(row[name], float) for row in (something, *others) for name in METRICS)


class TestSummary:
    def test_is_sorted_by_mean_auroc_with_the_undefined_last(self):
        evaluation = evaluation_of(n_detectors=4)
        evaluation.id_scores["detector_0"][:] = np.nan
        assert list(summarise(rows(evaluation)).lines) == ["detector_1", "detector_2", "detector_3", "detector_0"]

    def test_numbers_that_read_the_same_are_both_best(self):
        def row(detector, auroc, fpr95):
            of_set = {"ood_set": "s", "kind": None, "mean": False}
            return {"detector": detector, **of_set, "auroc": auroc, "fpr95_id": fpr95}

        lines = summarise([row("a", 0.90001, 0.2), row("b", 0.90002, 0.1), row("c", 0.8, 0.3)]).lines
        best = {name: [cell.best for cell in pairs[0]] for name, pairs in lines.items()}
        assert best == {"a": [True, False], "b": [True, True], "c": [False, False]}

    def test_nothing_is_marked_where_all_read_the_same(self):
        evaluation = evaluation_of(n_detectors=3)
        evaluation.ood_scores["set_0"] = dict.fromkeys(evaluation.detectors, np.full(4, 99.0))
        lines = summarise(rows(evaluation)).lines.values()
        marked = [any(cell.best for pairs in lines for cell in pairs[column]) for column in range(3)]
        assert marked == [False, True, True]
        lines = summarise(rows(evaluation_of(n_detectors=1))).lines
        assert not any(cell.best for pair in lines["detector_0"] for cell in pair)


class TestPrintedTable:
    def test_best_of_each_column_is_bold(self):
        evaluation = evaluation_of(n_detectors=2, n_sets=1)
        best = next(row for row in rows(evaluation) if row["detector"] == "detector_0")
        line = next(line for line in printed(evaluation, styled=True).splitlines() if "detector_0" in line)
        assert re.findall(r"\x1b\[1m *([\d.]+)\x1b\[0m", line) == [
            f"{100 * best['auroc']:.2f}",
            f"{100 * best['fpr95_id']:.2f}",
        ]

    @pytest.mark.parametrize("width", [40, 80])
    def test_has_every_number_and_sets_that_do_not_fit_go_below(self, width):
        text = printed(evaluation_of(n_detectors=2, n_sets=6, kinds={"set_0": "near"}), width)
        assert max(map(len, text.splitlines())) <= width
        assert all(f"set_{j}" in text for j in range(6))
        assert "near" in text
        lines = [line for line in text.splitlines() if line.startswith("detector_0")]
        assert sum(len(re.findall(r"\d+\.\d\d", line)) for line in lines) == 14

    def test_names_are_text_not_markup_or_control_codes(self):
        text = printed(hostile_evaluation("[red]x[/red]\x1b[31m"))
        assert "[red]x[/red]\N{REPLACEMENT CHARACTER}[31m" in text
        assert "\x1b" not in text


class TestMarkdownTable:
    def test_marks_the_best_and_names_the_convention(self):
        evaluation = evaluation_of(n_detectors=2, n_sets=1, kinds={"set_0": "near"})
        first, second = rows(evaluation)
        a, b = ([f"{100 * row[name]:.2f}" for name in ("auroc", "fpr95_id")] for row in (first, second))
        assert markdown_table(evaluation).splitlines()[:4] == [
            "| Detector | set_0 (near) |",
            "| --- | ---: |",
            f"| detector_0 | **{a[0]}** / **{a[1]}** |",
            f"| detector_1 | {b[0]} / {b[1]} |",
        ]
        assert "ID as the positive class" in markdown_table(evaluation)

    def test_names_cannot_break_the_table(self):
        table = markdown_table(hostile_evaluation("a|b <i> *c* `d`\n_e_")).splitlines()
        assert {line.count("|") for line in table[:3]} == {5}
        assert r"a&#124;b &lt;i&gt; \*c\* \`d\` \_e\_" in table[2]


class TestJson:
    def test_round_trip(self, tmp_path):
        evaluation = evaluation_of(information={"model": "CNN"}, thresholds={"detector_0": math.nan}, accuracy=0.75)
        evaluation.ood_scores["set_0"]["detector_0"][:] = np.nan
        path = write_json(evaluation, tmp_path / "new" / "folder" / "result.json")
        document = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert document["rows"] == rows(evaluation)
        assert document["thresholds"] == {"detector_0": None}
        assert (document["format"], document["title"], document["accuracy"]) == (1, "A title", 0.75)
        assert document["information"] == {"model": "CNN"}

    def test_a_full_disk_leaves_the_old_file_and_says_so(self, tmp_path, monkeypatch):
        path = tmp_path / "result.json"
        path.write_text("old")

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OodEngineError, match=r"cannot write '.*result\.json' \(No space left on device\)"):
            write_json(evaluation_of(), path)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["result.json"]


class TestHtml:
    def test_needs_nothing_from_elsewhere_and_can_be_read_without_seeing_it(self, tmp_path):
        page = page_of(evaluation_of(example_images={"digits": np.zeros((3, 4, 4))}), tmp_path)
        source = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", source)
        assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
        images = page.attributes("img")
        assert len(images) == 3
        assert all("alt" in image and image["src"].startswith("data:image/png;base64,") for image in images)
        assert page.attributes("html") == [{"lang": "en"}]
        assert all("aria-label" in svg or svg.get("aria-hidden") == "true" for svg in page.attributes("svg"))
        assert all(heading.get("scope") in {"row", "col", "colgroup"} for heading in page.attributes("th"))

    def test_every_name_is_escaped(self, tmp_path):
        hostile = f"{SCRIPT}\"'>&"
        page = page_of(hostile_evaluation(hostile), tmp_path)
        assert "script" not in {tag for tag, _ in page.tags}
        assert "".join(page.text).count(hostile) >= 12
        assert sum(hostile in attributes.get("aria-label", "") for _, attributes in page.tags) >= 4

    def test_shows_numbers_left_out_scores_and_facts(self, tmp_path):
        evaluation = evaluation_of(
            n_detectors=2, kinds={"set_0": "near"}, information={"Head": "fc, 10 classes"}, accuracy=0.987
        )
        evaluation.ood_scores["set_0"]["detector_1"][:3] = np.inf
        text = " ".join("".join(page_of(evaluation, tmp_path).text).split())
        mean = rows(evaluation)[2]
        assert f"detector_0 is the best of 2 detectors, with a mean AUROC of {100 * mean['auroc']:.2f}" in text
        assert "The hardest set is set_0 (near)" in text
        assert "3 on set_0: detector_1" in text
        assert "fc, 10 classes" in text
        assert "98.70" in text

    def test_threshold_is_drawn_where_it_is(self, tmp_path):
        def lines():
            paths = page_of(evaluation, tmp_path).attributes("path")
            return [path["d"] for path in paths if "stroke: var(--ink)" in path.get("style", "")]

        scores, ood = {"d": np.linspace(0, 10, 101)}, {"s": {"d": np.linspace(0, 10, 101)}}
        evaluation = Evaluation("t", "digits", scores, ood, thresholds={"d": 5.0})
        (line,) = lines()
        width = float(page_of(evaluation, tmp_path).attributes("svg")[-1]["viewbox"].split()[2])
        start, end = re.fullmatch(r"M ([\d.]+) [\d.]+ L ([\d.]+) [\d.]+ ", line).groups()
        assert start == end
        assert float(start) == pytest.approx(width / 2, abs=0.02)
        evaluation.thresholds["d"] = 50.0
        assert lines() == []

    def test_is_the_same_again_and_has_no_id_twice(self, tmp_path):
        evaluation = evaluation_of(n_detectors=2, n_sets=2)
        page = page_of(evaluation, tmp_path / "first")
        again = page_of(evaluation, tmp_path / "second")
        assert page.tags == again.tags
        assert (tmp_path / "first/report.html").read_bytes() == (tmp_path / "second/report.html").read_bytes()
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        used = {use["xlink:href"].removeprefix("#") for use in page.attributes("use")}
        assert len(set(ids)) == len(ids)
        assert used <= set(ids)

    def test_pictures_have_the_colours_of_the_page_alone(self, tmp_path):
        page = page_of(evaluation_of(n_detectors=9, thresholds={"detector_0": 1.0}), tmp_path)
        styles = [attributes["style"] for tag, attributes in page.tags if tag in ("path", "text", "use")]
        colours = {value for style in styles for value in re.findall(r"(?:fill|stroke): ([^;]+)", style)}
        source = (tmp_path / "report.html").read_text(encoding="utf-8")
        variables = ("ink", "soft", "grid", *(f"line-{number}" for number in range(1, 7)))
        assert colours == {"none", *(f"var(--{name})" for name in variables)}
        assert all(f"{colour[4:-1]}:" in source for colour in colours - {"none"})

    @pytest.mark.parametrize(("n_detectors", "n_sets"), [(1, 1), (1, 6), (10, 2)])
    def test_has_a_panel_for_everything(self, n_detectors, n_sets, tmp_path):
        page = page_of(evaluation_of(n_detectors, n_sets), tmp_path)
        labels = [svg.get("aria-label", "") for svg in page.attributes("svg")]
        assert sum(label.startswith("Histogram of ") for label in labels) == n_detectors * n_sets
        assert sum(label.startswith("ROC curves of ") for label in labels) == n_sets
        curves = re.compile(r"stroke: var\(--(line-\d|soft)\); stroke-width: 1.6")
        drawn = [path for path in page.attributes("path") if curves.search(path.get("style", ""))]
        assert len(drawn) == n_detectors * n_sets
        assert len({path["style"] for path in drawn}) == n_detectors


class TestFigures:
    @pytest.mark.parametrize("name", [f"$\\frac{{$ 数字 \x00\udc80 {SCRIPT}", "_hidden"])
    def test_are_png_files_whatever_the_names(self, name, tmp_path):
        paths = write_figures(hostile_evaluation(name), tmp_path)
        assert [path.name for path in paths] == ["histograms.png", "roc.png"]
        for path in paths:
            content = path.read_bytes()
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
            assert int.from_bytes(content[16:20], "big") > 300


DEGENERATE = {
    "constant": ([1.0] * 5, [1.0] * 5),
    "constant and large": ([1e30] * 5, [1e30] * 5),
    "two constants": ([1.0] * 5, [0.0] * 5),
    "one each": ([3.0], [4.0]),
    "nearly equal": ([1e16, 1e16 + 2], [1e16, 1e16 + 2]),
    "extreme": ([1.7e308, -1.7e308], [5e-324, 0.0]),
    "no ID": ([], [1.0, 2.0]),
    "no OOD": ([1.0, 2.0], []),
    "only NaN": ([np.nan], [np.nan]),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_scores_never_stop_a_report(case, tmp_path):
    id_scores, ood_scores = DEGENERATE[case]
    evaluation = Evaluation("t", "digits", {"d": id_scores}, {"s": {"d": ood_scores}}, thresholds={"d": np.nan})
    page = page_of(evaluation, tmp_path)
    assert not any(re.search("nan|inf", path.get("d", "")) for path in page.attributes("path"))
    assert ("no finite scores" in "".join(page.text)) == (case in ("no ID", "no OOD", "only NaN"))
    write_figures(evaluation, tmp_path)
    write_json(evaluation, tmp_path / "result.json")
    assert "| d |" in markdown_table(evaluation)
    assert "d" in printed(evaluation)


scores = st.lists(st.floats(-1e3, 1e3) | st.sampled_from([0.0, 1.0, -2.5]), min_size=1, max_size=40).map(np.array)


class TestCurves:
    @given(scores, scores)
    @settings(deadline=None, max_examples=60)
    def test_roc_curves_enclose_the_auroc_and_keep_ends_and_points_when_thinned(self, id_scores, ood_scores):
        fpr, tpr = roc_curve(id_scores, ood_scores, n_points=100_000)
        area = float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
        assert area == pytest.approx(metrics.auroc(id_scores, ood_scores), abs=1e-9)
        full = set(zip(fpr, tpr, strict=True))
        fpr, tpr = roc_curve(id_scores, ood_scores, n_points=5)
        assert len(fpr) <= 5
        assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
        assert set(zip(fpr, tpr, strict=True)) <= full
        assert (np.diff([fpr, tpr]) >= 0).all()

    @given(scores, scores)
    @settings(deadline=None, max_examples=60)
    def test_histograms_share_bins_and_scale(self, id_scores, ood_scores):
        bars = histogram(id_scores, ood_scores)
        assert (np.diff(bars.edges) > 0).all()
        assert max(bars.id_heights.max(), bars.ood_heights.max()) == 1
        swapped = histogram(ood_scores, id_scores)
        np.testing.assert_array_equal(swapped.id_heights, bars.ood_heights)
        np.testing.assert_array_equal(swapped.edges, bars.edges)

    def test_histogram_limits_ignore_outliers(self):
        bulk = np.linspace(0, 1, 1000)
        bars = histogram(np.append(bulk, 1e6), np.append(bulk, -1e6))
        assert -0.01 < bars.edges[0] < bars.edges[-1] < 1.01


class TestEvaluation:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"id_scores": {}}, "id_scores is empty"),
            ({"ood_scores": {}}, "ood_scores is empty"),
            ({"ood_scores": {"far": {"other": [1.0]}}}, r"OOD set 'far' has scores of \['other'\]"),
            ({"id_scores": {"d": [[1.0]]}}, r"scores of 'd' on 'digits' have shape \[1, 1\], expected \[N\]"),
            ({"id_scores": {"d": ["a"]}}, "scores of 'd' on 'digits' are not numbers"),
            ({"kinds": {"near": "x"}}, r"kinds names \['near'\], expected an OOD set out of \['far'\]"),
            ({"thresholds": {"e": 1.0}}, r"thresholds names \['e'\], expected a detector"),
            ({"accuracy": 98.0}, r"accuracy is 98.0, expected a fraction in \[0, 1\]"),
            ({"ece": {"e": 0.1}}, r"ece names \['e'\], expected a head out of \['d', 'unpruned'\]"),
            ({"example_images": {"far": np.zeros((2, 3, 8, 8))}}, r"have shape \[2, 3, 8, 8\], expected \[n, H, W\]"),
            ({"example_images": {"far": np.zeros((2, 8, 8), np.uint8)}}, "have dtype uint8, expected floats"),
        ],
    )
    def test_bad_input_is_named(self, fields, message):
        good = {"title": "t", "id_name": "digits", "id_scores": {"d": [1.0]}, "ood_scores": {"far": {"d": [0.0]}}}
        with pytest.raises(InputError, match=message) as caught:
            Evaluation(**{**good, **fields})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("jinja2", lambda folder: write_html(evaluation_of(), folder / "report.html")),
        ("matplotlib.figure", lambda folder: write_figures(evaluation_of(), folder)),
        ("matplotlib.figure", lambda folder: write_html(evaluation_of(), folder / "report.html")),
        ("rich.table", lambda folder: print_table(evaluation_of(), Console(file=io.StringIO()))),
    ],
)
def test_a_missing_package_names_the_extra(package, make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"package '{package.partition('.')[0]}'.*pip install 'ood-engine\[cli\]'"
    with pytest.raises(OodEngineError, match=message):
        make(tmp_path)
    assert os.listdir(tmp_path) == []


def test_optional_packages_are_not_imported_with_the_module():
    for path in Path(ood_engine.evaluation.report.__file__).parent.glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if re.match(r"(import|from) (matplotlib|jinja2|rich|PIL)\b", line)]


def test_only_some_detectors_can_be_shown():
    scores = {name: np.arange(3.0) + index for index, name in enumerate(("a", "b", "c"))}
    whole = Evaluation("t", "id", scores, {"ood": scores}, thresholds={"a": 1.0, "c": 2.0})
    part = whole.only(("c", "b"))
    assert part.detectors == ["c", "b"]
    assert list(part.ood_scores["ood"]) == ["c", "b"]
    assert part.thresholds == {"c": 2.0}
    assert whole.detectors == ["a", "b", "c"]
    with pytest.raises(InputError, match="'d'"):
        whole.only(("a", "d"))
