"""FlexVAR's quantiser and tokenizer: scales that know nothing of each other, and any list of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vtok.layout import SequenceLayout
from vtok.losses.objective import TokenizerObjective
from vtok.models.flexvar import FlexVARTokenizer
from vtok.quantize.independent import IndependentVQ
from vtok.quantize.vq import VQ


def tokenizer(**options) -> FlexVARTokenizer:
    torch.manual_seed(0)
    quantizer = IndependentVQ(vocab_size=40, channels=4, sides=(1, 2, 3, 6))
    shape = dict(channels=8, multipliers=[1, 2, 2], blocks=1, groups=4, z_channels=8)
    return FlexVARTokenizer(image_size=24, quantizer=quantizer, **(shape | options)).eval()


def images(size: int = 24) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_scale_is_a_plain_vq_of_the_pooled_map():
    quantizer = tokenizer().quantizer
    plain = VQ(vocab_size=40, channels=4)
    plain.load_state_dict(quantizer.state_dict())
    z = torch.randn(2, 6, 6, 4, requires_grad=True)
    found = quantizer(z)
    wants = [plain(F.adaptive_avg_pool2d(z.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)) for side in quantizer.sides]
    assert torch.equal(found.ids, torch.cat([want.ids for want in wants], 1))
    torch.testing.assert_close(found.codes, torch.cat([want.codes for want in wants], 1))
    torch.testing.assert_close(found.z, wants[-1].z)
    for name in ("commitment", "codebook"):
        torch.testing.assert_close(found.loss[name], sum(want.loss[name] for want in wants) / 4)
    assert torch.equal(quantizer.indices(z, [2, 5])[:, :4], found.ids[:, 1:5])


def test_any_list_of_scales_at_any_size():
    module = tokenizer()
    for sides, size in (((1, 4, 5), 24), ((2, 8), 32), ((1, 2, 3, 6), 40)):
        layout = SequenceLayout.scales(sides)
        tokens = module.encode(images(size), layout=layout)
        assert tokens.shape == (2, layout.length)
        z = module.features(images(size)).permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(z, sides[-1]).permute(0, 2, 3, 1)
        codes = module.quantizer.lookup(VQ.indices(module.quantizer, pooled)).mT.unflatten(2, sides[-1:] * 2)
        want = module.decoder(module.project_out(codes))
        decoded = module.decode(tokens, layout=layout)
        assert decoded.shape == (2, 3, 4 * sides[-1], 4 * sides[-1])
        torch.testing.assert_close(decoded, want, rtol=1e-4, atol=1e-5)
        assert module.decode(tokens, layout=layout, size=20).shape == (2, 3, 20, 20)
    with pytest.raises(ValueError, match="square"):
        module.encode(images(), layout=SequenceLayout.line(50))
    with pytest.raises(ValueError, match="square"):
        module.encode(torch.rand(1, 3, 8, 16))
    with pytest.raises(ValueError, match="expected int64"):
        module.decode(tokens[:, :-1], layout=layout)
    with pytest.raises(ValueError, match="sides"):
        module.spec_for(40)


def test_prefixes_are_whole_images():
    module = tokenizer()
    tokens = module.encode(images())
    codes = module.embed(tokens)
    small = module.decoder(module.project_out(codes[:, 1:5].mT.unflatten(2, (2, 2))))
    want = F.interpolate(small, size=(24, 24), mode="bicubic")
    torch.testing.assert_close(module.decode(tokens, keep=5), want, rtol=1e-4, atol=1e-5)
    other = tokens.clone()
    other[:, :1] = 0  # earlier scales do not matter either
    assert torch.equal(module.decode(other, keep=5), module.decode(tokens, keep=5))
    for keep, word in ((4, "end of a scale"), (torch.tensor([1, 5]), "one keep")):
        with pytest.raises(ValueError, match=word):
            module.decode(tokens, keep=keep)


def test_smaller_scales_are_compared_with_smaller_images():
    module = tokenizer()
    recon = module(images())
    codes, errors = module.quantizer(module.features(images())).codes, []
    for (start, stop), side in zip(((0, 1), (1, 5), (5, 14)), (1, 2, 3)):
        image = module.decoder(module.project_out(codes[:, start:stop].mT.unflatten(2, (side, side))))
        errors.append((image - F.adaptive_avg_pool2d(images(), 4 * side)).square().mean())
    torch.testing.assert_close(recon.losses["scales"], sum(errors) / 3)
    assert set(tokenizer(scale_weight=0.0)(images()).losses) == {"commitment", "codebook"}
    with pytest.raises(ValueError, match="scale_weight"):
        tokenizer(scale_weight=-1.0)


def large(**options) -> FlexVARTokenizer:
    """The published list of sides, on narrow networks."""
    torch.manual_seed(0)
    quantizer = IndependentVQ(vocab_size=40, channels=4, sides=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    shape = dict(channels=4, multipliers=[1, 1], blocks=1, groups=2, z_channels=4, attention=False)
    return FlexVARTokenizer(image_size=32, quantizer=quantizer, mid_attention=False, **shape, **options)


def test_drawn_lists_follow_the_law_and_cover_all_sides():
    module, steps = large(draw_sides=True), 4000
    lists = [module.sides_at(step / steps) for step in range(steps)]
    assert lists == [module.sides_at(step / steps) for step in range(steps)]
    assert all(s == tuple(sorted(set(s))) and s[0] == 1 and s[-1] == 16 for s in lists)
    assert all(sum(side**2 for side in s) <= 680 for s in lists)
    assert {side for s in lists for side in s} == set(range(1, 17))
    own = sum(s == module.quantizer.sides for s in lists) / steps
    assert abs(own - 0.05 * 0.9) < 5 * (0.05 / steps) ** 0.5  # 5 % draw it, a tenth of them loses a side or more
    assert max(lists.count(s) for s in set(lists)) == lists.count(module.quantizer.sides)  # the rest is spread


def test_a_drawn_step_is_one_with_these_sides():
    """Training at a share of progress equals a tokenizer whose fixed list it is; another share has another list."""
    module = large(draw_sides=True).train()
    picture, steps = images(32), 50
    chosen = [module.sides_at(step / steps) for step in range(steps)]
    assert len(set(chosen)) > 25
    for step in (3, 17):
        sides = chosen[step]
        fixed = large().train()
        fixed.load_state_dict(module.state_dict())
        fixed.quantizer.sides = sides
        got, want = module(picture, progress=step / steps), fixed(picture, progress=step / steps)
        assert got.tokens.shape == (2, sum(side**2 for side in sides)) and torch.equal(got.tokens, want.tokens)
        assert got.images.shape == picture.shape and torch.equal(got.images, want.images)
        assert all(torch.equal(got.losses[name], want.losses[name]) for name in want.losses)
        alone = module(picture[1:], progress=step / steps, key=torch.tensor([5]))  # nor do the samples matter
        assert torch.equal(alone.tokens, got.tokens[1:])


def test_evaluation_and_off_keep_the_fixed_list():
    drawing, fixed = large(draw_sides=True), large()
    for mode, one in ((False, drawing), (True, fixed), (False, fixed)):
        assert one.train(mode)(images(32), progress=0.3).tokens.shape == (2, 680)
    assert drawing.eval().encode(images(32)).shape == (2, 680)
    recon = TokenizerObjective(perceptual_weight=0.0).reconstruct(drawing.train(), images(32), progress=0.02)
    assert recon.tokens.shape[1] == sum(side**2 for side in drawing.sides_at(0.02))


def test_published_size():
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    with torch.device("meta"):
        quantizer = IndependentVQ(vocab_size=8912, channels=32, sides=sides)
        module = FlexVARTokenizer(image_size=256, quantizer=quantizer)
    assert sum(p.numel() for p in module.parameters()) == 72_049_827 and module.spec.layout.length == 680
