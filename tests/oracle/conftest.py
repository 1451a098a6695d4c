"""Torch on one thread: its threads spin, and these models are too small to gain by more."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    torch.set_num_threads(1)
