"""`python -m dpo.data`: rows as the model sees them; every token once, and none that hides."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dpo.show import LEGEND, ShowConfig, pieces, show
from dpo.tokens import encode
from models.command import expand_arguments
from models.template import ChatTemplate
from models.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "experiments" / "world" / "model"
PAIR = {"prompt": "What does a cow eat?", "chosen": "A cow likes to eat grass.", "rejected": "A cow likes to eat meat."}


def shown(capsys, *arguments: str, colour: bool = False) -> str:
    expanded, _ = expand_arguments(list(arguments), ShowConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        show(compose("show", expanded), colour=colour)
    return capsys.readouterr().out


@pytest.fixture
def file(tmp_path) -> Path:
    turns = [{"from": role, "value": text} for role, text in (("system", "Be kind."), ("human", "A cow?"),
             ("gpt", "Yes."), ("human", "And a hen?"))]  # fmt: skip
    rows = [PAIR, {"conversations": turns, "chosen": "A hen\nis big.", "rejected": "No <|im_end|>", "margin": 0.5}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def test_a_pair_by_hand(capsys, file):
    assert shown(capsys, f"dataset={file}", "show=1", "cutoff_len=99").splitlines() == [
        "2 rows, 0 skipped; template=auto, model_name_or_path=world, cutoff_len=99",
        LEGEND,
        "",
        f"row 1 ({file}:1): user; tokens: prompt 14, chosen 9, rejected 9",
        "  prompt      | «<|im_start|>»·user·⏎",
        "  prompt      | What· does· a· cow· eat·?·«<|im_end|>»·⏎",
        "  prompt      | «<|im_start|>»·assistant·⏎",
        "  chosen      * A· cow· likes· to· eat· grass·.·«<|im_end|>»·⏎",
        "  rejected    * A· cow· likes· to· eat· meat·.·«<|im_end|>»·⏎",
    ]


def test_text_that_spells_a_special_token_is_told_from_one(capsys, file):
    """And numbers of the row are said."""
    text = shown(capsys, f"dataset={file}", "rows=[2]")
    assert "row 1" not in text and "): system, user, assistant, user; " in text and "margin 0.5" in text
    (rejected,) = [line for line in text.splitlines() if line.startswith("  rejected")]
    assert rejected.count("«<|im_end|>»") == 1 and "<·|·" in rejected


def test_what_cutoff_len_takes_is_said(capsys, file):
    """Row 2 loses its first question; then each response has room for a token."""
    text = shown(capsys, f"dataset={file}", "rows=[2]", "cutoff_len=30")
    assert "2 old turns left out" in text and text.count("(cut here by cutoff_len)") == 2
    assert "row 2 cannot be used: " in shown(capsys, f"dataset={file}", "rows=[2]", "cutoff_len=10")


def test_a_wrong_template_shows_no_special_token_but_the_last(capsys, file):
    text = shown(capsys, f"dataset={file}", "template=plain", "show=1").partition("row 1")[2]
    assert text.count("«") == text.count("«<|im_end|>»\n") == 2


@pytest.mark.parametrize(("stage", "names"), [("kto", ["desirable", "undesirable"]), ("sft", ["response"])])
def test_rows_of_one_response_have_their_own_names(capsys, file, stage, names):
    text = shown(capsys, f"dataset={file}", f"stage={stage}", f"show={len(names)}")
    assert re.findall(r"^  (\w+) +\*", text, re.MULTILINE) == names


def test_colour_adds_nothing_but_colour(capsys, file):
    plain = shown(capsys, f"dataset={file}")
    coloured = shown(capsys, f"dataset={file}", colour=True)
    assert "\033[" not in plain and re.sub(r"\033\[[0-9;]*m", "", coloured) == plain
    assert "\033[32m" in coloured and "\033[31m" in coloured


@pytest.mark.parametrize("text", ["naïve 猫 👩\u200d👧", "a\tb\x1b[31m\r\u202ec", "x\n\ny"])
def test_the_pieces_are_the_tokens_and_their_text(capsys, file, text):
    """One piece for each id; without `…`, they join to the text; nothing printed moves the cursor."""
    tokenizer = Tokenizer(MODEL)
    (ids,) = tokenizer.encode([text])
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(piece for piece, _ in found).replace("…", "") == text
    file.write_text(json.dumps(PAIR | {"chosen": text}))
    assert shown(capsys, f"dataset={file}").replace("\n", "").isprintable()


@pytest.mark.real
def test_the_pieces_of_sentencepiece_keep_their_spaces(real):
    template = ChatTemplate("plain", Tokenizer(real / "models" / "stories260K" / "hf"))
    prompt, (response,) = template.encode([{"role": "user", "content": "Once upon a time"}], ["there was a  cat."])
    found = "".join(text for text, special in pieces(template.tokenizer, response, before=prompt) if not special)
    assert found == "there was a  cat."


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("rows=[1,3]", r"rows=\[1, 3\]: 3 is none of the 2 rows, which count from 1"),
        ("rows=[0]", r"rows=\[0\]: 0 is none of the 2 rows"),
        ("rows=2", r"rows=2: expected a list like \[5,17\]"),
        ("show=0", "show=0: must be at least 1"),
        ("cutoff_len=1", "cutoff_len=1: must be at least 2"),
        ("stage=rm", "stage=rm: expected one of dpo, kto, sft"),
        ("shown=1", r"shown=1: unknown key; did you mean show\?"),
    ],
)
def test_a_mistake_is_refused(capsys, file, argument, message):
    with pytest.raises(ValueError, match=message):
        shown(capsys, f"dataset={file}", argument)


def test_a_training_runs_file_is_taken_as_it_is(capsys, file, tmp_path):
    (tmp_path / "dpo.yaml").write_text(f"model_name_or_path: world\ndataset: {file}\npref_beta: 0.1\nbf16: true\n")
    assert "row 2" in shown(capsys, f"config_file={tmp_path / 'dpo.yaml'}")


def test_the_rows_are_those_of_training(capsys, file):
    """The same ids, so the same number of tokens, after the same cut."""
    from dpo.data import read_examples

    examples, _ = read_examples(file, stage="dpo", on_bad_row="stop")
    row = encode(examples[1], ChatTemplate("auto", Tokenizer(MODEL)), 30)
    text = shown(capsys, f"dataset={file}", "rows=[2]", "cutoff_len=30")
    assert f"tokens: prompt {len(row.prompt_ids)}, chosen {row.lengths[0]}, rejected {row.lengths[1]}" in text
    for side, ids in zip(("chosen", "rejected"), row.response_ids, strict=True):
        printed = re.findall(rf"^  {side} +\* (.*)$", text, re.MULTILINE)
        assert sum(line.count("·") + 1 for line in printed) == len(ids)


def test_the_command_is_plain_in_a_pipe(file):
    command = [sys.executable, "-m", "dpo.data", f"dataset={file}", "show=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "\033" not in done.stdout and "«<|im_start|>»·user" in done.stdout, done.stderr
