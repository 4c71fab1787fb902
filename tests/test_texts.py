"""A checkpoint as researchers bring it, with decoder and tokenizer in one folder, from texts to the end of a stream."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from fedsim import simulation
from fedsim.core import config as configs
from tests.tiny import TINY, final_state

WORDS = ("apple", "bread", "cloud", "dance", "earth", "flame")  # one for each class, among others that all have
COMMON = ("the", "of", "and", "is")


def t5(folder: Path) -> None:
    """A whole T5 with a tokenizer of whole words, as `save_pretrained` writes them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    names = ["<pad>", "</s>", "<unk>", *COMMON, *WORDS]
    tokenizer = Tokenizer(WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    told = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **told).save_pretrained(folder)
    layout = T5Config(
        vocab_size=len(names), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    torch.default_generator.manual_seed(0)
    T5ForConditionalGeneration(layout).save_pretrained(folder)


def texts(file: Path) -> None:
    """Texts of 3 to 9 words, in which every class has its own word."""
    draw = np.random.default_rng(0)

    def split(count: int) -> list[list[str]]:
        common = [" ".join(draw.choice(COMMON, size=draw.integers(2, 9))) for _ in range(count * len(WORDS))]
        return [[f"{rest} {WORDS[i % len(WORDS)]}", WORDS[i % len(WORDS)]] for i, rest in enumerate(common)]

    file.write_text(json.dumps({"train": split(12), "test": split(4)}), encoding="utf-8")


def test_a_stream_of_texts_is_learned_with_the_checkpoints_own_tokenizer(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        t5(tmp_path / "t5")
    texts(tmp_path / "texts.json")
    config = configs.from_dict(
        {
            **TINY,
            "name": "t5",
            "data": {"source": "text", "path": str(tmp_path / "texts.json")},
            "model": {"backbone": str(tmp_path / "t5")},
            "client": {"epochs": 4, "batch_size": 8, "lr": 2e-2},
            "runtime": {**TINY["runtime"], "output": str(tmp_path)},
        }
    )
    results = simulation.run(config)
    assert results.accuracy.shape == (2, 2)
    assert results.accuracy[0, 0] > 60, "three classes in the first task"
    params = final_state(results.path, config).params
    assert float(params["adapter.encoder.block.0.layer.0.SelfAttention.q.lora_B"].abs().sum()) > 0
    assert not any(n.startswith("adapter.decoder") for n in params)
