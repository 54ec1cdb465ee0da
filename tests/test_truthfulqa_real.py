"""TruthfulQA on SmolLM2: MC1 and MC2 are what lm-eval's official tasks give, question by question, in float32.

lm-eval's own model reads each answer in a row of its own: seconds per question. So it is asked two, and ten through
dpo.evals.lm_eval_model, which has lm-eval make the prompts, part them and count. DPO_QUESTIONS=100 is the long form.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from dpo.evals.choices import encode_choices, option_logps
from dpo.evals.truthfulqa import Item, questions, read, sample
from models.tokenizer import Tokenizer
from models.weights import load_model

pytestmark = pytest.mark.real
COUNTS = {through: int(os.environ.get("DPO_QUESTIONS", n)) for through, n in (("policy", "10"), ("hugging face", "2"))}


def official_tasks(items: list[Item], directory: Path) -> None:
    """lm-eval's truthfulqa_mc1 and truthfulqa_mc2, of local data."""
    import lm_eval

    official = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    with open(directory / "rows.jsonl", "w") as file:
        for item in items:
            targets = {
                f"{name}_targets": {"choices": list(answers), "labels": list(answers.values())}
                for name, answers in (("mc1", item.mc1), ("mc2", item.mc2))
            }
            file.write(json.dumps({"question": item.question, **targets}) + "\n")
    for name in ("mc1", "mc2"):
        (directory / f"{name}.yaml").write_text(
            f"include: {official / f'truthfulqa_{name}.yaml'}\ntask: local_{name}\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs: {{data_files: {{validation: {directory / 'rows.jsonl'}}}}}\n"
        )


@pytest.mark.parametrize("through", COUNTS)
def test_mc1_and_mc2_equal_lm_evals_question_by_question(real, smollm2, tmp_path, through):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from dpo.evals.lm_eval_model import PolicyLM

    policy = load_model(smollm2, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = Tokenizer(smollm2)
    if through == "policy":
        model = PolicyLM(policy, tokenizer, None, name="x", max_length=8192, max_tokens=4096, batch_size=1, seed=0)
    else:
        model = HFLM(pretrained=str(smollm2), dtype="float32", device="cpu", batch_size=4)
    items = read(real / "benchmarks")[: COUNTS[through]]
    official_tasks(items, tmp_path)
    manager = TaskManager(include_path=str(tmp_path))
    theirs = lm_eval.simple_evaluate(model, tasks=["local_mc1", "local_mc2"], task_manager=manager, bootstrap_iters=0)

    asked = questions(items)
    encoded = encode_choices(tokenizer, list(asked.values()), 2048)
    found = option_logps(policy, [q.context_ids for q in encoded], [q.option_ids for q in encoded], 4096)
    logps = dict(zip(asked, found, strict=True))
    furthest = 0.0
    for name in ("mc1", "mc2"):
        rows = sorted(theirs["samples"][f"local_{name}"], key=lambda row: row["doc_id"])
        for item, row in zip(items, rows, strict=True):
            ours = sample(item, logps)
            expected = [float(response[0][0]) for response in row["resps"]]
            differences = (
                abs(ours["log_likelihoods"][a] - b) for a, b in zip(getattr(item, name), expected, strict=True)
            )
            furthest = max(furthest, *differences)
            assert ours[name] == pytest.approx(row["acc"], abs=1e-4)
    assert furthest < 5e-4  # nats, of sums of about -40 in float32
    scores = {name: float(theirs["results"][f"local_{name}"]["acc,none"]) for name in ("mc1", "mc2")}
    print(f"{through}, {len(items)} questions: {scores}, furthest log-likelihood {furthest:.1e} nats")
