"""Chat templates: from messages to token ids, with an exact boundary between prompt and response.

A template renders the prompt (every message and the generation header) and then the response: everything it writes
after that header, end-of-turn token and trailing newline included. The two are encoded apart, so both sides of a pair
share the prompt's ids by construction and no token straddles the boundary.

Named templates are a few fields of data; `auto` is the checkpoint's own Jinja, in jinja2's immutable sandbox. Text
inside messages never becomes a special token (see models.tokenizer). A date that a template asks for is an argument,
never today: a prompt that changes with the day would change the results with it. Left out: tools and images.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.tokenizer import Tokenizer

Message = dict[str, str]
"""{"role": one of ROLES, "content": text}"""
ROLES = ("system", "user", "assistant")
Renderer = Callable[[Sequence[Message], bool], str]
"""(messages, add_generation_prompt) -> text"""


@dataclass(frozen=True)
class Template:
    """A chat format as data: what stands around every message, and what opens the model's turn."""

    turn: str
    """around one message, with {role} and {content}."""
    header: str
    """opens the assistant's turn; `turn` for the assistant must begin with it."""
    start: str = ""
    """before the first message; {bos} is the tokenizer's."""
    default_system: str | None = None
    trim: bool = False
    """strip white space around every message, as Llama 3's template does."""
    thoughts: bool = False
    """Qwen3's <think> ... </think>: taken out of the history, and a final assistant message has one, be it empty."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, bos: str = "") -> str:
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        text = self.start.format(bos=bos)
        for i, message in enumerate(messages):
            content = message["content"].strip() if self.trim else message["content"]
            is_tools = content.startswith("<tool_response>") and content.endswith("</tool_response>")
            if self.thoughts and message["role"] == "user" and is_tools:
                raise ValueError("template=qwen3: a user turn is a <tool_response>; tools are left out here, use auto")
            if self.thoughts and message["role"] == "assistant":
                thought, content = _split_thought(content)
                if i == len(messages) - 1:
                    content = f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n")
            text += self.turn.format(role=message["role"], content=content)
        return text + self.header if add_generation_prompt else text


def _split_thought(content: str) -> tuple[str, str]:
    """(thought, answer) as Qwen3's Jinja parts them: by the first and the last </think>."""
    if "</think>" not in content:
        return "", content
    thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1]
    return thought.strip("\n"), content.split("</think>")[-1].lstrip("\n")


_CHATML = Template(turn="<|im_start|>{role}\n{content}<|im_end|>\n", header="<|im_start|>assistant\n")
TEMPLATES = {
    "chatml": _CHATML,  # Qwen3-Instruct-2507's too
    "qwen": replace(_CHATML, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": replace(_CHATML, thoughts=True),
    "llama3": Template(
        start="{bos}",
        turn="<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        trim=True,
    ),
    # For base models: turns are lines, and the only special token is the EOS that ends a response.
    "plain": Template(turn="{content}\n", header=""),
}


class ChatTemplate:
    """One template bound to one tokenizer. `source` is all that it says: Jinja, or the fields of the named one."""

    def __init__(self, name: str, tokenizer: Tokenizer, date_string: str | None = None):
        """name: a key of TEMPLATES, or `auto` for the checkpoint's own.

        date_string: what a dated template calls today; None: its own fixed default, where it has one.

        Raises ValueError where the name is unknown, `auto` finds none, the tokenizer lacks the template's specials, or
        the template reads no date and one is given.
        """
        if name != "auto" and name not in TEMPLATES:
            raise ValueError(f"template={name}: expected auto, {', '.join(TEMPLATES)}")
        if name == "auto" and not tokenizer.chat_template:
            raise ValueError(f"template=auto: the checkpoint has no chat template; name one of {', '.join(TEMPLATES)}")
        self.name = name
        self.tokenizer = tokenizer
        self.source = tokenizer.chat_template if name == "auto" else repr(TEMPLATES[name])
        if name == "auto":
            self.render = _jinja_renderer(
                tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, date_string
            )
        else:
            if date_string is not None:
                raise ValueError(f"date_string={date_string} with template={name}, which reads no date; leave it out")
            bos = tokenizer.bos_token or ""
            self.render = lambda messages, header: TEMPLATES[name].render(messages, header, bos)
            sample = self.render([{"role": "user", "content": ""}], True)
            for special in ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
                if special in sample and special not in tokenizer.special_ids:
                    raise ValueError(f"template={name}: the tokenizer has no token {special}; is it of another family?")
        if name == "plain" and tokenizer.eos_token not in tokenizer.special_ids:
            raise ValueError("template=plain: the tokenizer names no eos_token, so nothing would end a response")

    def parts(self, messages: Sequence[Message], responses: Sequence[str]) -> tuple[str, list[str]]:
        """The rendered prompt and each rendered response, escaped for Tokenizer.encode_rendered."""
        for message in messages:
            if message["role"] not in ROLES:  # it is written as it stands, so it could hold a special token
                raise ValueError(f"a message has the role {message['role']!r}; expected one of {', '.join(ROLES)}")
        escaped = [{"role": m["role"], "content": self.tokenizer.escape(m["content"])} for m in messages]
        prompt = self.render(escaped, True)
        rendered = []
        for response in responses:
            if self.name == "plain":
                rendered.append(self.tokenizer.escape(response) + str(self.tokenizer.eos_token))
                continue
            answer = {"role": "assistant", "content": self.tokenizer.escape(response)}
            whole = self.render([*escaped, answer], False)
            if not whole.startswith(prompt):
                raise ValueError(
                    f"template={self.name}: the prompt renders differently once a response follows it, so where the "
                    "response begins is undefined; choose a template by name"
                )
            rendered.append(whole[len(prompt) :])
        return prompt, rendered

    def encode(self, messages: Sequence[Message], responses: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """(prompt ids, ids of each response); the responses end with the template's end-of-turn."""
        (ids,) = self.tokenizer.encode_continued([self.parts(messages, responses)])
        return ids

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generated response: the tokenizer's, and the special that the template puts after one."""
        _, (ending,) = self.encode([{"role": "user", "content": "x"}], ["x"])
        specials = set(self.tokenizer.special_ids.values())
        return self.tokenizer.stop_ids | set([i for i in ending if i in specials][-1:])


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: a mark for trainers that mask by it; here it is what stands inside."""

    tags = {"generation"}  # noqa: RUF012, as the base class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache
def _jinja_renderer(source: str, bos_token: str | None, eos_token: str | None, date_string: str | None) -> Renderer:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    # As transformers has it; jinja2's own escapes the text for HTML.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    date = {} if date_string is None else {"date_string": date_string, "strftime_now": lambda format: date_string}
    try:
        template = environment.from_string(source)
        reads_date = meta.find_undeclared_variables(environment.parse(source)) & {"date_string", "strftime_now"}
    except jinja2.TemplateError as error:
        raise ValueError(f"template=auto: the checkpoint's chat template does not parse ({error})") from None
    if date and not reads_date:
        raise ValueError(f"date_string={date_string} with template=auto: the checkpoint's reads no date; leave it out")

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt,
                bos_token=bos_token or "", eos_token=eos_token or "", **date,
            )  # fmt: skip
        except Exception as error:  # a template can raise whatever its expressions do
            way_out = "; it asks for the date: set date_string" if "'strftime_now' is undefined" in str(error) else ""
            raise ValueError(
                f"template=auto: the checkpoint's chat template refused the messages ({error}){way_out}"
            ) from None

    return render
