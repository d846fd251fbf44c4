"""The page in a real browser, with the server in a thread of this process.

    pytest tests/browser --browser /usr/bin/chromium
    pytest tests/browser --browser /usr/bin/chromium --browser-checkpoint runs/quickstart/model \\
        --browser-shots shots

Without ``--browser`` these tests are deselected.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chromium import Chromium, Tab
from PIL import Image
from serving import serving

from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.envs import gym as gym_suite
from gato.envs import registry
from gato.model_config import ModelConfig
from gato.rollouts.agent import Agent, load
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.task_codec import History
from gato.tokenizers.text import MODEL_FILE

TINY = ModelConfig(layers=1, width=16, heads=2, head_dim=8, ffn_width=32, context=256, qk_norm=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("browser")


@pytest.fixture(scope="session")
def agent(request: pytest.FixtureRequest, text_model: bytes) -> Agent:
    """Return the checkpoint that was given, or a tiny random one that knows a made-up world."""
    given = request.config.option.browser_checkpoint
    if given:
        return load(given)
    sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "rollouts"))
    gym_suite.import_module("watched")
    serializer = Serializer(None, {"text": {MODEL_FILE: text_model}})
    for name in ("Drawn", "Undrawn"):
        serializer.add_task(registry.spec(f"gym/watched:Watched{name}-v0"), history=History())
    torch.manual_seed(0)
    model = build_model(TrainConfig(TINY), serializer).eval()
    return Agent(
        SimpleNamespace(path="tiny", model=model, serializer=serializer, data={}, averaged=False)
    )


@pytest.fixture(scope="session")
def browser(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Chromium]:
    """Return the browser."""
    found = Chromium(request.config.option.browser, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, agent: Agent) -> Iterator[Callable[[str | None], str]]:
    """Return what gives the address of a server, with a token or without."""
    given = request.config.option.browser_checkpoint
    name = Path(given).absolute().parent.name if given else "tiny"
    with ExitStack() as servers:

        @cache
        def address(token: str | None) -> str:
            return servers.enter_context(serving(agent, name=name, token=token, grace_seconds=1.0))

        yield address


@pytest.fixture
def address(server: Callable[[str | None], str]) -> str:
    """Return the address of a server without a token."""
    return server(None)


@pytest.fixture
def make_tab(browser: Chromium) -> Iterator[Callable[..., Tab]]:
    """Return what opens a tab at an address; at the end nothing may have been complained of."""
    opened: list[tuple[Tab, str]] = []

    def make(address: str, width: int = 1280, height: int = 800, **about: bool) -> Tab:
        tab = browser.open(width, height, **about)
        opened.append((tab, address))
        tab.go(address)
        return tab

    yield make
    for tab, address in opened:
        tab.run("localStorage.clear()")
        tab.close()
        local = (f"{address}/", "data:image/", "blob:")
        elsewhere = [r["url"][:100] for r in tab.requests if not r["url"].startswith(local)]
        assert not elsewhere
        assert not tab.complaints


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small picture: a held-out digit, 32 pixels wide."""
    from gato.envs.corpora import digits

    path = tmp_path_factory.mktemp("pictures") / "digit.png"
    record = next(iter(digits.records("heldout", 0, 1)))
    Image.fromarray(np.asarray(record["image"])).save(path)
    return path


@pytest.fixture(scope="session")
def shoot(request: pytest.FixtureRequest) -> Callable[[Tab, str], None]:
    """Return what writes a screenshot where somebody wants them."""
    folder = request.config.option.browser_shots

    def shot(tab: Tab, name: str) -> None:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tab.picture(Path(folder) / f"{name}.png")

    return shot
