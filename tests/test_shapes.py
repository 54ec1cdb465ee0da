"""Names tell the truth: a local called `x_TD` has as many dimensions as letters, and a letter one size per frame."""

import re
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from train import train

ROOT = Path(__file__).parent.parent
SUFFIX = re.compile(r"_([A-Z]+)$")


def wrong_names(frame) -> list[str]:
    sizes: dict[str, int] = {}
    wrong = []
    for name, value in frame.f_locals.items():
        match = SUFFIX.search(name)
        if match is None or not isinstance(value, torch.Tensor):
            continue
        letters = match[1]
        where = f"{frame.f_code.co_filename}:{frame.f_code.co_name}: {name} has shape {tuple(value.shape)}"
        if value.ndim != len(letters):
            wrong.append(where)
            continue
        for letter, size in zip(letters, value.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                wrong.append(f"{where}, but {letter} is {sizes[letter]} elsewhere in the frame")
    return wrong


@pytest.mark.slow
def test_every_shape_in_a_name_is_the_tensors_shape(tmp_path):
    found: list[str] = []
    seen: set[str] = set()

    def on_return(frame, event, argument):
        file = frame.f_code.co_filename
        if event == "return" and file.startswith((str(ROOT / "dpo"), str(ROOT / "models"))):
            seen.update(name for name in frame.f_locals if SUFFIX.search(name))
            found.extend(wrong_names(frame))

    overrides = ["max_samples=4", "max_steps=2", "num_samples=1", "max_new_tokens=3", f"output_dir={tmp_path / 'run'}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides)
    sys.setprofile(on_return)
    try:
        train(cfg)
    finally:
        sys.setprofile(None)
    assert not found, "\n".join(sorted(set(found)))
    assert {"hidden_TD", "logps_CV", "q_THE", "mask_NQK", "A_RI"} <= seen


def test_a_wrong_name_is_found():
    def liar():
        x_TD = torch.zeros(3)
        y_TD, z_DT = torch.zeros(2, 3), torch.zeros(2, 3)
        return sys._getframe(), [x_TD, y_TD, z_DT]

    frame, _ = liar()
    assert len(wrong_names(frame)) == 3
