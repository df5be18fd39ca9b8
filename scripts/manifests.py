"""Names, shapes and dtypes of published checkpoints, from the originals' own classes built at full size.

    python scripts/manifests.py <folder with checkouts named owner+name> tests/references/manifests [zoo name ...]

A checkout of each original is needed here only; the manifests are facts and the tests run without it. Modules are built
with parameters on the meta device and the constructor arguments of the zoo's entry. Packages that are not installed,
and that a class imports but does not build anything of, are replaced by empty stand-ins.
"""

from __future__ import annotations

import gzip
import importlib.abc
import importlib.machinery
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CHECKOUTS = {
    "llamagen": "FoundationVision+LlamaGen",
    "var": "FoundationVision+VAR",
    "flexvar": "jiaosiyu1999+FlexVAR",
    "xar": "OliverRensu+xAR",
    "mar": "LTH14+mar",
    "kl": "LTH14+mar",
    "rar": "bytedance+1d-tokenizer",
    "titok": "bytedance+1d-tokenizer",
    "maskgit": "bytedance+1d-tokenizer",
    "maskgit_vqgan": "bytedance+1d-tokenizer",
    "gigatok": "SilentView+GigaTok",
    "retok": "zfu006+ReTok",
    "restok": "Kwai-Kolors+ResTok",
    "har": "Kwai-Kolors+ResTok",
    "hita": "CVMI-Lab+Hita",
    "dar": "showlab+D-AR",
    "detailflow": "ByteFlow-AI+DetailFlow",
    "magvit2": "TencentARC+SEED-Voken",
    "ibq": "TencentARC+SEED-Voken",
}
STUBS = {"flash_attn", "kornia", "cv2", "refile", "lmdb", "msgpack", "nori2", "pytorch_lightning", "accelerate"}
STUBS |= {"scipy", "transformers", "open_clip", "webdataset", "albumentations", "diffusers", "decord", "torch_fidelity"}
STUBS |= {"ruamel", "pyiqa"}


class Empty(types.ModuleType):
    """A module that has whatever is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Importing a package of STUBS that is not installed, or a part of it, gives an empty object."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in STUBS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return Empty(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__path__ = []


def of(name: str, **arguments: Any) -> Any:
    """arguments as an object that configurations are read from with dots."""
    from omegaconf import OmegaConf

    return OmegaConf.create(arguments[name])


def build(entry: Any) -> Any:
    """The original's module of a zoo entry. Imports from the current sys.path."""
    import torch

    get, config, generator = importlib.import_module, dict(entry.config), entry.kind == "generator"
    if entry.family == "var":
        models = get("models")
        arguments = {k: v for k, v in config.get("VQVAE", {}).items() if k != "v_patch_nums"}
        sides = tuple(config.get("VQVAE", {}).get("v_patch_nums", (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)))
        vae = models.VQVAE(**arguments, v_patch_nums=sides)
        return models.VAR(vae_local=vae, **config["VAR"] | {"patch_nums": sides}) if generator else vae
    if entry.family == "flexvar":
        vq = get("models.vq_llama")
        if not generator:
            return vq.VQModel(vq.ModelArgs(**config["VQModel_ModelArgs"]))
        vae = vq.VQModel(vq.ModelArgs(codebook_size=8912, codebook_embed_dim=32))
        return get("models.flexvar").FlexVAR(vae_local=vae, **config["FlexVAR"])
    if entry.family in ("llamagen", "gigatok", "retok", "dar", "hita", "detailflow", "har") and generator:
        names = {"gigatok": "gpt_1d", "retok": "gpt_1d", "har": "gpt_har"}
        gpt = get(f"autoregressive.models.{names.get(entry.family, 'gpt')}")
        if entry.family == "har":
            gpt.Transformer.__init__.__globals__["BaseModel"] = torch.nn.Module
        return gpt.Transformer(gpt.ModelArgs(**config["Transformer_ModelArgs"]))
    if entry.family == "llamagen":
        vq = get("tokenizer.tokenizer_image.vq_model")
        return vq.VQModel(vq.ModelArgs(**config["VQModel_ModelArgs"]))
    if entry.family == "xar":
        return get("models.xar").xAR(**config["xAR"])
    if entry.family == "mar":
        return get("models.mar").MAR(**config["MAR"])
    if entry.family == "kl":
        return get("models.vae").AutoencoderKL(**config["AutoencoderKL"])
    if entry.family == "rar":
        return get("modeling.rar").RAR(of("RAR_config", **config))
    if entry.family == "maskgit":
        name = next(iter(config))
        return getattr(get("modeling.maskgit"), name.removesuffix("_config"))(of(name, **config))
    if entry.family == "titok":
        ta = entry.name.startswith("ta")
        module = get("modeling.tatitok" if ta else "modeling.titok")
        return (module.TATiTok if ta else module.TiTok)(of("TiTok_config", **config))
    if entry.family == "maskgit_vqgan":
        module = get("modeling.modules.maskgit_vqgan")
        network = {"channel_mult": [1, 1, 2, 2, 4], "num_resolutions": 5, "dropout": 0.0, "hidden_channels": 128}
        network |= {"num_channels": 3, "num_res_blocks": 2, "resolution": 256, "z_channels": 256}
        parts = torch.nn.Module()
        parts.encoder, parts.decoder = module.Encoder(of("n", n=network)), module.Decoder(of("n", n=network))
        parts.quantize = module.VectorQuantizer(num_embeddings=1024, embedding_dim=256, commitment_cost=0.25)
        return parts
    if entry.family in ("gigatok", "retok"):
        module = get("tokenizer.tokenizer_image.vq.vq_vit_model")
        return module.VQVitModelPlus(module.VQVitModelPlusArgs(**config["VQVitModelPlusArgs"]))
    if entry.family == "restok":
        published = {"merge_tokens": True, "residual_image_tokens": True, "residual_latent_tokens": True}
        published |= {"learnable_latent_tokens": False, "learnable_dec_image_tokens": True, "multi_quant": True}
        published |= {"vae_encoder": True, "latent_hierarchy": True, "learnable_dec_feat_tokens": True}
        published |= {"reduction_ratio": 0.5, "rope_base_len": 10000, "test_num_latent_tokens": 128, "drop_prob": 0.0}
        published |= {"encoder_feature_supervision": False, "decoder_feature_supervision": False}
        whole = json.loads(json.dumps(config["ResTok_config"]))
        whole["model"]["vq_model"] |= published
        return get("modeling.restok").ResTok(of("c", c=whole))
    if entry.family == "hita":
        module = get("hita.tokenizer.tokenizer_image.vq_model")
        stand_in = types.ModuleType("stand_in")
        stand_in.Frozen = type("Frozen", (torch.nn.Module,), {"is_trainable": False})
        stand_in.Frozen.__init__ = lambda self, **_: torch.nn.Module.__init__(self)
        sys.modules["stand_in"] = stand_in
        whole = json.loads(json.dumps(config["transformer_config"]))
        for half, name in (("encoder", "Encoder"), ("decoder", "Decoder")):
            whole[f"{half}_config"]["target"] = f"hita.core.layers.{name}"
        side = {"target": "stand_in.Frozen", "params": {}}
        whole["encoder_config"]["params"]["visual_encoder_config"] = side
        keys = {
            k: v for k, v in config["ModelArgs"].items() if k in ("codebook_size", "codebook_embed_dim", "z_channels")
        }
        return module.VQ_models["VQ-16"](**keys, transformer_config=of("c", c=whole))
    if entry.family == "dar":
        return get("tokenizer.tokenizer_image.vq_model").VQModel(of("VQModel", **config))
    if entry.family in ("magvit2", "ibq"):
        main = types.ModuleType("main")
        main.instantiate_from_config = lambda config: torch.nn.Module()
        sys.modules["main"] = main
        if entry.family == "ibq":
            return get("src.IBQ.models.ibqgan").IBQ(
                **_voken(config["IBQ"], attn_resolutions=[16], dropout=0.0), lossconfig={}, use_ema=False
            )
        weights = {"sample_minimization_weight": 1.0, "batch_maximization_weight": 1.0}
        arguments = _voken(config["VQModel"]) | weights
        return get("src.Open_MAGVIT2.models.lfqgan").VQModel(**arguments, lossconfig={}, use_ema=False)
    raise ValueError(f"{entry.name}: nothing builds {entry.family}")


def _voken(arguments: dict, **network: Any) -> dict[str, Any]:
    common = {"resolution": 256, "in_channels": 3, "out_ch": 3}
    return arguments | {"ddconfig": common | arguments["ddconfig"] | network}


def write(name: str, checkouts: Path, out: Path) -> str:
    """One manifest, in this process; returns a line about it."""
    import torch

    from vgen.zoo import ZOO
    from vtok.weight_files import without_weights

    entry = ZOO[name]
    sys.meta_path.append(StandIns())  # last: what is installed comes first
    sys.path.insert(0, str((checkouts / CHECKOUTS[entry.family]).resolve()))
    torch.nn.Module.cuda = lambda self, *a, **k: self
    with without_weights():
        module = build(entry)
    state = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in module.state_dict().items()}
    count = sum(p.numel() for p in module.parameters())
    text = json.dumps({"name": name, "original": CHECKOUTS[entry.family], "parameters": count, "state": state})
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    return f"{name}: {len(state)} keys, {count:,} parameters"


def main() -> None:
    from vgen.zoo import ZOO

    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    checkouts, out, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    if len(names) == 1:
        print(write(names[0], checkouts, out))
        return
    chosen = names or [
        n for n, e in ZOO.items() if CHECKOUTS.get(e.family) and (checkouts / CHECKOUTS[e.family]).is_dir()
    ]
    for name in chosen:  # a process each: the originals use the same module names
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:3], name], capture_output=True, text=True)
        last = (done.stdout or done.stderr).strip().splitlines()[-1:]
        print(last[0] if last else "?", flush=True)


if __name__ == "__main__":
    main()
