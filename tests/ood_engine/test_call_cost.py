"""What one batch costs in Python: calls, detours and things built twice; counted, never timed."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

import ood_engine as oe
import ood_kernels as ok

ROOTS = tuple(str(Path(package.__file__).parent) for package in (oe, ok))
MOST_CALLS = 120


@pytest.fixture
def calls(make_engine, test_images):
    """Of one `Engine.score`: (file, function) of every Python call in our packages, and the files on the stack at each."""
    engine = make_engine(oe.engine.DEFAULT_DETECTORS)
    engine.score(test_images)
    found, stacks = Counter(), set()

    def hook(frame, event, _):
        if event != "call" or not frame.f_code.co_filename.startswith(ROOTS):
            return
        found[frame.f_code.co_filename, frame.f_code.co_name] += 1
        stack = []
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(ROOTS) and stack[-1:] != [name]:
                stack.append(name)
            frame = frame.f_back
        stacks.add(tuple(reversed(stack)))

    sys.setprofile(hook)
    try:
        engine.score(test_images)
    finally:
        sys.setprofile(None)
    return found, stacks


def test_a_batch_makes_few_calls(calls):
    found, _ = calls
    assert sum(found.values()) <= MOST_CALLS, found.most_common(12)


def test_no_file_is_entered_twice_on_the_way_out_of_the_scorer(calls):
    for stack in calls[1]:
        assert len(set(stack)) == len(stack), " > ".join(Path(name).name for name in stack)


def test_masks_basis_and_head_are_built_once(calls):
    built = Counter(dict.fromkeys(("masks", "tensors"), 0))
    heads = 0
    for (file, name), count in calls[0].items():
        if name in built and not file.endswith("base.py"):
            built[name] += count
        heads += count if name == "head" and file.endswith("scorer.py") else 0
    assert built == {"masks": 1, "tensors": 1}
    assert heads == 1
