"""Train: `python train.py key=value ...` (Hydra; every key with its meaning in conf/config.yaml).

Composes the config, checks it, builds the objects of the run (dpo.build), trains (dpo.trainer), and shows what changed.
"""

import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo.build import (
    build_objective,
    build_policy,
    build_rows,
    build_template,
    model_dir,
    predict_memory,
    starts_at_its_reference,
)
from dpo.certificate import certify
from dpo.checkpoint import find_checkpoint, load_checkpoint, save_result
from dpo.config import TrainConfig, check
from dpo.evals import world_reward
from dpo.memory import amount, free_memory, give_back_at_once
from dpo.objective import Objective, to_stream
from dpo.plan import micro_batches
from dpo.preference import PreferenceObjective
from dpo.run import (
    Occupied,
    RunDir,
    check_output_dir,
    check_resume,
    collect_sweep,
    is_finished,
    with_chosen_cut,
    write_results,
)
from dpo.sft import SFTObjective
from dpo.signals import StopRequest
from dpo.tokens import Encoded, Rows, print_cuts
from dpo.trainer import Trainer
from models.command import one_line_errors, prepare_command_line
from models.generate import generate
from models.sampling import DRAWN
from models.template import ChatTemplate
from models.transformer import Transformer
from models.weights import choose_device

ConfigStore.instance().store(name="train_schema", node=TrainConfig)


FAILED_JOBS: list[str] = []
"""Jobs of a sweep that ended in an error; the others run all the same."""


STOPPED: list[int] = []
"""The exit status of a signal that came after a job's last update: no further job begins."""


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    # A group that was left out is no setting of the run's.
    pairs = (item.partition("=") for item in job.overrides.task if "=" in item and not item.startswith("~"))
    overrides = {key: value.strip("'") for key, _, value in pairs}  # quoted where config_file gave them
    if job.mode == RunMode.MULTIRUN:
        sweep_job(cfg, overrides, int(job.job.num))
        return
    with one_line_errors():
        write_results(Path(cfg.output_dir), overrides, train(cfg))


def sweep_job(cfg: DictConfig, overrides: dict[str, str], number: int) -> None:
    """One job of a sweep, in a directory of its own; a mistake ends the job and is a row of the sweep's results."""
    sweep_dir = Path(cfg.output_dir)
    cfg.output_dir = str(sweep_dir / str(number))
    cfg.tokenized_path = cfg.tokenized_path or str(sweep_dir / "tokenized")
    if not cfg.sync_ref_model:  # what moves cannot be shared
        cfg.ref_cache_dir = cfg.ref_cache_dir or str(sweep_dir / "reference")
    print(f"job {number}: {' '.join(f'{key}={value}' for key, value in overrides.items())}")
    try:
        write_results(Path(cfg.output_dir), overrides, train(cfg))
    except (ValueError, OSError) as error:
        FAILED_JOBS.append(str(number))
        print(f"error: job {number}: {error}", file=sys.stderr)
        if cfg.overwrite_output_dir or not (isinstance(error, Occupied) or is_finished(Path(cfg.output_dir))):
            write_results(Path(cfg.output_dir), overrides, {}, error=str(error))
    print(f"sweep: {collect_sweep(sweep_dir, last_job=number)}")
    if STOPPED:
        sys.exit(STOPPED[0])


def train(cfg: DictConfig) -> dict[str, float]:
    """One run, from config to saved result; returns its final metrics."""
    for warning in check(cfg):
        print(f"warning: {warning}")
    path = Path(cfg.output_dir)
    resume = str(cfg.resume_from_checkpoint or "false").lower() != "false"
    check_output_dir(path, overwrite=cfg.overwrite_output_dir, resume=resume)
    checkpoint = find_checkpoint(cfg.resume_from_checkpoint, path) if resume else None
    if checkpoint is not None:
        check_resume(checkpoint.parent, with_chosen_cut(cfg, checkpoint.parent))
    device = choose_device(cfg.device)
    template = build_template(cfg)
    rows = build_rows(cfg, template)
    print_rows(rows.train, rows.evaluation, rows.skipped)
    for warning in rows.warnings:
        print(f"warning: {warning}")
    if cfg.gradient_checkpointing and device.type == "cpu":
        give_back_at_once()
    free = free_memory(device)
    policy = build_policy(cfg, device)
    objective: Objective = SFTObjective()
    if cfg.stage == "sft":
        objective.check(chain(rows.train, rows.evaluation))
    else:
        objective, description = build_objective(cfg, policy, rows)
        print(f"reference: {description}")

    # Nothing is written, and nothing of an earlier run removed, before all that can be wrong has been looked at.
    with RunDir(path, overwrite=cfg.overwrite_output_dir, resume=resume) as run_dir:
        source_dir = model_dir(cfg.model_name_or_path)
        trainer = Trainer(cfg, policy, objective, rows.train, rows.evaluation, run_dir, source_dir)
        if cfg.do_train:
            print_memory(cfg, policy, rows, free)
            print_warnings(cfg, trainer)
            if checkpoint is None and isinstance(objective, PreferenceObjective):
                first = micro_batches(cfg, [rows.train[i] for i in trainer.plan.indices(0)])[0]
                stream = to_stream(first, device)
                same = starts_at_its_reference(cfg)
                print(certify(policy, trainer.parameters, objective, stream, first, same_weights=same))
            report = Report(cfg, policy, template, rows.evaluation or rows.train)
            if checkpoint is not None:
                trainer.resume(checkpoint)
                print(f"resumed after step {trainer.step}, from {checkpoint}")
        elif checkpoint is not None:  # looked at, not continued: nothing of the run is removed
            trainer.state = load_checkpoint(checkpoint, policy, trainer.optimizer, objective.state)
            print(f"the policy after step {trainer.step}, from {checkpoint}")
        run_dir.write_config(cfg)
        run_dir.write_skipped(rows.skipped)
        if cfg.val_size and cfg.stage != "sft":
            run_dir.write_held_out([row.example for row in rows.evaluation])
        if cfg.do_train:
            with StopRequest() as stop:
                metrics = trainer.train(stop)
            save_result(policy, path, **trainer.result)
            metrics |= report.show()
            STOPPED.extend([stop.exit_status] if stop.signal else [])  # after the last update: the run is whole
        else:
            metrics = trainer.evaluate()
    print(f"run: {path}")
    return metrics


def print_memory(cfg: DictConfig, policy: Transformer, rows: Rows, free: int | None) -> None:
    """The predicted growth of the process since before the model was loaded, of which `free` bytes were free then."""
    automatic = cfg.max_tokens_per_micro_batch == "auto"
    predicted = predict_memory(cfg, policy, rows, free)
    if automatic:
        print(f"max_tokens_per_micro_batch: {cfg.max_tokens_per_micro_batch}")
    print(f"memory: about {predicted}")
    if free is not None and predicted.peak > free:
        print(
            f"warning: {amount(free)} of memory were free; lower max_tokens_per_micro_batch, or set "
            "gradient_checkpointing=true or bf16=true"
        )


def print_warnings(cfg: DictConfig, trainer: Trainer) -> None:
    """What the length of the run makes useless."""
    total = trainer.plan.total_steps
    if trainer.warmup_steps >= total:
        print(
            f"warning: {trainer.warmup_steps} steps of warm-up in a run of {total}: learning_rate is never reached; "
            "lower warmup_steps or warmup_ratio"
        )
    if cfg.sync_ref_model and cfg.ref_model_sync_steps >= total:
        print(
            f"warning: ref_model_sync_steps={cfg.ref_model_sync_steps} in a run of {total}: the reference does not "
            "move before the last update; lower it"
        )


def print_rows(train: Sequence[Encoded], evaluation: Sequence[Encoded], skipped: Sequence[str]) -> None:
    """What the data came to: rows, tokens, and everything that was cut, dropped or skipped."""
    tokens = sum(row.tokens for row in train)
    print(f"rows: {len(train)} to train on ({tokens} tokens), {len(evaluation)} held out, {len(skipped)} skipped")
    print_cuts(chain(train, evaluation))


class Report:
    """Before and after: sampled responses to held-out prompts and, on the built-in world, the expected gold reward."""

    def __init__(self, cfg: DictConfig, policy: Transformer, template: ChatTemplate, rows: Sequence[Encoded]):
        self.policy, self.template = policy, template
        self.max_new_tokens, self.seed = cfg.max_new_tokens, cfg.seed
        # Not read where nothing is shown of them: they may be many.
        shows = cfg.num_samples or cfg.eval_dataset == "world"
        distinct = {row.example.messages[-1]["content"]: row for row in rows} if shows else {}
        # Spread over the file: neighbours are often variations of one another.
        self.shown = [list(distinct.values())[i * len(distinct) // cfg.num_samples] for i in range(cfg.num_samples)]
        # Every third: enough for two digits, and a third of the time of enumerating every grammar.
        self.world_prompts = list(distinct)[::3] if cfg.eval_dataset == "world" else []
        self.before = self._responses()
        self.reward_before = self._world_score()

    def _responses(self) -> list[str]:
        prompts = [row.prompt_ids for row in self.shown]
        if not prompts:  # or the weights would be laid out for decoding, a copy as large as the model, for nothing
            return []
        self.policy.eval()
        # Draws, because the most likely response hides what the policy does most of the time; the same seed before and
        # after, so that what differs is the policy.
        answers = generate(
            self.policy, prompts, samples=1, max_new_tokens=self.max_new_tokens, stop_ids=self.template.stop_ids,
            sampling=DRAWN, seeds=range(self.seed, self.seed + len(prompts)), batch_size=8,
        )  # fmt: skip
        return [self.template.tokenizer.decode(answer.ids).strip() for answer in answers]

    def _world_score(self) -> world_reward.WorldScore | None:
        if not self.world_prompts:
            return None
        return world_reward.score(self.policy, self.template, self.world_prompts)

    def show(self) -> dict[str, float]:
        """Print before and after; returns the gold reward's metrics."""
        for row, before, after in zip(self.shown, self.before, self._responses(), strict=True):
            print(f"\nprompt: {row.example.messages[-1]['content']}\n  before: {before}\n  after:  {after}")
        print()
        old, new = self.reward_before, self._world_score()
        if old is None or new is None:
            return {}
        print(f"expected gold reward on {len(self.world_prompts)} held-out prompts, exact by enumeration")
        print(f"  before: {old.expected_reward:.3f} (probability outside the grammar {old.mass_outside:.3f})")
        print(f"  after:  {new.expected_reward:.3f} (probability outside the grammar {new.mass_outside:.3f})")
        return {"gold_reward_before": old.expected_reward, "gold_reward": new.expected_reward}


if __name__ == "__main__":
    with one_line_errors():
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}: one process trains; several are not supported yet"
            )
    prepare_command_line(TrainConfig)
    main()
    sys.exit(2 if FAILED_JOBS else 0)
