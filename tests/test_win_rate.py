"""The win rate counts what the judge said, both ways round, and believes no more than it was told."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import dpo.evals.answers
import dpo.evals.win_rate
import eval  # registers its schema
from dpo.build import build_finished_policy
from dpo.evals.answers import Answer
from dpo.evals.progress import Progress
from dpo.evals.prompts import Prompt
from dpo.evals.win_rate import count, judge_pairs
from dpo.judge.human import HumanJudge
from dpo.judge.verdict import Judged, Order, Verdict
from models.lora import inject_lora, lora_layers, save_adapter
from models.weights import WORLD, load_model

ROOT = Path(__file__).parent.parent


class Scripted:
    """A judge that says of each pair what a table says, and remembers what it was asked."""

    name, prompt_sha256 = "scripted", "abc"

    def __init__(self, verdicts: dict[str, Verdict], outcome: str = "ok"):
        self.verdicts, self.outcome, self.asked = verdicts, outcome, []

    def __call__(self, pairs, on_done=lambda *_: None):
        self.asked += [pair.id for pair in pairs]
        results = []
        for pair in pairs:
            verdict = self.verdicts[pair.id]
            orders = tuple(Order(verdict, 0.9, "A", 5, False, 1, self.outcome) for _ in range(2))
            results.append(Judged(verdict, 0.9, orders, ""))
            on_done(pair, results[-1])
        return results


def prompt(id: str, text: str = "Why?", source: str = "s") -> Prompt:
    return Prompt(id, ({"role": "user", "content": text},), source)


def answer(text: str) -> Answer:
    return Answer(text, "stop", [1] * len(text))


def counted(outcomes: str, *, max_invalid: float = 1.0, lengths: tuple[int, int] = (3, 4)):
    """w, t, l and i: what becomes of each pair; `e` is a pair of equal answers."""
    verdicts = dict(
        zip("wtlie", [Verdict.FIRST, Verdict.TIE, Verdict.SECOND, Verdict.INVALID, Verdict.TIE], strict=True)
    )
    prompts = [prompt(str(i)) for i in range(len(outcomes))]
    before = [answer("b" * lengths[0]) for _ in outcomes]
    after = [answer("b" * lengths[0] if one == "e" else "a" * lengths[1]) for one in outcomes]
    rows = [{"verdict": verdicts[one].name, "p": 0.5, "orders": [], "reason": ""} for one in outcomes]
    return count(prompts, before, after, rows, resamples=100, seed=0, max_invalid=max_invalid)


# --- counting ---


def test_the_rate_by_hand():
    """(3 + 1 / 2) / 5: a tie is half a win, and a pair without a verdict is none."""
    result = counted("wwwtli")
    assert result.metrics["win_rate"] == pytest.approx(0.7)
    kinds = ("prompts", "wins", "ties", "losses", "invalid", "equal_answers")
    assert [result.counts[kind] for kind in kinds] == [6, 3, 1, 1, 1, 0]
    assert result.metrics["mcnemar_p"] == pytest.approx(0.625)  # (1 + 4) / 2^3
    assert not result.error


def test_without_ties_the_interval_is_wilsons_and_with_them_it_is_resampled():
    def methods(result) -> dict:
        return {row["method"]: (row["from"], row["to"]) for row in result.tables["95% intervals of win_rate"]}

    result = counted("wwwl")
    assert result.intervals["win_rate"] == methods(result)["Wilson"]
    result = counted("wwwtttl")
    assert result.intervals["win_rate"] == methods(result)["bootstrap, BCa"]


@pytest.mark.parametrize("outcomes", ["w" * 9, "t" * 9])
def test_results_that_are_all_alike_are_no_certainty(outcomes):
    low, high = counted(outcomes).intervals["win_rate"]
    assert high - low > 0.2 and "length_adjusted" not in counted(outcomes).intervals


@pytest.mark.parametrize(("outcomes", "fails"), [("w" * 19 + "i", False), ("w" * 18 + "ii", True), ("iii", True)])
def test_more_than_max_invalid_fails_with_its_numbers_still_there(outcomes, fails):
    result = counted(outcomes, max_invalid=0.05)
    said = f"{outcomes.count('i')} of {len(outcomes)} pairs have no verdict, more than max_invalid=0.05"
    assert result.error.startswith(said) if fails else not result.error
    assert len(result.samples) == len(outcomes) and ("win_rate" in result.metrics) == ("w" in outcomes)


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [("w" * 70 + "l" * 30, "70.0% is within"), ("wl" * 5, "50.0% is below"), ("w" * 200, "100.0% is above")],
)
def test_where_the_rate_lies_in_the_guides_60_to_80_percent(outcomes, said):
    lines = {row["question"]: row["answer"] for row in counted(outcomes).tables["what it says"]}
    assert lines["the guide expects 60% to 80%"].startswith(said)


def test_the_reading_says_how_many_prompts_it_would_take():
    result = counted("wwwll" * 20)
    assert result.counts["prompts_needed"] == 194
    assert {"question": "prompts to tell this rate from 50%, at 80% power", "answer": "194; there were 100"} in (
        result.tables["what it says"]
    )
    assert "prompts_needed" not in counted("wl").counts


def test_slices_add_up_and_name_source_and_lengths():
    prompts = [prompt("1", "a", "x"), prompt("2", "bb", "x"), prompt("3", "ccc", "y")]
    after, before = [answer("long"), answer("s"), answer("same")], [answer("l"), answer("short"), answer("like")]
    rows = [{"verdict": v, "p": None, "orders": [], "reason": ""} for v in ("FIRST", "SECOND", "TIE")]
    result = count(prompts, before, after, rows, resamples=100, seed=0, max_invalid=0)
    table = {row["slice"]: row for row in result.tables["by slice"]}
    assert table["source x"]["n"] == 2 and table["source y"]["ties"] == 1
    assert table["after is longer"]["win_rate"] == 1 and table["after is shorter"]["win_rate"] == 0
    assert table["equally long"]["win_rate"] == 0.5
    assert [table[f"prompts by length, part {i}: {i} to {i} characters"]["n"] for i in (1, 2, 3)] == [1, 1, 1]
    assert "mean_p_after" not in result.metrics


def test_a_judge_that_says_nothing_both_times_is_not_consistent():
    """Of three pairs one without a verdict; of the others one is the same in both orders."""
    said = [("INVALID", "INVALID", "INVALID"), ("FIRST", "FIRST", "FIRST"), ("TIE", "FIRST", "SECOND")]
    rows = [
        {"verdict": verdict, "p": None, "orders": [{"verdict": one, "raw": ""} for one in orders], "reason": ""}
        for verdict, *orders in said
    ]
    prompts, answers = [prompt(str(i)) for i in range(3)], [answer("a"), answer("b"), answer("c")]
    result = count(prompts, answers, answers[::-1], rows, resamples=100, seed=0, max_invalid=1)
    assert result.metrics["order_consistency"] == 0.5


# --- judging ---


def test_equal_answers_are_a_tie_that_nobody_is_asked_about(tmp_path):
    judge = Scripted({"2": Verdict.SECOND})
    rows = judge_pairs(
        judge, [prompt("1"), prompt("2")], [answer("x"), answer("y")], [answer("x"), answer("z")], tmp_path / "v.jsonl"
    )
    assert judge.asked == ["2"] and [row["verdict"] for row in rows] == ["TIE", "SECOND"]
    assert [order["raw"] for order in rows[1]["orders"]] == ["A", "A"]


def test_a_verdict_is_asked_for_once_and_a_failure_again(tmp_path):
    def judged(outcome: str) -> list[str]:
        judge = Scripted({"1": Verdict.INVALID}, outcome)
        (row,) = judge_pairs(judge, [prompt("1")], [answer("x")], [answer("y")], tmp_path / "v.jsonl")
        assert row["verdict"] == "INVALID"
        return judge.asked

    assert judged("http_error") == ["1"] and judged("malformed") == ["1"] and judged("ok") == ["1"]
    assert judged("ok") == []


def test_labels_that_people_add_or_mend_later_count(tmp_path):
    labels = tmp_path / "labels.jsonl"
    for verdict in (None, "first", "second"):
        labels.write_text(json.dumps({"id": "1", "verdict": verdict}) if verdict else "")
        (row,) = judge_pairs(HumanJudge(labels), [prompt("1")], [answer("x")], [answer("y")], tmp_path / "v.jsonl")
        assert row["verdict"] == (verdict or "invalid").upper()


def test_other_answers_are_other_verdicts(tmp_path):
    judge = Scripted({"1": Verdict.FIRST})
    judge_pairs(judge, [prompt("1")], [answer("x")], [answer("y")], tmp_path / "v.jsonl")
    with pytest.raises(ValueError, match="holds rows of answers_sha256="):
        judge_pairs(judge, [prompt("1")], [answer("x")], [answer("other")], tmp_path / "v.jsonl")


# --- the command ---


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """One that changes many answers, at random."""
    directory = tmp_path_factory.mktemp("adapter")
    policy = load_model(WORLD / "model", dtype=torch.float32, device=torch.device("cpu"))
    inject_lora(policy, rank=4, alpha=8, use_rslora=False, dropout=0, target="all", seed=0)
    torch.manual_seed(0)
    for layer in lora_layers(policy).values():
        torch.nn.init.normal_(layer.lora_B, std=0.5)
    save_adapter(policy, directory, base_model="world", dropout=0.0)
    return directory


def config(adapter: Path, output: Path, *overrides: str):
    given = ["task=win_rate", "model_name_or_path=world", "eval_dataset=world", "max_samples=4"]
    given += ["judge=model", "judge_model=world", "judge_cache=null"]
    given += [f"adapter_name_or_path={adapter}", f"output_dir={output}", "max_new_tokens=9", "device=cpu"]
    given += ["per_device_eval_batch_size=2"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("eval", [*given, *overrides])


def found(directory: Path) -> dict[str, bytes]:
    """What was written, without the times."""
    results = json.loads((directory / "results.json").read_text())
    assert set(results.pop("time")) == {"started", "seconds"}
    report = [line for line in (directory / "report.html").read_text().split("\n") if "<td>s" not in line]
    names = ("samples.jsonl", "before.jsonl", "after.jsonl", "verdicts.jsonl")
    files = {name: (directory / name).read_bytes() for name in names}
    return files | {"results": json.dumps(results).encode(), "report": "\n".join(report).encode()}


@pytest.fixture(scope="module")
def undisturbed(adapter, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    eval.evaluate(config(adapter, output), {})
    return output


def test_two_evaluations_at_temperature_0_write_the_same_bytes_but_for_the_times(adapter, undisturbed, tmp_path):
    eval.evaluate(config(adapter, tmp_path / "out"), {})
    assert found(tmp_path / "out") == found(undisturbed)
    changed = [json.loads(line)["answers"] for line in (undisturbed / "samples.jsonl").read_text().splitlines()]
    assert any(answers["before"] != answers["after"] for answers in changed)


def test_before_is_the_base_model_and_after_the_policy(adapter, undisturbed):
    """As models of their own answer."""
    cfg = config(adapter, undisturbed)
    policy = build_finished_policy(cfg, torch.device("cpu"))
    base = load_model(WORLD / "model", dtype=torch.float32, device=torch.device("cpu"))
    template = dpo.evals.win_rate.build_template(cfg)
    for line in (undisturbed / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        ids, _ = template.encode([{"role": "user", "content": sample["prompt"]}], [])
        for side, model in (("before", base), ("after", policy)):
            (answered,) = dpo.evals.answers.generate(
                model, [ids], samples=1, max_new_tokens=9, stop_ids=template.stop_ids,
                sampling=dpo.evals.win_rate.Sampling(0.0, 0, 1.0, 0.0), seeds=[0], batch_size=1,
            )  # fmt: skip
            assert sample["answers"][side] == template.tokenizer.decode(answered.ids).strip()


@pytest.mark.parametrize("rows", [3, 6])
def test_after_a_kill_nothing_is_answered_or_judged_twice(adapter, undisturbed, tmp_path, monkeypatch, rows):
    """Killed in a child of this process as soon as it has kept so many batches: 2 before, 2 after, then verdicts."""
    output = tmp_path / "out"
    child = os.fork()
    if child == 0:
        kept, add = 0, Progress.add

        def add_and_die(self, *given):
            nonlocal kept
            add(self, *given)
            kept += 1
            if kept == rows:
                os.kill(os.getpid(), signal.SIGKILL)

        Progress.add = add_and_die
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        eval.evaluate(config(adapter, output), {})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    held = {row for path in output.glob("*.jsonl") for row in path.read_bytes().split(b"\n")[1:-1]}
    assert held
    added = []
    monkeypatch.setattr(
        Progress, "add", lambda self, *given, add=Progress.add: (added.extend(given), add(self, *given))
    )
    eval.evaluate(config(adapter, output), {})
    assert found(output) == found(undisturbed)
    assert not held & {json.dumps(row).encode() for row in added}


def test_a_model_is_not_compared_with_itself(tmp_path):
    cfg = config(tmp_path, tmp_path / "out", "adapter_name_or_path=null")
    with pytest.raises(ValueError, match=r"^model_name_or_path=world: nothing to compare it with; name run, adapter"):
        eval.evaluate(cfg, {})


def test_other_settings_in_the_same_directory_are_refused(adapter, undisturbed):
    with pytest.raises(ValueError, match=r"before\.jsonl: holds rows of temperature=0\.0, this evaluation has 1\.0"):
        eval.evaluate(config(adapter, undisturbed, "temperature=1"), {})


def test_a_win_is_afters(adapter, undisturbed, tmp_path, monkeypatch):
    """Of a judge that likes what the policy says."""
    samples = [json.loads(line) for line in (undisturbed / "samples.jsonl").read_text().splitlines()]
    liked = {sample["answers"]["after"] for sample in samples}

    class Fond(Scripted):
        def __call__(self, pairs, on_done=lambda *_: None):
            self.verdicts = {pair.id: Verdict.FIRST if pair.first in liked else Verdict.SECOND for pair in pairs}
            return super().__call__(pairs, on_done)

    monkeypatch.setattr(dpo.evals.win_rate, "build_judge", lambda cfg: Fond({}))
    result = eval.evaluate(config(adapter, tmp_path), {})
    assert result.counts["wins"] == 4 and result.metrics["win_rate"] == 1


def test_too_many_invalid_fail_after_the_files_are_written(adapter, tmp_path, monkeypatch):
    class Silent(Scripted):
        def __call__(self, pairs, on_done=lambda *_: None):
            self.verdicts = {pair.id: Verdict.INVALID for pair in pairs}
            return super().__call__(pairs, on_done)

    monkeypatch.setattr(dpo.evals.win_rate, "build_judge", lambda cfg: Silent({}))
    with pytest.raises(ValueError, match=r"of 4 pairs have no verdict, more than max_invalid=0\.05; see why"):
        eval.evaluate(config(adapter, tmp_path), {})
    assert "no verdict" in json.loads((tmp_path / "results.json").read_text())["error"]
    assert "no verdict" in (tmp_path / "report.html").read_text()
