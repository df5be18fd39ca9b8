"""FlexTok's recorded parts: FSQ, guidance and the walk of its flow. Its whole models: no reference available."""

import torch
from references import assert_close, read

from vtok import flow
from vtok.apg import classifier_free, guided, projected
from vtok.quantize.fsq import FSQ


def test_flextok_parts():
    state, given, want, info = read("flextok_parts")
    quantizer = FSQ(levels=info["ctor"]["FSQ"]["levels"])
    found = quantizer(given["z"])
    assert_close(found.z, want["fsq_quant"])
    assert torch.equal(found.ids, want["fsq_ids"])
    assert_close(quantizer.lookup(given["ids"]), want["fsq_embedding"])

    cond, uncond, start = given["cond"], given["uncond"], given["noise"]
    assert_close(classifier_free(cond, uncond, 3.0), want["cfg"])
    assert_close(projected(cond, uncond, 3.0)[0], want["apg"])
    first, running = projected(cond, uncond, 3.0)
    assert_close(first, want["apg_momentum1"])
    assert_close(projected(uncond, cond, 3.0, before=running)[0], want["apg_momentum2"])

    def pair(x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        null = torch.tanh(state["toy.a"] * x + t)
        return null + 0.3 * torch.sin(x), null

    grid = flow.times(5)
    assert_close(flow.solve(lambda x, t: pair(x, t)[0], start, grid), want["flow_plain"])
    assert_close(flow.solve(guided(pair, 3.0, project=False), start, grid), want["flow_cfg"])
    assert_close(flow.solve(guided(pair, 3.0, project=True), start, grid), want["flow_apg"])
