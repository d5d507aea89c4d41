"""`ood-engine score` on a folder of images: reading, forward, scores and table, beside the first two of these alone."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ood_kernels.workloads import Cost

from ...demo import SmallCNN, small_cnn
from ...engine import Engine
from ...images.dataset import ImageDataset, open_dataset
from ...images.preprocess import Preprocess, import_pillow
from ..cases import OURS, Case, Effort, Plan, Provider
from .engine import FORWARD, forward_cost, load_exact

__all__ = ["READING", "plans"]

READING = "reading the images alone"
"""Provider: decoding and preprocessing, with the threads that `ood-engine score` takes."""

_SUBJECT = "score from files"
_PIXELS, _INPUT = 64, 16
_PREPROCESS = Preprocess(size=(_INPUT, _INPUT), channels=1, mean=(0.5,), std=(0.25,))
_BATCH = 64


def plans(effort: Effort) -> Iterator[Plan]:
    """Along N, with the demo's small model, so that the files are what costs."""
    for samples in (16, 64, 256) if effort.is_quick else (32, 128, 512):
        yield _plan(effort, samples)


def _plan(effort: Effort, samples: int) -> Plan:
    sizes = {"N": samples, "D": 64, "C": 8, "H": _INPUT, "W": _INPUT}
    build = partial(_build, samples, effort.device)
    return Plan(_SUBJECT, "SmallCNN", sizes, build, memory_format="NCHW", sweeps=("N",), seconds=0.5)


class _Folder:
    """A folder with images, weights and the state of an engine; removed with the object."""

    def __init__(self, samples: int, model: SmallCNN) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="ood-engine-bench-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self.images, self.state, self.weights = (
            self.path / name for name in ("images", "state.safetensors", "weights.safetensors")
        )
        self.table = self.path / "scores.parquet"
        self._write_images(samples)
        save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, self.weights)
        _fitted(model).save(self.state)

    def _write_images(self, samples: int) -> None:
        """Smooth colours with a little noise: PNG files about as large as those of photographs of this size."""
        image, generator = import_pillow(), np.random.default_rng(0)
        self.images.mkdir()
        for number in range(samples):
            colours = image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            smooth = np.asarray(colours.resize((_PIXELS, _PIXELS), image.Resampling.BICUBIC), dtype=np.int16)
            noisy = smooth + generator.integers(-4, 5, smooth.shape, dtype=np.int16)
            image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(self.images / f"{number:05d}.png")

    @property
    def nbytes(self) -> int:
        """Of all images, as they are on disk."""
        return sum(path.stat().st_size for path in self.images.iterdir())


def _fitted(model: SmallCNN) -> Engine:
    """An engine with the default detectors, fitted and calibrated on random images."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    fit, calibration = torch.randn((2, 256, 1, _INPUT, _INPUT), generator=generator).to(device)
    engine = Engine(model).fit([(fit, torch.arange(256) % 8)]).calibrate([calibration])
    engine.information = {"preprocess": _PREPROCESS.to_dict()}
    return engine


def _build(samples: int, device: torch.device) -> Case:
    model = small_cnn().eval().to(device)
    folder = _Folder(samples, model)
    dataset = open_dataset(folder.images, _PREPROCESS)
    batches = [images.to(device) for images in _read(dataset)]
    names, truth = _truth(folder, model, batches)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [model(images) for images in batches]

    forward_only = forward_cost(small_cnn, (samples, 1, _INPUT, _INPUT), 4)
    read_only = Cost(0, folder.nbytes)
    note = f"{samples} PNG files of {_PIXELS}×{_PIXELS} pixels, {_BATCH} a batch"
    return Case(
        [
            Provider(OURS, partial(_score, folder, device), _columns(names), 1e-3, note=note),
            Provider(READING, partial(_read, dataset), tolerance=None, cost=read_only, note=note),
            Provider(FORWARD, forward, tolerance=None, cost=forward_only, note=f"{_BATCH} a batch"),
        ],
        truth,
        Cost(forward_only.flops, forward_only.bytes + read_only.bytes),
    )


def _read(dataset: ImageDataset) -> list[Tensor]:
    return [batch.images for batch in dataset.batches(_BATCH) if batch.images is not None]


def _truth(folder: _Folder, model: SmallCNN, batches: list[Tensor]) -> tuple[list[str], list[Tensor]]:
    """Detectors, and their scores [N] in fp64."""
    scores = load_exact(folder.state, model).score(torch.cat(batches).double())
    return list(scores), [score.double().cpu() for score in scores.values()]


def _score(folder: _Folder, device: torch.device) -> Path:
    """Run the command as a user does, without its start of Python; returns the table."""
    from ...cli.application import run  # the command line offers this benchmark

    arguments = ["--state", folder.state, "--model", "ood_engine.demo:small_cnn", "--weights", folder.weights]
    arguments += ["--data", folder.images, "--output", folder.table, "--batch-size", _BATCH, "--device", device]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run(["score", *map(str, arguments)])
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(said.getvalue())
    return folder.table


def _columns(names: list[str]) -> Callable[[Path], list[Tensor]]:
    """Check: the scores in the table."""

    def check(table: Path) -> list[Tensor]:
        from pyarrow import parquet

        columns = parquet.read_table(table)
        return [torch.tensor(columns[f"{name}_score"].to_pylist(), dtype=torch.float64) for name in names]

    return check
