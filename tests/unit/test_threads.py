"""A small model decides with one thread on a CPU; what was set before comes back."""

import pytest
import torch

from gato import model_config
from gato.model import GatoModel
from gato.model_config import ModelConfig
from gato.threads import few_threads, trunk_parameters

LARGE = ModelConfig(layers=12, width=768, heads=12, head_dim=64, ffn_width=4096, context=64)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def inside(config: ModelConfig, device: str) -> int:
    with few_threads(config, torch.device(device)):
        return torch.get_num_threads()


def test_only_a_small_model_on_a_cpu_uses_one_thread(two_threads) -> None:
    assert inside(model_config.quickstart(), "cpu") == 1
    assert inside(model_config.quickstart(), "cuda") == 2
    assert inside(LARGE, "cpu") == 2
    assert torch.get_num_threads() == 2


def test_threads_come_back_where_something_is_raised(two_threads) -> None:
    with (
        pytest.raises(ValueError, match="no"),
        few_threads(model_config.quickstart(), torch.device("cpu")),
    ):
        raise ValueError("no")
    assert torch.get_num_threads() == 2


def test_a_trunk_has_the_parameters_of_its_matrices() -> None:
    config = ModelConfig(
        layers=2, width=64, heads=4, head_dim=16, ffn_width=96, context=32, kv_heads=2
    )
    blocks = GatoModel(config, 32, masked_id=1).blocks
    matrices = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    assert trunk_parameters(config) == matrices
