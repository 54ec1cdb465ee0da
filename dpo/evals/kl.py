"""task=kl: how far the policy has gone from the reference, KL(policy || reference) in nats per answer.

The policy's own samples at temperature 1, whatever `temperature` says, and at each of their positions the exact KL of
the next token (dpo.kl). An answer counts up to its end, or as far as max_new_tokens.
"""

from omegaconf import DictConfig

from dpo.build import build_finished_policy, build_live_reference, build_template, check_reference
from dpo.evals import provenance
from dpo.evals.answers import answer_prompts
from dpo.evals.prompts import prompts_of
from dpo.evals.results import Result
from dpo.evals.statistics import bootstrap
from dpo.kl import kl_and_entropy_of_texts
from dpo.samples import mean, standard_error, with_end
from models.generate import Completion
from models.sampling import DRAWN
from models.weights import choose_device


def run(cfg: DictConfig) -> Result:
    check_reference(cfg)
    template = build_template(cfg)
    prompts = prompts_of(cfg)
    policy = build_finished_policy(cfg, choose_device(cfg.device))
    reference, description = build_live_reference(cfg, policy)
    print(f"reference: {description}")
    facts = provenance.of_policy(cfg) | provenance.of_answers(template, DRAWN, cfg.max_new_tokens, cfg.seed)
    answers = answer_prompts(cfg, policy, template, prompts, "answers", facts, DRAWN)
    completions = [Completion(answer.ids, answer.finish_reason) for answer in answers]
    texts = [with_end(one, template.stop_ids) for one in completions]
    asked = [template.encode(prompt.messages, [])[0] for prompt in prompts]
    kl, entropy = kl_and_entropy_of_texts(policy, reference, asked, texts, cfg.per_device_eval_batch_size)
    tokens = sum(map(len, texts))
    metrics = {"kl": mean(kl), "kl_se": standard_error(kl), "kl_per_token": sum(kl) / tokens}
    metrics["entropy_per_token"] = sum(entropy) / tokens
    samples = [
        {
            "id": prompt.id, "source": prompt.source, "prompt": prompt.text, "answers": {"answer": answer.text},
            "tokens": len(ids), "kl": one,
        }
        for prompt, answer, ids, one in zip(prompts, answers, texts, kl, strict=True)
    ]  # fmt: skip
    result = Result("kl", metrics, samples=samples)
    result.intervals["kl"] = bootstrap(kl, resamples=cfg.resamples, seed=cfg.seed, method="bca")
    result.counts = {"prompts": len(prompts), "cut": sum(answer.finish_reason == "length" for answer in answers)}
    result.provenance = provenance.of_data(cfg, prompts) | provenance.of_reference(cfg) | facts
    return result
