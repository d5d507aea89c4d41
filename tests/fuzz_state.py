"""Mutations of a state file, signed again as another program would: each must be refused, or load with the same decisions.

    python tests/fuzz_state.py --mutations 100000

A mutation changes one or two places: a value, type, key or list of the header; the name, dtype, shape, order or a bit of a
tensor. `tests/ood_engine/test_fuzz_state.py` runs some thousand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ood_engine as oe
from ood_engine.errors import StateError
from ood_engine.state import _tensors_digest

Tensors = dict[str, Tensor]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**40, 2**70, 0.5, -0.25, 1.5, 1e300, float("nan"), float("inf")),
    *("", "relu", "0", "nap", "float16", "NHWC", "basis", [], [1], [3, 8, 9], {}, {"a": 1}),
]


def sign(tensors: Tensors, header: Any, path: Path) -> None:
    """Write a state with digests that fit."""
    if isinstance(header, dict) and "tensors_digest" in header:
        header["tensors_digest"] = _tensors_digest(tensors)
    text = json.dumps(header)
    save_file(tensors, path, {"ood_engine": text, "digest": hashlib.sha256(text.encode()).hexdigest()})


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values below a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*at, key)
        yield from places(value[key], (*at, key))


def mutate_header(header: dict[str, Any], rng: random.Random) -> str:
    """Change a field, nearby or to any value, drop it, add one, or exchange two."""
    by_field: dict[Any, list[tuple[Any, ...]]] = {}
    for path in places(header):
        by_field.setdefault(path[0], []).append(path)
    path = rng.choice(by_field[rng.choice(sorted(by_field))])
    holder: Any = header
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]]
    kind = rng.choice(("near", "near", "any", "any", "drop", "add", "other"))
    if kind == "drop":
        del holder[path[-1]]
    elif kind == "add" and isinstance(holder, dict):
        holder["extra"] = rng.choice(VALUES)
    elif kind == "other":
        siblings = list(holder.values()) if isinstance(holder, dict) else holder
        holder[path[-1]] = json.loads(json.dumps(rng.choice(siblings)))
    elif kind == "near" and type(old) in (int, float):
        holder[path[-1]] = rng.choice((old + 1, old - 1, -old, old * 2, old * (1 + 1e-6), old * 0.9))
    elif kind == "near" and isinstance(old, str) and old:
        holder[path[-1]] = rng.choice((old[:-1], old + "x", old[::-1], "0" + old[1:]))
    elif kind == "near" and isinstance(old, list):
        holder[path[-1]] = rng.choice((old[:-1], old[::-1], old * 2))
    else:
        holder[path[-1]] = rng.choice(VALUES)
    return f"header {'.'.join(map(str, path))} {kind}"


def mutate_tensors(tensors: Tensors, rng: random.Random) -> str:
    """Change a bit, a value, order, shape, dtype or name of a tensor."""
    key = rng.choice(sorted(tensors))
    old = tensors[key]
    kind = rng.choice(
        ("bit", "value", "value", "shuffle", "cut", "grow", "flat", "dtype", "drop", "name", "swap", "scale")
    )
    flat = old.flatten().clone()
    at = rng.randrange(max(1, flat.numel()))
    if kind == "bit" and flat.numel():
        raw = flat.view(torch.uint8)
        raw[rng.randrange(len(raw))] ^= 1 if old.dtype == torch.bool else 1 << rng.randrange(8)
    elif kind == "value" and flat.numel():
        flat[at] = rng.choice((0, 1, float("nan"), float("inf"), -1e30, 1e30)) if old.is_floating_point() else at % 2
    elif kind == "scale" and old.is_floating_point():
        flat *= rng.choice((0.0, -1.0, 0.5, 2.0))
    elif kind == "shuffle":
        flat = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(at))]
    changed = {
        "cut": lambda: old[:-1] if old.ndim else old[None],
        "grow": lambda: torch.cat([old, old[:1]]) if old.ndim else old[None],
        "flat": lambda: old.flatten(),
        "dtype": lambda: old.to(rng.choice((torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool))),
    }.get(kind, lambda: flat.view(old.shape))()
    tensors[key] = changed.contiguous().clone()
    if kind in ("drop", "name"):
        moved = tensors.pop(key)
        if kind == "name":
            tensors[f"{key}x"] = moved
    elif kind == "swap":
        other = rng.choice(sorted(tensors))
        tensors[key], tensors[other] = tensors[other].clone(), old.clone()
    return f"tensor {key} {kind}"


def run(
    state: Path, model: nn.Module, images: Tensor, seeds: range, say: Callable[[str], None] = print
) -> Counter[str]:
    """Count outcomes: "refused", "same"; anything else is a fault, and is said."""
    tensors, outcomes = load_file(state), Counter[str]()
    with safe_open(state, framework="pt") as file:
        header = json.loads(file.metadata()["ood_engine"])
    expected = oe.Engine.load(state, model).predict(images)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "state.safetensors"
        for seed in seeds:
            rng, made, top = random.Random(seed), dict(tensors), json.loads(json.dumps(header))
            words = []
            for _ in range(rng.choice((1, 1, 1, 2))):
                words.append(mutate_header(top, rng) if rng.random() < 0.5 else mutate_tensors(made, rng))
            sign(made, top, path)
            outcome = "same"
            try:
                found = oe.Engine.load(path, model).predict(images)
            except StateError:
                outcome = "refused"
            except Exception as error:
                outcome = f"raised {type(error).__name__}"
            else:
                # A detector that is not there any more decides nothing.
                if not all(torch.equal(found[name], expected.get(name, ~found[name])) for name in found):
                    outcome = "other decisions"
            outcomes[outcome] += 1
            if outcome not in ("same", "refused"):
                say(f"seed {seed}: {outcome}: {'; '.join(words)}")
    return outcomes


def main() -> None:
    """Fuzz the state of the demo model."""
    from ood_engine.demo import small_cnn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.rand(512, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = small_cnn()
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.safetensors"
        engine = oe.Engine(model, ["nap_energy", "opnp", "low_dim_gradient", "low_dim_gradient_knn"])
        engine.fit([images[:256]]).calibrate([images[256:448]], 0.1).save(state)
        outcomes = run(state, model, images[448:], range(arguments.seed, arguments.seed + arguments.mutations))
    print(dict(outcomes))
    if outcomes.keys() - {"same", "refused"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
