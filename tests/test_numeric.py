"""Which files of tests run under several instruction sets."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_every_file_that_compares_numbers_is_marked(request, pytestconfig):
    hooks = next(plugin for plugin in pytestconfig.pluginmanager.get_plugins() if hasattr(plugin, "is_numeric"))
    for name in ("ood_engine/test_state.py", "ood_engine/detectors/test_opnp.py", "ood_kernels/test_operators.py"):
        assert hooks.is_numeric(TESTS / name)
    for name in ("ood_kernels/triton_kernels/test_score.py", "ood_engine/cli/test_cli.py", "ood_kernels/test_tune.py"):
        assert not hooks.is_numeric(TESTS / name)
    assert all((TESTS / name).exists() for name in hooks.NOT_NUMERIC)
    assert (request.node.get_closest_marker("numeric") is not None) == hooks.is_numeric(Path(__file__))


@pytest.mark.parametrize(("line", "expected"), [("assert torch.equal(a, b)", True), ("assert a == b", False)])
def test_a_new_file_is_recognised_by_what_it_calls(line, expected, pytestconfig, tmp_path, monkeypatch):
    hooks = next(plugin for plugin in pytestconfig.pluginmanager.get_plugins() if hasattr(plugin, "is_numeric"))
    monkeypatch.setattr(hooks, "_HERE", tmp_path)
    (tmp_path / "test_new.py").write_text(line)
    assert hooks.is_numeric(tmp_path / "test_new.py") is expected
