"""`python -m dpo.tokens`: a token's log-ratio is the definition's, the sums are eval.py's rewards, nothing hides."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import eval  # noqa: F401  (registers its schema)
from dpo.build import build_eval_rows, build_template
from dpo.evals.preference import preference
from dpo.logprobs import gather_logps
from dpo.token_view import Response, Row, TokenViewConfig, background, lines, most_moved, page, scale_of, view, viewed
from models.command import CONF, expand_arguments
from models.lora import adapter_tensors, adapters_disabled, inject_lora, save_adapter
from models.stream import pack
from models.transformer import Transformer
from models.weights import WORLD, load_model

ROOT = Path(__file__).parent.parent
EVIL = "<script>alert(1)</script>\x1b[2J\u202e猫 & \"naïve\"\n'x'"
PAIRS = [
    {"prompt": "What does a cow eat?", "chosen": "A cow likes to eat grass.", "rejected": "A cow eats meat."},
    {"prompt": "May I pet a snail?", "chosen": "No, a snail is too delicate.", "rejected": EVIL},
    {"prompt": "How many legs has a hen?", "chosen": "A hen has six legs. Ha!", "rejected": "A hen has two legs."},
]


def config(*arguments: str) -> DictConfig:
    expanded, _ = expand_arguments(list(arguments), TokenViewConfig)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("token_view", expanded)


def adapted(model_dir: Path, target: Path, size: float) -> Transformer:
    """A model with a random adapter, which is written to `target`."""
    model = load_model(model_dir, dtype=torch.float32, device=torch.device("cpu"))
    inject_lora(model, rank=4, alpha=8.0, dropout=0.0, use_rslora=False, target="all", seed=0)
    for name, parameter in adapter_tensors(model).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, size, generator=torch.Generator().manual_seed(1))
    save_adapter(model, target, base_model=str(model_dir), dropout=0.0)
    return model.requires_grad_(False)


def test_keys_of_other_tasks_are_left_out_and_said():
    expanded, notes = expand_arguments(["judge=gold", "temperature=1", "show=2"], TokenViewConfig)
    assert expanded == ["show=2"] and notes == ["without effect here, and left out: judge, temperature"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Transformer]:
    """(the directory of a run on the built-in world, its policy); PAIRS are its held-out rows."""
    path = tmp_path_factory.mktemp("run")
    (path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    saved = {"model_name_or_path": "world", "pref_beta": 0.5, "eval_dataset": str(path / "held.jsonl")}
    (path / "config.yaml").write_text(OmegaConf.to_yaml(saved))
    return path, adapted(WORLD / "model", path, 0.3)


def row_of(*logratios: float, texts: tuple[str, ...] = (), **more) -> Row:
    pieces = [(texts[i] if texts else f" w{i}", False) for i in range(len(logratios))]
    chosen = Response("chosen", pieces, [-1.0] * len(logratios), list(logratios), cut=False)
    rejected = Response("rejected", [("no", False)], [-2.0], [0.25], cut=False)
    return Row(1, "f.jsonl:1", [("Why?", False)], [chosen, rejected], **{"beta": 0.1} | more)


# --- the numbers ---


@torch.no_grad()
def definition(policy: Transformer, prompt_ids: list[int], response_ids: list[int]) -> torch.Tensor:
    """(R,) log pi of a response in a stream of its own."""
    stream = pack([prompt_ids], [[response_ids]])
    return gather_logps(policy(stream)[stream.predictor_R], policy.head_weight_VD, stream.target_R)


def test_each_log_ratio_is_the_definitions_on_a_row_of_its_own(run):
    """The policy minus the policy without its adapter."""
    path, policy = run
    cfg = config(f"run={path}")
    rows, about = viewed(cfg)
    assert about == f"3 of 3 held-out rows; policy: {path}; reference: the base model, adapter off; pref_beta=0.5"
    encoded = build_eval_rows(cfg, build_template(cfg)).evaluation
    for row, its in zip(rows, encoded, strict=True):
        assert [response.name for response in row.responses] == ["chosen", "rejected"]
        for response, ids in zip(row.responses, its.response_ids, strict=True):
            logps_R = definition(policy, its.prompt_ids, ids)
            with adapters_disabled(policy):
                reference_R = definition(policy, its.prompt_ids, ids)
            assert len(response.pieces) == len(ids) and (logps_R - reference_R).abs().max() > 0.1
            assert response.logps == pytest.approx(logps_R.tolist(), abs=1e-4)
            assert response.logratios == pytest.approx((logps_R - reference_R).tolist(), abs=1e-4)


def test_the_sums_that_are_shown_are_the_rewards_that_eval_reports(run, capsys):
    """Means over the rows; accuracy is the share that is ranked right."""
    cfg = config(f"run={run[0]}", "per_device_eval_batch_size=2")
    metrics, _ = preference(cfg)
    capsys.readouterr()
    view(cfg, colour=False)
    shown = capsys.readouterr().out

    def mean(pattern: str) -> list[float]:
        found = [float(number) for number in re.findall(pattern, shown)]
        sides = [found[0::2], found[1::2]] if len(found) == 6 else [found]
        return [sum(side) / 3 for side in sides]

    for pattern, name in ((r"reward ([-+.\d]+),", "rewards"), (r"logps ([-+.\d]+),", "logps")):
        expected = [metrics[f"eval_{name}/{side}"] for side in ("chosen", "rejected")]
        assert mean(pattern) == pytest.approx(expected, abs=2e-3)
    assert mean(r"margin ([-+.\d]+), ranked") == pytest.approx([metrics["eval_rewards/margins"]], abs=2e-3)
    right = len(re.findall("ranked right", shown))
    assert 0 < right < 3 and right / 3 == pytest.approx(metrics["eval_rewards/accuracies"])


def test_a_policy_that_is_its_reference_has_moved_no_token(run, capsys):
    view(config("model_name_or_path=world", f"eval_dataset={run[0] / 'held.jsonl'}"), colour=True)
    text = capsys.readouterr().out
    assert "margin +0.000, ranked wrong" in text and "\033[30;48" not in text
    assert not re.search(r"^ +[-+]\d\.\d\d  ", text, re.MULTILINE)


def test_a_labelled_row_is_one_response_and_has_no_margin(run):
    """Not the mismatched one beside it, which kto compares with; the numbers are the pair's."""
    rows, _ = viewed(config(f"run={run[0]}", "pref_loss=kto", "show=2"))
    assert [[response.name for response in row.responses] for row in rows] == [["desirable"], ["undesirable"]]
    assert rows[0].verdict == "one response, so no margin"
    (pair,), _ = viewed(config(f"run={run[0]}", "show=1"))
    for row, response in zip(rows, pair.responses, strict=True):
        assert row.responses[0].logratios == pytest.approx(response.logratios, abs=1e-4)


@pytest.mark.real
def test_log_ratios_of_a_real_row_equal_transformers_and_pefts(real, smollm2, tmp_path):
    """SmolLM2 with an adapter against peft's, each response in a row of its own, and the adapter off."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapted(smollm2, tmp_path, 0.02)
    rows = json.loads((real / "preferences" / "polite_impolite.json").read_text())[:1]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    given = [f"model_name_or_path={smollm2}", f"adapter_name_or_path={tmp_path}", "cutoff_len=256"]
    cfg = config(*given, f"eval_dataset={tmp_path / 'rows.json'}")
    (row,), _ = viewed(cfg)
    (its,) = build_eval_rows(cfg, build_template(cfg)).evaluation
    oracle = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), tmp_path)

    @torch.no_grad()
    def theirs(ids: list[int]) -> torch.Tensor:
        logits_TV = oracle(torch.tensor([its.prompt_ids + ids])).logits[0, len(its.prompt_ids) - 1 : -1]
        return -torch.nn.functional.cross_entropy(logits_TV, torch.tensor(ids), reduction="none")

    for response, ids in zip(row.responses, its.response_ids, strict=True):
        logps_R = theirs(ids)
        with oracle.disable_adapter():
            reference_R = theirs(ids)
        assert (logps_R - reference_R).abs().max() > 0.05
        assert response.logps == pytest.approx(logps_R.tolist(), abs=1e-3)
        assert response.logratios == pytest.approx((logps_R - reference_R).tolist(), abs=1e-3)


# --- the terminal ---


def test_the_most_moved_tokens_stand_with_their_context_by_hand():
    """Five each way at most, the most first, none that moved less than 0.005; seven words: five before, two after."""
    row = row_of(0.1, -0.2, 0.3, 0.004, -0.5, 0.6, 0.2, 0.0, 0.15, 0.4)
    assert most_moved(row.responses[0]) == [5, 9, 2, 6, 8, 4, 1]
    text = list(lines(row, 1.0, colour=False))
    assert text[:4] == [
        "row 1 (f.jsonl:1): margin +0.080, ranked right",  # 0.1 (1.054 - 0.25)
        "  prompt      | Why?",
        "  chosen      * " + "·".join(f" w{i}" for i in range(10)),
        "    logps -10.000, log-ratio +1.054, reward +0.105, 10 tokens",
    ]
    assert text[4] == "     +0.60   w0· w1· w2· w3· w4[ w5] w6· w7"
    assert text[10] == "     -0.20   w0[ w1] w2· w3"


def test_colour_adds_nothing_but_colour_and_a_legend(run, capsys):
    texts = []
    for colour in (False, True):
        view(config(f"run={run[0]}"), colour=colour)
        texts.append(capsys.readouterr().out)
    plain, coloured = texts
    assert "\033" not in plain
    assert [line for line in re.sub(r"\033\[[0-9;]*m", "", coloured).splitlines() if line[:11] != "background:"] == (
        plain.splitlines()
    )
    assert {"\033[30;48;5;33m", "\033[30;48;5;196m"} <= {*re.findall(r"\033\[[0-9;]*m", coloured)}


def test_a_background_is_as_strong_as_the_share_of_the_scale_and_clipped():
    assert [background(share) for share in (0, 0.09, -0.09)] == ["", "", ""]
    assert [background(share) for share in (0.2, 1, 7)] == [f"\033[30;48;5;{n}m" for n in (189, 33, 33)]
    assert [background(share) for share in (-0.2, -1, -7)] == [f"\033[30;48;5;{n}m" for n in (224, 196, 196)]


def test_the_scale_holds_all_tokens_but_the_far_out():
    """Of 20 of size 1 and one of 50, the 95% quantile; 1 where nothing moved, and never 0 where something did."""
    assert scale_of([row_of(*[1.0, -1.0] * 10, 50.0)]) == 1.0
    still = Row(1, "f:1", [], [Response("chosen", [("a", False)], [-1.0], [0.0], cut=False)], 0.1)
    assert scale_of([still]) == 1.0
    nearly = Row(1, "f:1", [], [Response("chosen", [("a", False)] * 99, [-1.0] * 99, [0.0] * 98 + [0.3], cut=False)], 1)
    assert scale_of([nearly]) == 0.3


def test_nothing_that_is_printed_moves_the_cursor(run, capsys):
    view(config(f"run={run[0]}", "rows=[2]"), colour=False)
    text = capsys.readouterr().out
    assert text.replace("\n", "").isprintable() and "\\x1b" in text and "\\u202e" in text and "…" in text
    assert "\x1b" not in "".join(lines(row_of(1.0, texts=("\x1b[2J",)), 1.0, colour=False))


# --- the page ---


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        if "title" in given:
            self.tokens.append((given["title"], given["style"], ""))

    def handle_data(self, data):
        if self.tokens and not self.tokens[-1][2]:
            self.tokens[-1] = (*self.tokens[-1][:2], data)


def test_a_page_has_every_token_with_its_numbers_and_runs_none(run, tmp_path, capsys):
    cfg = config(f"run={run[0]}", f"output_file={tmp_path / 'view.html'}")
    view(cfg, colour=False)
    assert f"page: {tmp_path / 'view.html'}" in capsys.readouterr().out
    text = (tmp_path / "view.html").read_text(encoding="utf-8")
    parsed = Page(text)
    rows, _ = viewed(cfg)
    responses = [response for row in rows for response in row.responses]
    numbers = [float(title.partition(":")[0]) for title, _, _ in parsed.tokens]
    assert numbers == pytest.approx([ratio for r in responses for ratio in r.logratios], abs=6e-4)
    assert "".join(token for *_, token in parsed.tokens).replace("…", "").count("猫") == 1
    assert not {"script", "img", "a"} & {*parsed.tags} and "\x1b" not in text and "http" not in text
    assert "&lt;" in text and "ranked wrong</span>" in text and f"{scale_of(rows):+.2g}; what is beyond" in text


def test_a_pages_colours_by_hand():
    """Of a scale of 2 nats: a half of it, all of it, and beyond."""
    text = page([row_of(1.0, -2.0, 9.0, 0.0)], 2.0, "about <b>")
    shades = re.findall(r"background: rgb\(([\d ]+) / ([\d.]+)\)", text)
    blue, red = "40 110 220", "220 50 40"
    assert shades == [(blue, "0.50"), (red, "1.00"), (blue, "1.00"), (red, "0.00"), (blue, "0.12")]
    assert 'title="+1.000: policy -1.000, reference -2.000"' in text and "about &lt;b&gt;" in text


# --- the command ---


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("rows=[1,4]", r"rows=\[1, 4\]: 4 is none of the 3 rows, which count from 1"),
        ("show=0", "show=0: must be at least 1"),
        ("shown=1", r"shown=1: unknown key; did you mean show\?"),
        ("pref_beta=0", "pref_beta=0.0: must be above 0"),
    ],
)
def test_a_mistake_is_refused(run, argument, message):
    with pytest.raises(ValueError, match=message):
        viewed(config(f"run={run[0]}", argument))


def test_the_keys_are_evals_and_every_other_is_explained():
    text = (CONF / "token_view.yaml").read_text().splitlines()
    own = [line.partition(":")[0] for line in text if re.match(r"[a-z_]+: (?!$)", line)]
    assert own == ["show", "rows", "output_file"]
    assert all(text[i - 1].startswith("# ") for i, line in enumerate(text) if line.partition(":")[0] in own)
    evals = {key for key in config("model_name_or_path=world") if key not in ("show", "rows")}
    assert evals == {f for f in OmegaConf.load(CONF / "eval.yaml") if f not in ("defaults", "hydra")}


@pytest.mark.slow
def test_the_command_is_plain_in_a_pipe(run):
    command = [sys.executable, "-m", "dpo.tokens", f"run={run[0]}", "show=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "\033" not in done.stdout and "row 2" not in done.stdout, done.stderr
    assert re.search(r"chosen      \* A· cow· likes.*\n    logps -", done.stdout)
