"""What a run that was stopped by numbers that are not finite leaves to look at: postmortem-N.json.

the rows          of the micro-batch where it happened, by file:line, with their texts; the batch's, by file:line
first_non_finite  the first module whose output is not finite when that micro-batch is run again, in order
weights           trained weights that are not finite
gradients         the largest norms, and the gradients that are not finite
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo.checkpoint import trainable
from dpo.tokens import Encoded
from models.stream import pack
from models.transformer import Transformer


def write_postmortem(
    path: Path, *, step: int, what: str, rows: Sequence[Encoded], batch: Sequence[Encoded], policy: Transformer,
    objective: Any, metrics: Mapping[str, float],
) -> None:  # fmt: skip
    """Write the file; `rows` are of the micro-batch, `what` is `loss` or `gradient`. The gradients are still there."""
    gradients = {name: p.grad for name, p in trainable(policy).items() if p.grad is not None}
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    largest = sorted(norms, key=lambda name: -norms[name] if math.isfinite(norms[name]) else -math.inf)
    content = {
        "step": step,
        "not_finite": what,
        "first_non_finite": first_non_finite(policy, objective, rows),
        "weights_not_finite": [name for name, p in trainable(policy).items() if not p.isfinite().all()],
        "gradients_not_finite": [name for name, norm in norms.items() if not math.isfinite(norm)],
        "largest_gradients": {name: norms[name] for name in largest[:10] if math.isfinite(norms[name])},
        "metrics_of_the_window": dict(metrics),
        "rows": [
            {"source": row.example.source, "messages": row.example.messages, "responses": row.example.responses}
            for row in rows[:8]
        ],
        "batch": [row.example.source for row in batch],
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def first_non_finite(policy: Transformer, objective: Any, rows: Sequence[Encoded]) -> str | None:
    """The first module of the policy whose output is not finite on these rows; `loss` where all are; None: nothing."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in policy.named_modules() if name]
    try:
        stream = pack([row.prompt_ids for row in rows], [row.response_ids for row in rows]).to(policy.device)
        losses = objective.losses(objective.measure(policy, stream, rows, rows))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None if losses.isfinite().all() else "loss"
