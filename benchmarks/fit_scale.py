"""Fitting from caches of growing size: time and resident memory against n.

A synthetic cache of fp16 features is mapped from a file. `ood_engine.subspace.gather` reads it in blocks, and a dual basis is found
from the anchors. Gathering does the same work for every sample (2·(C·D̃ + C² + D̃² + C·D) flops), and what it holds does not depend
on n, so time has to grow in proportion and memory not at all; finding the basis depends on the anchors alone. Then engines are
fitted from the largest cache, a detector each: they look at every sample, and what they collect lies in a file beside the cache.
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

import ood_engine as oe  # noqa: E402
import ood_kernels as ok  # noqa: E402
from ood_engine.bench.measure import (  # noqa: E402
    default_results_path,
    machine_facts,
    print_table,
    write_results,
)
from ood_engine.subspace import DualBasis, gather  # noqa: E402

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
        statistics = None
        for samples in options.sizes:
            cache = make_cache(Path(name), samples, options.features)
            found: dict[str, Any] = {}

            def run(cache: oe.FeatureCache = cache, found: dict[str, Any] = found) -> None:
                started = time.perf_counter()
                found["statistics"] = gather(cache, head, max_anchors=options.anchors, progress=True)
                found["seconds"] = time.perf_counter() - started

            peak = peak_anonymous_mib(run)
            statistics = found["statistics"]
            yield _row("gather", samples, found["seconds"], peak, cache.rows.features.nbytes)
        assert statistics is not None
        started = time.perf_counter()
        basis = DualBasis.fit(statistics.anchor_p, statistics.anchor_h, n_components=options.components)
        yield _row(f"dual basis, K={basis.n_components}", options.anchors, time.perf_counter() - started, None, 0)
        yield from fit_engines(cache, head, options)


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


def exponent(rows: Sequence[dict[str, Any]]) -> float:
    """B of seconds ≈ a · n^b over the sizes, by least squares of the logarithms."""
    points = [(math.log(row["samples"]), math.log(row["seconds"])) for row in rows if row["subject"] == "gather"]
    x, y = (np.array(column) for column in zip(*points, strict=True))
    return float(np.polyfit(x, y, 1)[0])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fitting from caches of growing size.")
    sizes = [12_500, 50_000, 200_000]
    parser.add_argument("--sizes", type=lambda text: [int(part) for part in text.split(",")], default=sizes, help="n")
    parser.add_argument("--features", type=int, default=2048, help="D")
    parser.add_argument("--classes", type=int, default=1000, help="C")
    parser.add_argument("--anchors", type=int, default=4096)
    parser.add_argument("--components", type=int, default=1000, help="K")
    parser.add_argument("--detectors", nargs="*", choices=DETECTORS, default=list(DETECTORS), help="fitted at the end")
    path = default_results_path("fit_scale")
    parser.add_argument("--json", type=Path, nargs="?", const=path, help="write the rows")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    machine = machine_facts()
    print(f"D={options.features} C={options.classes} anchors={options.anchors}, features mapped in fp16")
    rows: list[dict[str, Any]] = []
    growth = None
    for row in measure(options):
        rows.append({**row, "shape": f"D={options.features} C={options.classes}", "dtype": "float16"})
        print(f"{row['subject']}, {row['samples']:,} samples: {row['seconds']:.1f} s", flush=True)
        if row["subject"] == "gather" and len(rows) > 1:
            growth = exponent(rows)
        if options.json:
            write_results(options.json, machine, rows, time_exponent=growth)
    print_table(rows, COLUMNS)
    if growth is not None:
        print(f"gathering grows with n^{growth:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
