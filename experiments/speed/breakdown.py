"""Where the time of a training update goes, and what its matrix products alone would take.

    python -m experiments.speed.breakdown MODEL_DIR DATASET [batch=4] [cutoff_len=1024] [skip=0] [KEY=VALUE ...]

One logical batch of the first rows that fit (after `skip` of them) is trained on again and again: some updates are
timed, one is profiled. Then every product that the profile saw (mm, addmm, bmm, baddbmm, by shape) is timed by itself,
a plain torch.mm or torch.bmm of fresh tensors of the same shapes and dtype, in the same process. Their sum is the
bound: an update that did nothing else would take it. Products inside PyTorch's attention kernel are not counted.
KEY=VALUE: of the config.
"""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from dpo.trainer import Trainer, _Clock
from experiments.speed.run import build_trainer

OWN = {"batch": "4", "cutoff_len": "1024", "skip": "0"}
TIMED = 5
PARTS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"),
    "attention's forward kernel": ("scaled_dot_product", "flash_attention"),
    "log-softmax of the head": ("log_softmax", "logsumexp"),
    "copies and new tensors": ("copy", "empty", "cat", "index_select", "index_add", "fill", "zero", "scatter", "clone"),
}
Shape = tuple[int, ...]


def median_of(action: Callable[[], object], repeats: int) -> float:
    """Seconds, after one call to warm up."""
    action()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def products(profiled: profile) -> Counter[tuple[Shape, Shape]]:
    """How often each product of two shapes was computed."""
    counted: Counter[tuple[Shape, Shape]] = Counter()
    for event in profiled.events():
        name = event.name.removeprefix("aten::").rstrip("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            # Before the factors stands what is added, after them what is written to.
            one, other = map(tuple, event.input_shapes[1:3] if "add" in name else event.input_shapes[:2])
            counted[one, other] += 1
    return counted


def alone(one: Shape, other: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a plain product of these shapes; the second factor lies as a layer's weight does."""
    x = torch.randn(one, device=device).to(dtype)
    w = torch.randn(*other[:-2], other[-1], other[-2], device=device).to(dtype).mT

    def multiply() -> None:
        torch.matmul(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize()

    work = 2.0 * x.numel() * other[-1]
    return median_of(multiply, 3 if work > 1e10 else 10)


def flops(one: Shape, other: Shape) -> float:
    batch = one[0] if len(one) == 3 else 1
    return 2.0 * batch * one[-2] * one[-1] * other[-1]


def main(model: str, data: str, own: dict[str, str], overrides: Sequence[str]) -> None:
    batch, skip = int(own["batch"]), int(own["skip"])
    job = {"model": model, "data": data, "cutoff_len": int(own["cutoff_len"]), "rows": batch + skip, "batch": batch}
    trainer = build_trainer(job | {"overrides": list(overrides)})
    rows = trainer.train_rows[skip:]

    def update() -> None:
        trainer.update(rows, _Clock())
        trainer.state.step += 1
        if trainer.policy.device.type == "cuda":
            torch.cuda.synchronize()

    seconds = median_of(update, TIMED)
    profiled = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True)
    with profiled:
        update()
    counted = products(profiled)
    dtype, device = trainer.policy.dtype, trainer.policy.device
    each = {shapes: alone(*shapes, dtype, device) for shapes in counted}
    bound = sum(times * each[shapes] for shapes, times in counted.items())
    work = sum(times * flops(*shapes) for shapes, times in counted.items())
    tokens, predicted = sum(row.tokens for row in rows), sum(sum(row.lengths) for row in rows)
    print(f"{len(rows)} pairs, {tokens:,} tokens of the packed stream, {predicted:,} of them of responses; {dtype}")
    print(f"an update takes {seconds:.2f} s (median of {TIMED}); {torch.get_num_threads()} threads, {device}")
    print(
        f"its {counted.total():,} products alone take {bound:.2f} s, {bound / seconds:.1%} of it, at "
        f"{work / bound / 1e9:,.0f} GFLOP/s"
    )
    print("\n| part of the profiled update | share |\n|---|---|")
    for part, share in parts(trainer, profiled):
        print(f"| {part} | {share:.1%} |")


def parts(trainer: Trainer, profiled: profile) -> list[tuple[str, float]]:
    """Each part's share of the time spent in operations themselves."""
    cuda = trainer.policy.device.type == "cuda"
    spent: Counter[str] = Counter()
    for event in profiled.key_averages():
        names = [part for part, keys in PARTS.items() if any(key in event.key for key in keys)]
        spent[names[0] if names else "the rest"] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return [(part, spent[part] / spent.total()) for part in [*PARTS, "the rest"]]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(str(__doc__))
    pairs = dict(argument.split("=", 1) for argument in sys.argv[3:])
    main(sys.argv[1], sys.argv[2], OWN | {k: v for k, v in pairs.items() if k in OWN},
         [f"{key}={value}" for key, value in pairs.items() if key not in OWN])  # fmt: skip
