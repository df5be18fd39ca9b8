"""FlowAR and E-CAR: maps between scales, the block flow head, the renoising of stages, one solver step by hand."""

import pytest
import torch
import torch.nn.functional as F
from generators import CHANNELS, CLASSES, FAMILIES, drawn, make, tokens_of

from vgen.conditioning import Cond
from vgen.convert import convert
from vgen.guidance import ClassifierFree, Linear, Progress, guidance
from vgen.heads import DrawRule
from vgen.latents import enlarge, scale_map, shrink
from vgen.models.ecar import ECAR, renoise, start_after
from vgen.models.flowar import FlowAR
from vgen.samplers.ancestral import ancestral
from vtok.flow import interpolate
from vtok.layout import SequenceLayout
from vtok.noise import SampleNoise, sample_seeds
from vtok.tokenizer import Part, TokenSpec

LABELS = torch.tensor([0, 3, CLASSES])


def test_scales_are_area_means_and_inputs_pass_through_the_full_grid():
    model, tokens = make("flowar"), tokens_of(make("flowar"), 3)
    canvas, maps = model.arrange(tokens), tokens.unflatten(1, (4, 4))
    torch.testing.assert_close(canvas.tokens[:, 0], tokens.mean(1))
    blocks = maps.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
    torch.testing.assert_close(canvas.tokens[:, 1:5], blocks.flatten(1, 2))
    assert torch.equal(canvas.tokens[:, 5:], tokens) and torch.equal(model.restore(canvas), tokens)
    full = F.interpolate(blocks.permute(0, 3, 1, 2), (4, 4), mode="bicubic")
    torch.testing.assert_close(enlarge(scale_map(canvas.tokens, model.layout, 1), 4), full.permute(0, 2, 3, 1))
    one = model.inputs(canvas, model.conditioner(LABELS), 1, 2)  # scale 1 x 1 at every cell of 2 x 2: constant
    want = model.stacks.enter(model.stacks.project(canvas.tokens[:, :1]).expand(-1, 4, -1), 1, 5)
    torch.testing.assert_close(one.x, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flowar", "flowar_cross"])
def test_the_head_sees_one_scale_at_a_time_and_the_loss_weighs_scales_by_their_cells(name):
    model, keys = make(name), sample_seeds(0, 0, 3)
    batch = {"tokens": tokens_of(model, 3), "label": LABELS, "key": keys}
    out, layout = model.loss(batch), model.layout
    canvas = model.arrange(batch["tokens"])
    h = model(canvas, model.conditioner(LABELS))
    means = []
    for k, (a, b) in enumerate(((0, 1), (1, 5), (5, 21))):
        t = SampleNoise(keys).uniform(torch.arange(3), 7301)[:, k]
        noise = SampleNoise(keys).normal(torch.arange(a, b), CHANNELS, 7302)
        x = interpolate(canvas.tokens[:, a:b], noise, t)
        got = model.head(x, t, h[:, a:b])
        means.append((got - (noise - canvas.tokens[:, a:b])).square().mean((1, 2)))
        torch.testing.assert_close(out["nats"][:, a:b].mean(1), means[-1], rtol=1e-4, atol=1e-5)
    weights = torch.tensor(layout.sizes) / 16
    torch.testing.assert_close(out["loss"], (torch.stack(means, 1) * weights).sum(1).mean(), rtol=1e-4, atol=1e-5)
    moved = model.head(x.flip(1), t, h[:, 5:].flip(1))  # states carry the place, attention is symmetric
    torch.testing.assert_close(moved.flip(1), got, rtol=1e-4, atol=1e-4)


def test_one_euler_step_by_hand_with_the_gate_of_the_guidance():
    model, noise = make("flowar"), SampleNoise(sample_seeds(0, 0, 3))
    cond, null = model.conditioner(LABELS), model.conditioner.null(3)
    rows = []
    model.head.net.register_forward_pre_hook(lambda _, args: rows.append(len(args[0].x)))
    done = ancestral(
        model,
        Cond.cat([cond, null]),
        noise=noise,
        guide=guidance(3.0, "gate", high=0.6),
        rule=DrawRule(solver_steps=2),
    )
    a, b = 5, 21
    x = noise.normal(torch.arange(a, b), CHANNELS)
    assert rows == [3, 3] + [3, 6] * 2, "two steps a scale; the first scale is not guided"
    states = [model(done, row)[:, a:b] for row in (cond, null)]
    c = model.head(x, torch.full((3,), 1.0), states[0])  # time 1 is above 0.6: unguided
    x = x - 0.5 * c
    c, u = (model.head(x, torch.full((3,), 0.5), state) for state in states)
    torch.testing.assert_close(done.tokens[:, a:b], x - 0.5 * (u + 3.0 * (c - u)), rtol=1e-4, atol=1e-4)
    gate = guidance(3.0, "gate", high=0.6).schedule
    assert gate(Progress(1, 3, time=0.6)) == 2 and gate(Progress(2, 3, time=0.61)) == 1


@pytest.mark.parametrize("name", ["flowar", "flowar_cross", "ecar"])
def test_what_does_not_change_in_a_solve_is_computed_once_a_scale(name):
    """The states and, with cross-attention, their keys: as often as there are scales, whatever the steps; a time is
    embedded for one row. Tokens are those of the head as training calls it."""
    model, noise = make(name), SampleNoise(sample_seeds(0, 0, 3))
    head, rule = model.head, DrawRule(solver_steps=4)
    cond, guide, calls = Cond.cat([model.conditioner(LABELS), model.conditioner.null(3)]), guidance(3.0), []
    fixed = {"state": head.state} | ({"keys": head.net.blocks[-1].cross.kv} if head.cross else {})
    for key, layer in fixed.items():
        layer.register_forward_pre_hook(lambda _, args, key=key: calls.append(key))
    head.time.register_forward_pre_hook(lambda _, args: calls.append(f"time of {len(args[0])}"))
    got = ancestral(model, cond, noise=noise, guide=guide, rule=rule).tokens
    assert {key: calls.count(key) for key in calls} == {key: 3 for key in fixed} | {"time of 1": 12}
    at, head.condition = head.at, lambda h: (h, [])
    head.at = lambda x, t, given: at(x, t.expand(len(x)), type(head).condition(head, given[0]))
    want = ancestral(model, cond, noise=noise, guide=guide, rule=rule).tokens
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)  # a product of one row, or of six
    assert calls.count("state") == 3 + 12 and calls.count("time of 6") == 12


def test_sizes_are_near_those_that_others_report():
    spec = TokenSpec(SequenceLayout.raster(16, 16), (Part(256, None, 16),), 256)
    sizes = {
        170e6: (6, 768, 12, 2, 1024, False),
        589e6: (8, 1024, 16, 12, 1024, True),
        1.9e9: (15, 1536, 16, 12, 1536, True),
    }
    for count, (depth, width, heads, head_depth, head_width, cross) in sizes.items():
        with torch.device("meta"):
            options = {"head_depth": head_depth, "head_width": head_width, "head_cross": cross}
            model = FlowAR(spec, 1000, depth=depth, width=width, heads=heads, **options)
        assert model.layout.sizes == (1, 4, 16, 64, 256)
        assert abs(sum(p.numel() for p in model.parameters()) / count - 1) < 0.015


def published_state(model):
    """The trunk's tensors under the original's names, written out by hand."""
    names = {"conditioner.table.weight": "class_emb.weight", "state_position": "diffusion_pos_embed_learned"}
    names |= {"stacks.enter_norm.weight": "z_proj_ln.weight", "stacks.middle_norm.weight": "encoder_norm.weight"}
    names |= {
        "stacks.enter_position": "encoder_pos_embed_learned",
        "stacks.middle_position": "decoder_pos_embed_learned",
    }
    names |= {"trunk.norm.weight": "decoder_norm.weight"}
    for kind in ("weight", "bias"):
        names |= {f"stacks.project.{kind}": f"z_proj.{kind}", f"stacks.middle.{kind}": f"decoder_embed.{kind}"}
    state = {}
    for key, value in model.state_dict().items():
        if key in names:
            state[names[key]] = value
        elif key.startswith("trunk.blocks."):
            _, _, block, *rest = key.split(".")
            stack, kind = ("encoder", "decoder")[int(block)], rest[-1]
            inner = {"attention.qkv": "attn.qkv", "attention.out": "attn.proj", "ffn.down": "mlp.fc2"}
            inner |= {"modulation": "ada_lin.1"}
            name = ".".join(rest[:-1])
            if name == "ffn.up":
                gate, plain = value.chunk(2)
                state |= {f"{stack}_blocks.0.mlp.fc1_g.{kind}": gate, f"{stack}_blocks.0.mlp.fc1_x.{kind}": plain}
            else:
                state[f"{stack}_blocks.0.{inner[name]}.{kind}"] = value
    return state


def test_the_converter_takes_the_trunk_and_refuses_unknown_heads():
    model = make("flowar")
    state = published_state(model)
    config = {"heads": 2, "head": [1, 32, False], "trunk_only": True}
    twin = convert("flowar", {**state, "flownet.inner.weight": torch.zeros(1)}, config)
    canvas = model.arrange(tokens_of(model, 3))
    assert torch.equal(twin(canvas, twin.conditioner(LABELS)), model(canvas, model.conditioner(LABELS)))
    with pytest.raises(ValueError, match=r"flownet\.inner\.weight"):
        convert("flowar", {**state, "flownet.inner.weight": torch.zeros(1)}, {**config, "trunk_only": False})
    with pytest.raises(ValueError, match="unknown keys: surprise"):
        convert("flowar", {**state, "surprise": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="mask is not"):
        convert("flowar", {**state, "mask": torch.zeros(1, 1, 21, 21)}, config)


@pytest.mark.parametrize("ratio, end", [(2, 0.5), (4, 0.2)])
def test_renoised_maps_have_the_mean_and_the_white_noise_of_the_next_start(ratio, end):
    drawer = torch.Generator().manual_seed(0)
    data = torch.randn(1, 2, 2, 1, generator=drawer).expand(20_000, -1, -1, -1)
    maps = (1 - end) * data + end * torch.randn(data.shape, generator=drawer)
    white = torch.randn(20_000, 2 * ratio, 2 * ratio, 1, generator=drawer)
    x, start = renoise(maps, end, white), start_after(end, ratio)
    assert 0 < end < start < 1
    mean = (1 - start) * data[0].repeat_interleave(ratio, 0).repeat_interleave(ratio, 1)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.03)
    covariance = x.flatten(1).T.cov()
    torch.testing.assert_close(covariance, start**2 * torch.eye(len(covariance)), rtol=0, atol=0.03)


def test_stages_are_straight_paths_whose_noise_is_white_and_carried_on():
    model, data = make("ecar"), torch.randn(4000, 16, CHANNELS)
    canvas, noise, carried = model.arrange(data), SampleNoise(sample_seeds(0, 0, 4000)), None
    starts, ends = model.stages(canvas, noise)
    assert model.starts == (1.0, *(start_after(end, 2) for end in model.ends[:-1])) and model.ends[-1] == 0
    torch.testing.assert_close(ends[:, 5:], data)
    for k, (high, low) in enumerate(zip(model.starts, model.ends)):
        a, b = model.layout.written(k, k + 1)
        clean = 0 if k == 0 else enlarge(scale_map(canvas.tokens, model.layout, k - 1), 2**k, "nearest").flatten(1, 2)
        error = (starts[:, a:b] - (1 - high) * clean) / high
        end = (1 - low) * canvas.tokens[:, a:b] + low * error
        torch.testing.assert_close(ends[:, a:b], end, rtol=1e-4, atol=1e-4)
        covariance = error[:, :, 0].T.cov().reshape(b - a, b - a)
        torch.testing.assert_close(covariance, torch.eye(b - a), rtol=0, atol=0.12)  # 4,000 draws
        if k:  # a cell's mean is the noise of the stage before
            means = 2 * shrink(error.unflatten(1, (2**k, 2**k)), 2 ** (k - 1)).flatten(1, 2)
            torch.testing.assert_close(means, carried, rtol=1e-3, atol=1e-3)
        carried = error


def test_a_perfect_velocity_ends_at_the_data(monkeypatch):
    """Stage after stage through the true velocity of one image, in the sampler's own loop."""
    model, data = make("ecar"), tokens_of(make("ecar"), 3)
    canvas, layout = model.arrange(data), model.layout

    def velocity(x, t, condition):
        k = layout.sizes.index(x.shape[1])
        high, low = model.starts[k], model.ends[k]
        end = canvas.tokens[:, slice(*layout.written(k, k + 1))]
        start = 0 if k == 0 else enlarge(scale_map(canvas.tokens, layout, k - 1), 2**k, "nearest").flatten(1, 2)
        share = (t[0] - low) / (high - low)
        error = (x - (1 - share) * (1 - low) * end - share * (1 - high) * start) / t[0]
        return (1 - high) * start + high * error - (1 - low) * end - low * error

    monkeypatch.setattr(model.head, "at", velocity)
    noise = SampleNoise(sample_seeds(0, 0, 3))
    for steps in (1, 3):
        done = ancestral(model, model.conditioner(LABELS), noise=noise, rule=DrawRule(solver_steps=steps))
        torch.testing.assert_close(model.restore(done), data, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", [DrawRule(), DrawRule(solver_steps=2, solver="euler")])
def test_guidance_sees_the_flow_time_of_a_stage_not_its_share(rule):
    """Ends 2/3, 1/3, 0; starts 1, and 2 e / (1 + e) after an end e, by hand; each stage in two Euler steps."""
    model, seen = drawn(FAMILIES["ecar"](solver_steps=2)), []
    guide = ClassifierFree(lambda now: seen.append((now.step, now.time)) or 1.0)
    cond = Cond.cat([model.conditioner(LABELS), model.conditioner.null(3)])
    ancestral(model, cond, noise=SampleNoise(sample_seeds(0, 0, 3)), guide=guide, rule=rule)
    want = [(0, 1), (0, 5 / 6), (1, 4 / 5), (1, (4 / 5 + 1 / 3) / 2), (2, 1 / 2), (2, 1 / 4)]
    assert [step for step, _ in seen] == [step for step, _ in want]
    assert [time for _, time in seen] == pytest.approx([time for _, time in want])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="times falling"):
        FAMILIES["ecar"](ends=[0.5, 0.6, 0.0])
    with pytest.raises(ValueError, match="euler_maruyama"):
        FAMILIES["ecar"](solver="euler_maruyama")
    with pytest.raises(ValueError, match="euler_maruyama"):
        model, rule = make("ecar"), DrawRule(solver="euler_maruyama")
        ancestral(model, model.conditioner(LABELS), noise=SampleNoise(sample_seeds(0, 0, 3)), rule=rule)
    with pytest.raises(ValueError, match="scales=0"):
        FAMILIES["flowar"](scales=0)
    wide = TokenSpec(SequenceLayout.raster(2, 4), (Part(8, None, 4),), 32)
    for cls in (FlowAR, ECAR):
        with pytest.raises(ValueError, match=f"{cls.__name__} has square scales"):
            cls.accepts(wide)
    model = make("flowar")
    batch = {"tokens": tokens_of(model, 3), "label": LABELS, "key": sample_seeds(0, 0, 3)}
    other = model.loss({**batch, "context": tokens_of(model, 3, seed=5)})["nats"]
    same = model.loss(batch)["nats"]
    assert torch.equal(other[:, :1], same[:, :1]) and not torch.allclose(other[:, 1:], same[:, 1:])
    assert ClassifierFree(Linear(2.0)).streams == 2
