"""Plans: written, read back, and refused when they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from counting import keeping

from fastprune.errors import InputError
from fastprune.models.families import Geometry
from fastprune.pruning.plan import LayerPlan, Plan, keep_all

SIZES = (Geometry(8, 4, 10, 16), Geometry(8, 4, 10, 16))
PLAN = Plan(SIZES, (keeping(0, (0, 2), (1, 3, 9)), keeping(1, (), (0,))))


def test_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN


def test_result_keeps_the_ratio() -> None:
    assert PLAN.result() == [Geometry(4, 2, 3, 16), Geometry(0, 0, 1, 16)]
    assert keep_all(SIZES).result() == list(SIZES)


def test_one_plan_after_another() -> None:
    later = Plan(tuple(PLAN.result()), (keeping(0, (1,), (0, 2)), keeping(1, (), (0,))))
    both = PLAN.then(later)
    assert both == Plan(SIZES, (keeping(0, (2,), (1, 9)), keeping(1, (), (0,))))
    assert both.result() == later.result()


def test_a_plan_for_what_is_left_without_its_empty_layers() -> None:
    first = Plan(SIZES, (keeping(0, (), ()), keeping(1, (1, 3), (0, 4, 5))))
    later = Plan((first.result()[1],), (keeping(0, (0,), (1, 2)),))
    kept = keeping(0, (), ()), keeping(1, (1,), (4, 5))
    assert first.then(later) == Plan(SIZES, kept)
    with pytest.raises(InputError, match="another model"):
        first.then(Plan(SIZES[:1], (keeping(0, (0,), (1,)),)))


@pytest.mark.parametrize(
    "layer", [keeping(0, (2, 0), ()), keeping(0, (0, 4), ()), keeping(0, (), (1, 1))]
)
def test_units_must_ascend_and_exist(layer: LayerPlan) -> None:
    with pytest.raises(InputError, match="layer 0 are not ascending"):
        Plan(SIZES[:1], (layer,))


def test_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="another model: layer 1 is 8:4 heads"):
        PLAN.check_model([SIZES[0], Geometry(8, 4, 12, 16)])
    with pytest.raises(InputError, match="has 2 layers, the model 3"):
        PLAN.check_model([*SIZES, SIZES[0]])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "fastprune-plan/1"}', "\x00\x01"])
def test_what_is_no_plan(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"is not a plan|not JSON"):
        Plan.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        Plan.load(tmp_path / "missing.json")


def test_hand_edited_plan(tmp_path: Path) -> None:
    data = PLAN.to_dict()
    data["layers"][0]["channels"] = [0.5]  # type: ignore[index]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="not ascending"):
        Plan.load(path)
