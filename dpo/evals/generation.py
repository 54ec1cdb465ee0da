"""task=generation: are the answers still healthy? Long, cut off, repetitive or all alike ones show a policy that broke.

mean_tokens, p10, p50, p90_tokens     of an answer, its end not included
ended                                 share of answers that ended by themselves, before max_new_tokens
rep_4                                 share of an answer's 4-grams that it has said before, of tokens; mean over answers
distinct_1, distinct_2                distinct tokens, and pairs of neighbours, by all of them, over all answers
"""

import numpy as np
from omegaconf import DictConfig

from dpo.build import build_finished_policy, build_template
from dpo.evals import provenance
from dpo.evals.answers import answer_prompts
from dpo.evals.prompts import prompts_of
from dpo.evals.results import Result, finite
from dpo.evals.statistics import bootstrap, wilson
from dpo.samples import distinct, mean, repeated
from models.sampling import Sampling
from models.weights import choose_device


def run(cfg: DictConfig) -> Result:
    template = build_template(cfg)
    prompts = prompts_of(cfg)
    sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p)
    policy = build_finished_policy(cfg, choose_device(cfg.device))
    facts = provenance.of_policy(cfg) | provenance.of_answers(template, sampling, cfg.max_new_tokens, cfg.seed)
    answers = answer_prompts(cfg, policy, template, prompts, "answers", facts, sampling)
    texts = [answer.ids for answer in answers]
    lengths = list(map(len, texts))
    ended = [answer.finish_reason == "stop" for answer in answers]
    metrics = {
        "mean_tokens": mean(lengths),
        **{f"p{q}_tokens": float(np.percentile(lengths, q)) for q in (10, 50, 90)},
        "ended": mean(ended),
        "rep_4": mean([repeated(ids, 4) for ids in texts]),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }
    intervals = {
        "mean_tokens": bootstrap(lengths, resamples=cfg.resamples, seed=cfg.seed, method="bca"),
        "ended": wilson(sum(ended), len(ended)),
    }
    samples = [
        {
            "id": prompt.id, "source": prompt.source, "prompt": prompt.text, "answers": {"answer": answer.text},
            "tokens": answer.tokens, "ended": end, "rep_4": repeated(answer.ids, 4),
        }
        for prompt, answer, end in zip(prompts, answers, ended, strict=True)
    ]  # fmt: skip
    counts = {"prompts": len(prompts)}
    return Result(
        "generation", finite(metrics), intervals, counts, provenance.of_data(cfg, prompts) | facts, {}, samples
    )
