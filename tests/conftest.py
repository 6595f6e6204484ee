"""A demo in miniature, made once for all tests: the real generator, a hundredth of its size."""

import itertools
import os
import signal
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_math
import prepare_data

# Some comparisons of LaTeX never end, and twenty of them are tried. The slowest that ends takes a
# quarter of this.
eval_math.SECONDS = 0.4

# Where a shell starts the tests in the background, Ctrl-C is ignored in all that they start.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The library `datasets` writes below the home folder, where it may.
if not os.access(Path.home(), os.W_OK):
    os.environ["HF_HOME"] = tempfile.mkdtemp()

# Below the ports that a kernel gives away by itself, and others in each of pytest's workers.
PORTS = itertools.count(20_000 + 10 * (os.getpid() % 1000))


@pytest.fixture
def two_processes():
    """two_processes(): the environments that torchrun would give two processes, with gloo.

    ports: how many ports are theirs, from MASTER_PORT on.
    """

    def environments(ports=1):
        port = [next(PORTS) for _ in range(ports)][0]
        here = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        here |= {"OMP_NUM_THREADS": "1"}
        if os.path.exists("/sys/class/net/lo"):
            here |= {"GLOO_SOCKET_IFNAME": "lo"}  # it need not find this machine's name
        return [os.environ | here | {"RANK": rank} for rank in "01"]

    return environments


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_data.prepare_demo(folder, seed=1, n_ref=300, n_train=24_000, vocab=300)
    return folder


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch):
    """No test of this process pulls the plug, and each checkpoint would wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(autouse=True)
def same_every_time():
    """One seed; and one thread: small tensors, a second only waits, and sums in another order."""
    torch.manual_seed(0)
    np.random.seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
