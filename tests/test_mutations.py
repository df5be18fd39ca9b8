"""The recorded outputs notice mistakes: two keys exchanged, another norm epsilon, another order of rope's angles.

Every test of a recorded reference runs once more with the mistake made in what it reads or converts, and must fail.
"""

import importlib

import pytest
from references import read

# golden or reference -> (module of its test, the test, its arguments); flextok's has equations, not recorded numbers
TESTS = {
    "llamagen_gpt": ("test_vgen_goldens", "test_llamagen"),
    "var": ("test_vgen_goldens", "test_var"),
    "rar": ("test_golden_rar", "test_rar"),
    "mar": ("test_golden_mar", "test_training_pieces"),
    "maskgit_bert": ("test_golden_maskgit_bert", "test_logits"),
    "xar": ("test_golden_xar", "test_cells_velocity_and_loss"),
    "flexvar": ("test_golden_flexvar_gpt", "test_flexvar"),
    "gigatok_gpt": ("test_golden_llamagen_family", "test_gigatok"),
    "dar_gpt": ("test_golden_llamagen_family", "test_dar"),
    "restok_gpt_har": ("test_golden_llamagen_family", "test_har"),
    "detailflow_gpt": ("test_golden_llamagen_family", "test_detailflow"),
    "hita_gpt": ("test_golden_llamagen_family", "test_hita"),
    "ifsq_gpt": ("test_reference_generators", "test_gpt", "ifsq", ""),
    "elm_gpt": ("test_reference_generators", "test_elm", "elm_gpt"),
    "llamagen_vq": ("test_vtok_goldens", "test_llamagen_vq"),
    "var_vqvae": ("test_vtok_goldens", "test_var_vqvae"),
    "kl_vae": ("test_golden_kl_vae", "test_kl_vae"),
    "maskgit_vqgan": ("test_golden_maskgit_vqgan", "test_every_recorded_output"),
    "titok": ("test_golden_titok", "test_every_recorded_output"),
    "flexvar_vq": ("test_golden_flexvar_vq", "test_flexvar_networks_are_llamagens"),
    "gigatok": ("test_golden_gigatok", "test_outputs", "gigatok"),
    "retok": ("test_golden_gigatok", "test_outputs", "retok"),
    "restok": ("test_golden_restok", "test_every_recorded_output"),
    "hita": ("test_golden_hita", "test_outputs"),
    "dar": ("test_golden_dar", "test_dar"),
    "dar_encoder": ("test_reference_tokenizers", "test_dar_encoder"),
    "detailflow": ("test_golden_detailflow", "test_detailflow"),
    "ifsq_vae": ("test_golden_ifsq", "test_ifsq_vae"),
    "magvit2": ("test_reference_tokenizers", "test_open_magvit2"),
    "ibq": ("test_reference_tokenizers", "test_ibq"),
    "flextok": ("test_convert_flextok", "test_a_decoder_from_the_originals_tensors"),
}
ROPE = ("llamagen_gpt", "dar_gpt", "restok_gpt_har", "detailflow_gpt", "hita_gpt", "ifsq_gpt", "elm_gpt", "xar")
ROPE_FUNCTIONS = {"restok": ("vtok.models.restok", "rope_2d"), "dar": ("vtok.layers.pixel_flow", "grid_rope")}
ROPE_FUNCTIONS |= {"dar_encoder": ("vtok.models.dar", "grid_rope")}
WHOLE = [name for name in TESTS if name != "dar_encoder"]  # its reference looks at a part
OTHER_EPSILON = {1e-5: 1e-6, 1e-6: 1e-5}
# what goes into their norms has a variance near one: only a coarse mistake is above the tolerance
COARSE = {"maskgit_bert": {1e-12: 1e-2}, "xar": {1e-6: 1e-2}, "flextok": {1e-5: 1e-2}}


def rerun(name, monkeypatch, *, state=None, module=None):
    """The golden's own test, with `state(tensors)` and `module(converted)` changing what it works with."""
    where, test, *arguments = TESTS[name]
    tests = importlib.import_module(where)
    convert = tests.convert

    def changed(family, tensors, config):
        made = convert(family, tensors if state is None else state(dict(tensors)), config)
        return made if module is None else module(made)

    monkeypatch.setattr(tests, "convert", changed)
    if name == "xar":  # its test takes what a fixture has converted
        tensors, inputs, outputs, info = read(name)
        arguments = [(changed(name, tensors, info["ctor"]), inputs, outputs, tensors, info)]
    getattr(tests, test)(*arguments)


def swapped(tensors):
    """Two matrices of one shape and different names exchanged, the first such pair that the model has."""
    seen = {}
    for key in sorted(tensors):
        if tensors[key].dim() < 2 or tensors[key].numel() < 32 or not tensors[key].is_floating_point():
            continue
        kind = (tuple(tensors[key].shape), key.rsplit(".", 1)[-1])
        if kind in seen and not any(word in key for word in ("used", "mask", "rope", "bias", "repa", "distill")):
            other = seen[kind]
            tensors[key], tensors[other] = tensors[other], tensors[key]
            return tensors
        seen.setdefault(kind, key)
    raise ValueError("no two matrices of one shape")


def other_epsilon(model, table):
    changed = [m for m in model.modules() if getattr(m, "eps", None) in table]
    if not changed:
        raise ValueError("no norm of these epsilons")
    for part in changed:
        part.eps = table[part.eps]
    return model


def turned(model):
    """Rows' angles in the place of columns' (or the fastest in the place of the slowest)."""
    model.cos, model.sin = model.cos.flip(-1), model.sin.flip(-1)
    return model


@pytest.mark.parametrize("name", WHOLE)
def test_two_keys_exchanged(name, monkeypatch):
    with pytest.raises(AssertionError):
        rerun(name, monkeypatch, state=swapped)


@pytest.mark.parametrize("name", WHOLE)
def test_another_epsilon(name, monkeypatch):
    with pytest.raises(AssertionError):
        rerun(name, monkeypatch, module=lambda model: other_epsilon(model, COARSE.get(name, OTHER_EPSILON)))


@pytest.mark.parametrize("name", ROPE)
def test_another_order_of_angles(name, monkeypatch):
    with pytest.raises(AssertionError):
        rerun(name, monkeypatch, module=turned)


@pytest.mark.parametrize("name", ROPE_FUNCTIONS)
def test_another_order_of_a_tokenizers_angles(name, monkeypatch):
    where, function = ROPE_FUNCTIONS[name]
    module = importlib.import_module(where)
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *given: tuple(table.flip(-1) for table in right(*given)))
    with pytest.raises(AssertionError):
        rerun(name, monkeypatch)
