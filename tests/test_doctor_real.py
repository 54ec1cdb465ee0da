"""The doctor on real datasets: what it finds was found by reading the rows."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dpo.doctor.__main__ import examine
from dpo.doctor.check import Check
from models.command import CONF


def found(dataset: Path, output: Path) -> dict[str, Check]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        checks = examine(compose("doctor", [f"dataset={dataset}", f"output_dir={output}"]))
    return {check.name: check for check in checks}


@pytest.mark.real
def test_polite_impolite_is_known_by_its_words_and_not_by_its_length(real, tmp_path):
    checks = found(real / "preferences" / "polite_impolite.json", tmp_path)
    assert checks["bad_rows"].numbers["bad"] == 6 and len(checks["formatting_only"].rows) == 3
    assert checks["bag_of_words"].verdict == "warn" and checks["bag_of_words"].numbers["auc"] > 0.95
    assert checks["length"].verdict == "ok" and "obviously" in checks["bag_of_words"].summary


@pytest.mark.real
@pytest.mark.parametrize("name, repeated", [("dpo_en_demo", 5), ("dpo_zh_demo", 11)])
def test_the_demos_repeat_rows_and_stay_on_topic(name, repeated, real, tmp_path):
    checks = found(real / "preferences" / f"{name}.json", tmp_path)
    assert len(checks["duplicates"].rows) == repeated
    assert checks["topic"].numbers["chosen_auc"] > 0.9 and checks["topic"].verdict == "ok"


@pytest.mark.real
def test_broken_characters_are_found_in_chinese_and_code_is_no_other_language(real, tmp_path):
    checks = found(real / "preferences" / "dpo_zh_demo.json", tmp_path)
    assert len(checks["broken_text"].rows) == 4 and checks["languages"].numbers["sides_differ"] == 0
