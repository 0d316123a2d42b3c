"""`python -m util.models`: the registered models and their published sizes."""

import json

import pytest

from util import models
from util.weights.source import PUBLISHED


@pytest.fixture(scope="module")
def facts() -> dict[str, dict]:
    names = ("mixmae_base", "swin_base_w14", "swin_base_w16_384", "swin_quickstart")
    return {name: models.describe_model(name) for name in names}


def test_sizes_are_those_of_the_paper(facts):
    """Published numbers; multiply-adds of pretraining are the encoder's 16.35 G and the decoder's."""
    assert [facts[name]["parameters"] for name in facts][:3] == [114_665_784, 88_344_352, 89_577_440]
    giga = {name: entry["multiply_adds"] / 1e9 for name, entry in facts.items()}
    assert giga["swin_base_w14"] == pytest.approx(16.35, abs=0.05)
    assert giga["swin_base_w16_384"] == pytest.approx(52.6, rel=0.005)
    assert 18 < giga["mixmae_base"] < 20
    assert facts["swin_base_w16_384"]["windows"] == [16, 16, 24, 12]
    assert facts["swin_quickstart"]["strides"] == [1, 2, 4, 8] and facts["swin_base_w14"]["strides"] == [4, 8, 16, 32]
    assert facts["swin_base_w16_384"]["input_size"] == [384, 384]


def test_every_published_checkpoint_stands_beside_its_model(facts):
    assert facts["mixmae_base"]["published"] == ["base_600ep", "mixmim_base_300ep"]
    assert facts["swin_base_w14"]["published"] == ["base_600ep_ft", "mixmim_base_300ep_ft"]
    assert facts["swin_base_w16_384"]["published"] == ["base_600ep_ft_384x384"]
    shown = models.table(list(facts.values()))
    assert all(name in shown for name in PUBLISHED if "large" not in name)


def test_the_table_is_aligned(facts):
    heading, *rows = models.table(list(facts.values())).splitlines()
    assert len(rows) == 4 and "88.3 M" in rows[1] and "16.32 G" in rows[1] and "14 14 14 7" in rows[1]
    for column in ("windows", "strides", "published"):
        assert {row[heading.index(column) - 1] for row in rows} == {" "}
        assert " " not in {row[heading.index(column)] for row in rows}


def test_json(facts, capsys, monkeypatch):
    monkeypatch.setattr(models, "PRETRAINING_MODELS", ["mixmae_base"])
    monkeypatch.setattr(models, "CLASSIFIER_MODELS", ["swin_base_w14"])
    models.main(models.get_args_parser().parse_args(["--json"]))
    assert json.loads(capsys.readouterr().out) == [facts["mixmae_base"], facts["swin_base_w14"]]
