"""The chat: every turn sees those before it, what is shown is what was drawn, and nothing else is on stdout."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

import models.chat
from dpo.data import read_examples
from models.chat import COMMANDS, Chat, ChatConfig, before_stop, talk
from models.command import CONF, expand_arguments
from models.generate import StopStrings, generate, stream_tokens
from models.lora import adapter_tensors, inject_lora, save_adapter
from models.packed import packed
from models.sampling import GREEDY, Sampling
from models.weights import WORLD, load_model

SNAIL, DOG, OWL = "May I pet a snail?", "Where does a dog live?", "Tell me what an owl eats."


def config(*arguments: str) -> DictConfig:
    expanded, _ = expand_arguments(["model_name_or_path=world", "device=cpu", *arguments], ChatConfig)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("chat", expanded)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


@pytest.fixture
def say(monkeypatch, capsys) -> Callable[..., tuple[list[str], str]]:
    """say(chat, *lines): the lines that come back on stdout, and all of stderr."""

    def say(chat: Chat, *lines: str) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        with packed(chat.model):
            talk(chat)
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return say


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """The prompt ids of every answer, as the model gets them."""
    seen: list[list[int]] = []

    def spy(model, prompt, **settings) -> Iterator[int]:
        seen.append(list(prompt))
        return stream_tokens(model, prompt, **settings)

    monkeypatch.setattr(models.chat, "stream_tokens", spy)
    return seen


def ids(chat: Chat, *messages: dict[str, str]) -> list[int]:
    return chat.template.encode(messages, [])[0]


# --- the conversation ---


def test_every_turn_sees_all_turns_before_it(say, prompts):
    chat = Chat(config())
    (first, second, _), _ = say(chat, SNAIL, DOG, OWL)
    turns = [user(SNAIL), assistant(first), user(DOG), assistant(second), user(OWL)]
    assert prompts == [ids(chat, *turns[:1]), ids(chat, *turns[:3]), ids(chat, *turns)]
    assert first in chat.template.tokenizer.decode(prompts[2])


def test_reset_forgets_the_turns_and_keeps_the_system_message(say, prompts):
    chat = Chat(config("default_system=Be kind."))
    say(chat, SNAIL, "/reset", DOG)
    assert prompts[1] == ids(chat, system("Be kind."), user(DOG))


def test_system_replaces_the_system_message_and_keeps_the_turns(say, prompts):
    chat = Chat(config("default_system=Be kind."))
    (first, second, _), _ = say(chat, SNAIL, "/system   Be  rude! ", DOG, "/system", OWL)
    turns = [user(SNAIL), assistant(first), user(DOG), assistant(second), user(OWL)]
    assert prompts[1] == ids(chat, system("Be  rude!"), *turns[:3])
    assert prompts[2] == ids(chat, *turns)


def test_old_turns_are_forgotten_whole_where_they_leave_no_room_and_it_is_said_once(say, monkeypatch, tmp_path):
    """512 positions, of which an answer may have 300, so the half: 256 are left for what was said."""
    chat = Chat(config("max_new_tokens=300", "default_system=Be kind."))
    prompts: list[list[int]] = []
    answer = chat.template.tokenizer.encode(["It leaves a trail of slime behind. Look, but do not touch it."])[0]
    monkeypatch.setattr(models.chat, "stream_tokens", lambda model, prompt, **_: prompts.append(prompt) or answer)
    questions = [SNAIL + " snail" * (5 * turn % 17) for turn in range(30)]
    answers, err = say(chat, *questions, f"/save {tmp_path / 'chat.jsonl'}")
    assert err.count("outgrows the model's 512 positions: its oldest turns are forgotten") == 1
    messages = [m for q, a in zip(questions, answers, strict=True) for m in (user(q), assistant(a))]
    for turn, prompt in enumerate(prompts):
        tails = (ids(chat, system("Be kind."), *messages[first : 2 * turn + 1]) for first in range(0, 2 * turn + 1, 2))
        assert prompt == next(tail for tail in tails if len(tail) <= 256)
    saved = json.loads((tmp_path / "chat.jsonl").read_text())["conversations"]
    assert len(saved) == 1 + 2 * 30  # what the model forgot was said all the same


def test_a_message_longer_than_the_model_is_refused_and_nothing_is_forgotten(say, prompts):
    chat = Chat(config())
    (first, _), err = say(chat, SNAIL, "snail " * 600, DOG)
    assert re.search(r"^error: this message needs \d{3,} of the model's 512 positions; shorten it$", err, re.M)
    assert prompts[1] == ids(chat, user(SNAIL), assistant(first), user(DOG))


def test_an_answer_ends_with_the_models_last_position(say, monkeypatch):
    asked = []
    monkeypatch.setattr(models.chat, "stream_tokens", lambda m, prompt, **kw: asked.append((len(prompt), kw)) or [])
    say(Chat(config()), "snail " * 400, SNAIL)
    (length, settings), (_, short) = asked
    assert 256 < length < 512 and length + settings["max_new_tokens"] == 512
    assert short["max_new_tokens"] > 256


# --- what is shown ---


def test_what_is_shown_is_what_generate_draws_from_seed_and_the_seeds_after_it(say):
    chat = Chat(config("temperature=1.5", "top_k=20", "top_p=0.9", "min_p=0.01", "seed=5", "max_new_tokens=60"))
    shown, _ = say(chat, SNAIL, "/reset", SNAIL, "/reset", SNAIL)
    answers = generate(
        chat.model, [ids(chat, user(SNAIL))], samples=3, max_new_tokens=60, stop_ids=chat.template.stop_ids,
        sampling=Sampling(1.5, 20, 0.9, 0.01), seeds=[5, 6, 7], batch_size=1,
    )  # fmt: skip
    assert shown == [chat.template.tokenizer.decode(answer.ids) for answer in answers]
    assert len(set(shown)) > 1


def test_an_answer_is_shown_while_it_is_drawn(monkeypatch, capsys):
    chat = Chat(config("temperature=0"))
    shown = []

    def spy(*arguments, **settings) -> Iterator[int]:
        for token in stream_tokens(*arguments, **settings):
            shown.append(capsys.readouterr().out)
            yield token

    monkeypatch.setattr(models.chat, "stream_tokens", spy)
    chat.answer(SNAIL)
    assert len([piece for piece in shown if piece]) > 5
    assert "".join(shown) + capsys.readouterr().out == chat.turns[1]["content"] + "\n"


def test_an_answer_as_long_as_allowed_is_said_to_be_cut(say):
    assert "(3 tokens, the most that this answer may have)" in say(Chat(config("max_new_tokens=3")), SNAIL)[1]
    assert say(Chat(config("temperature=0")), SNAIL)[1] == ""


def test_an_adapter_answers(say, tmp_path):
    model = load_model(WORLD / "model", dtype=torch.float32, device=torch.device("cpu"))
    inject_lora(model, rank=4, alpha=8.0, dropout=0.0, use_rslora=False, target="all", seed=0)
    for name, parameter in adapter_tensors(model).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path, base_model="world", dropout=0.0)
    greedy = ("temperature=0", "max_new_tokens=40")
    chat = Chat(config(f"adapter_name_or_path={tmp_path}", *greedy))
    (answer,), _ = say(chat, SNAIL)
    (expected,) = generate(
        model, [ids(chat, user(SNAIL))], samples=1, max_new_tokens=40, stop_ids=chat.template.stop_ids,
        sampling=GREEDY, seeds=[0], batch_size=1,
    )  # fmt: skip
    assert answer == chat.template.tokenizer.decode(expected.ids)
    assert [answer] != say(Chat(config(*greedy)), SNAIL)[0]


# --- stop strings ---

TEXT = st.text(alphabet="ab", max_size=3)


@given(pieces=st.lists(TEXT, max_size=8), strings=st.lists(TEXT.filter(bool), max_size=3))
def test_no_part_of_a_stop_string_is_shown_and_everything_else_is_at_once(pieces, strings):
    """What is held back is always a proper beginning of a stop string; what was shown is the text before the first."""
    stops = StopStrings(strings, tokenizer=None)
    seen, shown = "", ""

    def arriving() -> Iterator[str]:
        nonlocal seen
        for piece in pieces:
            held = seen.removeprefix(shown)
            assert held == "" or any(s.startswith(held) and s != held for s in strings)
            seen += piece
            yield piece

    for piece in before_stop(arriving(), stops):
        shown += piece
    ends = [seen.find(s) for s in strings if s in seen]
    assert shown == (seen[: min(ends)] if ends else "".join(pieces))


def test_an_answer_ends_before_its_first_stop_string_and_so_does_what_is_remembered(say):
    greedy = Chat(config("temperature=0"))
    (whole,), _ = say(greedy, SNAIL)
    assert "delicate" in whole
    chat = Chat(config("temperature=0", "stop_strings=[slime,' delic']"))
    assert say(chat, SNAIL)[0] == [whole[: whole.index(" delic")]]
    assert chat.turns == [user(SNAIL), assistant(whole[: whole.index(" delic")])]


# --- Ctrl-C, end of input, lines ---


def interrupted_after(tokens: int) -> Callable[..., Iterator[int]]:
    def stream(*arguments, **settings) -> Iterator[int]:
        for _, token in zip(range(tokens), stream_tokens(*arguments, **settings), strict=False):
            yield token
        raise KeyboardInterrupt

    return stream


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(say, monkeypatch, prompts):
    chat = Chat(config("temperature=0"))
    (whole,), _ = say(Chat(config("temperature=0")), SNAIL)
    with monkeypatch.context() as patch:
        patch.setattr(models.chat, "stream_tokens", interrupted_after(6))
        (part,), _ = say(chat, SNAIL)
    assert part and whole.startswith(part) and part != whole
    say(chat, DOG)
    assert prompts[-1] == ids(chat, user(SNAIL), assistant(part), user(DOG))


def test_ctrl_c_before_the_first_word_takes_the_question_back(say, monkeypatch, prompts):
    chat = Chat(config())
    with monkeypatch.context() as patch:
        patch.setattr(models.chat, "stream_tokens", interrupted_after(0))
        assert say(chat, SNAIL) == ([""], "")
    say(chat, DOG)
    assert prompts == [ids(chat, user(DOG))]


@pytest.mark.parametrize("event", [KeyboardInterrupt, EOFError])
def test_ctrl_c_and_ctrl_d_at_the_prompt_leave(event, monkeypatch):
    def ended(prompt: str) -> str:
        raise event

    monkeypatch.setattr("builtins.input", ended)
    talk(Chat(config()))


def test_exit_leaves_and_what_follows_is_not_read(say):
    answers, _ = say(Chat(config()), SNAIL, "/exit", DOG)
    assert len(answers) == 1 and sys.stdin.read() == DOG


def test_empty_lines_do_nothing_and_the_space_around_a_message_is_not_said(say):
    chat = Chat(config())
    answers, err = say(chat, "", "   ", f"  {SNAIL} ", "", " /no command")
    assert [m["content"] for m in chat.turns[::2]] == [SNAIL, "/no command"]
    assert len(answers) == 2 and err == ""


def test_a_terminal_shows_a_prompt_and_the_speed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(SNAIL))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    talk(Chat(config("temperature=0")))
    out, err = capsys.readouterr()
    assert out.startswith("\n> That is") and out.endswith(".\n\n> ")
    assert re.search(r"/help .*\n\(\d+ tokens, [\d.]+ per second\)\n", err)


# --- commands ---


def test_a_saved_conversation_is_a_row_to_train_on(say, tmp_path):
    chat = Chat(config())
    file = tmp_path / "my chats.jsonl"
    answers, err = say(chat, SNAIL, DOG, f"/save {file}", "/reset", "/system Grüß Gott.", OWL, f"/save {file}")
    assert len(answers) == 3 and err.count(f"saved: {file}\n") == 2
    (one, two), bad = read_examples(file, stage="sft", on_bad_row="stop")
    assert not bad
    assert one.messages == (user(SNAIL), assistant(answers[0]), user(DOG)) and one.responses == (answers[1],)
    assert two.messages == (system("Grüß Gott."), user(OWL)) and two.responses == (answers[2],)
    assert "Grüß" in file.read_text(encoding="utf-8")


COMMAND_MISTAKES = {
    "/sav x.jsonl": "/sav: no such command; did you mean /save?",
    "/etc/hosts": "/etc/hosts: no such command; /help lists them; with a space before it, it is a message",
    "/save": "/save : expected the name of a .jsonl file",
    "/save chat.txt": "/save chat.txt: expected the name of a .jsonl file",
    "/save no/such/chat.jsonl": "/save no/such/chat.jsonl: No such file or directory; name another file",
    "a lone \ud800": "text holds '\\ud800', half of a surrogate pair; remove it",
}


def test_a_mistake_is_one_line_on_stderr_and_the_conversation_goes_on(say):
    chat = Chat(config())
    answers, err = say(chat, SNAIL, *COMMAND_MISTAKES, DOG)
    assert err.splitlines() == [f"error: {message}" for message in COMMAND_MISTAKES.values()]
    assert len(answers) == 2 and len(chat.turns) == 4


def test_there_is_nothing_to_save_before_something_was_said(say, tmp_path):
    file = tmp_path / "chat.jsonl"
    assert say(Chat(config()), SNAIL, "/reset", f"/save {file}")[1].endswith(f"/save {file}: nothing was said yet\n")
    assert not file.exists()


def test_help_lists_every_command_and_every_command_is_one(say):
    assert COMMANDS == ["/reset", "/system", "/save", "/help", "/exit"]
    answers, err = say(Chat(config()), *reversed(COMMANDS[:-1]), "/exit")
    assert not answers and all(command in err for command in COMMANDS) and "no such command" not in err


# --- the config and the program ---


def test_schema_and_file_have_the_same_keys_in_the_same_order_and_each_is_explained():
    written = [str(key) for key in OmegaConf.load(CONF / "chat.yaml") if key not in ("defaults", "hydra")]
    assert written == [f.name for f in fields(ChatConfig)]
    assert all(f.default == "???" for f in fields(ChatConfig))
    lines = (CONF / "chat.yaml").read_text().splitlines()
    assert all(lines[i - 1][0] == "#" for i, line in enumerate(lines) if line.partition(":")[0] in written)


def test_a_model_can_be_named_by_its_group():
    assert config("model=qwen3-0_6b").template == "qwen3"


MISTAKES = {
    "temperature=-1": "temperature=-1.0: must be 0, which is greedy",
    "top_k=-1": "top_k=-1: must not be negative",
    "top_p=0": "top_p=0.0: must be above 0 and at most 1",
    "min_p=2": "min_p=2.0: must be at least 0",
    "max_new_tokens=0": "max_new_tokens=0: must be at least 1",
    "seed=-1": "seed=-1: must be at least 0 and below 2^32",
    "device=gpu": "device=gpu: expected auto, cpu or cuda",
    "template=lama3": "template=lama3: expected auto, ",
    "stop_strings=['']": "stop string '': must not be empty",
    "stop_strings=a,b": "stop_strings=a,b: expected a list like [a,b]",
    "adapter_name_or_path=/no/such": "/no/such/adapter_config.json: no such file",
    "model_name_or_path=/no/such": "model_name_or_path=/no/such: no such directory",
    "model_name_or_path=???": "model_name_or_path is not set; pass model_name_or_path=...",
    "system=x": "system=x: unknown key; did you mean default_system?",
    "infer_backend=vllm": "infer_backend=vllm: is not done here; only infer_backend=huggingface is accepted",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_is_refused_by_name_before_the_weights_are_read(argument, monkeypatch):
    monkeypatch.setattr(models.chat, "load_model", lambda *_, **__: pytest.fail("read the weights"))
    with pytest.raises(ValueError, match=f"^{re.escape(MISTAKES[argument])}"):
        Chat(config(argument))


def test_a_mistake_ends_the_program_with_one_line(monkeypatch, capsys):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["models.chat", "model_name_or_path=world", "max_new_tokens=0"])
    with pytest.raises(SystemExit) as caught:
        models.chat.main()
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "error: max_new_tokens=0: must be at least 1\n")


def test_a_reader_that_has_enough_ends_the_chat_quietly(monkeypatch, capsys):
    """`| head -1`: the pipe is closed at its other end. Nothing is said, now or when the program closes stdout."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", ["models.chat", "model_name_or_path=world", "max_new_tokens=4", "device=cpu"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{DOG}\n{SNAIL}\n"))
    with monkeypatch.context() as patch, open(writer, "w") as stdout:
        patch.setattr(sys, "stdout", stdout)
        models.chat.main()
        print("more")
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_llama_factory_file_and_a_pipe_give_answers_and_nothing_else(say, tmp_path):
    (tmp_path / "chat.yaml").write_text(
        "model_name_or_path: world\ntemplate: chatml\nfinetuning_type: lora\ntrust_remote_code: true\n"
        "infer_backend: huggingface  # choices: [huggingface, vllm]\ndefault_system: Be kind.\ntop_p: 0.9\n"
    )
    command = [sys.executable, "-m", "models.chat", f"config_file={tmp_path / 'chat.yaml'}", "seed=3", "device=cpu"]
    done = subprocess.run(command, input=f"{SNAIL}\n{DOG}", capture_output=True, text=True, cwd=CONF.parent)
    assert done.returncode == 0, done.stderr
    left_out = "finetuning_type, trust_remote_code, infer_backend"
    assert done.stderr == f"note: without effect here, and left out: {left_out}\n"
    in_process = Chat(config("template=chatml", "default_system=Be kind.", "top_p=0.9", "seed=3"))
    assert done.stdout.splitlines() == say(in_process, SNAIL, DOG)[0]


@pytest.mark.real
def test_a_greedy_answer_is_what_transformers_generates(say, smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    question = "What is the capital of France?"
    chat = Chat(config(f"model_name_or_path={smollm2}", "temperature=0", "max_new_tokens=40"))
    answers, _ = say(chat, question)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template([user(question)], add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    assert "\n".join(answers) == tokenizer.decode(answer, skip_special_tokens=True)
