"""``compare_latency``: the order of calls, the unit and the statistic."""

import time

import pytest
import torch

from hf_compress.measurement import compare_latency, describe_machine


def test_candidates_take_turns_in_alternating_order():
    calls = []
    # 30 ms a call is more than a block, so every block is one call and one warm-up call
    candidates = {name: lambda name=name: (calls.append(name), time.sleep(0.03)) for name in ("a", "b")}
    compare_latency(candidates, rounds=4)
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert calls[0] == "a" and calls.count("a") == calls.count("b")
    # warm-up a b, then ab ba ab ba, where neighbours of the same name join
    assert "".join(turns) == "abababa"


def test_milliseconds_and_median():
    slow = iter(range(10_000))

    def sometimes_slow():  # every sixteenth call takes ten times as long: a mean would see it, a median does not
        time.sleep(0.2 if next(slow) % 16 == 15 else 0.02)

    times = compare_latency({"steady": lambda: time.sleep(0.02), "sometimes": sometimes_slow}, rounds=9)
    # sleep never returns early; a loaded machine may double it
    assert 20 <= times["steady"] < 45
    assert 20 <= times["sometimes"] < 60


def test_a_change_in_the_middle_hits_both_alike():
    """A machine that becomes twice as slow half-way: one candidate after the other would differ by that factor."""
    count = iter(range(10**6))

    def work():
        time.sleep(0.012 if next(count) < 50 else 0.024)

    times = compare_latency({"a": work, "b": work}, rounds=12)
    # both medians come from the same mixture; sleeping is exact to about a millisecond
    assert 0.66 < times["a"] / times["b"] < 1.5


def test_runs_without_gradients_and_with_the_threads_that_are_set():
    seen = set()
    compare_latency({"x": lambda: seen.add((torch.is_inference_mode_enabled(), torch.get_num_threads()))}, rounds=1)
    assert seen == {(True, torch.get_num_threads())}
    assert not torch.is_inference_mode_enabled()


def test_rounds_must_be_positive():
    with pytest.raises(ValueError, match="at least one"):
        compare_latency({"x": lambda: None}, rounds=0)


def test_the_machine_is_described_without_its_name():
    import platform

    described = describe_machine()
    assert f"torch {torch.__version__}" in described and "thread" in described
    assert platform.node() not in described
