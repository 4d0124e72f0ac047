import pytest

from longscan.data import prepare_corpus
from longscan.launcher.config import Config, resolve
from longscan.launcher.validate import check_run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small corpus of real text: this repository's own sources would change, so made-up but uneven documents."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(60):
        words = [f"word{(number * 7 + i * i) % 97}" for i in range(5 + (number * 37) % 1200)]
        (texts / f"{number:03d}.txt").write_text(" ".join(words))
    prepare_corpus([str(texts)], folder / "corpus", shard_bytes=64 * 1024, heldout=0.1, workers=1)
    return folder / "corpus"


@pytest.fixture
def tiny(corpus, tmp_path):
    """Makes a checked configuration of the tiny preset over the corpus, writing into the test's own folder."""

    def make(*overrides: str, run: str = "run") -> Config:
        fixed = [
            f"data.corpora=[{corpus}]",
            f"run.folder={tmp_path / run}",
            "run.threads=1",
            "logging.tensorboard=false",
        ]
        return check_run(resolve("griffin-tiny", [*fixed, "run.device=cpu", "logging.tensorboard=false", *overrides]))[
            0
        ]

    return make
