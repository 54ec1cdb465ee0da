"""Writes the world's files: `python -m experiments.world.build` from a seed, in about five minutes on two cores.

data/train.jsonl, data/eval.jsonl   preference pairs with their dimensions; eval's prompts are the held-out ones
data/sft.jsonl                      conversations in the base distribution, train prompts only
model/tokenizer.json, tokenizer_config.json   a byte-level BPE of that text and a ChatML template
model/config.json, model.safetensors          a tiny Llama, fitted to the base distribution by this project's own SFT

The files are committed. Data and tokenizer come out byte for byte the same, and a test compares them; the weights come
out the same on one machine and to rounding elsewhere.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.world.world import LABEL_SCALE, dimensions, preference_pair, sft_response, split
from models.config import parse_model_config
from models.transformer import Transformer
from models.weights import WEIGHTS, write_tensors

HERE = Path(__file__).parent
TRAIN_PAIRS, EVAL_PAIRS, SFT_ROWS = 3000, 400, 8000
TRAIN_SEED, EVAL_SEED, SFT_SEED = 1, 2, 3
VOCAB_SIZE = 800
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
# Fresh draws for the model, more than are committed: repeated rows would be learned by heart, and the base
# distribution is what it should learn.
MODEL_ROWS, MODEL_SEED = 60000, 4
SFT_ARGUMENTS = [
    "stage=sft", "finetuning_type=full", "learning_rate=3e-3", "weight_decay=0.01", "num_train_epochs=2",
    "per_device_train_batch_size=64", "gradient_accumulation_steps=1", "logging_steps=50", "save_strategy=no", "seed=0",
]  # fmt: skip

Row = dict[str, Any]


def each_prompt_in_turn(prompts: tuple[str, ...], count: int, rng: random.Random) -> Iterator[str]:
    """`count` prompts in random order, of which no two differ in number by more than one."""
    rounds = [rng.sample(prompts, len(prompts)) for _ in range(-(-count // len(prompts)))]
    return iter([prompt for one_round in rounds for prompt in one_round][:count])


def pair_rows(prompts: tuple[str, ...], count: int, seed: int) -> Iterator[Row]:
    rng = random.Random(seed)
    for prompt in each_prompt_in_turn(prompts, count, rng):
        chosen, rejected = preference_pair(prompt, rng, LABEL_SCALE)
        scores = {"chosen": dimensions(prompt, chosen), "rejected": dimensions(prompt, rejected)}
        yield {
            "conversations": [{"from": "user", "value": prompt}],
            "chosen": chosen,
            "rejected": rejected,
            "dimensions": {name: {side: scores[side][name] for side in scores} for name in scores["chosen"]},
        }


def sft_rows(prompts: tuple[str, ...], count: int, seed: int) -> Iterator[Row]:
    rng = random.Random(seed)
    for prompt in each_prompt_in_turn(prompts, count, rng):
        answer = {"from": "assistant", "value": sft_response(prompt, rng)}
        yield {"conversations": [{"from": "user", "value": prompt}, answer]}


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_data(directory: Path = HERE / "data") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    train_prompts, held_out_prompts = split()
    write_jsonl(directory / "train.jsonl", pair_rows(train_prompts, TRAIN_PAIRS, TRAIN_SEED))
    write_jsonl(directory / "eval.jsonl", pair_rows(held_out_prompts, EVAL_PAIRS, EVAL_SEED))
    write_jsonl(directory / "sft.jsonl", sft_rows(train_prompts, SFT_ROWS, SFT_SEED))


def write_tokenizer(directory: Path = HERE / "model") -> None:
    """A byte-level BPE: any text can be encoded, and the world's common words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, also those that the world never uses
        show_progress=False,
    )
    turns = [turn for row in sft_rows(split()[0], SFT_ROWS, SFT_SEED) for turn in row["conversations"]]
    tokenizer.train_from_iterator([text for turn in turns for text in (turn["from"], turn["value"])], trainer)

    end_of_text, _, im_end = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": im_end,
        "pad_token": end_of_text,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def write_initial_model(directory: Path) -> None:
    """A random tiny Llama: normal(0, 0.02), the two projections back into the stream scaled down by depth (GPT-2)."""
    torch.manual_seed(0)
    model = Transformer(parse_model_config(MODEL_CONFIG), torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * MODEL_CONFIG["num_hidden_layers"]  # type: ignore[operator]
            torch.nn.init.normal_(parameter, std=0.02 / (depth**0.5 if into_stream else 1))
    write_text(directory / "config.json", json.dumps(MODEL_CONFIG, indent=2) + "\n")
    write_tensors(directory / WEIGHTS, dict(model.named_parameters()))


def train_model(directory: Path = HERE / "model") -> None:
    """Fit the tiny Llama to the base distribution with `train.py stage=sft`."""
    with tempfile.TemporaryDirectory() as scratch:
        start, rows, out = Path(scratch) / "start", Path(scratch) / "sft.jsonl", Path(scratch) / "out"
        write_tokenizer(start)
        write_initial_model(start)
        write_jsonl(rows, sft_rows(split()[0], MODEL_ROWS, MODEL_SEED))
        paths = [f"model_name_or_path={start}", f"dataset={rows}", f"eval_dataset={HERE}/data/sft.jsonl"]
        command = [sys.executable, "train.py", *paths, f"output_dir={out}", *SFT_ARGUMENTS]
        subprocess.run(command, cwd=HERE.parent.parent, check=True)
        for name in ("config.json", WEIGHTS):
            (directory / name).write_bytes((out / name).read_bytes())


def main() -> None:
    write_data()
    write_tokenizer()
    train_model()


if __name__ == "__main__":
    main()
