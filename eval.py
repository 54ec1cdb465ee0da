"""Evaluate: `python eval.py task=preference run=RUN_DIR eval_dataset=FILE` (every key in conf/eval.yaml).

task=preference gives the guide's metrics of a policy on held-out pairs, by the code that training uses.
"""

import json
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from dpo.build import build_eval_rows, build_finished_policy, build_finished_reference, build_template, new_objective
from dpo.config import EvalConfig, check
from dpo.objective import evaluate
from dpo.tokens import describe_cuts
from models.command import one_line_errors, prepare_command_line
from models.weights import choose_device

ConfigStore.instance().store(name="eval_schema", node=EvalConfig)


@hydra.main(version_base="1.3", config_path="conf", config_name="eval")
def main(cfg: DictConfig) -> None:
    with one_line_errors():
        check(cfg)
        metrics = preference(cfg)
        for name, value in metrics.items():
            print(f"{name:28s}{value:10.4f}")
        if cfg.output_file:
            Path(cfg.output_file).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


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


if __name__ == "__main__":
    prepare_command_line(EvalConfig)
    main()
