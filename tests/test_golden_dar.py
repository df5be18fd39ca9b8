"""D-AR's recorded outputs, met through vtok.convert.convert."""

import torch
from references import assert_close, read

from vtok import flow
from vtok.convert import convert


@torch.no_grad()
def test_dar():
    state, given, want, info = read("dar")
    module = convert("dar", state, info["ctor"])
    image, noise = given["image"], given["noise"]
    tokens = module.encode(image)
    assert torch.equal(tokens, want["indices"])
    z = module.embed(tokens)
    assert_close(z, want["quant"].squeeze(2).transpose(1, 2))
    assert_close(module.condition(z), want["cond"])
    assert torch.equal(module.quantizer.indices(given["z"].squeeze(2).transpose(1, 2)).flatten(), want["z_indices"])

    codes = module.embed(given["indices"])
    assert_close(module.walk(module.condition(codes), noise), want["image_from_given"])
    assert_close(module.walk(module.condition(codes[:, :4]), noise), want["image_clip2"])
    assert_close(module.walk(want["cond"], noise, solver="euler"), want["image_euler"])

    u = 1 - given["time"]
    loss, estimate, _ = module.flow_pass(image, u, noise, want["cond"][:, 2:4])
    assert_close(loss.view(1), want["fm_loss"])
    assert_close(estimate, want["pred_x1"])
    t = flow.shifted(u, module.time_shift)
    assert_close(1 - t, want["shifted_time"])
    assert_close(flow.interpolate(module.data_std * image, noise, t) / module.data_std, want["xt"])
