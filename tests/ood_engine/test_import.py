"""What `import ood_engine` and `ood-engine --help` load beside torch, each in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import ood_engine as oe

OWN = {"ood_engine", "ood_kernels", "safetensors"}
TORCH_ON_DEMAND = ("torch._dynamo", "torch._inductor", "torch.distributed", "torch.onnx", "torch.utils.data")
"""What torch imports when it is called for; where `import torch` does that itself, it costs nothing here."""

MOST_MODULES = 100
"""64 on torch 2.13, of which 58 are our own; scikit-learn alone would bring more than 1,000."""


def run(code, after):
    """The value of `after` once `code` has run, and the modules that it loaded beside those of torch."""
    script = (
        "import contextlib, io, json, sys, torch\n"
        "before = set(sys.modules)\n"
        f"with contextlib.redirect_stdout(io.StringIO()):\n    {code}\n"
        "loaded = sorted(set(sys.modules) - before)\n"
        f"print(json.dumps([{after}, loaded, sorted({{name.partition('.')[0] for name in before}})]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    value, loaded, before = json.loads(done.stdout)
    packages = {name.partition(".")[0] for name in loaded} - set(before) - sys.stdlib_module_names
    return value, loaded, packages


def test_import_loads_no_package_beside_torch_but_safetensors():
    detectors, loaded, packages = run("import ood_engine", "ood_engine.available_detectors()")
    assert packages == OWN
    assert tuple(detectors) == oe.available_detectors()
    assert [name for name in loaded if name.startswith(TORCH_ON_DEMAND)] == []
    assert len(loaded) <= MOST_MODULES


def test_metrics_load_scikit_learn_when_called():
    script = "import ood_engine; found = ood_engine.metrics.auroc([2.0, 3.0], [0.0, 2.5])"
    found, _, packages = run(script, "found")
    assert found == 0.75
    assert "sklearn" in packages


def test_help_loads_click_and_no_command():
    code, loaded, packages = run("from ood_engine.cli import main; code = main(['--help'])", "code")
    assert code == 0
    assert packages == OWN | {"click"}
    assert {name for name in loaded if name.startswith("ood_engine.cli.")} == {
        "ood_engine.cli.application",
        "ood_engine.cli.common",
    }
