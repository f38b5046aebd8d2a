"""What the whole suite needs: one thread, one seed for each test, and fixtures that several folders use."""

import os

# Before torch is imported: the suite's models are too small to gain from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Seconds, instead of 10: the Hub on loopback answers at once, but the machine may be busy.
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "600")
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "600")

import hypothesis
import jaxtyping
import pytest
import torch

# Their asserts shall say what they compared, as those of the tests do.
pytest.register_assert_rewrite("support")

# Examples of any length: no test depends on the clock.
hypothesis.settings.register_profile("no clock", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("no clock")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def sparse_products(monkeypatch):
    """In the small layers of tests, sparse updates have a large part of the entries, and take their own product all the same."""
    monkeypatch.setattr("deltakit.ops.sparse_product._DENSEST", 1)


@pytest.fixture
def unchecked(monkeypatch):
    """Without the checks of types and shapes that only the test run has: bad input must meet our own errors."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def toy(tmp_path):
    """A folder with a tiny random classifier backbone and a tokenizer of SNIPS' words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from deltakit.demo.data import read
    from support.tiny_transformers import COMMON, SIZES

    words = sorted({word for text, _ in read("train")[:200] for word in text.lower().split()})
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "toy"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    config = transformers.BertConfig(**SIZES, **{**COMMON, "vocab_size": len(vocabulary)})
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback."""
    import huggingface_hub
    from huggingface_hub import constants

    from support.loopback_hub import LoopbackHub

    server = LoopbackHub()
    # The client froze its settings when it was imported.
    for name, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    huggingface_hub.utils.disable_progress_bars()
    yield server
    server.stop()
