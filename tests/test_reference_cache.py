"""The cache: what was computed is found, what depends on something else is not, and a damaged part is never used."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import dpo.build
import dpo.digests
import dpo.reference
import dpo.reference_cache
from dpo.build import WORLD, build_objective, build_policy, build_rows, build_template
from dpo.checkpoint import trainable
from dpo.config import EvalConfig, check
from dpo.evals.preference import preference
from dpo.formats import Example
from dpo.logprobs import token_logps
from dpo.metrics import TIMING_KEYS
from dpo.objective import to_stream
from dpo.reference import base_reference
from dpo.reference_cache import CachedReference, cached_reference, live_reference, reference_key
from dpo.run import check_resume
from dpo.tokens import Encoded
from models.command import expand_arguments
from models.config import parse_model_config
from models.transformer import Transformer
from train import sweep_job, train

CONF = str(Path(__file__).parent.parent / "conf")
SMALL = ["max_samples=12", "per_device_train_batch_size=4", "per_device_eval_batch_size=5", "logging_steps=1",
         "num_samples=0", "eval_dataset=null", "device=cpu"]  # fmt: skip
MODEL = {
    "model_type": "llama", "vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6,
}  # fmt: skip
EXAMPLE = Example((), (), source="rows.json:1")


def row(prompt: list[int], *responses: list[int]) -> Encoded:
    return Encoded(prompt, responses, EXAMPLE, dropped_turns=0, cut=(False,) * len(responses))


ROWS = [row([1, 2], [3], [4, 5]), row([1], [2, 3, 4], [5]), row([7, 8, 9], [1, 1], [2])]


class Live:
    """A reference that says -(token id) / 10 of every response token, and remembers the rows it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Encoded] = []

    def __call__(self, stream, rows: Sequence[Encoded]) -> torch.Tensor:
        self.asked += rows
        return stream.target_R / -10


def ask(directory: Path, rows: Sequence[Encoded] = ROWS, **changed) -> list[Encoded]:
    """The rows that had to be computed; all of them are looked up and held to what Live says."""
    live = Live()
    weights = directory.parent / "weights"
    weights.touch()
    settings = {"files": [weights], "dtype": torch.float32, "build": lambda: live} | changed
    device = torch.device("cpu")
    reference = cached_reference(
        directory, rows=rows, device=device, batch_size=2, loads_model=False, **settings
    )  # fmt: skip
    stream = to_stream(rows, device)
    assert torch.equal(reference(stream, rows), stream.target_R / -10)
    return live.asked


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def parts(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


def test_what_was_computed_is_found(cache, capsys):
    assert sorted(row.key for row in ask(cache)) == sorted(row.key for row in ROWS)
    assert ask(cache) == []
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("reference cache: 0 of 3 rows found, 3 computed in ")
    assert second.startswith("reference cache: 3 of 3 rows found, 0 computed in ") and f"({cache})" in second


def test_new_rows_extend_it(cache):
    ask(cache, ROWS[:2])
    assert ask(cache, ROWS) == [ROWS[2]]
    assert ask(cache, ROWS[::-1]) == []


def test_a_row_that_occurs_twice_is_computed_once(cache):
    assert ask(cache, [ROWS[0], ROWS[0]]) == [ROWS[0]]


def test_a_part_holds_so_many_rows_at_most(cache, monkeypatch):
    monkeypatch.setattr(dpo.reference_cache, "PART_ROWS", 1)
    assert len(ask(cache)) == 3
    assert len(parts(cache)) == 3 and ask(cache) == []


def test_a_rows_key_is_its_token_ids():
    """A moved boundary, a swap of chosen and rejected, and one other token are other rows; the text behind is not."""
    same, *others = [
        row([1, 2], [3], [4, 5]), row([1], [2, 3], [4, 5]), row([1, 2], [3, 4], [5]), row([1, 2], [4, 5], [3]),
        row([1, 2], [3]), row([1, 2], [3], [4, 6]), row([12], [3], [4, 5]),
    ]  # fmt: skip
    assert same.key == ROWS[0].key
    assert len({r.key for r in [same, *others]}) == 7


def test_the_key_is_bytes_dtype_and_version_and_not_where_the_files_lie(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("config.json", "model.safetensors", "adapter_model.safetensors")]
    for file in files:
        file.write_bytes(b"as it was")
    (tmp_path / "moved").mkdir()
    moved = [shutil.copy(file, tmp_path / "moved") for file in files]
    key = reference_key(files, torch.float32, tmp_path)
    assert reference_key([Path(file) for file in moved], torch.float32, tmp_path) == key
    keys = {key, reference_key(files, torch.bfloat16, tmp_path), reference_key(files[:2], torch.float32, tmp_path)}
    for file in files:
        file.write_bytes(b"as it is!")
        keys.add(reference_key(files, torch.float32, tmp_path))
        file.write_bytes(b"as it was")
        assert reference_key(files, torch.float32, tmp_path) == key
    monkeypatch.setattr(dpo.reference_cache, "NUMERICS_VERSION", 0)
    keys.add(reference_key(files, torch.float32, tmp_path))
    assert len(keys) == 7


def test_a_file_is_hashed_again_only_when_it_was_touched(tmp_path, monkeypatch):
    hashed = []
    file_digest = dpo.digests.file_digest
    monkeypatch.setattr(dpo.digests, "file_digest", lambda f, name: hashed.append(f) or file_digest(f, name))
    weights = tmp_path / "weights"
    weights.write_bytes(b"old")
    old = reference_key([weights], torch.float32, tmp_path)
    assert reference_key([weights], torch.float32, tmp_path) == old and len(hashed) == 1
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    weights.write_bytes(b"new")
    os.utime(weights, ns=times)  # as a tool that unpacks an archive does
    new = reference_key([weights], torch.float32, tmp_path)
    assert new != old and len(hashed) == 2
    (tmp_path / "digests.json").write_text('{"cut sho')
    assert reference_key([weights], torch.float32, tmp_path) == new and len(hashed) == 3


def flipped(at: int):
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [lambda c: c[:-3], lambda c: b"", flipped(3), flipped(40), flipped(-2)])
def test_a_damaged_part_is_said_left_alone_and_computed_again(cache, capsys, damage):
    """Cut short, emptied, and one bit in its length, its header and its last number."""
    ask(cache, ROWS[:2])
    ask(cache, ROWS[2:])
    broken = next(path for path in parts(cache) if ROWS[2].key.encode() in path.read_bytes())
    content = damage(broken.read_bytes())
    broken.write_bytes(content)
    capsys.readouterr()
    assert ask(cache) == [ROWS[2]]
    assert f"reference cache: {broken} is damaged and is not used" in capsys.readouterr().out
    assert broken.read_bytes() == content and len(parts(cache)) == 3
    assert ask(cache) == []


def test_a_write_that_was_cut_short_leaves_nothing_that_is_read(cache, monkeypatch):
    def interrupt(source, target):
        if target.suffix == ".safetensors":
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(dpo.digests.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ask(cache)
    assert len(list(cache.glob("*/*.tmp"))) == 1 and parts(cache) == []
    assert len(ask(cache)) == 3 and ask(cache) == []


def test_two_jobs_that_start_together_do_each_other_no_harm(cache):
    """The second begins and ends while the first computes; both had found nothing."""
    second: list[Encoded] = []

    def build() -> Live:
        second.extend(ask(cache))
        return Live()

    ask(cache, build=build)
    assert len(second) == 3 and len(parts(cache)) == 2
    assert ask(cache) == []


@pytest.mark.parametrize(("loads_model", "built", "kept"), [(True, [1, 1], False), (False, [1, 2], True)])
def test_a_model_that_the_run_does_not_hold_is_built_for_missing_rows_alone_and_not_kept(
    cache, capsys, loads_model, built, kept
):
    """Two runs of the same rows. A model that the run holds anyway costs nothing, and samples are measured by it."""
    weights, lives = cache.parent / "weights", []
    weights.touch()
    for number, so_far in enumerate(built):
        reference = cached_reference(
            cache, [weights], torch.float32, ROWS, lambda: lives.append(Live()) or lives[-1],
            device=torch.device("cpu"), batch_size=2, loads_model=loads_model,
        )  # fmt: skip
        assert len(lives) == so_far and reference.live is (lives[-1] if kept else None)
        said = "the model was not loaded" in capsys.readouterr().out
        assert said == (number == 1 and loads_model)


def test_a_reference_as_a_model_is_itself_that_of_a_cache_or_none(cache):
    live = base_reference(Transformer(parse_model_config(MODEL), torch.float32))
    assert live_reference(live) is live
    assert live_reference(CachedReference({}, live)) is live
    assert live_reference(CachedReference({}, None)) is None
    assert live_reference(None) is None
    assert live_reference(lambda stream, rows: stream.target_R) is None


# Whole runs on the built-in world.


def config(output_dir: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", [*SMALL, f"output_dir={output_dir}", *overrides])


def metrics(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_KEYS} for line in lines]


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The tokens of each of the reference's forward passes; the policy's are not counted."""
    counted: list[int] = []
    token_logps = dpo.reference.token_logps

    def counting(model, stream):
        counted.append(len(stream.input_ids_T))
        return token_logps(model, stream)

    monkeypatch.setattr(dpo.reference, "token_logps", counting)
    return counted


@pytest.fixture
def loaded(monkeypatch) -> list[Path]:
    """The directories that models were loaded from."""
    directories: list[Path] = []
    load_model = dpo.build.load_model
    monkeypatch.setattr(dpo.build, "load_model", lambda d, **options: directories.append(d) or load_model(d, **options))
    return directories


@pytest.mark.slow
def test_a_sweep_over_beta_loss_rate_and_seed_computes_once(tmp_path, passes):
    """12 rows in batches of 5 are 3 passes. A seed changes the rows' order, and a whole epoch has the same rows."""
    changes = [[], ["pref_beta=0.3", "pref_loss=ipo"], ["learning_rate=1e-4", "seed=7"]]
    for number, change in enumerate(changes):
        sweep_job(config(tmp_path, *change), {}, number)
        assert json.loads((tmp_path / str(number) / "results.json").read_text()).get("error") is None
    assert len(passes) == 3
    assert len(parts(tmp_path / "reference")) == 1


@pytest.mark.slow
def test_a_job_of_a_sweep_ends_where_a_run_of_its_own_does(tmp_path):
    """Bit for bit: what earlier jobs of the process did, and that they computed the caches, does not show."""
    changes = ["learning_rate=1e-2", "val_size=4"]
    for number, beta in enumerate((0.1, 0.3)):
        sweep_job(config(tmp_path / "sweep", *changes, f"pref_beta={beta}"), {}, number)
    alone = tmp_path / "alone"
    caches = [f"ref_cache_dir={tmp_path}/reference", f"tokenized_path={tmp_path}/tokenized"]
    train(config(alone, *changes, "pref_beta=0.3", *caches))
    job = tmp_path / "sweep" / "1"
    assert (job / "adapter_model.safetensors").read_bytes() == (alone / "adapter_model.safetensors").read_bytes()
    assert metrics(job) == metrics(alone)


def test_a_sweep_keeps_to_the_directory_that_is_named(tmp_path):
    sweep_job(config(tmp_path / "sweep", f"ref_cache_dir={tmp_path / 'cache'}", "max_steps=1"), {}, 0)
    assert len(parts(tmp_path / "cache")) == 1 and not (tmp_path / "sweep" / "reference").exists()


def test_a_loss_without_a_reference_has_no_cache(tmp_path, passes):
    sweep_job(config(tmp_path, "loss=simpo"), {}, 0)
    assert not passes and not (tmp_path / "reference").exists()


def test_a_job_whose_reference_moves_is_given_no_cache(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("train.train", lambda cfg: given.append(cfg.ref_cache_dir) or {})
    for number, moves in enumerate(("true", "false")):
        sweep_job(config(tmp_path, f"sync_ref_model={moves}"), {}, number)
    assert given == [None, str(tmp_path / "reference")]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    train(config(directory, "learning_rate=1e-2"))
    return directory


SLOW = [pytest.param(source, marks=pytest.mark.slow) for source in ("snapshot", "frozen copy", "another adapter")]


@pytest.mark.parametrize("source", ["adapter off", *SLOW])
def test_metrics_are_those_of_a_live_reference(tmp_path, adapter, source):
    """Of training and evaluation; the first loss is log 2 where policy and reference start equal."""
    options = {
        "adapter off": [], "snapshot": [f"adapter_name_or_path={adapter}"],
        "frozen copy": ["finetuning_type=full", "learning_rate=1e-5"],
        "another adapter": [f"ref_model_adapters={adapter}"],
    }[source]  # fmt: skip
    options += ["val_size=4", "warmup_ratio=0"]
    train(config(tmp_path / "live", *options))
    options.append(f"ref_cache_dir={tmp_path / 'cache'}")
    for name in ("first", "second"):
        train(config(tmp_path / name, *options))
        for step, expected in zip(metrics(tmp_path / name), metrics(tmp_path / "live"), strict=True):
            step, expected = ({k: v for k, v in m.items() if "accuracies" not in k} for m in (step, expected))
            assert step == pytest.approx(expected, rel=1e-5, abs=1e-5)
        if source != "another adapter":
            assert metrics(tmp_path / name)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(metrics(tmp_path / "first")[-1]["eval_rewards/margins"]) > 1e-3


def evaluated(*arguments: str) -> dict[str, float]:
    """What `python eval.py` gives, but for the time."""
    expanded, _ = expand_arguments(["device=cpu", *arguments], EvalConfig)
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("eval", expanded)
    check(cfg)
    return {name: value for name, value in preference(cfg)[0].items() if name not in TIMING_KEYS}


@pytest.mark.parametrize("source", ["adapter off", *SLOW])
def test_an_evaluation_finds_what_its_run_computed(tmp_path, adapter, passes, loaded, capsys, source):
    """No pass of the reference, no model but the policy, and the metrics of a live reference and of the run itself."""
    options = {
        "adapter off": ["learning_rate=1e-2"],
        "snapshot": [f"adapter_name_or_path={adapter}", "learning_rate=1e-2"],
        "frozen copy": ["finetuning_type=full", "learning_rate=1e-3"],
        "another adapter": [f"ref_model_adapters={adapter}"],
    }[source]
    run = tmp_path / "run"
    train(config(run, *options, "val_size=4", f"ref_cache_dir={tmp_path / 'cache'}"))
    passes.clear(), loaded.clear(), capsys.readouterr()
    found = evaluated(f"run={run}")
    out = capsys.readouterr().out
    assert f"4 of 4 rows found, 0 computed in 0.0 s{', the model was not loaded' * (source != 'adapter off')} (" in out
    assert (len(passes), len(loaded)) == (0, 1)
    live = evaluated(f"run={run}", "ref_cache_dir=null")
    assert len(passes) == 1 and "reference cache" not in capsys.readouterr().out
    assert found == pytest.approx(live, rel=1e-5, abs=1e-5)
    trained = {name: metrics(run)[-1][name] for name in found}
    assert found == pytest.approx(trained, rel=1e-5, abs=1e-5)
    assert abs(found["eval_rewards/margins"]) > 1e-3


def test_an_evaluation_computes_once_and_keeps_a_cache_of_its_own(tmp_path, adapter, passes, loaded):
    """With a frozen copy too, which the second does not load. A row that is new is computed alone."""
    for reference, first, second in (([], 1, 1), ([f"ref_model_adapters={adapter}"], 2, 1)):
        arguments = [f"ref_cache_dir={tmp_path / 'cache'}", "model_name_or_path=world", "eval_dataset=world"]
        arguments += [f"adapter_name_or_path={adapter}", "pref_beta=0.3", *reference]
        passes.clear(), loaded.clear()
        expected = evaluated(*arguments, "max_samples=5")
        assert (len(passes), len(loaded)) == (1, first)
        again = evaluated(*arguments, "max_samples=5")
        assert again == expected and (len(passes), len(loaded)) == (1, first + second)
        evaluated(*arguments, "max_samples=6")
        assert len(passes) == 2


def test_an_evaluation_of_a_sweeps_job_reads_the_sweeps_cache(tmp_path, passes, capsys):
    sweep_job(config(tmp_path, "val_size=4"), {}, 0)
    passes.clear()
    evaluated(f"run={tmp_path / '0'}")
    found = f"4 of 4 rows found, 0 computed in 0.0 s ({tmp_path / 'reference'})"
    assert not passes and found in capsys.readouterr().out


def test_rows_that_the_loss_cannot_honour_are_refused_before_any_weight_is_loaded(tmp_path, loaded):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2.0}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: margin=2.0: pref_loss=ipo cannot honour it"):
        evaluated("model_name_or_path=world", f"eval_dataset={file}", "pref_loss=ipo")
    assert not loaded


@pytest.mark.parametrize("found", [False, True], ids=["computed", "found"])
@pytest.mark.parametrize("source", ["adapter off", *SLOW])
def test_the_live_reference_is_the_policys_own_start_and_none_of_a_model_of_its_own(tmp_path, adapter, source, found):
    """The policy's weights are moved: within as_model it says what it said at first, and computes no gradient."""
    options = {
        "adapter off": [], "snapshot": [f"adapter_name_or_path={adapter}"], "frozen copy": ["finetuning_type=full"],
        "another adapter": [f"ref_model_adapters={adapter}"],
    }[source]  # fmt: skip
    cfg = config(tmp_path / "run", *options, f"ref_cache_dir={tmp_path / 'cache'}", "max_samples=2")
    data = build_rows(cfg, build_template(cfg))
    for _ in range(1 + found):
        policy = build_policy(cfg, torch.device("cpu"))
        objective, _ = build_objective(cfg, policy, data)
    live = live_reference(objective.reference)
    if source in ("frozen copy", "another adapter"):
        assert isinstance(objective.reference, CachedReference) and live is None
        return
    stream = to_stream(data.train, torch.device("cpu"))
    before = token_logps(policy, stream)
    with torch.no_grad():
        for parameter in trainable(policy).values():
            parameter.add_(0.1)
    with live.as_model() as model:
        torch.testing.assert_close(token_logps(model, stream), before, rtol=1e-5, atol=1e-5)
        assert not model(stream).requires_grad
    assert (token_logps(policy, stream) - before).abs().max() > 0.1


@pytest.mark.slow
def test_a_frozen_copy_whose_rows_are_all_found_is_not_loaded(tmp_path, loaded, capsys):
    options = ["finetuning_type=full", "learning_rate=1e-5", f"ref_cache_dir={tmp_path / 'cache'}"]
    train(config(tmp_path / "first", *options, "max_samples=8"))
    assert len(loaded) == 2 and "not loaded" not in capsys.readouterr().out
    train(config(tmp_path / "second", *options, "max_samples=8"))
    assert len(loaded) == 3
    assert "8 of 8 rows found, 0 computed in 0.0 s, the model was not loaded" in capsys.readouterr().out
    train(config(tmp_path / "third", *options, "max_samples=9"))
    assert len(loaded) == 5 and "8 of 9 rows found, 1 computed" in capsys.readouterr().out


@pytest.mark.slow
def test_what_the_reference_depends_on_is_computed_anew(tmp_path, adapter, passes):
    """Another dtype, template, cutoff, row, adapter, and one bit of an adapter and of the weights.

    A copy of the model elsewhere, and the same adapter as ref_model_adapters, are what was computed already.
    """
    model = shutil.copytree(WORLD / "model", tmp_path / "model")
    as_it_was = [f"ref_cache_dir={tmp_path / 'cache'}", "max_samples=3"]
    copy = shutil.copytree(adapter, tmp_path / "copy")
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(flipped(-3)(weights.read_bytes()))
    changes = [
        [], ["bf16=true"], ["template=plain"], ["cutoff_len=30"], ["max_samples=4"],
        [f"adapter_name_or_path={adapter}"], [f"adapter_name_or_path={copy}"],
    ]  # fmt: skip
    for number, change in enumerate(changes):
        train(config(tmp_path / str(number), *as_it_was, *change))
        assert len(passes) == number + 1, change
    for number, change in enumerate([[], [f"ref_model={model}"], [f"ref_model_adapters={adapter}"]]):
        train(config(tmp_path / f"again-{number}", *as_it_was, *change))
        assert len(passes) == len(changes), change
    weights = model / "model.safetensors"
    weights.write_bytes(flipped(-3)(weights.read_bytes()))
    train(config(tmp_path / "changed", *as_it_was, f"ref_model={model}"))
    assert len(passes) == len(changes) + 1


@pytest.mark.slow
def test_only_rows_that_a_run_gets_to_are_computed(tmp_path, capsys):
    """One update takes 4 of 12 rows; without evaluations the held out are not asked for, without training only they."""
    cached = [f"ref_cache_dir={tmp_path / 'cache'}", "max_steps=1"]
    train(config(tmp_path / "a", *cached))
    assert "0 of 4 rows found, 4 computed" in capsys.readouterr().out
    train(config(tmp_path / "b", *cached, "val_size=2", "eval_strategy=no", "ref_cache_dir=" + str(tmp_path / "other")))
    assert "0 of 4 rows found, 4 computed" in capsys.readouterr().out
    other = [*cached, "val_size=2", "eval_strategy=no", f"ref_cache_dir={tmp_path / 'other'}"]
    train(config(tmp_path / "d", *other, "eval_on_start=true"))
    assert "4 of 6 rows found, 2 computed" in capsys.readouterr().out
    train(config(tmp_path / "c", "val_size=2", "do_train=false", "ref_cache_dir=" + str(tmp_path / "third")))
    assert "0 of 2 rows found, 2 computed" in capsys.readouterr().out


def test_a_resumed_run_may_have_another_cache(tmp_path, adapter):
    check_resume(adapter, config(adapter, "learning_rate=1e-2", f"ref_cache_dir={tmp_path}"))


def test_a_cache_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"ref_cache_dir=.*file: is a file; name a directory"):
        train(config(tmp_path / "run", f"ref_cache_dir={tmp_path / 'file'}"))
    with pytest.raises(ValueError, match=r"ref_cache_dir=.*file: is a file; name a directory"):
        evaluated("model_name_or_path=world", "eval_dataset=world", f"ref_cache_dir={tmp_path / 'file'}")
