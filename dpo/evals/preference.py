"""task=preference: the guide's metrics of a policy on held-out pairs, by the code that training uses."""

from omegaconf import DictConfig

from dpo.build import build_eval_rows, build_finished_policy, build_finished_reference, build_template, new_objective
from dpo.evals.results import Result
from dpo.objective import evaluate
from dpo.tokens import describe_cuts
from models.weights import choose_device


def run(cfg: DictConfig) -> Result:
    metrics = preference(cfg)
    runtime = metrics.pop("eval_runtime")
    return Result("preference", metrics, time={"eval_runtime": runtime})


def preference(cfg: DictConfig) -> dict[str, float]:
    """The guide's metrics of the policy against the reference on eval_dataset."""
    device = choose_device(cfg.device)
    template = build_template(cfg)
    rows = build_eval_rows(cfg, template)
    print("\n".join([f"rows: {len(rows.evaluation)}, {len(rows.skipped)} skipped", *describe_cuts(rows.evaluation)]))
    objective, description = new_objective(cfg), "none"
    objective.check(rows.evaluation)
    policy = build_finished_policy(cfg, device)
    if objective.loss.needs_reference:
        objective.reference, description = build_finished_reference(cfg, policy, rows.evaluation)
    print(f"reference: {description}")
    return evaluate(policy, objective, rows.evaluation, cfg.per_device_eval_batch_size)
