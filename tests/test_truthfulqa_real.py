"""TruthfulQA on SmolLM2: MC1 and MC2 are what lm-eval gives, question by question; it reads every answer by itself."""

import json
import os
from pathlib import Path

import pytest
import torch

from dpo.evals.choices import batches, encode_choices, score
from dpo.evals.truthfulqa import questions, read, sample
from models.tokenizer import Tokenizer
from models.weights import load_model

pytestmark = pytest.mark.real
# A minute for 6; DPO_QUESTIONS=100 takes lm-eval about ten.
COUNT = int(os.environ.get("DPO_QUESTIONS", "6"))


def test_mc1_and_mc2_equal_lm_evals_question_by_question(real, smollm2, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    items = read(real / "benchmarks")[:COUNT]
    with open(tmp_path / "rows.jsonl", "w") as file:
        for item in items:
            targets = {
                f"{name}_targets": {"choices": list(answers), "labels": list(answers.values())}
                for name, answers in (("mc1", item.mc1), ("mc2", item.mc2))
            }
            file.write(json.dumps({"question": item.question, **targets}) + "\n")
    official = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    for name in ("mc1", "mc2"):  # the official task, of local data
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {official / f'truthfulqa_{name}.yaml'}\ntask: local_{name}\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs: {{data_files: {{validation: {tmp_path / 'rows.jsonl'}}}}}\n"
        )
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=str(smollm2), dtype="float32", device="cpu", batch_size=4), tasks=["local_mc1", "local_mc2"],
        task_manager=TaskManager(include_path=str(tmp_path)), bootstrap_iters=0,
    )  # fmt: skip

    asked = questions(items)
    encoded = encode_choices(Tokenizer(smollm2), list(asked.values()), 2048)
    policy = load_model(smollm2, dtype=torch.float32, device=torch.device("cpu"))
    logps = {}
    for batch in batches(encoded, 4096):
        scores = score(policy, [encoded[i] for i in batch])
        logps |= {list(asked)[i]: values for i, (values, _) in zip(batch, scores, strict=True)}
    furthest = 0.0
    for name in ("mc1", "mc2"):
        rows = sorted(theirs["samples"][f"local_{name}"], key=lambda row: row["doc_id"])
        for item, row in zip(items, rows, strict=True):
            ours = sample(item, logps)
            log_likelihoods = [ours["log_likelihoods"][answer] for answer in getattr(item, name)]
            expected = [float(response[0][0]) for response in row["resps"]]
            furthest = max(furthest, *(abs(a - b) for a, b in zip(log_likelihoods, expected, strict=True)))
            assert ours[name] == pytest.approx(row["acc"], abs=1e-4)
    assert furthest < 5e-4  # nats, of sums of about -40 in float32
    print(
        f"furthest log-likelihood: {furthest:.1e} nats;",
        {name: theirs["results"][f"local_{name}"]["acc,none"] for name in ("mc1", "mc2")},
    )
