"""Every token of a text is predicted exactly once, with as much context as a window has room for."""

import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import eval  # noqa: F401  (registers its schema)
from dpo.build import WORLD
from dpo.evals.choices import option_logps
from dpo.evals.perplexity import metrics, read, run, text_logps, windows
from models.command import CONF
from models.tokenizer import Tokenizer
from models.weights import load_model


def configured(tmp_path: Path, **values):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values = {"task": "perplexity", "model_name_or_path": "world", "output_dir": tmp_path / "out", **values}
        return compose("eval", [f"{key}={value}" for key, value in values.items()])


def test_windows_as_lm_evals_docstring_draws_them():
    assert list(windows(range(10), -1, 4, 4)) == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert list(windows(range(5), -1, 4, 1)) == [([-1], [0, 1, 2, 3]), ([0, 1, 2, 3], [4])]
    assert list(windows([], -1, 4, 4)) == []


def test_each_token_is_predicted_once_from_the_tokens_before_it_and_no_window_is_too_long():
    for n in range(20):
        padded = [-1, *range(n)]
        for length in range(1, 7):
            for stride in range(1, length + 1):
                predicted = []
                for context, targets in windows(range(n), -1, length, stride):
                    whole = context + targets
                    end = padded.index(whole[-1]) + 1
                    assert whole == padded[end - len(whole) : end] and context
                    assert len(whole) <= length + 1
                    assert len(whole) == min(end, length + 1)  # no context is left out that would fit
                    predicted += targets
                assert predicted == list(range(n))


def test_windows_equal_lm_evals():
    utils = pytest.importorskip("lm_eval.utils")
    for n in (0, 1, 7, 23):
        for length, stride in ((1, 1), (4, 4), (6, 2), (30, 5)):
            theirs = utils.get_rolling_token_windows(list(range(n)), -1, length, length - stride + 1)
            assert list(windows(range(n), -1, length, stride)) == list(map(utils.make_disjoint_window, theirs))


@pytest.mark.parametrize("stride", [0, 5])
def test_a_stride_must_lie_in_its_window(stride):
    with pytest.raises(ValueError, match=f"perplexity_stride={stride}: must be at least 1 and at most cutoff_len=4"):
        list(windows(range(9), -1, 4, stride))


def test_numbers_by_hand():
    """8 bits over 2 tokens and 4 bytes."""
    found = metrics(-8 * math.log(2), tokens=2, size=4)
    assert found == pytest.approx(
        {"nats_per_token": 4 * math.log(2), "token_perplexity": 16, "bits_per_byte": 2, "byte_perplexity": 4}
    )
    # exp(800) is above every float: the number is left out, for JSON has no infinity.
    assert sorted(metrics(-8000.0, 10, 10)) == ["bits_per_byte", "nats_per_token"]


def test_a_text_in_one_window_is_one_option_after_bos_and_texts_do_not_see_each_other():
    policy = load_model(WORLD / "model", dtype=torch.float64, device=torch.device("cpu"))
    texts = [[5, 6, 7, 8], [9, 10], []]
    alone = [values.item() for values in option_logps(policy, [[1], [1]], [[texts[0]], [texts[1]]], 1000)]
    assert text_logps(policy, texts, 1, 512, 512, 1000) == pytest.approx([*alone, 0.0], rel=1e-12)
    # Two windows: 5 6 | 7 8, and the second sees no more than 6.
    parts = [values.item() for values in option_logps(policy, [[1], [6]], [[[5, 6]], [[7, 8]]], 1000)]
    assert text_logps(policy, texts[:1], 1, 2, 2, 1000) == pytest.approx([sum(parts)], rel=1e-12)


def test_a_run_counts_tokens_and_bytes_of_the_texts_it_takes(tmp_path):
    rows = ["a cow eats grass", "grün", "left out"]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in rows), encoding="utf-8")
    result = run(configured(tmp_path, perplexity_file=tmp_path / "rows.jsonl", max_samples=2))
    tokens = Tokenizer(WORLD / "model").encode(rows[:2])
    assert result.counts == {"texts": 2, "tokens": sum(map(len, tokens)), "bytes": 16 + 5}
    assert result.provenance["texts"] == "the first 2 of 3"
    total = sum(row["log_likelihood"] for row in result.samples)
    assert result.metrics["nats_per_token"] == pytest.approx(-total / result.counts["tokens"])


def test_texts_are_resampled_whole_and_one_alone_has_no_interval(tmp_path):
    """Of two texts a resample is of one of them alone with probability 1/4: the interval ends at the rates of each."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a cow eats grass"}\n{"text": "xyz xyz"}\n')
    result = run(configured(tmp_path, perplexity_file=tmp_path / "rows.jsonl"))
    rates = sorted(-row["log_likelihood"] / row["tokens"] for row in result.samples)
    assert result.intervals["nats_per_token"] == pytest.approx(rates)
    bits = sorted(-row["log_likelihood"] / row["bytes"] / math.log(2) for row in result.samples)
    assert result.intervals["bits_per_byte"] == pytest.approx(bits)
    assert not run(configured(tmp_path, perplexity_file=tmp_path / "rows.jsonl", max_samples=1)).intervals


def test_texts_that_are_all_empty_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"text": "cow"}\n')
    with pytest.raises(ValueError, match=r"^max_samples=1: the first texts of .*rows\.jsonl are empty; take more"):
        run(configured(tmp_path, perplexity_file=tmp_path / "rows.jsonl", max_samples=1))


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\ntwo é".encode())
    assert read(tmp_path / "a.txt") == ["one\r\n\ntwo é"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"ab\xff", "a.txt: byte 3 is not UTF-8"),
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', r'a.jsonl:2: {"txt": 1}: expected an object with "text"'),
        ("a.jsonl", b"{\n", "a.jsonl:1: not valid JSON"),
    ],
)
def test_a_file_that_holds_no_texts_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"perplexity_file=.*nothing.txt: no such file"):
        read(tmp_path / "nothing.txt")


@pytest.mark.real
@torch.no_grad()
def test_perplexity_on_tinystories_equals_transformers_window_by_window(real, tmp_path):
    """20,000 characters in windows of 512 tokens, and with a stride of 100: each window read by transformers alone."""
    from transformers import AutoModelForCausalLM

    directory = real / "models" / "stories260K" / "hf"
    text = (real / "text" / "tinystories_val.txt").read_text(encoding="utf-8")[:20_000]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    oracle = AutoModelForCausalLM.from_pretrained(directory)
    (ids,) = Tokenizer(directory).encode([text])
    for stride, cut in (("null", 512), (100, 200)):
        expected = 0.0
        for context, targets in windows(ids, 1, cut, cut if stride == "null" else stride):
            logits_TV = oracle(torch.tensor([context + targets[:-1]])).logits[0, len(context) - 1 :]
            expected -= torch.nn.functional.cross_entropy(logits_TV, torch.tensor(targets), reduction="sum").item()
        cfg = configured(tmp_path, model_name_or_path=directory, perplexity_file=tmp_path / "a.txt", cutoff_len=cut,
                         perplexity_stride=stride)  # fmt: skip
        result = run(cfg)
        assert result.metrics["nats_per_token"] == pytest.approx(-expected / len(ids), abs=1e-6)
        print(f"cutoff_len={cut} perplexity_stride={stride}:", result.metrics)
