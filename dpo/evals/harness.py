"""lm-evaluation-harness on a policy: `python -m dpo.evals.harness tasks=... model_name_or_path=... key=value ...`
(keys: conf/harness.yaml; needs the extra `lm-eval`). Prints lm_eval's own table.

Most of lm_eval's tasks download their data. One whose YAML says `dataset_path: json` with files of yours does not;
include_path names a directory of such files.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from dpo.build import build_finished_policy, model_dir
from dpo.config import AT_LEAST_1, NOT_NEGATIVE, as_list, check_values
from models.command import CONF, one_line_errors, prepare_command_line, refuse_unset
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.weights import choose_device


@dataclass
class HarnessConfig:
    """Every key of dpo.evals.harness; see conf/harness.yaml for what each means."""

    tasks: Any = MISSING
    include_path: str | None = MISSING
    num_fewshot: int | None = MISSING
    limit: int | None = MISSING
    model_name_or_path: str = MISSING
    adapter_name_or_path: str | None = MISSING
    apply_chat_template: bool = MISSING
    template: str = MISSING
    date_string: str | None = MISSING
    max_length: int | None = MISSING
    max_tokens_per_batch: int = MISSING
    per_device_eval_batch_size: int = MISSING
    bf16: bool = MISSING
    fp16: bool = MISSING
    device: str = MISSING
    seed: int = MISSING
    output_file: str | None = MISSING


RULES = {"num_fewshot": NOT_NEGATIVE, "limit": AT_LEAST_1, "max_length": AT_LEAST_1}
ConfigStore.instance().store(name="harness_schema", node=HarnessConfig)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="harness")
def main(cfg: DictConfig) -> None:
    with one_line_errors():
        evaluate(cfg)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """lm_eval's results, printed as its table."""
    refuse_unset(cfg, model_name_or_path=" (or model=NAME)")
    check_values(cfg, RULES)
    if cfg.bf16 and cfg.fp16:
        raise ValueError("bf16=True and fp16=True: choose one; neither means float32")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from dpo.evals.lm_eval_model import PolicyLM
    except ImportError as error:
        raise ValueError(f'{error}: dpo.evals.harness needs lm_eval; pip install -e ".[lm-eval]"') from None
    tasks = as_list(cfg.tasks)
    manager = TaskManager(include_path=cfg.include_path)
    if unknown := sorted({*tasks} - {*manager.all_tasks}):
        raise ValueError(
            f"tasks={unknown[0]}: lm_eval has no such task; `lm-eval ls tasks` lists them, include_path=DIR adds yours"
        )
    tokenizer = Tokenizer(model_dir(cfg.model_name_or_path))
    template = ChatTemplate(cfg.template, tokenizer, cfg.date_string) if cfg.apply_chat_template else None
    policy = build_finished_policy(cfg, choose_device(cfg.device))
    model = PolicyLM(
        policy, tokenizer, template, name=cfg.model_name_or_path,
        max_length=cfg.max_length or policy.config.max_position_embeddings, max_tokens=cfg.max_tokens_per_batch,
        batch_size=cfg.per_device_eval_batch_size, seed=cfg.seed,
    )  # fmt: skip
    results: dict[str, Any] = simple_evaluate(
        model, tasks=tasks, num_fewshot=cfg.num_fewshot, limit=cfg.limit, task_manager=manager, log_samples=False,
        apply_chat_template=cfg.apply_chat_template, fewshot_random_seed=cfg.seed,
    )  # fmt: skip
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if cfg.output_file:
        kept = {key: results[key] for key in ("results", "versions", "n-samples", "n-shot") if key in results}
        Path(cfg.output_file).write_text(json.dumps(kept, indent=2, default=str) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    prepare_command_line(HarnessConfig)
    main()
