from __future__ import annotations

from ood_engine.bench.table import print_left_out, print_rows


def test_rows_stand_by_subject_and_case_beside_ood_engine(row, capsys):
    rows = [
        row("reference", 6.0, N=4, ms_per_sample=1.5, share_of_limit=0.25),
        row("ood-engine", 2.0, N=4, ms_per_sample=0.5, share_of_limit=0.75, peak_extra_mib=3.0, max_error=1e-6),
        row("ood-engine", 8.0, N=16, ms_per_sample=0.5),
        row("ood-engine", 8.0, N=16, subject="pool_nap"),
        row("autograd", None, N=4, refused="wrong"),
    ]
    print_rows(rows)
    first, second = capsys.readouterr().out.split("\npool_nap\n")
    lines = [line.split() for line in first.splitlines()]
    assert lines[1] == ["score"]
    assert lines[3] == ["R50", "N=4", "float32", "warm", "cpu"]
    assert lines[4] == ["ood-engine", "2", "2", "0.5", "1", "3", "1.0e-06", "75%"]
    assert lines[5] == ["reference", "6", "6", "1.5", "3", "-", "-", "25%"]
    assert lines[6][:2] == ["autograd", "(refused)"]
    assert "N=16" in first
    assert "N=16" in second


def test_what_is_left_out_is_said_once(row, capsys):
    refused = [row("bad", None, N=samples, refused="wrong result") for samples in (1, 2)]
    document = {
        "missing": [{"provider": "oodeel", "reason": "not installed"}],
        "left_out": [f"case {index}" for index in range(15)],
        "rows": [*refused, row(disturbed=True), row(disturbed=True, threads=1)],
    }
    print_left_out(document)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 of 4 rows are not those of an idle machine")
    assert lines[1:3] == ["left out: oodeel: not installed", "refused: bad in 2 × score: wrong result"]
    assert lines[3].startswith("no time for 15 cases (--minutes): case 0; ")
    assert lines[3].endswith("; case 11; and 3 more")
    print_left_out({"missing": [], "left_out": [], "rows": [row()]})
    assert capsys.readouterr().out == ""
