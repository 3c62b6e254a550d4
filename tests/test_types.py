"""What a notebook shows of a value is one line that says what it is, and no tensor."""

from __future__ import annotations

import pytest
import torch

from toolkit.types import Direction, HeadEdit, HeadScores, Moments, Plan


@pytest.mark.parametrize("kind", ["lm", "direction", "scores", "moments", "plan"])
def test_a_value_is_shown_in_one_line_with_its_size_and_model(kind, tiny):
    about = tiny.provenance()
    direction = Direction(torch.ones(4, 128), "resid_mid", "think", "mean_difference", 3, 4, about)
    shown = repr(
        {
            "lm": tiny,
            "direction": direction,
            "scores": HeadScores(torch.ones(4, 8), "short_thinking", "nats", about),
            "moments": Moments(("long", "short"), (3, 4), "think", {"resid_mid": torch.ones(2, 4, 128)}, {}, about),
            "plan": Plan((HeadEdit(2, 4, "project_out", 1.0),), direction, "one head", about),
        }[kind]
    )
    assert "tensor" not in shown and "\n" not in shown
    assert "tiny-reasoner" in shown
    assert {
        "lm": "4 layers x 8 heads",
        "direction": "4 layers x 128",
        "scores": "4 layers x 8 heads",
        "moments": "3 long, 4 short",
        "plan": "layer=2, head=4",
    }[kind] in shown


def test_moments_of_other_shapes_are_refused(tiny):
    about = tiny.provenance()
    with pytest.raises(ValueError, match=r"Moments\.sums\.resid_mid has shape"):
        Moments(("long", "short"), (3, 4), "think", {"resid_mid": torch.ones(3, 4, 128)}, {}, about)
    with pytest.raises(ValueError, match=r"Moments\.outer\.resid_mid has shape"):
        Moments(
            ("long", "short"), (3, 4), "think", {"resid_mid": torch.ones(2, 4, 8)}, {"resid_mid": torch.ones(2, 4, 8, 9)}, about
        )
