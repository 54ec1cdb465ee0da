"""task=perplexity: how surprised the model is by text, per token and per byte.

    nats_per_token     - sum_t log pi(x_t | x_<t) / tokens
    token_perplexity   its exponential
    bits_per_byte      - sum_t log pi(x_t | x_<t) / (ln 2 * bytes as UTF-8): comparable across tokenizers
    byte_perplexity    2 to the power of that

Every token of a text is predicted once, the first from BOS (EOS where there is none). A text longer than cutoff_len is
read in windows of that many tokens, the last of which ends where the text ends. With perplexity_stride=null a window
starts after the last token that the one before predicted, as lm-eval's loglikelihood_rolling does; with a stride of s
it predicts s tokens, and all others of it are their context. Texts never share a window. Base-model form alone.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from dpo.build import build_finished_policy, model_dir
from dpo.digests import file_sha256
from dpo.evals.benchmark import of_likelihoods
from dpo.evals.choices import Choices, batches, first_ids, lone_id, score
from dpo.evals.provenance import of_code
from dpo.evals.results import Result
from dpo.evals.statistics import bootstrap
from dpo.files import rows_of, suffix_of
from dpo.turns import BadRow
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from models.weights import choose_device


def run(cfg: DictConfig) -> Result:
    path = Path(cfg.perplexity_file)
    texts = read(path)
    total, texts = len(texts), texts[: cfg.max_samples]
    tokenizer = Tokenizer(model_dir(cfg.model_name_or_path))
    ids = tokenizer.encode(texts)
    if not any(ids):
        raise ValueError(f"max_samples={cfg.max_samples}: the first texts of {path} are empty; take more")
    first = (first_ids(tokenizer) or [lone_id(tokenizer)])[-1]
    policy = build_finished_policy(cfg, choose_device(cfg.device))
    length, stride = cfg.cutoff_len, cfg.perplexity_stride or cfg.cutoff_len
    logps = text_logps(policy, ids, first, length, stride, cfg.max_tokens_per_batch)
    sizes = [(len(tokens), len(text.encode())) for tokens, text in zip(ids, texts, strict=True)]
    samples = [
        {"id": str(i), "tokens": tokens, "bytes": size, "log_likelihood": logp}
        for i, ((tokens, size), logp) in enumerate(zip(sizes, logps, strict=True))
    ]
    tokens, size = (sum(column) for column in zip(*sizes, strict=True))
    provenance = of_code(cfg) | of_likelihoods(cfg) | {
        "data_sha256": file_sha256(path), "stride": stride, "seed": cfg.seed,
        "texts": f"the first {len(texts)} of {total}" if len(texts) < total else "all",
    }  # fmt: skip
    counts = {"texts": len(texts), "tokens": tokens, "bytes": size}
    result = Result(
        "perplexity", metrics(sum(logps), tokens, size), counts=counts, provenance=provenance, samples=samples
    )
    if min(map(len, ids)) and len(ids) > 1:  # one text says nothing of how others differ
        rows_N3 = np.array([[logp, *row] for logp, row in zip(logps, sizes, strict=True)])
        for name in ("nats_per_token", "bits_per_byte"):
            rate = lambda drawn_N3, name=name: metrics(*drawn_N3.sum(0).tolist())[name]
            result.intervals[name] = bootstrap(
                rows_N3, rate, resamples=cfg.resamples, seed=cfg.seed, method="percentile"
            )
    return result


def metrics(logp: float, tokens: float, size: float) -> dict[str, float]:
    nats, bits = -logp / tokens, -logp / size / math.log(2)
    found = {"nats_per_token": nats, "token_perplexity": _power(math.e, nats), "bits_per_byte": bits}
    return {name: x for name, x in (found | {"byte_perplexity": _power(2, bits)}).items() if math.isfinite(x)}


def _power(base: float, exponent: float) -> float:
    try:
        return base**exponent
    except OverflowError:
        return math.inf


def read(path: Path) -> list[str]:
    """The texts of a file: all of a .txt as one, or the `text` of every row of a data file."""
    if not path.is_file():
        raise ValueError(f"perplexity_file={path}: no such file")
    if suffix_of(path) is None:
        try:
            texts = [path.read_bytes().decode("utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    else:
        texts = [_text(source, row) for source, row in rows_of(path)]
    if not any(texts):
        raise ValueError(f"{path}: holds no text")
    return texts


def _text(source: str, row: object) -> str:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{source}: {json.dumps(row, default=str):.60}: expected an object with "text"')
    return row["text"]


def text_logps(
    policy: Transformer, texts: Sequence[list[int]], first: int, length: int, stride: int, max_tokens: int
) -> list[float]:
    """Summed log-probability of each text, nats; `first` stands before each; 0 for an empty one."""
    owners, parts = [], []
    for i, ids in enumerate(texts):
        for context, predicted in windows(ids, first, length, stride):
            owners.append(i)
            parts.append(Choices(context, [predicted]))
    sums = [0.0] * len(texts)
    for batch in tqdm(batches(parts, max_tokens), desc="windows", disable=None, leave=False):
        for i, (logps, _) in zip(batch, score(policy, [parts[i] for i in batch]), strict=True):
            sums[owners[i]] += logps.item()
    return sums


def windows(ids: Sequence[int], first: int, length: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, the tokens that are predicted after it): every token once, at most `length` tokens read at a time.

    The last token predicted is not read, so context and predicted are length + 1 together. After the first window each
    predicts `stride` tokens with as much context as fits; the last one what is left, with more.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"perplexity_stride={stride}: must be at least 1 and at most cutoff_len={length}")
    padded = [first, *ids]
    done = 0
    while done < len(ids):
        end = min(len(ids), done + (stride if done else length))
        start = max(0, end - length)
        yield padded[start : done + 1], padded[done + 1 : end + 1]
        done = end
