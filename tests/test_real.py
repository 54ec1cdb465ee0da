"""On real models and rows: log-probabilities equal transformers', and a packed batch equals a padded, unshared one."""

from pathlib import Path

import pytest
import torch

from dpo.data import read_examples
from dpo.fused import fused_logps
from dpo.logprobs import sum_over_responses, token_logps
from dpo.objective import to_stream
from dpo.tokens import encode
from models.stream import pack
from models.template import ChatTemplate
from models.tokenizer import Tokenizer
from models.weights import load_model

pytestmark = pytest.mark.real
STORIES = ("hf", "hf_bf16", "hf_mistral", "hf_qwen2_zero_bias", "hf_untied_sharded3")


def encoded_rows(real: Path, model_dir: Path, template: str, file: str, count: int, cutoff_len: int):
    chat = ChatTemplate(template, Tokenizer(model_dir))
    examples, _ = read_examples(real / "preferences" / file, stage="dpo", on_bad_row="skip", max_samples=count)
    return [encode(example, chat, cutoff_len) for example in examples]


def transformers_logps(model_dir: Path, rows, dtype: torch.dtype) -> torch.Tensor:
    """Per-token log-probabilities of every response, each in a row of its own, by transformers' model."""
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    logps = []
    with torch.no_grad():
        for row in rows:
            for response in row.response_ids:
                ids = torch.tensor([row.prompt_ids + response])
                logits = oracle(ids).logits[0, len(row.prompt_ids) - 1 : -1]
                logps.append(-torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none"))
    return torch.cat(logps)


def assert_logps_equal(model_dir: Path, rows) -> None:
    model = load_model(model_dir, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        ours_R = token_logps(model, to_stream(rows, model.device))
    assert (ours_R - transformers_logps(model_dir, rows, torch.float32)).abs().max() < 1e-3


def test_log_probabilities_of_real_rows_equal_transformers_on_smollm2(real, smollm2):
    for file in ("polite_impolite.json", "dpo_en_demo.json"):
        assert_logps_equal(smollm2, encoded_rows(real, smollm2, "auto", file, 4, 640))


@pytest.mark.parametrize("variant", STORIES)
def test_log_probabilities_of_real_rows_equal_transformers_on_stories260k(real, variant):
    directory = real / "models" / "stories260K" / variant
    assert_logps_equal(directory, encoded_rows(real, directory, "plain", "polite_impolite.json", 8, 400))


@torch.no_grad()
def test_the_loss_on_tinystories_equals_transformers_on_the_same_windows(real):
    """Mean nats per token over 40 windows of 512 tokens, packed here, a batch of rows there; and a sane one."""
    from transformers import AutoModelForCausalLM

    directory = real / "models" / "stories260K" / "hf"
    text = (real / "text" / "tinystories_val.txt").read_text(encoding="utf-8")
    (ids,) = Tokenizer(directory).encode([text[:60_000]])
    windows = [ids[i : i + 512] for i in range(0, 40 * 512, 512)]
    model = load_model(directory, dtype=torch.float32, device=torch.device("cpu"))
    loss = -token_logps(model, pack([w[:1] for w in windows], [[w[1:]] for w in windows])).mean().item()
    batch = torch.tensor(windows)
    theirs = AutoModelForCausalLM.from_pretrained(directory)(batch, labels=batch).loss.item()
    print(f"loss on TinyStories: {loss:.6f} here, {theirs:.6f} in transformers")
    assert loss == pytest.approx(theirs, abs=1e-5)
    assert 1 < loss < 2


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_log_probabilities_of_real_rows_equal_transformers_on_a_random_qwen(real, tmp_path, family):
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 151665, "head_dim": 32 if family == "Qwen3" else 16}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # far from uniform, and with biases that are not 0
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((real / "tokenizers" / "qwen2.5" / name).read_bytes())
    template = "qwen" if family == "Qwen2" else "qwen3"
    assert_logps_equal(tmp_path, encoded_rows(real, tmp_path, template, "dpo_en_demo.json", 2, 640))


def test_a_packed_batch_has_the_values_and_gradients_of_a_padded_unshared_one(real):
    """stories260K, float64 throughout: prompts shared and nothing padded, against one padded row per response."""
    directory = real / "models" / "stories260K" / "hf"
    rows = encoded_rows(real, directory, "plain", "polite_impolite.json", 6, 300)
    model = load_model(directory, dtype=torch.float64, device=torch.device("cpu")).requires_grad_(True)

    packed = to_stream(rows, model.device)
    logps = sum_over_responses(token_logps(model, packed), packed.lengths_B)
    logps.tanh().sum().backward()  # any nonlinear function: each response weighs differently
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    # Padding: every sequence is filled to the longest with a token, as a branch whose log-probabilities are not read.
    longest = max(len(row.prompt_ids) + len(ids) for row in rows for ids in row.response_ids)
    unshared = []
    for row in rows:
        for ids in row.response_ids:
            padding = [7] * (longest - len(row.prompt_ids) - len(ids))
            stream = pack([row.prompt_ids], [[ids + padding]])
            hidden_RD = model(stream)[stream.predictor_R]
            unshared.append(fused_logps(hidden_RD, model.head_weight_VD, stream.target_R)[: len(ids)].sum())
    torch.stack(unshared).tanh().sum().backward()

    assert (logps - torch.stack(unshared)).abs().max() <= 1e-10 * logps.abs().max()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-10 * gradients[name].abs().max(), name
