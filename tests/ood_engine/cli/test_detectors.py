from __future__ import annotations

import json

from click.testing import CliRunner

import ood_engine as oe
from ood_engine.cli.application import application
from ood_engine.demo import small_cnn


def test_every_detector_is_listed_with_a_sentence_and_its_settings():
    shown = CliRunner().invoke(application, ["detectors"], env={"COLUMNS": "120"}).stdout
    listed = json.loads(CliRunner().invoke(application, ["detectors", "--json"]).stdout)
    assert list(listed) == list(oe.available_detectors())
    for name, row in listed.items():
        assert name in shown
        assert len(row["summary"]) > 20
        assert all(f"{key}=" in shown for key in row["settings"])
        # What is listed is accepted.
        oe.Engine(small_cnn(), [name], settings={name: row["settings"]})
