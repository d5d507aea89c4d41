"""Fitting from caches of growing size: time and resident memory against n.

A synthetic cache of fp16 features is mapped from a file, a dual basis is found from its first samples, and engines are fitted from
it, a detector each: they look at every sample, and what they collect lies in a file beside the cache. Finding the basis depends on
the anchors alone; the rest has to grow in proportion to n, and memory hardly.
Memory is what the process holds itself (RssAnon, looked at every 20 ms), without pages of mapped files, which the system may drop.

    python benchmarks/fit_scale.py [--sizes 12500,50000,200000] [--json]
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "kernels")]

from ood_engine.bench.measure import (  # noqa: E402
    default_results_path,
    machine_facts,
    print_table,
    write_results,
)

import ood_engine as oe  # noqa: E402
import ood_kernels as ok  # noqa: E402
from ood_engine.subspace import DualBasis  # noqa: E402

COLUMNS = {
    "subject": "subject",
    "samples": "n",
    "seconds": "s",
    "samples_per_second": "samples/s",
    "peak_anonymous_mib": "peak MiB held",
    "cache_mib": "cache MiB",
}


DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "dual, mahalanobis": ("low_dim_gradient", {"basis": "dual"}),
    "dual, mahalanobis and that of the features": ("low_dim_gradient", {"basis": "dual", "a": 1.0}),
    "factored, mahalanobis": ("low_dim_gradient", {"basis": "factored"}),
    "class_average, mahalanobis": ("low_dim_gradient", {"basis": "class_average"}),
    "class_average of nfk-separable, mahalanobis": (
        "low_dim_gradient",
        {"basis": "class_average", "normalisation": "nfk-separable"},
    ),
    "dual, probe of one epoch": ("low_dim_gradient", {"basis": "dual", "head": "probe_energy", "epochs": 1}),
    "dual, knn": ("low_dim_gradient", {"basis": "dual", "head": "knn"}),
    "grad_pca": ("grad_pca", {}),
    "opnp": ("opnp", {}),
}
"""Row → detector and its settings; the number of components and of anchors are added."""


def make_cache(folder: Path, samples: int, features: int, seed: int = 0) -> oe.FeatureCache:
    """ReLU-like features with a common mean, in fp16, in a mapped file; written in blocks."""
    array = np.memmap(folder / f"features-{samples}.bin", dtype=np.float16, mode="w+", shape=(samples, features))
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, features, generator=generator) / 8
    for start in range(0, samples, 8192):
        count = min(8192, samples - start)
        array[start : start + count] = (
            (torch.randn(count, 64, generator=generator) @ mixing + 0.4).relu().half().numpy()
        )
    array.flush()
    marks = torch.randint(-(2**62), 2**62, (samples,), generator=generator)
    return oe.FeatureCache.from_features(torch.from_numpy(array), fingerprints=marks, directory=folder)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows, each as soon as it is measured."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(options.classes, options.features, generator=generator) / math.sqrt(options.features) * 4
    head = ok.Head(weight, torch.zeros(options.classes))
    with tempfile.TemporaryDirectory() as name:
        for samples in options.sizes:
            cache = make_cache(Path(name), samples, options.features)
            if samples == options.sizes[0]:
                yield fit_basis(cache, head, options)
            yield from fit_engines(cache, head, options)


def fit_basis(cache: oe.FeatureCache, head: ok.Head, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a dual basis over the first samples."""
    h = cache.rows.features[: options.anchors].float()
    p = (h @ head.weight.T).softmax(1)
    started = time.perf_counter()
    basis = DualBasis.fit(p, h, n_components=options.components)
    return _row(f"dual basis, K={basis.n_components}", len(h), time.perf_counter() - started, None, 0)


def fit_engines(cache: oe.FeatureCache, head: ok.Head, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a detector, fitted from the whole cache; classes are those that the head predicts."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(options.features, options.classes))
    model.load_state_dict({"1.weight": head.weight, "1.bias": head.bias})
    parts = [(rows.features.float() @ head.weight.T).argmax(1) for rows in cache.batches()]
    cache = oe.FeatureCache(cache.rows._replace(labels=torch.cat(parts)), cache.directory)
    images = cache.rows.features[:8].float()[:, :, None, None]
    for name in options.detectors:
        detector, settings = DETECTORS[name]
        if detector == "low_dim_gradient":
            settings = {**settings, "max_anchors": options.anchors, "n_components": options.components}
        engine = oe.Engine(model, [detector], settings={detector: settings})
        started = time.perf_counter()
        peak = peak_anonymous_mib(partial(engine.fit_features, cache, images))
        yield _row(f"fit {name}", len(cache), time.perf_counter() - started, peak, cache.rows.features.nbytes)


def peak_anonymous_mib(call: Callable[[], object]) -> float | None:
    """By how much the memory that belongs to no file outgrew its size before the call; None where it cannot be read."""
    before = _anonymous_mib()
    if before is None:
        call()
        return None
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], _anonymous_mib() or 0.0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return peak[0] - before


def _anonymous_mib() -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")), None)


def _row(subject: str, samples: int, seconds: float, peak: float | None, size: int) -> dict[str, Any]:
    return {
        "subject": subject,
        "provider": "ood_engine",
        "samples": samples,
        "seconds": seconds,
        "samples_per_second": samples / seconds,
        "ms_per_sample": 1000 * seconds / samples,
        "peak_anonymous_mib": peak,
        "cache_mib": size / 2**20,
    }


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Subject → b of seconds ≈ a · n^b, by least squares of the logarithms, where it was measured at several sizes."""
    found = {}
    for subject in dict.fromkeys(row["subject"] for row in rows):
        points = [(row["samples"], row["seconds"]) for row in rows if row["subject"] == subject]
        if len(points) > 1:
            x, y = np.log(points).T
            found[subject] = float(np.polyfit(x, y, 1)[0])
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fitting from caches of growing size.")
    sizes = [12_500, 50_000, 200_000]
    parser.add_argument("--sizes", type=lambda text: [int(part) for part in text.split(",")], default=sizes, help="n")
    parser.add_argument("--features", type=int, default=2048, help="D")
    parser.add_argument("--classes", type=int, default=1000, help="C")
    parser.add_argument("--anchors", type=int, default=4096)
    parser.add_argument("--components", type=int, default=1000, help="K")
    parser.add_argument(
        "--detectors", nargs="*", choices=DETECTORS, default=list(DETECTORS), help="fitted at each size"
    )
    path = default_results_path("fit_scale")
    parser.add_argument("--json", type=Path, nargs="?", const=path, help="write the rows")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    machine = machine_facts()
    print(f"D={options.features} C={options.classes} anchors={options.anchors}, features mapped in fp16")
    rows: list[dict[str, Any]] = []
    for row in measure(options):
        rows.append({**row, "shape": f"D={options.features} C={options.classes}", "dtype": "float16"})
        print(f"{row['subject']}, {row['samples']:,} samples: {row['seconds']:.1f} s", flush=True)
        if options.json:
            write_results(options.json, machine, rows, time_exponents=exponents(rows))
    print_table(rows, COLUMNS)
    for subject, growth in exponents(rows).items():
        print(f"{subject} grows with n^{growth:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
