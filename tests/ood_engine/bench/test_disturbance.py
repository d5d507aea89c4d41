from __future__ import annotations

import os
import time

import pytest
import torch

from ood_engine.bench.disturbance import Disturbance, Usage

CORES = len(os.sched_getaffinity(0))


@pytest.fixture
def asked(monkeypatch):
    """asked(threads, interruptions, own_seconds, all_seconds) → what is said of one second with these."""

    def ask(threads, interruptions, own_seconds, all_seconds):
        counters = [
            Usage(10.0, 7, 3.0, None if all_seconds is None else 40.0),
            Usage(11.0, 7 + interruptions, 3.0 + own_seconds, None if all_seconds is None else 40.0 + all_seconds),
        ]
        monkeypatch.setattr(Usage, "now", lambda: counters.pop(0))
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return Disturbance()()

    return ask


def test_an_idle_machine_does_not_disturb(asked):
    assert asked(CORES, 40, CORES, CORES + 0.02) is False


def test_another_program_on_every_core_disturbs(asked):
    assert asked(CORES, 500, CORES / 2, CORES) is True


def test_threads_of_its_own_are_no_disturbance(asked):
    assert asked(CORES, 2000, CORES, CORES) is False


def test_compilers_beside_a_thread_that_waits_are_no_disturbance(asked):
    assert asked(CORES, 20, 0.1, CORES) is False


def test_cores_that_are_left_for_others_are_no_disturbance(asked):
    assert asked(CORES - 1, 500, CORES - 1, CORES) is False


def test_interruptions_alone_count_where_the_cores_are_unknown(asked):
    assert asked(CORES, 500, 1.0, None) is True
    assert asked(CORES, 5, 1.0, None) is False


def test_a_system_without_counters_says_nothing(monkeypatch):
    monkeypatch.setattr(Usage, "now", lambda: None)
    assert Disturbance()() is None


def test_the_counters_go_on():
    before, begun = Usage.now(), time.process_time()
    while time.process_time() - begun < 0.05:
        pass
    after = Usage.now()
    assert after.own_seconds - before.own_seconds == pytest.approx(0.05, abs=0.04)
    assert after.all_seconds >= before.all_seconds > 0
    assert after.interruptions >= before.interruptions
