"""DetailFlow's recorded outputs, met through vtok.convert.convert."""

import torch
from references import assert_close, read

from vtok.convert import convert


@torch.no_grad()
def test_detailflow():
    state, given, want, info = read("detailflow")
    module = convert("detailflow", state, info["ctor"])
    image = given["image"]
    features = module.features(image)
    assert_close(features, want["features"])
    tokens = module.encode(image)
    assert torch.equal(tokens.flatten(), want["indices"])
    assert torch.equal(tokens[:, :4].flatten(), want["indices_first4"])  # latents see no later ones
    assert_close(module.quantizer(features).z, want["quant"])
    assert_close(module.decode(tokens), want["image"])
    first = module.embed(tokens[:, :4])  # the original decodes a prefix at the side that it is asked for
    assert_close(module.pixels(first), want["image_t4"])
    assert_close(module.pixels(first, size=8), want["image_size8"])
    assert_close(module.decode(given["indices"]), want["image_from_given"])
