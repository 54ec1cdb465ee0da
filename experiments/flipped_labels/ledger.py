"""The same question asked of a run that was made anyway: how well does its ledger tell which labels were exchanged?

    python -m experiments.flipped_labels.ledger OUTPUT_DIR [share=0.1] [epochs=3] [seed=0]

The default run of the built-in world on pairs of which a share is exchanged; then `python -m dpo.doctor ledger=`'s map.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir

from dpo.doctor.cartography import map_of, read_ledger, to_read
from experiments.flipped_labels.run import auc
from models.command import CONF
from models.weights import WORLD
from train import train


def main(output_dir: Path, share: float, epochs: int, seed: int) -> None:
    rows = [json.loads(line) for line in (WORLD / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    flipped = set(random.Random(seed).sample(range(len(rows)), round(share * len(rows))))
    for i in flipped:
        rows[i] |= {"chosen": rows[i]["rejected"], "rejected": rows[i]["chosen"]}
    output_dir.mkdir(parents=True, exist_ok=True)
    data = output_dir / "exchanged.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run = ["overwrite_output_dir=true", "num_samples=0", "eval_dataset=null", f"num_train_epochs={epochs}"]
        train(compose("config", [f"output_dir={output_dir / 'run'}", f"dataset={data}", *run]))
    margins = {source: visits for (_, source), visits in read_ledger(output_dir / "run").margins.items()}
    places = map_of("train", margins)
    exchanged = np.array([int(place.source.rpartition(":")[2]) - 1 in flipped for place in places])
    confidence = np.array([place.confidence for place in places])
    print(f"\nshare {share}, {epochs} epochs: AUC of confidence {auc(-confidence, exchanged):.3f}")
    for kind, group in to_read(places).items():
        hits = sum(int(place.source.rpartition(":")[2]) - 1 in flipped for place in group)
        print(f"  {kind}: {hits} of {len(group)} are exchanged")


if __name__ == "__main__":
    if len(sys.argv) < 2 or not all("=" in argument for argument in sys.argv[2:]):
        sys.exit(str(__doc__))
    given = dict(argument.split("=", 1) for argument in sys.argv[2:])
    main(Path(sys.argv[1]), float(given.get("share", 0.1)), int(given.get("epochs", 3)), int(given.get("seed", 0)))
