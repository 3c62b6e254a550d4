"""How much of a change of weights a number type keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from toolkit import lm as lms
from toolkit import shipped
from toolkit.rounding import rounding


def of(start: list[float], changed: list[float], dtype: torch.dtype = torch.bfloat16):
    return rounding({"w": torch.tensor(start)}, {"w": torch.tensor(changed)}, dtype)


def test_by_hand_a_change_below_half_a_unit_in_the_last_place_is_lost_and_one_of_a_unit_is_kept():
    unit = 2**-7  # of 1 in bfloat16
    assert (of([1.0], [1 + unit]).kept, of([1.0], [1 + unit]).error) == (1.0, 0.0)
    assert (of([1.0], [1 + 0.25 * unit]).kept, of([1.0], [1 + 0.25 * unit]).error) == (0.0, 1.0)
    both = of([1.0, 1.0], [1 + unit, 1 + 0.25 * unit])
    assert both.kept == pytest.approx(1 / (1 + 0.25**2)) and both.error == pytest.approx(0.25 / (1 + 0.25**2) ** 0.5)
    up = of([1.0], [1 + 0.75 * unit])  # rounded away from the start: more than was changed, and still wrong
    assert up.kept == pytest.approx(4 / 3) and up.error == pytest.approx(1 / 3) and not up.small


def test_fp32_and_no_change_lose_nothing():
    assert of([1.0], [1 + 2**-20], torch.float32).error == 0 == of([1.0], [1.0]).error


def test_merging_an_adapter_into_a_type_that_loses_it_warns(tmp_path):
    base = lms.load("tiny-reasoner", device="cpu").model
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.mul_(1e-3)
    adapted.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="loses precision when it is merged: bfloat16 keeps .* Load it in float32"):
        shipped.merge(copy.deepcopy(base), tmp_path, torch.bfloat16)
    shipped.merge(copy.deepcopy(base), tmp_path, torch.float32)  # a warning would be an error
