"""What the tests of readers share: imports into stores, and a tiny model that trains on them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.readers.formats import open_source
from gato.envs.readers.importing import import_source
from gato.envs.readers.reader import BadItem, ReadOptions
from gato.envs.store import open_store
from gato.model_config import ModelConfig
from gato.optim import OptimConfig
from gato.train import train

STEPS = 50


@pytest.fixture
def trains(tmp_path: Path) -> Callable[[Path], tuple[float, float]]:
    """Return a function that trains on stores: losses of the first and the last 5 of 50 steps."""

    def losses(folder: Path) -> tuple[float, float]:
        config = TrainConfig(
            model=ModelConfig(layers=1, width=32, heads=2, head_dim=16, ffn_width=64, context=96),
            optim=OptimConfig(lr=1e-2, warmup=5),
            corpora=(CorpusConfig("foreign", str(folder)),),
            embedders={"image": {"embedder": "conv"}},
            text_pieces=300,
            rows=4,
            steps=STEPS,
            log_every=1,
            save_every=STEPS,
        )
        run = tmp_path / "run"
        train(config, run, device="cpu")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        history = [line["losses"]["foreign"] for line in lines]
        assert len(history) == STEPS
        return float(np.mean(history[:5])), float(np.mean(history[-5:]))

    return losses


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that imports a location, as the command line does, and opens the store."""

    def store(location: Any, format: str = "auto", **options: Any) -> Any:
        source = open_source(location, format, ReadOptions(**options))
        out = tmp_path / "store"
        summary = import_source(source, out)
        opened = open_store(out)
        opened.validate()
        assert len(opened) == summary.kept
        return opened

    return store


@pytest.fixture
def read() -> Callable[..., tuple[list[Any], list[BadItem]]]:
    """Return a function that gives the good items of a location, and the bad ones."""

    def items(location: Any, format: str = "auto", **options: Any) -> Any:
        found = list(open_source(str(location), format, ReadOptions(**options)).read())
        good = [i for i in found if not isinstance(i, BadItem)]
        return good, [i for i in found if isinstance(i, BadItem)]

    return items


@dataclass(frozen=True)
class Shown:
    """A picture of one colour, and words about it."""

    pixels: np.ndarray
    colour: str

    @property
    def text(self) -> str:
        return f"a {self.colour} box on the floor"

    def encoded(self, format: str = "PNG") -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, format)
        return file.getvalue()


@pytest.fixture(scope="session")
def shown() -> list[Shown]:
    """Return 60 small pictures of three colours."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(60):
        pixels = rng.integers(0, 60, (32, 48, 3), np.uint8)
        pixels[..., i % 3] += 190
        made.append(Shown(pixels, ("red", "green", "blue")[i % 3]))
    return made


@pytest.fixture(scope="session")
def bomb() -> bytes:
    """Return a whole picture of 30,000 x 30,000 pixels, white, in a hundred kilobytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    side, packer = 30_000, zlib.compressobj(1)
    row = b"\0" + b"\xff" * (side // 8)
    content = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    ends = chunk(b"IDAT", content) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + ends
