# SPDX-License-Identifier: BSD-3-Clause
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slower on more, and far slower where others use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
