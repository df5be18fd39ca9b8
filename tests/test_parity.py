"""Layer-by-layer comparison: pairs by name, the first difference named, and what is said without a checkout."""

import pytest
import torch
from torch import nn

from eval.parity import LAYERS, Recorder, compare, first_difference, main, parity, partners


def chain(*names):
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in names)
    model.forward = lambda x: [x := layer(x) for layer in model.layers][-1]
    return model


def test_the_first_layer_that_differs_is_named():
    theirs, ours = chain(*"abc"), nn.Module()
    ours.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    ours.blocks.load_state_dict(theirs.layers.state_dict())
    with torch.no_grad():
        ours.blocks[1].bias[0] += 0.5
    pairs = partners(theirs, ours, [(r"layers\.(\d+)", r"blocks.\1"), (r"layers\.7", "nothing")])
    assert pairs == {f"layers.{i}": f"blocks.{i}" for i in range(3)}
    left, right = Recorder(theirs, list(pairs)), Recorder(ours, list(pairs.values()))
    x = torch.randn(2, 4)
    for _ in range(2):
        theirs(x)
        y = x
        for block in ours.blocks:
            y = block(y)
    rows = compare(left, right, pairs)
    assert [row.theirs for row in rows] == ["layers.0", "layers.1", "layers.2"] and rows[0].calls == 2
    assert rows[0].error < 1e-6
    first = first_difference(rows, 1e-4)
    scale = left.outputs["layers.1"][0].abs().max()
    assert first.theirs == "layers.1" and first.ours == "blocks.1"
    assert first.error == pytest.approx(float(0.5 / scale), rel=1e-4)
    assert first_difference(rows[:1], 1e-4) is None


def test_without_a_checkout_the_message_says_what_to_clone(capsys, tmp_path):
    with pytest.raises(ValueError, match=r"clone https://github.com/FoundationVision/VAR"):
        parity("var", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="choose llamagen, var"):
        parity("other", str(tmp_path))
    assert main(["peer=x"]) == 2 and "family= is missing" in capsys.readouterr().out
    assert set(LAYERS) == {"llamagen", "var", "rar", "xar", "mar"}
