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
    scale = left.outputs["layers.1"][0][1].abs().max()
    assert first.theirs == "layers.1" and first.ours == "blocks.1"
    assert first.error == pytest.approx(float(0.5 / scale), rel=1e-4)
    assert first_difference(rows[:1], 1e-4) is None


class Loop(nn.Module):
    """A sampler in small: its output goes in again. extra: a pass on other input before each."""

    def __init__(self, extra):
        super().__init__()
        self.layers, self.extra = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), extra

    def logits(self, x):
        return 2 * x

    def forward(self, x):
        for _ in range(3):
            if self.extra:  # as where one side encodes in two passes what is half of one for the other
                self.layers[2](self.layers[1](self.layers[0](x + 7)))
            for layer in self.layers:
                x = layer(x)
            x = self.logits(x)
        return x


@pytest.mark.parametrize("changed", [None, 0, 1, 2, "logits"])
def test_what_is_fed_back_does_not_hide_the_layer(changed):
    """The first layer gets another input from the second step on, whichever layer is wrong."""
    torch.manual_seed(0)
    theirs, ours = Loop(extra=False), Loop(extra=True)
    ours.load_state_dict(theirs.state_dict())
    if changed == "logits":
        ours.logits = lambda x: 3 * x
    elif changed is not None:
        with torch.no_grad():
            ours.layers[changed].weight[0, 0] += 0.5
    pairs = {name: name for name in ("layers.0", "layers.1", "layers.2", "logits")}
    left, right = Recorder(theirs, list(pairs)), Recorder(ours, list(pairs))
    x = torch.randn(2, 4)
    theirs(x), ours(x)
    rows = compare(left, right, pairs)
    first = first_difference(rows, 1e-4)
    assert [row.calls for row in rows] == [3, 3, 3, 3]
    if changed is None:
        assert first is None
        return
    assert rows[0].error > 1e-4 or changed == 0
    assert first.theirs == (changed if changed == "logits" else f"layers.{changed}")
    left.remove()
    theirs(x)
    assert len(left.outputs["logits"]) == 3 and "logits" not in vars(theirs)


def test_partners_are_modules_or_methods():
    theirs, ours = nn.Module(), nn.Module()
    theirs.layers, theirs.output, theirs.other = nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4), nn.Linear(4, 4)
    ours.blocks, ours.head = nn.ModuleList([nn.Identity(), nn.Linear(4, 4)]), Loop(extra=False)
    table = [(r"layers\.(\d+)", lambda match, theirs: f"blocks.{len(theirs.layers) + int(match[1])}")]
    table += [("output", "head.logits"), ("other", "head.nothing")]
    assert partners(theirs, ours, table) == {"layers.0": "blocks.1", "output": "head.logits"}


def test_a_layer_that_one_side_never_runs_at_that_size_is_named():
    theirs, ours = chain("a"), chain("a")
    pairs = {"layers.0": "layers.0"}
    left, right = Recorder(theirs, list(pairs)), Recorder(ours, list(pairs))
    theirs(torch.randn(2, 4)), ours(torch.randn(3, 4))
    first = first_difference(compare(left, right, pairs), 1e-4)
    assert first.shapes == "[(2, 4)] against [(3, 4)]"


def test_without_a_checkout_the_message_says_what_to_clone(capsys, tmp_path):
    with pytest.raises(ValueError, match=r"clone https://github.com/FoundationVision/VAR"):
        parity("var", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="choose llamagen, var"):
        parity("other", str(tmp_path))
    assert main(["peer=x"]) == 2 and "family= is missing" in capsys.readouterr().out
    assert set(LAYERS) == {"llamagen", "var", "rar", "xar", "mar"}
