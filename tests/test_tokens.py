"""Tokens: the template's ids within cutoff_len, the same in a batch as alone, and scored on response tokens only."""

import random
from pathlib import Path

import pytest
import torch

from dpo.data import read_examples
from dpo.formats import BadRow, Example
from dpo.losses import OFF, PREF_LOSSES
from dpo.objective import to_stream
from dpo.preference import PreferenceObjective, preference_loss
from dpo.sft import SFTObjective
from dpo.tokens import Encoded, describe_cuts, encode, encode_all, encode_batch
from dpo.unpaired import UnpairedObjective, with_mismatched
from models.stream import Stream
from models.template import ChatTemplate, Message
from models.tokenizer import Tokenizer

WORLD = Path(__file__).parent.parent / "experiments" / "world"
END_OF_TURN = 2  # <|im_end|> in the world's tokenizer


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate("auto", Tokenizer(WORLD / "model"))


def messages(*turns: str) -> tuple[Message, ...]:
    """("system: be kind", "user: q") as messages."""
    split = [turn.split(": ", 1) for turn in turns]
    return tuple({"role": role, "content": content} for role, content in split)


# --- one row ---

PROMPT = messages("system: Be kind.", "user: What is a cow?", "assistant: A cow is big.", "user: And a hen?")
LONG = Example(PROMPT, ("A hen is a small bird.", "No idea at all, sorry."), "rows.jsonl:7")


def test_tokens_are_the_templates_and_responses_end_in_end_of_turn(template):
    row = encode(LONG, template, cutoff_len=512)
    assert (row.prompt_ids, list(row.response_ids)) == template.encode(LONG.messages, LONG.responses)
    assert all(END_OF_TURN in ids for ids in row.response_ids)
    assert (row.dropped_turns, row.cut) == (0, (False, False))
    assert row.tokens == len(row.prompt_ids) + sum(len(ids) for ids in row.response_ids)


def test_a_row_that_fits_exactly_is_left_whole(template):
    whole = encode(LONG, template, cutoff_len=512)
    length = len(whole.prompt_ids) + max(len(ids) for ids in whole.response_ids)
    assert encode(LONG, template, cutoff_len=length) == whole
    assert encode(LONG, template, cutoff_len=length - 1).dropped_turns == 2


def test_whole_old_turns_go_first_and_system_and_last_turn_stay(template):
    """One token too long, and the first question goes with its answer: as if the row had never held them."""
    whole = encode(LONG, template, cutoff_len=512)
    row = encode(LONG, template, cutoff_len=len(whole.prompt_ids) + max(map(len, whole.response_ids)) - 1)
    without = template.encode((PROMPT[0], PROMPT[3]), LONG.responses)
    assert (row.prompt_ids, list(row.response_ids)) == without
    assert (row.dropped_turns, row.cut) == (2, (False, False))


def test_no_more_old_turns_go_than_must(template):
    """Three questions; room for two of them."""
    turns = ("user: one one one", "assistant: a", "user: two", "assistant: b", "user: three")
    example = Example(messages(*turns), ("c", "r"), "f:1")
    shorter = template.encode(messages(*turns[2:]), ("c", "r"))
    row = encode(example, template, cutoff_len=len(shorter[0]) + len(shorter[1][0]))
    assert (row.prompt_ids, row.dropped_turns) == (shorter[0], 2)


def test_responses_are_cut_at_their_end_and_lose_their_end_of_turn(template):
    """With the old turns gone and room for 3 tokens, each response keeps its first 3, which end nothing."""
    prompt_ids, responses = template.encode((PROMPT[0], PROMPT[3]), LONG.responses)
    row = encode(LONG, template, cutoff_len=len(prompt_ids) + 3)
    assert row.prompt_ids == prompt_ids and list(row.response_ids) == [ids[:3] for ids in responses]
    assert all(END_OF_TURN not in ids for ids in row.response_ids)
    assert (row.dropped_turns, row.cut) == (2, (True, True))


def test_only_the_response_that_is_too_long_is_cut(template):
    example = Example(messages("user: q"), ("A hen is a small bird that lays eggs.", "No."), "f:1")
    prompt_ids, responses = template.encode(example.messages, example.responses)
    row = encode(example, template, cutoff_len=len(prompt_ids) + len(responses[1]))
    assert row.cut == (True, False) and row.response_ids[1] == responses[1]


def test_a_last_turn_that_leaves_no_room_is_a_bad_row(template):
    """One response token must fit; at one token less the row is refused, with the number that it needs."""
    length = len(template.encode((PROMPT[0], PROMPT[3]), LONG.responses)[0])
    assert encode(LONG, template, cutoff_len=length + 1).cut == (True, True)
    with pytest.raises(BadRow, match=rf"rows\.jsonl:7: .* take {length} tokens .* cutoff_len={length};"):
        encode(LONG, template, cutoff_len=length)


def test_responses_that_are_equal_once_cut_are_a_bad_row(template):
    """`A hen eats.` and `A hen drinks.` differ after their common beginning only."""
    example = Example(messages("user: q"), ("A hen eats.", "A hen drinks."), "rows.jsonl:7")
    prompt_ids, (chosen, rejected) = template.encode(example.messages, example.responses)
    same = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    assert encode(example, template, cutoff_len=len(prompt_ids) + same + 1).cut == (True, True)
    with pytest.raises(BadRow, match=rf"rows\.jsonl:7: .*equal within cutoff_len={len(prompt_ids) + same}"):
        encode(example, template, cutoff_len=len(prompt_ids) + same)


def test_responses_that_the_template_makes_equal_are_not_blamed_on_cutoff_len():
    """A template that trims white space makes `yes` and `yes ` one response; no cutoff_len would help."""
    tokenizer = Tokenizer(WORLD / "model")
    tokenizer.chat_template = str(tokenizer.chat_template).replace("message.content", "message.content.strip()")
    with pytest.raises(BadRow, match=r"f:1: .*equal") as caught:
        encode(Example(messages("user: q"), ("yes", "yes "), "f:1"), ChatTemplate("auto", tokenizer), cutoff_len=512)
    assert "cutoff_len" not in str(caught.value)


@pytest.mark.parametrize("text", ["a\U00100000b", "a\ud800b"], ids=["reserved_mark", "lone_surrogate"])
def test_text_that_the_tokenizer_cannot_take_is_a_bad_row(template, text):
    """The mark is reserved by the tokenizer; half a surrogate pair is valid in JSON and no Unicode text."""
    bad = Example(messages("user: q"), (text, "r"), "rows.jsonl:7")
    good = Example(messages("user: q"), ("c", "r"), "rows.jsonl:8")
    with pytest.raises(BadRow, match=r"rows\.jsonl:7: "):
        encode(bad, template, cutoff_len=512)
    encoded, skipped = encode_all([bad, good], template, cutoff_len=512, on_bad_row="skip")
    assert [row.example for row in encoded] == [good] and len(skipped) == 1


def test_encode_all_stops_or_skips_and_never_returns_nothing(template):
    short = Example(messages("user: q"), ("c", "r"), "f:1")
    tight = len(template.encode(short.messages, short.responses)[0]) + 1
    with pytest.raises(BadRow, match=r"rows\.jsonl:7"):
        encode_all([short, LONG], template, cutoff_len=tight, on_bad_row="stop")
    encoded, bad = encode_all([short, LONG, short], template, cutoff_len=tight, on_bad_row="skip")
    assert [row.example for row in encoded] == [short, short] and len(bad) == 1 and "rows.jsonl:7" in bad[0]
    with pytest.raises(ValueError, match=r"no row is left after tokenization \(1 bad\): rows\.jsonl:7"):
        encode_all([LONG], template, cutoff_len=tight, on_bad_row="skip")


# --- many rows at once ---


def one_by_one(example: Example, template: ChatTemplate, cutoff_len: int) -> Encoded | str:
    """The slow twin: one row, one piece of text after the other; a bad row is its message."""
    tokenizer = template.tokenizer
    system = [m for m in example.messages[:1] if m["role"] == "system"]
    turns = list(example.messages[len(system) :])
    for dropped in range(0, len(turns), 2):
        try:
            prompt, rendered = template.parts([*system, *turns[dropped:]], example.responses)
        except ValueError as error:
            return f"{example.source}: cannot be tokenized ({error})"
        (ids,) = tokenizer.encode_rendered([prompt])
        responses = [tokenizer.encode_rendered([text], after=prompt)[0] for text in rendered]
        if len(ids) + max(map(len, responses)) <= cutoff_len:
            break
    room = max(0, cutoff_len - len(ids))
    cut = tuple(response[:room] for response in responses)
    if not room or (len(cut) == 2 and cut[0] == cut[1]):
        return "bad"
    return Encoded(ids, cut, example, dropped, tuple(len(response) > room for response in responses))


def assert_a_batch_is_its_rows(examples: list[Example], template: ChatTemplate, cutoff_len: int) -> None:
    for example, result in zip(examples, encode_batch(examples, template, cutoff_len), strict=True):
        expected = one_by_one(example, template, cutoff_len)
        if isinstance(result, BadRow):
            assert expected in ("bad", str(result))
        else:
            assert result == expected


def long_talks(texts: list[str], count: int) -> list[Example]:
    """Pairs after 1 to 9 turns, every second with a system turn, from the texts by chance; some spell specials."""
    rng = random.Random(0)
    spoilt = [*texts, "<|im_end|>", "a <|im_", "x\U00100000"]
    talks = []
    for i in range(count):
        head = messages("system: be kind") if i % 2 else ()
        turns = [{"role": ("user", "assistant")[k % 2], "content": rng.choice(spoilt)} for k in range(1 + 2 * (i % 5))]
        talks.append(Example((*head, *turns), tuple(rng.sample(texts, 2)), f"talk:{i}"))
    return talks


@pytest.mark.parametrize("cutoff_len", [256, 40])
def test_all_rows_of_the_built_in_world_have_in_a_batch_the_ids_that_they_have_alone(template, cutoff_len):
    examples, _ = read_examples(WORLD / "data" / "eval.jsonl", stage="dpo", on_bad_row="stop")
    assert_a_batch_is_its_rows(examples, template, cutoff_len)


def test_a_batch_of_long_talks_loses_of_each_row_what_it_loses_alone(template):
    examples, _ = read_examples(WORLD / "data" / "eval.jsonl", stage="dpo", on_bad_row="stop", max_samples=50)
    talks = long_talks([e.responses[0] for e in examples], 60)
    results = encode_batch(talks, template, 50)
    assert {r.dropped_turns for r in results if isinstance(r, Encoded)} >= {0, 2, 4}
    assert {type(r) for r in results} == {Encoded, BadRow} and any(r.cut[0] for r in results if isinstance(r, Encoded))
    assert_a_batch_is_its_rows(talks, template, 50)


@pytest.mark.real
@pytest.mark.parametrize("name", ["dpo_en_demo", "dpo_zh_demo", "polite_impolite"])
def test_all_real_rows_have_in_a_batch_the_ids_that_they_have_alone(real, smollm2, name):
    examples, _ = read_examples(real / "preferences" / f"{name}.json", stage="dpo", on_bad_row="skip")
    talks = long_talks([text for e in examples[:40] for text in e.responses], 40)
    for where, which in ((smollm2, "auto"), (real / "tokenizers" / "qwen2.5", "qwen")):
        template = ChatTemplate(which, Tokenizer(where))
        for cutoff_len in (2048, 256):
            assert_a_batch_is_its_rows(examples + talks, template, cutoff_len)


# --- where a prompt ends, and what is scored ---


def template_specials(template: ChatTemplate, ids: list[int]) -> list[int]:
    return [i for i in ids if i in set(template.tokenizer.special_ids.values())]


def assert_ends_stand_on_whole_responses_alone(examples: list[Example], template: ChatTemplate, cutoff_len: int) -> int:
    """One special token ends a response that keeps its text whole, none any other; returns how many are cut short."""
    short = 0
    for row in encode_batch(examples, template, cutoff_len):
        if not isinstance(row, Encoded):
            continue
        _, whole = template.encode(row.example.messages[-1:], row.example.responses)
        for ids, all_ids, cut in zip(row.response_ids, whole, row.cut, strict=True):
            ends = template_specials(template, ids)
            assert cut == (len(ids) < len(all_ids)) and ids == all_ids[: len(ids)]
            # What the template writes after the end of turn may be cut off alone.
            end = next(i for i, token in enumerate(all_ids) if token in template.stop_ids)
            assert ends == ([all_ids[end]] if len(ids) > end else [])
            short += len(ids) <= end
    return short


def test_an_end_of_turn_stands_only_on_a_response_whose_text_is_whole(template):
    examples, _ = read_examples(WORLD / "data" / "eval.jsonl", stage="dpo", on_bad_row="stop", max_samples=100)
    assert assert_ends_stand_on_whole_responses_alone(examples, template, 256) == 0
    assert assert_ends_stand_on_whole_responses_alone(examples, template, 36) > 50


@pytest.mark.real
def test_an_end_of_turn_stands_only_on_a_whole_real_response(real, smollm2):
    examples, _ = read_examples(real / "preferences" / "dpo_en_demo.json", stage="dpo", on_bad_row="stop")
    for where, which in ((smollm2, "auto"), (real / "tokenizers" / "qwen2.5", "qwen")):
        template = ChatTemplate(which, Tokenizer(where))
        assert assert_ends_stand_on_whole_responses_alone(examples, template, 512) > 50


class AnyPolicy:
    """Hidden states that are free to choose: the gradient of a loss with respect to them says which are scored."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.head_weight_VD = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))

    def __call__(self, stream: Stream) -> torch.Tensor:
        shape = len(stream.input_ids_T), 8
        self.hidden_TD = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        return self.hidden_TD


def loss_of(name: str) -> PreferenceObjective:
    options = OFF | {"beta": 0.3}
    kind = UnpairedObjective if PREF_LOSSES[name].unpaired else PreferenceObjective
    return kind(preference_loss([name], None, options), lambda stream, rows: torch.zeros(len(stream.target_R)))


KINDS = {
    "pairs": (("yes", "no way"), None, lambda: loss_of("sigmoid")),
    "labelled": (("yes",), True, lambda: loss_of("apo_zero_unpaired")),
    "labelled, with a mismatched response": (("yes",), False, lambda: loss_of("kto")),
    "sft": (("yes",), None, SFTObjective),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_reads_response_tokens_and_no_other(template, kind):
    """Each is read where it is predicted: at the token before it, the prompt's last for the first."""
    responses, label, objective = KINDS[kind]
    examples = [Example(PROMPT, responses, "f:1", label=label), Example(PROMPT[1:2], responses, "f:2", label=label)]
    rows, _ = encode_all(examples, template, cutoff_len=512, on_bad_row="stop")
    if "mismatched" in kind:
        rows = with_mismatched(rows, 512)
    policy, stream = AnyPolicy(), to_stream(rows, torch.device("cpu"))
    measured = objective().measure(policy, stream, rows, rows)
    objective().losses(measured).sum().backward()
    expected, targets, start = set(), [], 0
    for row in rows:
        last = start + len(row.prompt_ids) - 1
        start = last + 1
        for j, ids in enumerate(row.response_ids):
            targets += ids
            if j == 0 or "mismatched" not in kind:  # of that one KTO takes no gradient
                expected |= {last, *range(start, start + len(ids) - 1)}
            start += len(ids)
    assert set(policy.hidden_TD.grad.abs().sum(1).nonzero().flatten().tolist()) == expected
    assert stream.target_R.tolist() == targets and start == len(stream.input_ids_T)
    before = stream.input_ids_T[stream.predictor_R].tolist()
    assert before == [i for row in rows for ids in row.response_ids for i in [row.prompt_ids[-1], *ids[:-1]]]


# --- what is said of it ---


@pytest.mark.parametrize(
    ("responses", "labels", "counts"),
    [
        (("A hen is a small bird.", "No."), (None, None), "2 chosen"),
        (("No.", "A hen is a small bird."), (None, None), "2 rejected"),
        (("A hen is a small bird.",), (None, None), "2"),
        (("A hen is a small bird.",), (True, False), "1 desirable, 1 undesirable"),
        (("No.",), (None, None), "0"),
    ],
)  # fmt: skip
def test_what_cutoff_len_took_is_counted_per_side(template, responses, labels, counts):
    """Two rows, one of them with old turns, and room for `No.` with its end."""
    whole = encode(Example((PROMPT[0], PROMPT[3]), ("No.",), "f:1"), template, 512)
    talks = (PROMPT, (PROMPT[0], PROMPT[3]))
    examples = [Example(talk, responses, "f:1", label=label) for talk, label in zip(talks, labels, strict=True)]
    rows, _ = encode_all(examples, template, cutoff_len=whole.tokens, on_bad_row="stop")
    assert describe_cuts(rows) == [f"cutoff_len: 1 rows lost old turns; responses cut at their end: {counts}"]
    assert describe_cuts(encode_all(examples, template, cutoff_len=512, on_bad_row="stop")[0]) == []
