"""Answers: what a model says to many conversations, in batches, each with its seed; none is asked for twice."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from dpo.evals.progress import Progress
from dpo.evals.prompts import Prompt, prompts_sha256
from models.generate import generate
from models.packed import packed
from models.sampling import Sampling
from models.template import ChatTemplate, Message
from models.transformer import Transformer


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str
    """stop or length."""
    ids: list[int]
    """without the token that ended it."""

    @property
    def tokens(self) -> int:
        return len(self.ids)


def answer_all(
    policy: Transformer, template: ChatTemplate, conversations: Sequence[Sequence[Message]], *, seeds: Sequence[int],
    sampling: Sampling | Sequence[Sampling], max_new_tokens: int, batch_size: int, progress: Progress,
    ids: Sequence[str],
) -> list[Answer]:  # fmt: skip
    """An answer to each conversation, in their order; one that `progress` holds under its id is not drawn again.

    sampling: of all, or one for each. A batch has one temperature, and is the same whatever is done already.
    """
    samplings = [sampling] * len(ids) if isinstance(sampling, Sampling) else list(sampling)
    prompts = [template.encode(messages, [])[0] for messages in conversations]
    positions = policy.config.max_position_embeddings
    for id, prompt in zip(ids, prompts, strict=True):
        if len(prompt) >= positions:
            raise ValueError(f"{id}: its prompt takes {len(prompt)} tokens, the model sees {positions}; leave it out, "
                             "stop before it with max_samples, or name a model that sees more")  # fmt: skip
    # By length: those of a batch then share their padding.
    order = sorted(range(len(ids)), key=lambda i: len(prompts[i]))
    done = sum(id in progress.done for id in ids)
    with packed(policy), tqdm(total=len(ids), initial=done, desc=progress.path.stem, unit="") as bar:
        for one in dict.fromkeys(samplings):
            alike = [i for i in order if samplings[i] == one]
            for first in range(0, len(alike), batch_size):
                batch = [i for i in alike[first : first + batch_size] if ids[i] not in progress.done]
                if not batch:
                    continue
                completions = generate(
                    policy, [prompts[i] for i in batch], samples=1, max_new_tokens=max_new_tokens,
                    stop_ids=template.stop_ids, sampling=one, seeds=[seeds[i] for i in batch], batch_size=batch_size,
                )  # fmt: skip
                answers = [
                    Answer(template.tokenizer.decode(done.ids).strip(), done.finish_reason, done.ids)
                    for done in completions
                ]
                progress.add(*({"id": ids[i], **asdict(a)} for i, a in zip(batch, answers, strict=True)))
                bar.update(len(batch))
    rows = (progress.done[id] for id in ids)
    return [Answer(row["text"], row["finish_reason"], row["ids"]) for row in rows]


def answer_prompts(
    cfg: DictConfig, model: Transformer, template: ChatTemplate, prompts: Sequence[Prompt], name: str,
    facts: Mapping[str, Any], sampling: Sampling,
) -> list[Answer]:  # fmt: skip
    """A model's answers to prompts, with the config's settings; kept in output_dir/NAME.jsonl.

    facts: what else the answers depend on, beside the prompts.
    """
    # A model that was moved is the same one.
    key = {name: value for name, value in facts.items() if not name.endswith(("_path", "ref_model", "_adapters"))}
    key |= {"data_sha256": prompts_sha256(prompts), "dtype": str(model.dtype)}
    with Progress(Path(cfg.output_dir) / f"{name}.jsonl", key) as progress:
        return answer_all(
            model, template, [prompt.messages for prompt in prompts],
            seeds=range(cfg.seed, cfg.seed + len(prompts)), sampling=sampling, max_new_tokens=cfg.max_new_tokens,
            batch_size=cfg.per_device_eval_batch_size, progress=progress, ids=[prompt.id for prompt in prompts],
        )  # fmt: skip
