"""The schema of the rows, the files they are kept in, and the words of a case."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

from ood_engine.bench.cases import Case, Effort, MissingProviderError, Plan, Provider, providers_of
from ood_engine.bench.measure import machine_facts, print_table
from ood_engine.bench.rows import FIELDS, KEY, SIZES, make_row, read_document, write_csv, write_document
from ood_engine.errors import InputError


def test_a_row_has_every_field_and_no_other():
    row = make_row(subject="score", N=4)
    assert list(row) == list(FIELDS)
    assert (row["subject"], row["N"], row["p50_ms"]) == ("score", 4, None)
    with pytest.raises(TypeError, match="no such fields in a row: p51_ms, speed"):
        make_row(subject="score", speed=1, p51_ms=2)


def test_every_field_says_what_it_means():
    assert all(meaning.strip() for meaning in FIELDS.values())
    assert FIELDS.keys() >= {*KEY, *SIZES, "device_p50_ms", "share_of_limit", "refused"}


def test_json_comes_back_as_it_was(tmp_path, row):
    rows = [row(p50_ms=1 / 3, N=4, sweeps=["N"], note='a, "b"\nc × d'), row(p50_ms=None, refused="wrong")]
    document = {"machine": {"cpu": "x"}, "rows": rows, "growth": []}
    path = tmp_path / "bench.json"
    write_document(path, document)
    assert read_document(path) == document
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, row):
    path = tmp_path / "bench.json"
    write_document(path, {"rows": [row()]})
    with pytest.raises(TypeError):
        write_document(path, {"rows": [row(note=torch.ones(1))]})
    assert len(read_document(path)["rows"]) == 1


def test_csv_holds_the_same_rows_without_the_rounds(tmp_path, row):
    rows = [row(p50_ms=1 / 3, N=4, D=2048, sweeps=["N", "D"], note='a, "b"\nc × d'), row(p50_ms=None, sweeps=None)]
    path = tmp_path / "bench.csv"
    write_csv(path, rows)
    with path.open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert list(first) == [name for name in FIELDS if name != "rounds_ms"]
    assert float(first["p50_ms"]) == 1 / 3
    assert (first["N"], first["sweeps"], first["note"]) == ("4", "N D", rows[0]["note"])
    assert (second["p50_ms"], second["sweeps"], second["N"]) == ("", "", "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        '{"rows": []}',
        '{"rows": 5}',
        '{"rows": null}',
        '{"rows": [1]}',
        '{"rows": {"subject": 1}}',
        '{"rows": [{"subject": "score"}]}',
    ],
)
def test_what_is_no_document_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "old.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"expected the bench\.json of an earlier run") as caught:
        read_document(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_another_version_are_refused(tmp_path, row):
    path = tmp_path / "old.json"
    older = {name: value for name, value in row().items() if name != "share_of_limit"}
    path.write_text(json.dumps({"rows": [row(), older]}), encoding="utf-8")
    with pytest.raises(InputError, match="run `ood-engine bench` anew"):
        read_document(path)
    path.write_text(json.dumps({"rows": [row() | {"later field": 1}]}), encoding="utf-8")
    assert read_document(path)["rows"][0]["later field"] == 1


def test_a_missing_file_a_folder_and_bytes_are_refused(tmp_path):
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.json", tmp_path, binary):
        with pytest.raises(InputError, match=r"expected the bench\.json of an earlier run"):
            read_document(path)


def test_providers_that_cannot_be_had_are_named_with_the_reason():
    def lacking() -> Provider:
        raise MissingProviderError("peer", "not installed; pip install 'ood-engine[peers]'")

    found, missing = providers_of(lambda: Provider("a", int), lacking, lambda: Provider("b", int))
    assert [provider.name for provider in found] == ["a", "b"]
    assert missing == {"peer": "not installed; pip install 'ood-engine[peers]'"}


def test_other_errors_of_a_provider_are_not_hidden():
    def broken() -> Provider:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        providers_of(broken)


def test_a_plan_says_what_it_is():
    plan = Plan("score", "R50", {"N": 64, "D": 2048}, lambda: Case([]), torch.bfloat16)
    assert plan.shape == "N=64 D=2048"
    assert str(plan) == "score, R50 N=64 D=2048 bfloat16"
    assert Effort("quick", 1, 0, 1, torch.device("cpu")).is_quick
    assert not Effort("full", 1, 0, 1, torch.device("cpu")).is_quick


def test_a_table_shows_what_is_missing_as_a_dash(capsys):
    print_table([{"name": "a", "ms": 1234.5}, {"name": "bb", "ms": 0.0001234}, {"name": "c"}], {"name": "", "ms": "ms"})
    assert capsys.readouterr().out.splitlines() == ["         ms", "a     1,234", "bb  1.2e-04", "c         -"]


def test_the_machine_is_described():
    facts = machine_facts()
    assert facts["cpu"]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["torch"] == torch.__version__
    assert facts["memory_gib"] is None or math.isfinite(facts["memory_gib"])
