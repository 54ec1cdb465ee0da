"""The SFT objective: negative log-likelihood of every response token."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from dpo.formats import NUMBERS, Example
from dpo.logprobs import token_logps
from dpo.tokens import Encoded
from models.stream import Stream
from models.transformer import Transformer


class SFTObjective:
    """Negative log-likelihood of every response token, nats; its mean over tokens is the loss."""

    couples = False
    state: Mapping[str, Tensor] = {}

    def updated(self, step: int) -> None:
        pass

    def check(self, rows: Iterable[Encoded]) -> None:
        for row in (row for row in rows if row.has_numbers):
            for key in NUMBERS:
                value = getattr(row.example, key)
                if value != getattr(Example, key):  # the default, which changes nothing
                    raise ValueError(
                        f"{row.example.source}: {key}={value}: stage=sft cannot honour it; remove it from the rows"
                    )

    def units(self, rows: Sequence[Encoded]) -> int:
        return sum(sum(row.lengths) for row in rows)

    def measure(self, policy: Transformer, stream: Stream, rows: Sequence[Encoded], batch: Sequence[Encoded]) -> Tensor:
        return token_logps(policy, stream)

    def losses(self, measured: Tensor) -> Tensor:
        return -measured

    def metrics(self, measured: Tensor, losses: Tensor) -> dict[str, Tensor]:
        return {"loss": losses}

    def margins(self, measured: Tensor) -> None:
        return None
