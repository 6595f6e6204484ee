"""A demo in miniature, made once for all tests: the real generator, a hundredth of its size."""

import numpy as np
import pytest
import torch

import prepare_data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_data.prepare_demo(folder, seed=1, n_ref=300, n_train=24_000, vocab=300)
    return folder


@pytest.fixture(autouse=True)
def same_every_time():
    """One seed; and one thread: small tensors, a second only waits, and sums in another order."""
    torch.manual_seed(0)
    np.random.seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
