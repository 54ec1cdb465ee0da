"""The command line: what the user typed becomes arguments for Hydra, and what went wrong becomes one line.

A LLaMA-Factory file runs with config_file=PATH: its keys become overrides that stand before the command line's, so
precedence is config.yaml, groups, config_file, command line. Keys of that project that change nothing here are accepted
and named once; any other unknown key is refused with the nearest one that is known.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

CONF = Path(__file__).parent.parent / "conf"
GROUPS = ("model", "loss", "data", "experiment")
FLAGS_WITH_VALUE = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
)

# LLaMA-Factory's and the Hugging Face trainer's keys that change no result here, with the values that hold for.
ANY = object()
WITHOUT_EFFECT: dict[str, Any] = {
    "overwrite_cache": ANY, "preprocessing_num_workers": ANY, "preprocessing_batch_size": ANY,
    "dataloader_num_workers": ANY, "dataloader_pin_memory": ANY, "ddp_timeout": ANY, "ddp_find_unused_parameters": ANY,
    "trust_remote_code": ANY, "report_to": ANY, "run_name": ANY, "logging_dir": ANY, "log_level": ANY,
    "logging_first_step": ANY, "include_num_input_tokens_seen": ANY, "flash_attn": ANY, "use_fast_tokenizer": True,
    "low_cpu_mem_usage": ANY, "use_cache": ANY, "cache_dir": ANY, "do_eval": ANY, "do_predict": False,
    "print_param_status": ANY, "remove_unused_columns": ANY, "save_only_model": ANY, "disable_tqdm": ANY,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "hub_token": None,
    "upcast_layernorm": ANY, "packing": False, "deepspeed": None,
    "quantization_bit": None, "additional_target": None, "use_dora": False, "infer_backend": "huggingface",
}  # fmt: skip


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with `error: ...` on what a user can get wrong. HYDRA_FULL_ERROR=1 shows the traceback.

    Ctrl-C where nothing listens to it is no error: exit status 130.
    """
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


@contextmanager
def while_read() -> Iterator[None]:
    """What is printed within goes to whoever reads it for as long as they do (`| head`)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # they have enough, and Python is not to try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Whatever a row holds or a model writes, a terminal is not to obey it."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def prepare_command_line(schema: type) -> None:
    """Replace sys.argv by its expansion (see expand_arguments), and print the notes."""
    with one_line_errors():
        sys.argv[1:], notes = expand_arguments(sys.argv[1:], schema)
    for note in notes:
        print(f"note: {note}")


def expand_arguments(argv: list[str], schema: type) -> tuple[list[str], list[str]]:
    """(arguments for Hydra, notes for the user) from a command line.

    config_file=PATH is replaced by its keys, standing first; keys without effect are dropped with a note; every other
    key and value is checked against the schema, so that a mistake is one line and not Hydra's several. A schema may
    have class variables beside its keys: STANDS_FOR, functions from a key's value to the keys that it stands for,
    NOT_THE_WORLDS, keys that a run on the built-in world does not name, and WITHOUT_EFFECT, more of that table.
    """
    flags, typed = _split_flags(argv)
    sweeping = bool({"-m", "--multirun"} & set(flags))
    ineffective: list[str] = []
    stand_ins = getattr(schema, "STANDS_FOR", {})
    without_effect = WITHOUT_EFFECT | getattr(schema, "WITHOUT_EFFECT", {})
    stood_for: list[str] = []
    from_files: list[str] = []
    arguments: list[str] = []
    for argument in typed:
        key, _, text = argument.partition("=")
        if argument.startswith("hydra"):
            arguments.append(argument)
        elif argument.startswith("~"):
            if argument[1:] not in GROUPS:
                raise ValueError(f"{argument}: every key needs a value; only a group can be left out")
            arguments.append(argument)
        elif "=" not in argument:
            raise ValueError(f"{argument}: expected key=value")
        elif key == "config_file":
            for name, value in read_config_file(Path(text)).items():
                if not _without_effect(name, value, without_effect, ineffective):
                    _check_key(name, value, schema)
                    if name in stand_ins:
                        stood_for += [f"{k}={_quote(v)}" for k, v in stand_ins[name](value).items()]
                    from_files.append(f"{name}={_quote(value)}")
        elif key in GROUPS or key.partition("@")[0] in GROUPS:
            _check_group(key, text)
            arguments.append(f"~{key}" if text == "null" else argument)
        elif key in without_effect:
            _without_effect(key, next(_override_values(argument)), without_effect, ineffective)
        else:
            if key in stand_ins:
                stood_for += [f"{k}={_quote(v)}" for k, v in stand_ins[key](text).items()]
            # Outside a multirun a comma in a text (lora_target=q_proj,v_proj) is a comma and no sweep.
            if not sweeping and "," in text and _is_text(key, schema) and text[0] not in "'\"[{":
                argument = f"{key}={_quote(text)}"
            for value in _override_values(argument):
                _check_key(key, value, schema)
            arguments.append(argument)
    expanded = stood_for + from_files + arguments
    named = {a.lstrip("~").partition("=")[0] for a in expanded}
    notes = [f"without effect here, and left out: {', '.join(ineffective)}"] if ineffective else []
    notes += _groups_that_lose(arguments, from_files)
    # The default experiment's tuned values (its learning rate above all) belong to the built-in world. A run on
    # another model or data must not inherit them in silence.
    own = sorted(named & getattr(schema, "NOT_THE_WORLDS", set()))
    if own and "experiment" not in named:
        expanded.append("~experiment")
        notes.append(f"{own[0]} is given: the built-in world's settings (experiment=world) are not used")
    return flags + expanded, notes


def refuse_unset(cfg: DictConfig, needed: Sequence[str] | None = None, **other_ways: str) -> None:
    """ValueError for a key that nobody gave a value. other_ways: how else a key can be given one, by its name.

    needed: the keys that must have one other than null or nothing; None: all, and null is a value.
    """
    for key in map(str, cfg) if needed is None else needed:
        if OmegaConf.is_missing(cfg, key) or (needed is not None and cfg[key] in (None, [])):
            raise ValueError(f"{key} is not set; pass {key}=...{other_ways.get(key, '')}")


def _split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """(Hydra's flags with their values, everything else): -m may stand anywhere, expanded keys may not follow it."""
    flags: list[str] = []
    typed: list[str] = []
    for argument in argv:
        takes_value = bool(flags) and flags[-1] in FLAGS_WITH_VALUE
        (flags if argument.startswith("-") or takes_value else typed).append(argument)
    return flags, typed


def _groups_that_lose(arguments: list[str], from_files: list[str]) -> Iterator[str]:
    """A note for each group whose keys a config_file sets too: it wins, which is the rule and still a surprise."""
    in_files = {a.partition("=")[0] for a in from_files}
    for argument in arguments:
        group, _, choice = argument.partition("=")
        path = CONF / group / f"{choice}.yaml"
        both = sorted(in_files & OmegaConf.load(path).keys()) if group in GROUPS and path.is_file() else []
        if both:
            yield f"config_file stands above {argument}, and sets {', '.join(both)} too; its values are used"


def read_config_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"config_file={path}: no such file")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # YAML's and OmegaConf's errors have no common base, and run over many lines
        reason = " ".join(str(error).split())
        raise ValueError(f"config_file={path}: not readable as YAML ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"config_file={path}: expected keys and values at the root")
    return {str(key): value for key, value in content.items()}


def _without_effect(key: str, value: Any, table: dict[str, Any], ineffective: list[str]) -> bool:
    if key not in table:
        return False
    allowed = table[key]
    if allowed is not ANY and value != allowed:
        accepted = "null" if allowed is None else allowed
        raise ValueError(f"{key}={value}: is not done here; only {key}={accepted} is accepted")
    ineffective.append(key)
    return True


def _check_key(key: str, value: Any, schema: type) -> None:
    known = [f.name for f in fields(schema)]
    if key not in known:
        if key in GROUPS:
            raise ValueError(f"{key}={value}: a group stands on the command line ({key}={value}), not in a config_file")
        near = difflib.get_close_matches(key, [*known, "config_file", *GROUPS], n=1)
        hint = f"did you mean {near[0]}?" if near else "conf/ lists every key"
        raise ValueError(f"{key}={value}: unknown key; {hint}")
    if isinstance(value, str) and "${" in value:
        return
    try:
        OmegaConf.update(OmegaConf.structured(schema), key, value)
    except OmegaConfBaseException:
        raise ValueError(f"{key}={value}: expected {_type_of(schema, key)}") from None


def _type_of(schema: type, key: str) -> str:
    """The type of a key, in words."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}
    words |= {"list[str]": "a list like [a,b]", "list[int]": "a list like [5,17]"}
    kind = next(f.type for f in fields(schema) if f.name == key)
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    return " or ".join(words[part] for part in name.split(" | "))


def _is_text(key: str, schema: type) -> bool:
    return any(f.name == key and ("str" in str(f.type) or f.type is Any) for f in fields(schema))


def _check_group(key: str, text: str) -> None:
    folder = CONF / key.partition("@")[0]
    choices = sorted(p.stem for p in folder.glob("*.yaml"))
    # Of glob(...), Hydra matches the files itself; null leaves the group out.
    given = [] if text == "null" or text.startswith("glob(") else _override_values(f"{key}={text}")
    for choice in given:
        if choice not in choices:
            near = difflib.get_close_matches(str(choice), choices, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(choices)}"
            raise ValueError(f"{key}={choice}: no such file in conf/{key}; {hint}")


def _override_values(argument: str) -> Iterator[Any]:
    """The value of an override, or every value of a sweep over it."""
    try:
        override = OverridesParser.create().parse_override(argument)
        texts = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else None
    except HydraException:
        raise ValueError(f"{argument}: not readable as key=value; quote values with commas or brackets") from None
    if texts is not None:
        yield from map(_parse, texts)
    elif override.is_sweep_override():
        raise ValueError(f"{argument}: a sweep here is a list, choice(...) or range(...)")
    else:
        yield override.value()


def _parse(text: str) -> Any:
    """The value that Hydra will see in one job of a sweep; text where it is not YAML."""
    try:
        return OmegaConf.from_dotlist([f"x={text}"]).x
    except YAMLError:
        return text


def _quote(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(_quote(item) for item in value) + "]"
    # In the grammar a backslash escapes only before a quote, and so must be doubled only there.
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), str(value))
    return f"'{escaped}'"
