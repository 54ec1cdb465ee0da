"""The built-in world's judge: the gold reward itself, which no order sways.

p is Bradley and Terry's, at the scale at which the world's own labels are drawn.
"""

from collections.abc import Sequence

from dpo.judge.verdict import Judged, OnDone, Pair, Verdict, ignore
from experiments.world.world import FACT_OF, LABEL_SCALE, gold_reward, sigmoid


class GoldJudge:
    name = "gold"
    prompt_sha256 = None

    def __call__(self, pairs: Sequence[Pair], on_done: OnDone = ignore) -> list[Judged]:
        results = []
        for pair in pairs:
            results.append(_judge(pair))
            on_done(pair, results[-1])
        return results


def _judge(pair: Pair) -> Judged:
    prompt = pair.messages[-1]["content"]
    if len(pair.messages) > 1 or prompt not in FACT_OF:
        raise ValueError(
            f"judge=gold: {pair.id} asks {prompt!r:.60}, no question of the built-in world; choose another"
        )
    # Rewards are multiples of 0.05; rounding undoes float error.
    gap = round(gold_reward(prompt, pair.first) - gold_reward(prompt, pair.second), 2)
    verdict = Verdict.FIRST if gap > 0 else Verdict.SECOND if gap < 0 else Verdict.TIE
    return Judged(verdict, sigmoid(LABEL_SCALE * gap), ())
