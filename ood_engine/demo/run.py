"""The demo: a small classifier trained on scanned digits in seconds, every detector, and a report.

In-distribution: the digits 0 to 7 among scikit-learn's 1797 scans of 8×8 pixels. Near OOD: its digits 8 and 9, held out of
training. Far OOD: 8×8 patches of scikit-learn's two photographs, and uniform noise.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..detectors import available_detectors
from ..engine import DEFAULT_DETECTORS, Engine
from ..errors import InputError, OodEngineError
from ..evaluation.evaluate import evaluate, write_report
from ..evaluation.report import Evaluation, markdown_table, write_figures
from ..features.loader import with_progress
from ..images.dataset import ImageDataset, open_dataset
from ..images.preprocess import Preprocess, import_pillow
from .small_cnn import SmallCNN

__all__ = ["DemoResult", "run_demo", "write_images"]

ID_CLASSES = 8
NEAR, PHOTOS, NOISE = "held-out digits", "photo patches", "noise"
FOLDERS = {NEAR: "held-out-digits", PHOTOS: "photo-patches", NOISE: "noise"}
KINDS = {NEAR: "near", PHOTOS: "far", NOISE: "far"}
SHARES = {"fit": 0.55, "calibration": 0.2, "test": 0.25}
BATCH = 64
EPOCHS, FAR_IMAGES = 20, 400
MARKER = ".made-by-ood-engine-demo"
PREPROCESS = Preprocess(channels=1, mean=(0.3,), std=(0.35,))
"""Rounded mean and standard deviation of the scans."""


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo: the evaluation, and the files written to `folder`."""

    evaluation: Evaluation
    folder: Path
    files: list[Path]

    def commands(self) -> list[str]:
        """Example command lines for the files of the demo."""
        folder = shlex.quote(str(self.folder))
        model = f"--state {folder}/state.safetensors --model ood_engine.demo:small_cnn --weights {folder}/weights.safetensors"
        sets = " ".join(f"--ood {path}={folder}/images/{path}" for path in FOLDERS.values())
        return [
            f"ood-engine inspect {folder}/state.safetensors",
            f"ood-engine score {model} --data {folder}/images/{FOLDERS[PHOTOS]} --output {folder}/scores.csv",
            f"ood-engine evaluate {model} --id {folder}/images/test {sets} --output {folder}/again",
        ]


def run_demo(
    folder: str | Path = "demo-output",
    *,
    seed: int = 0,
    quick: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> DemoResult:
    """Train, fit, calibrate, score and report; the same seed gives the same table on the same machine.

    Args:
        folder: output folder of images, weights, state and report.
        seed: seed of the split, the training, the patches and the noise.
        quick: fewer epochs and images, as a smoke test; the numbers mean little.
        device: device on which the model is trained and run.
        progress: show progress bars.

    Raises:
        InputError: `folder` holds a folder `images` that was not written by the demo.
        OodEngineError: an optional package is missing, or the folder cannot be written.
    """
    folder = Path(folder)
    write_images(folder / "images", seed, quick)
    names = [*SHARES, *FOLDERS.values()]
    data = {name: open_dataset(folder / "images" / name, PREPROCESS) for name in names}
    model = train(data["fit"], seed, 12 if quick else EPOCHS, torch.device(device), progress)
    save_file(
        {name: value.cpu().contiguous() for name, value in model.state_dict().items()}, folder / "weights.safetensors"
    )
    engine = Engine(model, available_detectors(), seed=seed)
    # A model trained so shortly disagrees with many labels.
    engine.fit(data["fit"].loader(BATCH), labels="predicted" if quick else "given", progress=progress)
    engine.calibrate(data["calibration"].loader(BATCH), overlap="drop", progress=progress)
    engine.information = {"preprocess": PREPROCESS.to_dict(), "class_names": data["fit"].class_names}
    engine.save(folder / "state.safetensors")
    evaluation, _ = evaluate(
        engine,
        data["test"],
        {name: data[path] for name, path in FOLDERS.items()},
        title="Scanned digits: which images are not one of the digits 0 to 7?",
        id_name="digits 0 to 7",
        kinds=KINDS,
        information={"model": f"SmallCNN, trained on {len(data['fit'])} scans", "seed": str(seed)},
        batch_size=BATCH,
        progress=progress,
    )
    # A figure of every detector is long; the default detectors and plain Energy fit on a page.
    headline = evaluation.only(("energy", *DEFAULT_DETECTORS))
    files = [*write_report(evaluation, folder), *write_figures(headline, folder / "headline")]
    table = folder / "table.md"
    table.write_text(markdown_table(evaluation), encoding="utf-8")
    return DemoResult(evaluation, folder, [*files, table, folder / "state.safetensors", folder / "weights.safetensors"])


def train(data: ImageDataset, seed: int, epochs: int, device: torch.device, progress: bool) -> SmallCNN:
    """SGD with Nesterov momentum 0.9, weight decay 5e-4 and a cosine schedule; random shifts by up to one pixel."""
    images, labels = (torch.cat(column).to(device) for column in zip(*data.loader(BATCH), strict=True))
    model = SmallCNN(ID_CLASSES, seed).to(device).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    with torch.enable_grad(), _one_thread():
        for _ in with_progress(range(epochs), "training", progress, unit="epoch"):
            for batch in torch.randperm(len(images), generator=generator).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(_shifted(images[batch], generator)), labels[batch]).backward()
                optimizer.step()
            schedule.step()
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread: the weights then do not depend on the number of cores, and images this small gain little from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return F.pad(images, (1, 1, 1, 1), value=float(images.min()))[:, :, 1 + down : 9 + down, 1 + right : 9 + right]


def write_images(folder: Path, seed: int, quick: bool) -> None:
    """Write one folder of PNG files per ID split and OOD set."""
    from sklearn.datasets import load_digits, load_sample_images
    from sklearn.model_selection import train_test_split

    generator = np.random.default_rng(seed)
    digits = load_digits()
    scans = np.round(digits.images * (255 / 16)).astype(np.uint8)
    known = np.flatnonzero(digits.target < ID_CLASSES)
    if quick:
        known, _ = train_test_split(known, train_size=400, stratify=digits.target[known], random_state=seed)
    rest, test = train_test_split(known, test_size=SHARES["test"], stratify=digits.target[known], random_state=seed)
    fit, calibration = train_test_split(
        rest, test_size=SHARES["calibration"] / (1 - SHARES["test"]), stratify=digits.target[rest], random_state=seed
    )
    count = 60 if quick else FAR_IMAGES
    with _fresh(folder):
        for name, indices in (("fit", fit), ("calibration", calibration), ("test", test)):
            for label in range(ID_CLASSES):
                _save(folder / name / str(label), ((i, scans[i]) for i in indices if digits.target[i] == label))
        held_out = np.flatnonzero(digits.target >= ID_CLASSES)
        _save(folder / FOLDERS[NEAR], ((i, scans[i]) for i in held_out[: count if quick else None]))
        patches = np.concatenate([_patches(photo) for photo in load_sample_images().images])
        chosen = generator.choice(len(patches), count, replace=False)
        _save(folder / FOLDERS[PHOTOS], enumerate(patches[chosen]))
        _save(folder / FOLDERS[NOISE], enumerate(generator.integers(0, 256, (count, 8, 8), dtype=np.uint8)))


def _patches(photo: np.ndarray) -> np.ndarray:
    """All 8×8 tiles of a photograph [H, W, 3] in grey, uint8 [n, 8, 8]."""
    grey = np.asarray(import_pillow().fromarray(photo).convert("L"))
    rows, columns = grey.shape[0] // 8, grey.shape[1] // 8
    return grey[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8).swapaxes(1, 2).reshape(-1, 8, 8)


def _save(folder: Path, images: Iterable[tuple[int, np.ndarray]]) -> None:
    folder.mkdir(parents=True)
    for number, pixels in images:
        import_pillow().fromarray(pixels).save(folder / f"{number:04d}.png")


@contextmanager
def _fresh(folder: Path) -> Iterator[None]:
    """Make an empty folder; an existing one is replaced only if the demo wrote it."""
    if folder.exists() and not (folder / MARKER).is_file():
        raise InputError(f"{folder}: exists, and no demo wrote it; choose another --output")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / MARKER).touch()
        yield
    except OSError as error:
        raise OodEngineError(
            f"{folder}: cannot be written ({error.strerror}); make room, or choose another --output"
        ) from error
