"""Losses on frozen pretrained networks, with their architectures at seeded random weights; nothing is downloaded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vtok.losses.alignment import Alignment
from vtok.losses.backbone import Backbone
from vtok.losses.logits import FILES, LogitDistance
from vtok.tokenizer import Reconstruction

timm = pytest.importorskip("timm")
# one of each kind: a class token, class and register tokens with rotary positions, no class token
MODELS = {
    "dinov2": ("vit_small_patch14_dinov2.lvd142m", 28),
    "dinov3": ("vit_small_patch16_dinov3.lvd1689m", 32),
    "siglip2": ("vit_base_patch32_siglip_256.v2_webli", 64),
}


whole_network = timm.create_model


@pytest.fixture(scope="module", autouse=True)
def two_blocks():
    """The architectures with two of their blocks: the rest would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **options: whole_network(name, **{"depth": 2} | options))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, two_blocks):
    """Random weights in the files' format, at the sizes at which the published ones were trained."""
    folder = tmp_path_factory.mktemp("backbones")
    for model, _ in MODELS.values():
        torch.manual_seed(0)
        net = timm.create_model(model, num_classes=0)
        for name, value in sorted(net.state_dict().items()):
            if "pos_embed" in name:
                value.normal_(0, 0.5)  # so that losing the positions would show
        save_file(net.state_dict(), folder / f"{model}.safetensors")
    return folder


def ramp(batch: int = 2, side: int = 28) -> torch.Tensor:
    steps = torch.linspace(-1, 1, batch * 3 * side * side)
    return steps.view(batch, 3, side, side)


@pytest.mark.parametrize("kind", MODELS)
def test_a_backbone_is_timms_network(folder, kind):
    model, size = MODELS[kind]
    backbone = Backbone(model=model, size=size, weights_path=folder)
    direct = timm.create_model(model, num_classes=0, img_size=size)
    weights = load_file(folder / f"{model}.safetensors")
    if kind == "dinov2":  # trained at 518 px: its positions are a 37 x 37 image
        weights["pos_embed"] = timm.layers.resample_abs_pos_embed(weights["pos_embed"], [2, 2], num_prefix_tokens=1)
    elif kind == "siglip2":
        weights["pos_embed"] = timm.layers.resample_abs_pos_embed(weights["pos_embed"], [2, 2], num_prefix_tokens=0)
    direct.load_state_dict(weights)
    images = ramp(side=size)
    mean, std = ((0.5,) * 3, (0.5,) * 3) if kind == "siglip2" else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    prepared = torch.stack([((images[:, c] + 1) / 2 - mean[c]) / std[c] for c in range(3)], 1)
    tokens = direct.eval().forward_features(prepared)
    label, patches = backbone(images)
    first = {"dinov2": 1, "dinov3": 5, "siglip2": 0}[kind]
    torch.testing.assert_close(patches, tokens[:, first:], rtol=1e-4, atol=1e-5)
    assert patches.shape[1] == 4 and (label is None) == (kind == "siglip2")
    if label is not None:
        torch.testing.assert_close(label, tokens[:, 0], rtol=1e-4, atol=1e-5)


def test_preprocessing_is_pinned(folder):
    """A ramp of 56 px to 28 px: normalised by ImageNet's numbers, then bicubic without antialiasing, a = -0.75."""
    backbone = Backbone(model=MODELS["dinov2"][0], size=28, weights_path=folder)
    image = torch.linspace(-1, 1, 56).expand(1, 3, 56, 56)
    seen = backbone.prepare(image)
    # at half size every output lies midway between two inputs: weights (-3, 19, 19, -3) / 32
    row = image[0, 0, 0]
    inside = (-3 * row[1:-5:2] + 19 * row[2:-4:2] + 19 * row[3:-3:2] - 3 * row[4:-2:2]) / 32
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        torch.testing.assert_close(seen[0, c, 0, 1:-2], ((inside[:25] + 1) / 2 - mean) / std, rtol=1e-4, atol=1e-5)
    assert backbone.prepare(image[..., :28, :28]).shape == (1, 3, 28, 28)


def recon(**features: torch.Tensor) -> Reconstruction:
    return Reconstruction(torch.zeros(2, 3, 28, 28), torch.zeros(2, 1).long(), features=features)


def test_alignment_is_the_formula(folder):
    term = Alignment(
        model=MODELS["dinov2"][0],
        size=28,
        weights_path=folder,
        features={"fine": "patch", "whole": "class", "coarse": "mean"},
        weight=0.5,
        margin=0.25,
    )
    torch.manual_seed(1)
    images = ramp()
    fine, whole, coarse = (torch.randn(2, 4, 384), torch.randn(2, 384), torch.randn(2, 3, 384))
    label, patches = Backbone(model=MODELS["dinov2"][0], size=28, weights_path=folder)(images)

    def loss(states, target):
        unit = lambda v: v / v.norm(dim=-1, keepdim=True)  # noqa: E731
        return (0.75 - (unit(states) * unit(target)).sum(-1)).clamp(min=0)

    found = term(recon(fine=fine, whole=whole, coarse=coarse), images)
    torch.testing.assert_close(found["fine"], 0.5 * loss(fine, patches).mean())
    torch.testing.assert_close(found["whole"], 0.5 * loss(whole, label).mean())
    torch.testing.assert_close(found["coarse"], 0.5 * loss(coarse.mean(1), patches.mean(1)).mean())
    # a state that says the same as the target costs nothing within the margin, and 1 - 0.25 - (-1) at the other end
    same = term(recon(fine=3 * patches, whole=label, coarse=-patches), images)
    assert same["fine"] == 0 and same["whole"] == 0
    torch.testing.assert_close(same["coarse"], torch.tensor(0.5 * 1.75))
    weights = torch.tensor([0.2, 0.7])
    found = term(recon(fine=fine, whole=whole, coarse=coarse, fine_weight=weights), images)
    torch.testing.assert_close(found["fine"], 0.5 * (weights[:, None] * loss(fine, patches)).mean())


def test_alignment_moves_the_states_only(folder):
    term = Alignment(
        model=MODELS["dinov3"][0], size=32, weights_path=folder, features={"a": "mean"}, width=8, hidden=16, final=0.2
    )
    assert set(term.state_dict()) == {f"projections.a.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    states, images = torch.randn(2, 8, requires_grad=True), ramp(side=32).requires_grad_()
    early = term(recon(a=states), images, progress=0.0)["a"]
    early.backward()
    assert states.grad.abs().sum() > 0 and images.grad is None
    assert all(p.grad is None and not p.requires_grad for p in term.backbone.net.parameters())
    assert all(p.grad is not None for p in term.parameters())
    half = term(recon(a=states), images, progress=0.5)["a"]
    torch.testing.assert_close(half, 0.6 * early)  # 1 falls to 0.2
    term.train()
    assert not term.backbone.net.training


def test_mistakes_of_an_alignment_are_named(folder, tmp_path, monkeypatch):
    model, size = MODELS["dinov2"]
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            ValueError,
            match=rf"{model}\.safetensors \(about 88 MB\) in {tmp_path}: get it from https://huggingface\.co/timm/{model}"
            r".*weights_path=",
        ),
    ):
        patch.setattr(timm, "create_model", whole_network)
        Alignment(model=model, size=size, features={"a": "patch"}, weights_path=tmp_path)
    (tmp_path / f"{model}.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="does not fit"):
        Alignment(model=model, size=size, features={"a": "patch"}, weights_path=tmp_path)
    with pytest.raises(ValueError, match="no such model"):
        Alignment(model="vit_of_tomorrow", size=size, features={"a": "patch"})
    with pytest.raises(ValueError, match="no class token"):
        Alignment(model=MODELS["siglip2"][0], size=64, features={"a": "class"}, weights_path=folder)
    with pytest.raises(ValueError, match="patch, class or mean"):
        Alignment(model=model, size=size, features={"a": "cls"}, weights_path=folder)
    term = Alignment(model=model, size=size, features={"a": "patch"}, weights_path=folder / f"{model}.safetensors")
    with pytest.raises(ValueError, match=r"\['a'\], the tokenizer gives \['b'\]"):
        term(recon(b=torch.zeros(2, 4, 384)), ramp())
    with torch.no_grad():  # validation: some families give their states in training only
        assert term(recon(), ramp()) == {}
    with pytest.raises(ValueError, match=r"\(2, 9, 384\).*change size"):
        term(recon(a=torch.zeros(2, 9, 384)), ramp())


# --- logits of a classifier -----------------------------------------------------------------------------------------


def test_logit_distance_is_torchvisions(tmp_path):
    models = pytest.importorskip("torchvision").models
    name, _ = FILES["convnext_tiny"]
    torch.manual_seed(0)
    net = models.convnext_tiny(weights=None)
    for key, value in net.state_dict().items():
        if key.endswith("layer_scale"):
            value.fill_(0.5)  # 1e-6 at first: the blocks would not count
        elif key == "classifier.2.weight":
            value.mul_(100)
    torch.save(net.state_dict(), tmp_path / name)
    term = LogitDistance(model="convnext_tiny", weight=0.1, weights_path=tmp_path)
    assert not list(term.parameters()) and not term.state_dict()
    images = ramp(1, 32)
    made = images.flip(3).requires_grad_()
    found = term(Reconstruction(made, torch.zeros(1, 1).long()), images)["logits"]

    def logits(x):
        x = F.interpolate((x + 1) / 2, size=(224, 224), mode="bilinear", antialias=True)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return net.eval()((x - mean[:, None, None]) / std[:, None, None])

    with torch.no_grad():
        want = 0.1 * (logits(made) - logits(images)).square().mean()
    assert want > 1e-4
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-7)
    found.backward()
    assert made.grad.abs().sum() > 0 and all(p.grad is None for p in term.net.net.parameters())
    big = torch.linspace(-1, 1, 448).expand(1, 3, 448, 448)
    # antialiased halving by a triangle of radius 2: (1, 3, 3, 1) / 8
    row = (big[0, 0, 0, 1:-4:2] + 3 * big[0, 0, 0, 2:-3:2] + 3 * big[0, 0, 0, 3:-2:2] + big[0, 0, 0, 4:-1:2]) / 8
    torch.testing.assert_close(
        term.prepare(big)[0, 1, 5, 1:-2], ((row[:221] + 1) / 2 - 0.456) / 0.224, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"convnext_small-0c510722\.pth \(192 MB\).*weights_path="):
        LogitDistance(weights_path=tmp_path)
    torch.save({}, tmp_path / name)
    with pytest.raises(ValueError, match="does not hold"):
        LogitDistance(model="convnext_tiny", weights_path=tmp_path)
