"""Time, memory and error of the head's log-probabilities, forward and backward, ours and others' on the same tensors.

    python -m experiments.speed.head [VxDxR ...] [rounds=5] [dtypes=bfloat16,float32] [heads=frozen,trained] [csv=PATH]

V vocabulary, D width, R response tokens; by default SmolLM2's and Qwen2.5-0.5B's heads, R = 256, 1024, 4096. Half of
the tokens are of chosen responses, half of rejected ones, of one pair per 256 tokens, and what is differentiated is
the sigmoid loss of the pairs, because Liger gives nothing else. A reference's log-probabilities are left out (0).

    fused           dpo.fused
    plain           log_softmax of the whole logits in float32, then gather
    plain compiled  the same by torch.compile, which needs a C++ compiler
    TRL             1.16, what its DPOTrainer calls, asked for log-probabilities alone (it asks for three more)
    TRL selective   selective_log_softmax of the whole logits
    Liger           LigerFusedLinearDPOLoss, a pair at a time; and compiled, as it is by default

All run in turn, `rounds` times after one to warm up; medians, and lowest to highest. Memory is the growth of a fresh
process's resident peak over its second step, gradients included. Errors are the largest differences from float64 on 256
tokens: of a response's log-probability, and of either gradient relative to its largest entry.
"""

import csv
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.fused import fused_logps
from experiments.memory.run import status

ROOT = Path(__file__).parents[2]
SHAPES = [f"{head}x{rows}" for head in ("49152x576", "151936x896") for rows in (256, 1024, 4096)]
DEFAULTS = {"rounds": "5", "dtypes": "bfloat16,float32", "heads": "frozen,trained", "csv": "head.csv"}
BETA, PAIR = 0.1, 256
COLUMNS = ["head", "vocabulary", "width", "tokens", "dtype", "who", "ms", "lowest", "highest", "peak_mb", "value_error",
           "hidden_gradient_error", "head_gradient_error"]  # fmt: skip
# Whole logits in float32 with their softmax and gradients: what does not fit is not run.
LARGEST_WHOLE = 1 << 28

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def of_pairs(logps_R: Tensor) -> tuple[Tensor, Tensor]:
    """The sigmoid loss, and the log-probability of each response; the chosen ones are the first half."""
    logps = logps_R.reshape(-1, min(PAIR, len(logps_R)) // 2).sum(-1)
    chosen, rejected = logps.chunk(2)
    return -logsigmoid(BETA * (chosen - rejected)).mean(), logps.detach()


def plain_logps(hidden_RD: Tensor, head_VD: Tensor, target_R: Tensor) -> Tensor:
    logits_RV = hidden_RD @ head_VD.T
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    return logits_RV.log_softmax(-1).gather(-1, target_R[:, None])[:, 0]


def plain_compiled() -> Loss:
    logps = torch.compile(plain_logps, dynamic=False)
    return lambda *inputs: of_pairs(logps(*inputs))


def trl() -> Loss:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    return lambda hidden_RD, head_VD, target_R: of_pairs(
        ChunkedLogProbFunction.apply(hidden_RD, head_VD, None, target_R, 1.0, CHUNK, None, 1.0, ("log_probs",))[0]
    )


def trl_selective() -> Loss:
    from trl.trainer.utils import selective_log_softmax

    def loss(hidden_RD: Tensor, head_VD: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
        return of_pairs(selective_log_softmax((hidden_RD @ head_VD.T)[None], target_R[None])[0].float())

    return loss


def liger(compiled: bool) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    dpo = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=compiled)

    def loss(hidden_RD: Tensor, head_VD: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
        length = min(PAIR, len(target_R)) // 2
        hidden_NLD = hidden_RD.reshape(-1, length, hidden_RD.shape[1])
        value, (chosen, rejected, *_) = dpo(head_VD, hidden_NLD, target_R.reshape(-1, length))
        return value, torch.cat([chosen, rejected]).detach()

    return loss


WHO: dict[str, Callable[[], Loss]] = {
    "fused": lambda: lambda *inputs: of_pairs(fused_logps(*inputs)),
    "plain": lambda: lambda *inputs: of_pairs(plain_logps(*inputs)),
    "plain compiled": plain_compiled,
    "TRL": trl,
    "TRL selective": trl_selective,
    "Liger": lambda: liger(False),
    "Liger compiled": lambda: liger(True),
}


def tensors(shape: tuple[int, int, int], dtype: torch.dtype, trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a standard deviation of about 2."""
    vocabulary, width, rows = shape
    generator = torch.Generator().manual_seed(0)
    hidden_RD = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    head_VD = torch.randn(vocabulary, width, generator=generator).mul_(2 / width**0.5).to(dtype)
    return hidden_RD, head_VD.requires_grad_(trained), torch.randint(vocabulary, (rows,), generator=generator)


def step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    for tensor in inputs[:2]:
        tensor.grad = None
    value, logps = loss(*inputs)
    value.backward()
    return logps


def errors(loss: Loss, shape: tuple[int, int, int], dtype: torch.dtype, trained: bool) -> list[float]:
    """Of the responses' log-probabilities, and of each gradient relative to its largest entry."""
    vocabulary, width, rows = shape
    inputs = tensors((vocabulary, width, min(rows, PAIR)), dtype, trained)
    exact_inputs = (*(x.detach().double().requires_grad_(x.requires_grad) for x in inputs[:2]), inputs[2])
    exact = step(lambda *exact: of_pairs(plain_logps(*exact)), exact_inputs)  # type: ignore[arg-type]
    worst = [(step(loss, inputs).double() - exact).abs().max().item()]
    for tensor, truth in zip(inputs[:2], exact_inputs[:2], strict=True):
        if tensor.grad is not None and truth.grad is not None:
            worst.append(((tensor.grad.double() - truth.grad).abs().max() / truth.grad.abs().max()).item())
    return worst


def peak(who: str, shape: tuple[int, int, int], dtype: torch.dtype, trained: bool) -> int:
    """Bytes, in a process of its own: this is the child."""
    loss, inputs = WHO[who](), tensors(shape, dtype, trained)
    step(loss, inputs)  # compilers take memory, and come once
    for tensor in inputs[:2]:
        tensor.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = status("VmRSS")[0]
    step(loss, inputs)
    return status("VmHWM")[0] - before


def peak_of_child(*job: str) -> float | None:
    command = [sys.executable, "-m", "experiments.speed.head", "child", *job]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return int(done.stdout.splitlines()[-1]) / 1e6 if done.returncode == 0 else None


def measure(shape: tuple[int, int, int], name: str, trained: bool, rounds: int) -> list[list[object]]:
    dtype = getattr(torch, name)
    inputs, losses = tensors(shape, dtype, trained), {}
    whole = shape[0] * shape[2] <= LARGEST_WHOLE
    for who in WHO:
        if not whole and ("plain" in who or who == "TRL selective"):
            continue
        try:
            losses[who] = WHO[who]()
            step(losses[who], inputs)
        except Exception as error:  # no compiler, or a package that is not installed
            losses.pop(who, None)
            print(f"{who}: none ({type(error).__name__}: {str(error).splitlines()[0][:80]})", file=sys.stderr)
    seconds: dict[str, list[float]] = {who: [] for who in losses}
    for _ in range(rounds):
        for who, loss in losses.items():
            start = time.perf_counter()
            step(loss, inputs)
            seconds[who].append(time.perf_counter() - start)
    rows: list[list[object]] = []
    for who in WHO:
        row: list[object] = ["trained" if trained else "frozen", *shape, name, who]
        if who in losses:
            times = [1e3 * s for s in seconds[who]]
            memory = peak_of_child(who, *map(str, shape), name, str(int(trained)))
            row += [f"{x:.0f}" for x in (statistics.median(times), min(times), max(times))]
            row += ["none" if memory is None else f"{memory:.0f}"]
            row += [f"{x:.1e}" for x in errors(losses[who], shape, dtype, trained)]
        rows.append(row + ["none"] * (len(COLUMNS) - len(row)))
    return rows


def main(shapes: list[str], settings: dict[str, str]) -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with Path(settings["csv"]).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for shape in shapes or SHAPES:
            vocabulary, width, rows = map(int, shape.split("x"))
            for name in settings["dtypes"].split(","):
                for head in settings["heads"].split(","):
                    measured = measure((vocabulary, width, rows), name, head == "trained", int(settings["rounds"]))
                    table.writerows(measured)
                    file.flush()
                    for row in measured:
                        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        who, vocabulary, width, rows, name, trained = sys.argv[2:]
        shape = (int(vocabulary), int(width), int(rows))
        print(peak(who, shape, getattr(torch, name), bool(int(trained))))
    else:
        given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
        unknown = given.keys() - DEFAULTS
        if unknown:
            sys.exit(f"{min(unknown)}: expected some of {', '.join(DEFAULTS)}")
        main([argument for argument in sys.argv[1:] if "=" not in argument], DEFAULTS | given)
