"""A demo in miniature, made once for all tests: the real generator, a hundredth of its size."""

import os
import signal
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_data

# Where a shell starts the tests in the background, Ctrl-C is ignored in all that they start.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The library `datasets` writes below the home folder, where it may.
if not os.access(Path.home(), os.W_OK):
    os.environ["HF_HOME"] = tempfile.mkdtemp()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_data.prepare_demo(folder, seed=1, n_ref=300, n_train=24_000)
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
