"""A tokenizer.json for Moonlight, from the files of its checkpoint, without running the code that came with them.

    pip install tiktoken
    python docs/gpus/moonlight_tokenizer.py models/moonlight-16b-a3b-instruct

The checkpoint has `tiktoken.model` (bytes and ranks), `tokenizer_config.json` (special tokens, chat template) and
`tokenization_moonshot.py`, whose `pat_str` says how text is split first. That pattern is read as text. transformers
would convert `tiktoken.model` by itself, but with another pattern: other tokens than the model was trained on, and no
error. What comes out is compared with tiktoken before it is written; `tokenizer_config.json` is overwritten.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import tiktoken
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

TEXTS = (
    "Natalia sold 48/2 = 24 clips in May.\n\n#### 72",
    "It's $1,234.50 - isn't it? HelloWorld, I'LL say\t so.\r\n  x_1 = [a+b]*2;\n",
    "Zürich, naïve, Ωmega, привет, 东京2024年，中文abc。日本語のテキスト 🚀",
)


def pattern(source: str) -> str:
    """`pat_str` of a tokenizer's module, `"|".join([...])` over literals. Raises ValueError where there is none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pat_str":
            assert isinstance(node.value, ast.Call)
            return "|".join(ast.literal_eval(node.value.args[0]))
    raise ValueError('there is no pat_str = "|".join([...])')


def convert(folder: Path) -> PreTrainedTokenizerFast:
    """Raises ValueError for a text that it and tiktoken read differently."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    split = pattern((folder / "tokenization_moonshot.py").read_text(encoding="utf-8"))
    file = str(folder / "tiktoken.model")
    ranks = TikTokenConverter.load_tiktoken_bpe(file)
    names = {int(number): token["content"] for number, token in config["added_tokens_decoder"].items()}
    # No further than the embedding goes: the original names two more, which it has no rows for.
    special = {names.get(i, f"<|reserved_token_{i}|>"): i for i in range(len(ranks), vocabulary)}
    converted = TikTokenConverter(vocab_file=file, pattern=split, extra_special_tokens=special).converted()
    kept = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "model_max_length")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converted, **{name: config[name] for name in kept if config.get(name)}
    )
    reference = tiktoken.Encoding("reference", pat_str=split, mergeable_ranks=ranks, special_tokens=special)
    for text in (*TEXTS, *(f"{name}{TEXTS[0]}{name}" for name in list(special)[:16])):
        expected, found = (
            reference.encode(text, allowed_special="all"),
            tokenizer.encode(text, add_special_tokens=False),
        )
        if expected != found:
            raise ValueError(f"{text!r} is {expected} to tiktoken, and {found} to the converted tokenizer")
    return tokenizer


if __name__ == "__main__":
    where = Path(sys.argv[1])
    convert(where).save_pretrained(where)
    print(f"{where / 'tokenizer.json'}: the same tokens as tiktoken on {len(TEXTS)} texts and with special tokens")
