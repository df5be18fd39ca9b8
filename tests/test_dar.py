"""D-AR: who sees whom, which tokens a time uses, previews, and the published size."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import dar, images, make

from vtok import flow
from vtok.noise import SampleNoise
from vtok.quantize.vq import VQ

CONFIGS = Path(__file__).parents[1] / "configs" / "tokenizer"
KEYS = SampleNoise(torch.tensor([5, 6, 7]))


def load(name: str, size: int):
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    return OmegaConf.merge({"data": {"image_size": size}}, {"t": config}).t


@torch.no_grad()
def test_queries_are_causal_and_patches_do_not_see_them():
    model = make("dar")
    before = model.features(images())
    model.queries[3] += 1.0
    after = model.features(images())
    changed = (before != after).flatten(2).any(2).any(0)
    assert changed.tolist() == [False] * 3 + [True] * 5
    z = model.embed(model.encode(images()))
    other = z.clone()
    other[:, 3] = z.flip(0)[:, 5]
    changed = ((model.condition(z) - model.condition(other)).abs() > 1e-6).any(2).any(0)
    assert changed.tolist() == [False] * 3 + [True] * 5


@torch.no_grad()
def test_previews_are_prefixes_and_the_last_one_is_the_image():
    model, seen = make("dar"), []
    tokens = model.encode(images())
    whole = model.decode(tokens, noise=KEYS, on_step=lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1], whole)
    for i, preview in seen:
        torch.testing.assert_close(preview, model.decode(tokens, keep=2 * (i + 1), noise=KEYS), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[0][1], whole, atol=1e-3)


@torch.no_grad()
def test_every_row_may_keep_another_prefix():
    model = make("dar")
    tokens, keep = model.encode(images()), torch.tensor([1, 8, 4])
    together = model.decode(tokens, keep=keep, noise=KEYS)
    for row, k in enumerate(keep.tolist()):
        alone = model.decode(tokens[row : row + 1], keep=k, noise=KEYS.rows(slice(row, row + 1)))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="keep=0"):
        model.decode(tokens, keep=0)


def test_a_time_uses_one_group_and_later_tokens_get_no_loss():
    """Only codes of tokens up to the used group's end move; the groups follow the published formula."""
    model = dar()
    u = torch.tensor([1.0, 0.88, 0.87, 0.6, 0.1, 1e-6])
    want = [min(int((1 - float(x)) * 4 + 0.5), 3) for x in u]
    assert model.group_of(u).tolist() == want == [0, 0, 1, 2, 3, 3]
    quantizer = VQ(vocab_size=16, channels=4)
    z = torch.randn(2, 8, 4, requires_grad=True)
    used = torch.arange(8) < torch.tensor([[2], [6]])
    found = quantizer(z, weight=used.float())
    sum(found.loss.values()).backward()
    assert torch.equal(z.grad.abs().sum(-1) > 0, used)
    unit = torch.nn.functional.normalize(z, dim=-1)
    errors = (unit - found.codes).detach().square().mean(-1)
    assert float(found.loss["codebook"].detach()) == pytest.approx(float(errors[used].mean()), rel=1e-5)


def test_near_codes_by_brute_force():
    quantizer = VQ(vocab_size=20, channels=4)
    z = torch.randn(2, 3, 4)
    unit = torch.nn.functional.normalize(z, dim=-1)
    distances = torch.cdist(unit, quantizer.codebook.table())
    assert torch.equal(quantizer.near(z, 5), distances.argsort(-1)[..., :5])
    assert torch.equal(quantizer.near(z, 1).squeeze(-1), quantizer.indices(z))


@torch.no_grad()
def test_a_perfect_velocity_decodes_to_the_image_and_has_no_loss():
    """With v = noise - data the walk ends at the data whatever the grid, and the one-step estimate is the data."""
    model, image = make("dar"), images()
    start = flow.normal_map(KEYS, 3, 16, 16)
    exact = (start - model.data_std * image, None)
    model.velocity = lambda x, t, condition: exact
    torch.testing.assert_close(model.walk(torch.zeros(3, 8, 16), start), image, rtol=1e-4, atol=1e-5)
    loss, estimate, _ = model.flow_pass(image, torch.tensor([0.2, 0.5, 0.9]), start, torch.zeros(3, 2, 16))
    assert float(loss) < 1e-10
    torch.testing.assert_close(estimate, image, rtol=1e-4, atol=1e-5)


def test_the_uniform_solver_has_fixed_weights():
    grid = [1.0, 0.7, 0.6, 0.0]
    got = flow.solve(lambda x, t: torch.full_like(x, t), torch.zeros(1), grid, solver="ab2_uniform")
    want = -0.3 * 1.0 - 0.1 * (1.5 * 0.7 - 0.5) - 0.6 * (1.5 * 0.6 - 0.5 * 0.7)
    assert float(got) == pytest.approx(want)


@torch.no_grad()
def test_options_for_short_trainings():
    """Sine positions are added to the patches of both sides; the model's solver is that of a draw that names none."""
    torch.manual_seed(1)
    plain = make("dar")
    torch.manual_seed(1)
    fixed = make("dar", positions="sincos", solver="euler")
    fixed.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain.features(images()), fixed.features(images()), atol=1e-3)
    for embed in (plain.patches, plain.flow.conv_in):
        embed.register_forward_hook(lambda module, inputs, out: out + grid(int(out.shape[1] ** 0.5), out.shape[2]))
    torch.testing.assert_close(plain.features(images()), fixed.features(images()), rtol=0, atol=1e-6)
    tokens = plain.encode(images())
    euler = plain.decode(tokens, noise=KEYS, solver="euler")
    torch.testing.assert_close(fixed.decode(tokens, noise=KEYS), euler, rtol=0, atol=1e-5)
    assert not torch.allclose(euler, plain.decode(tokens, noise=KEYS), atol=1e-3)


def grid(side: int, dim: int) -> torch.Tensor:
    """[side^2, dim]: sines and cosines of the row, then of the column, frequency by frequency."""
    rates = [10000 ** (-i / (dim // 4)) for i in range(dim // 4)]
    cells = [(row, column) for row in range(side) for column in range(side)]
    waves = [[f(k * rate) for k in cell for f in (math.sin, math.cos) for rate in rates] for cell in cells]
    return torch.tensor(waves)


def test_an_open_start_passes_tokens_on_at_once():
    """What the paper's start keeps from the tokens in the first step: its conditions count for nothing yet."""
    reached = {}
    for init in ("paper", "open"):
        model = dar(init=init).train()
        torch.nn.init.ones_(model.flow.out.weight)  # zero in both: no gradient passes it in the first step
        model(images(), key=torch.arange(3)).losses["flow"].backward()
        reached[init] = float(model.project_out.weight.grad.abs().sum())
    assert reached["paper"] == 0 < reached["open"]
    for name in ("solver", "positions", "init"):
        with pytest.raises(ValueError, match=f"{name}='x': choose"):
            dar(**{name: "x"})


def test_the_tapped_states_train_the_flow():
    model = dar(repa_block=1, repa_width=5, repa_side=2).train()
    found = model(images(), key=torch.arange(3)).features["repa"]
    assert found.shape == (3, 4, 5)
    found.square().sum().backward()
    assert all(p.grad is not None for p in model.flow.repa.parameters())
    assert model.flow.blocks[0].block.attention.qkv.weight.grad is not None
    assert model.flow.blocks[1].block.attention.qkv.weight.grad is None
    with pytest.raises(ValueError, match="repa_block"):
        dar(repa_block=2)


@pytest.mark.parametrize("name, size, count", (("dar", 256, 307_444_672), ("dar_small", 32, None)))
def test_published_and_small_sizes(name, size, count):
    with torch.device("meta"):
        model = instantiate(load(name, size), _convert_="all")
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == count if count else 1e6 < parameters < 8e6
    assert f"{parameters:,} parameters" in (CONFIGS / f"{name}.yaml").read_text()
    if name == "dar":
        part = model.spec.parts[0]
        assert (part.count, part.vocab_size, part.channels) == (256, 16384, 8)
