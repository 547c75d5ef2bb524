"""The validation half in batches: every process its part, every run the same."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.methods.data_halves import ValidationBatches, half_sizes, split_halves


def stack(items):
    return torch.tensor(items)


def batches(size=10, batch_size=3, process=0, processes=1, seed=5, workers=0):
    return ValidationBatches(list(range(size)), batch_size, stack, seed, process, processes, workers)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 7), processes=st.integers(1, 4), first=st.integers(0, 9))
def test_processes_together_see_what_one_would(size, batch_size, processes, first):
    parts = [batches(size, batch_size, process, processes) for process in range(processes)]
    whole = batches(size, batch_size * processes)
    for number in range(first, first + 3):
        assert torch.equal(torch.cat([part.get(number) for part in parts]), whole.get(number))


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 30), batch_size=st.integers(1, 7))
def test_every_pass_has_each_item_once(size, batch_size):
    source = batches(size, batch_size)
    seen = torch.cat([source.get(number) for number in range(-(-3 * size // batch_size))]).tolist()
    for start in (0, size, 2 * size):
        assert sorted(seen[start : start + size]) == list(range(size))


def test_asking_out_of_order_gives_the_same_batches():
    source = batches()
    in_order = [source.get(number).tolist() for number in range(8)]
    assert [source.get(number).tolist() for number in (5, 6, 2, 0)] == [in_order[n] for n in (5, 6, 2, 0)]
    assert batches(seed=6).get(0).tolist() != in_order[0]


def test_workers_load_the_same_batches():
    here, there = batches(), batches(workers=1)
    assert [here.get(n).tolist() for n in range(3)] == [there.get(n).tolist() for n in range(3)]


class Noisy(torch.utils.data.Dataset):
    """Items with augmentation from all three random generators."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return [i, float(torch.rand(())), random.random(), float(np.random.rand())]


def test_random_transformations_follow_the_step_and_leave_other_randomness_alone():
    def make():
        return ValidationBatches(Noisy(), 2, stack, 0, 0, 1, 0)

    first = make()
    expected = [first.get(n) for n in range(4)]
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        assert torch.equal(make().get(3), expected[3])
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
        assert (np.random.get_state()[1] == before[2]).all()
    assert not torch.equal(expected[0][:, 1], expected[1][:, 1])


@pytest.mark.parametrize("split", [0.1, 0.5, 0.9])
def test_sizes_are_those_of_the_halves(split):
    parts = split_halves(list(range(37)), split, 0)
    assert tuple(map(len, parts)) == half_sizes(37, split)
