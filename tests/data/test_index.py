"""A corpus is opened from a folder or a URL, and what is none is told in one sentence."""

import functools
import http.server
import json
import shutil
import threading

import pytest

from longscan.data.index import Corpus, ShardInfo, Split, TokenizerInfo, file_url, open_corpus
from longscan.errors import ConfigError


@pytest.fixture
def corpus(tmp_path):
    shard = ShardInfo("train/00000.tar", "train/00000.npy", 2, 30, 40, 10240, "aa", "bb")
    tokenizer = TokenizerInfo("bytes", None, 257, 256, 256, "bytes")
    corpus = Corpus(str(tmp_path / "c"), tokenizer, "uint8", {"train": Split((shard,)), "heldout": Split(())})
    (tmp_path / "c").mkdir()
    (tmp_path / "c/manifest.json").write_text(json.dumps(corpus.to_manifest() | {"counts": {"tokens": 30}}))
    return corpus


def test_a_folder_is_opened(corpus):
    found = open_corpus(corpus.location)
    assert found == corpus
    assert found.splits["train"].tokens == 30
    assert found.url("train/00000.tar") == f"{corpus.location}/train/00000.tar"


@pytest.mark.parametrize("form", ["file:{}", "file:{}/", "pipe:cat {}", "pipe:cat {}/{{}} | cat"])
def test_urls_are_opened_and_the_fingerprint_does_not_depend_on_them(corpus, form):
    found = open_corpus(form.format(corpus.location))
    assert found.splits == corpus.splits
    assert found.fingerprint == corpus.fingerprint


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens http URLs with curl")
def test_http_is_opened(corpus):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=corpus.location)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert open_corpus(url).splits == corpus.splits
            with pytest.raises(ConfigError, match="cannot read"):
                open_corpus(f"{url}/absent")
        finally:
            server.shutdown()


def test_a_pipe_without_place_for_the_name_gets_it_appended():
    assert file_url("pipe:cat /x", "train/0.tar") == "pipe:cat /x/train/0.tar"
    assert file_url("pipe:get /x/{} -", "a") == "pipe:get /x/a -"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no corpus"),
        ("{", "damaged"),
        ("[]", "not a corpus manifest"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "splits": {}}', "damaged"),
    ],
)
def test_what_is_no_corpus_is_told(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        open_corpus(tmp_path)


def test_absent_and_unfinished_corpora_are_told_apart(tmp_path):
    with pytest.raises(ConfigError, match="there is no corpus at"):
        open_corpus(tmp_path / "absent")
    (tmp_path / ".prepare").mkdir()
    with pytest.raises(ConfigError, match="not finished"):
        open_corpus(tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        open_corpus("nosuchscheme://x/y")
