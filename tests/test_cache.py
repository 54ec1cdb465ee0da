"""The cache is the packed stream continued: decoding over it equals packing and reading everything anew at each token.

Shapes: N samples, S steps, D width, V vocabulary, M new tokens.
"""

import pytest
import torch
from test_transformer import FAMILIES, build, load
from torch import Tensor

from models.cache import Cache
from models.generate import Decoding, generate
from models.sampling import GREEDY, Sampling, choose
from models.stream import pack
from models.transformer import Transformer

# Shorter and longer than the windows (2 to 4), and than the original context of the scaled ropes (16).
PROMPTS = [[5, 9, 2, 7, 36, 1], [3], [8, 8, 30, 4, *range(10, 26)], [22, 21]]
STEPS = 10
STOPS = range(0, 37, 5)
HOT = Sampling(temperature=2.0, top_k=20, top_p=0.95, min_p=0.01)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> Transformer:
    return load(build(request.param, tmp_path_factory.mktemp(request.param))[1], torch.float64)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Transformer:
    return load(build("qwen2-late-window", tmp_path_factory.mktemp("qwen"))[1], torch.float64)


@torch.no_grad()
def assert_steps_continue_the_stream(model: Transformer, samples: int, keep_after: int, kept: list[int]) -> None:
    """Random continuations, read by step; after `keep_after` steps those of the prompts `kept` alone go on."""
    generator = torch.Generator().manual_seed(1)
    tokens_NS = torch.randint(37, (len(PROMPTS) * samples, STEPS), generator=generator)
    # A last token of no meaning, so that the last real one is a predictor too.
    branches = torch.cat([tokens_NS, torch.zeros(len(tokens_NS), 1, dtype=torch.long)], dim=1)
    whole = pack(PROMPTS, branches.unflatten(0, (len(PROMPTS), samples)).tolist())
    expected_NSD = model(whole)[whole.predictor_R].unflatten(0, (len(tokens_NS), STEPS + 1))

    lengths_P = torch.tensor([len(prompt) for prompt in PROMPTS])
    cache = Cache(model, lengths_P, samples, STEPS)
    prompts = pack(PROMPTS, [[] for _ in PROMPTS])
    prompts_TD = model.run(prompts.input_ids_T, prompts.positions_T, cache.prefill(prompts))
    assert_equal(prompts_TD[lengths_P.cumsum(0) - 1], expected_NSD[::samples, 0])
    for step in range(STEPS):
        if step == keep_after:
            cache.keep(torch.tensor(kept))
            tokens_NS, expected_NSD = (
                x.unflatten(0, (len(PROMPTS), samples))[kept].flatten(0, 1) for x in (tokens_NS, expected_NSD)
            )
        positions_N, attends = cache.step()
        hidden_ND = model.run(tokens_NS[:, step], positions_N, attends)
        assert_equal(hidden_ND, expected_NSD[:, step + 1])


def assert_equal(ours_ND: Tensor, expected_ND: Tensor) -> None:
    assert (ours_ND - expected_ND).abs().max() <= 1e-12 * expected_ND.abs().max()


def test_steps_have_the_hidden_states_of_the_packed_stream_in_every_family(model):
    assert_steps_continue_the_stream(model, samples=2, keep_after=5, kept=[2, 1])


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [3], [2, 0]])
def test_steps_have_the_hidden_states_of_the_packed_stream_for_any_samples_and_prompts(qwen, samples, kept):
    assert_steps_continue_the_stream(qwen, samples, keep_after=3, kept=kept)


@torch.no_grad()
def generate_slowly(model, prompts, *, samples, max_new_tokens, stop_ids, sampling, seeds) -> list[list[int]]:
    """Every prompt and every sample is packed and read anew for each of its tokens."""
    answers: list[list[list[int]]] = [[[] for _ in range(samples)] for _ in prompts]
    uniform_NM = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds])
    for step in range(max_new_tokens):
        stream = pack(prompts, [[[*ids, 0] for ids in row] for row in answers])  # 0 stands for what is predicted
        hidden_ND = model(stream)[stream.predictor_R][stream.lengths_B.cumsum(0) - 1]
        tokens = iter(choose(hidden_ND @ model.head_weight_VD.T, sampling, uniform_NM[:, step]).tolist())
        for ids in (ids for row in answers for ids in row):
            ids.append(next(tokens))
    flat = [ids for row in answers for ids in row]
    return [ids[: next((i for i, token in enumerate(ids) if token in stop_ids), None)] for ids in flat]


@pytest.fixture
def kept(monkeypatch) -> list[int]:
    """How many prompts stayed, each time that some left a batch."""
    calls: list[int] = []
    keep = Decoding.keep
    monkeypatch.setattr(Decoding, "keep", lambda decoder, rows: (calls.append(len(rows)), keep(decoder, rows)))
    return calls


def assert_equals_slow_generation(model: Transformer, *, batch_size: int, samples: int, **options) -> None:
    options |= {"samples": samples, "max_new_tokens": STEPS, "seeds": range(len(PROMPTS) * samples)}
    answers = [completion.ids for completion in generate(model, PROMPTS, batch_size=batch_size, **options)]
    assert answers == generate_slowly(model, PROMPTS, **options)
    assert len(set(map(len, answers))) > 1


def test_drawn_tokens_are_those_of_the_slow_decoder_in_every_family(model, kept):
    assert_equals_slow_generation(model, batch_size=4, samples=2, sampling=HOT, stop_ids=STOPS)
    assert kept


def test_the_most_likely_tokens_are_those_of_the_slow_decoder_in_every_family(model, kept):
    options = {"samples": 1, "max_new_tokens": STEPS, "sampling": GREEDY, "seeds": range(len(PROMPTS))}
    free = generate_slowly(model, PROMPTS, stop_ids=(), **options)
    # Tokens that do come, so that answers end early and at different times.
    stops = {free[0][0], free[2][1], free[3][3]}
    assert_equals_slow_generation(model, batch_size=4, samples=1, sampling=GREEDY, stop_ids=stops)
    assert kept


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_drawn_tokens_are_those_of_the_slow_decoder_for_any_samples_and_batch(qwen, kept, samples, batch_size):
    assert_equals_slow_generation(qwen, batch_size=batch_size, samples=samples, sampling=HOT, stop_ids=STOPS)
    assert kept or batch_size == 1
