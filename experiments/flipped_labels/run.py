"""How well the data doctor finds flipped labels where they are known: AUC against that of the gold reward itself.

    python -m experiments.flipped_labels.run [key=value ...]

A share of the built-in world's training pairs has chosen and rejected exchanged. The doctor ranks all pairs, seeing the
texts alone, and AUC says how well: the probability that an exchanged pair has a lower margin than another. Labels were
noisy before, so the gold reward, which knows everything but the noise, does not reach 1 either; it is the ceiling.
"""

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from dpo.data import read_examples
from dpo.doctor.flips import held_out_margins
from dpo.doctor.with_model import encode_some, measure
from dpo.formats import Example
from experiments.world import world
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.weights import WORLD, load_model

# The doctor's defaults, and of this experiment: the share exchanged, the seed of which, and how many pairs.
SETTINGS = {
    "model_name_or_path": "world", "cutoff_len": 2048, "per_device_eval_batch_size": 64, "seed": 42,
    "flip_folds": 5, "flip_rounds": 2, "flip_epochs": 2, "flip_learning_rate": 3e-4, "flip_beta": 3.0,
    "flip_batch_size": 8, "flip_lora_rank": 16, "share": 0.1, "flip_seed": 0, "max_samples": None,
}  # fmt: skip


def auc(scores: Sequence[float] | np.ndarray, positive: Sequence[bool] | np.ndarray) -> float:
    """The probability that a positive has a higher score than a negative; a tie counts half (Mann and Whitney's U)."""
    scores, positive = np.asarray(scores), np.asarray(positive, bool)
    negatives = np.sort(scores[~positive])
    below = (negatives.searchsorted(scores[positive], side) for side in ("left", "right"))
    return float(sum(below).mean() / 2 / len(negatives))


def exchange(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], np.ndarray]:
    """(examples, (N,) which of them): a share of the pairs with chosen and rejected exchanged."""
    flipped = np.zeros(len(examples), bool)
    flipped[random.Random(seed).sample(range(len(examples)), round(share * len(examples)))] = True
    return [
        replace(example, responses=example.responses[::-1]) if flip else example
        for example, flip in zip(examples, flipped, strict=True)
    ], flipped


def gold_margin(example: Example) -> float:
    chosen, rejected = (world.gold_reward(example.messages[-1]["content"], text) for text in example.responses)
    return chosen - rejected


def margins(cfg: DictConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(the doctor's margins, the reference's, the gold reward's, which labels were flipped), each (N,)."""
    path = WORLD / "data" / "train.jsonl"
    examples, _ = read_examples(path, stage="dpo", on_bad_row="stop", max_samples=cfg.max_samples)
    examples, flipped = exchange(examples, cfg.share, cfg.flip_seed)
    _, rows = encode_some(examples, ChatTemplate("auto", Tokenizer(WORLD / "model"), None), cfg.cutoff_len)
    model = load_model(WORLD / "model", dtype=torch.float32, device=torch.device("cpu"))
    measured = measure(model, rows, cfg.per_device_eval_batch_size)
    margin = held_out_margins(model, rows, measured.token_logps, cfg)
    return margin, measured.margin, np.array([gold_margin(example) for example in examples]), flipped


def main(arguments: Sequence[str]) -> None:
    cfg = OmegaConf.create(SETTINGS | dict(OmegaConf.from_dotlist(list(arguments))))
    start = time.perf_counter()
    margin, reference, gold, flipped = margins(cfg)
    seconds = time.perf_counter() - start
    lowest = np.argsort(margin)[: flipped.sum()]
    print(
        f"share {cfg.share:g}, seed {cfg.flip_seed}: AUC {auc(-margin, flipped):.3f}, of the gold reward "
        f"{auc(-gold, flipped):.3f}, of the reference's margin {auc(-reference, flipped):.3f}\n"
        f"AUC for labels against the gold reward, exchanged or not: {auc(-margin, gold < 0):.3f}\n"
        f"of the {len(lowest)} lowest margins {flipped[lowest].mean():.1%} are exchanged pairs, and "
        f"{(gold[lowest] < 0).mean():.1%} go against the gold reward; {seconds:.0f} s"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
