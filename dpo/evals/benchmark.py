"""Benchmarks of questions with options: from a config and the questions to the log-likelihood of every option.

What truthfulqa.py and safetybench.py share. Each stream's log-likelihoods are kept in the output_dir as soon as they
are there, so that an evaluation that was killed goes on; the streams are the same as if it had not been.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from dpo.build import build_finished_policy, model_dir
from dpo.digests import text_sha256
from dpo.evals.choices import Question, batches, encode_choices, score
from dpo.evals.progress import Progress
from dpo.evals.provenance import Facts, of_code, of_policy
from models.tokenizer import Tokenizer
from models.weights import choose_device, choose_dtype

LETTERS = "ABCD"


def lettered(
    question: str, options: Sequence[str], words: Sequence[str] = ("Question: ", "Options:", "Answer: ")
) -> Question:
    """A question whose options are letters, asked after `Answer: (`."""
    return f"{lettered_text(question, options, words)}(", list(LETTERS[: len(options)])


def lettered_text(question: str, options: Sequence[str], words: Sequence[str]) -> str:
    lines = [f"({letter}) {option}\n" for letter, option in zip(LETTERS, options, strict=False)]
    return f"{words[0]}{question.strip()}\n{words[1]}\n{''.join(lines)}{words[2]}"


def measure(cfg: DictConfig, questions: Mapping[str, Question]) -> tuple[dict[str, Tensor], dict[str, int], Facts]:
    """((options,) log-probabilities of every question by its id, counts, provenance)."""
    tokenizer = Tokenizer(model_dir(cfg.model_name_or_path))
    encoded = dict(zip(questions, encode_choices(tokenizer, list(questions.values()), cfg.cutoff_len), strict=True))
    ids, asked = list(encoded), list(encoded.values())
    facts = of_likelihoods(cfg)
    # Of the questions too: max_samples or the number of shots may have changed.
    texts = (json.dumps([name, *question]) for name, question in questions.items())
    key = facts | {"questions_sha256": text_sha256(texts), "max_tokens_per_batch": cfg.max_tokens_per_batch}
    with Progress(Path(cfg.output_dir) / "log_likelihoods.jsonl", key) as progress:
        streams = batches(asked, cfg.max_tokens_per_batch)
        missing = [stream for stream in streams if any(ids[i] not in progress.done for i in stream)]
        if missing:
            policy = build_finished_policy(cfg, choose_device(cfg.device))
        left = sum(map(len, missing))
        with tqdm(total=len(ids), initial=len(ids) - left, desc="questions", disable=None, leave=False) as bar:
            for stream in missing:
                scores = zip(stream, score(policy, [asked[i] for i in stream]), strict=True)
                progress.add(*({"id": ids[i], "logps": logps.tolist()} for i, (logps, _) in scores))
                bar.update(len(stream))
        logps = {name: torch.tensor(progress.done[name]["logps"], dtype=torch.float64) for name in ids}
    cut = sum(question.dropped > 0 for question in asked)
    if cut:
        print(f"cutoff_len={cfg.cutoff_len} has cut the start of {cut} of {len(ids)} contexts")
    return logps, {"truncated": cut}, of_code(cfg) | facts


def of_likelihoods(cfg: DictConfig) -> Facts:
    """What a log-likelihood hangs on, beside code and data."""
    return of_policy(cfg) | {
        "dtype": str(choose_dtype(cfg.bf16, cfg.fp16)).removeprefix("torch."),
        "form": "base: plain text, no chat template",
        "cutoff_len": cfg.cutoff_len,
    }
