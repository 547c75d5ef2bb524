"""Two processes end in the weights of one with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_run import METHODS, SEARCHES, searched, stepped, trained
from slimming_training import largest_difference

SCRIPT = Path(__file__).with_name("distributed_run.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the two processes found, for every mode and method; one launch for all, since it takes seconds."""
    output = tmp_path_factory.mktemp("distributed") / "result"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    root = str(SCRIPT.parents[2])
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([*command, str(output)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(f"{output}.{rank}") for rank in range(2)]


def assert_same(found, expected):
    for result in found:  # float32 sums in another order, over 12 steps
        assert largest_difference(result["weights"], expected["weights"]) < 2e-6
        assert result["scores"].keys() == expected["scores"].keys()
        for name, score in expected["scores"].items():
            torch.testing.assert_close(result["scores"][name], score, atol=2e-6, rtol=0)
            assert torch.equal(result["scores"][name] == 0, score == 0)
    assert largest_difference(found[0]["weights"], found[1]["weights"]) == 0.0  # the processes never drift apart
    assert found[0]["sparsity"] == expected["sparsity"]


@pytest.mark.multi_process
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_ddp_equals_one_process(method, results, tmp_path):
    assert_same([found["ddp", method] for found in results], trained(method, tmp_path, batch=8))


@pytest.mark.multi_process
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sharded_parameters_equal_whole_ones(method, results):
    """FSDP2: every process holds half of every parameter."""
    assert_same([found["sharded", method] for found in results], stepped(method, is_sharded=False))


@pytest.mark.multi_process
@pytest.mark.slow
@pytest.mark.parametrize("method", SEARCHES)
def test_architecture_search_on_two_processes_equals_one(method, results, tmp_path):
    found, expected = [result["search", method] for result in results], searched(method, tmp_path, batch=4)
    # the finite difference divides rounding errors of gradients by 2 epsilon
    close = 1e-4 if method == "second_order" else 5e-6
    for result in found:
        assert largest_difference(result["weights"], expected["weights"]) < close
        assert result["log"] == pytest.approx(expected["log"], rel=1e-4) and len(result["log"]) >= 2
    assert largest_difference(found[0]["weights"], found[1]["weights"]) == 0.0
