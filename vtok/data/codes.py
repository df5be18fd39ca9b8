"""What a generator trains on: tokens of a frozen tokenizer, encoded on the fly or read from shards.

Both modules carry the tokenizer, its spec and the classes, so a generator's run needs nothing else. Codes are refused
when the tokenizer that was asked for is not, byte for byte, the one that made them: a generator trained on one codebook
and decoded with another gives noise, and no loss shows it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vtok import counters
from vtok.checkpoint import CheckpointError, Weights, weights_hash
from vtok.config import build, completed, describe, differences, imported
from vtok.data.ahead import Ahead
from vtok.data.module import ImageData, Position, StepData, check_limits, float_images
from vtok.data.shards import Crops, Shards, open_split
from vtok.decoding import channels_last, encode_images
from vtok.models import FAMILIES
from vtok.noise import SampleNoise, host_uniforms, key, keys
from vtok.tokenizer import TRAINING, Tokenizer, TokenSpec

CORRECTED, CORRECTION_STREAM = 0.3, 7201  # DetailFlow (arXiv 2505.21473): its code's share, for the generator
_CROP = 1  # separates the draw of the crop from the model's own use of the sample's key


def frozen(tokenizer: str | Path | Tokenizer, weights: Weights = "ema", *, trust: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a run, checkpoint or folder (or the given one) in eval mode, without gradients.

    trust: modules of yours that may hold its class.
    """
    if not isinstance(tokenizer, torch.nn.Module):
        tokenizer = Tokenizer.load(tokenizer, weights=weights, trust=trust)
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"tokenizer={type(tokenizer).__name__} is not a tokenizer; give a tokenizer's run or folder")
    return tokenizer.requires_grad_(False).eval()


def spec_at(tokenizer: Tokenizer, image_size: int) -> TokenSpec:
    """The tokenizer's spec for images of that side."""
    if tokenizer.spec.image_size == image_size:
        return tokenizer.spec
    if not hasattr(tokenizer, "spec_for"):
        raise ValueError(
            f"the tokenizer works at {tokenizer.spec.image_size} px, data.image_size={image_size}; make them equal"
        )
    return tokenizer.spec_for(image_size)


def on_sides(tokenizer: Tokenizer, sides: Sequence[int]) -> Tokenizer:
    """A frozen tokenizer of the same weights that encodes on that list of scales (VAR's, FlexVAR's), and images of the
    last side times its stride. Raises ValueError where it has no scales, or weights that belong to a number of them."""
    described, sides = describe(tokenizer), list(sides)
    quantizer = described["arguments"].get("quantizer")
    if not isinstance(quantizer, Mapping) or "sides" not in quantizer.get("arguments", {}):
        raise ValueError(f"tokenizer_sides={sides}: {type(tokenizer).__name__} has no scales; leave it null")
    if not sides or not all(isinstance(side, int) for side in sides) or sorted({*sides}) != sides or sides[0] < 1:
        raise ValueError(f"tokenizer_sides={sides}: give growing whole numbers from 1 on")
    quantizer["arguments"]["sides"] = sides
    described["arguments"]["image_size"] = sides[-1] * tokenizer.stride
    other = build(described, imported(FAMILIES, described))
    try:
        other.load_state_dict(tokenizer.state_dict())
    except RuntimeError:
        raise ValueError(
            f"tokenizer_sides={sides}: this tokenizer has weights for each of its {len(tokenizer.spec.layout.sides)} "
            "scales (quantizer.phi=0); give as many"
        ) from None
    return other.requires_grad_(False).eval()


class OnlineTokens(LightningDataModule):
    """An image data module whose batches are encoded on the device.

    data: an ImageData. tokenizer: run directory, .ckpt, shared folder, or a Tokenizer. keep_images: leave "image" in
    the batch beside "tokens". corrections: add "corrupted" and "repaired" [B, L] to training batches: for a share
    CORRECTED of the samples, drawn by their keys, what is read and what is to be predicted where the tokenizer goes on
    from wrong tokens (DetailFlow), else the tokens; needs a tokenizer that can. sides: see `on_sides`; None = the
    tokenizer's own. ahead: on a GPU, encode the next training batch beside the step that has this one; the tokens are
    the same. trust: see `frozen`.
    """

    def __init__(
        self,
        *,
        data: ImageData,
        tokenizer: str | Tokenizer,
        weights: Weights = "ema",
        keep_images: bool = False,
        corrections: bool = False,
        sides: Sequence[int] | None = None,
        ahead: bool = True,
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.data, self.keep_images, self.corrections, self.ahead = data, keep_images, corrections, ahead
        self.tokenizer = frozen(tokenizer, weights, trust=trust)
        if sides is not None:
            self.tokenizer = on_sides(self.tokenizer, sides)
        if corrections and not getattr(self.tokenizer, "correction", False):
            name = type(self.tokenizer).__name__
            raise ValueError(f"corrections=true needs a tokenizer that repairs its tokens (DetailFlow's), not {name}")
        self.spec = spec_at(self.tokenizer, data.image_size)
        channels_last(self.tokenizer)  # not packed: it is saved, and generators copy its weights

    @property
    def image_size(self) -> int:
        return self.data.image_size

    @property
    def batch_size(self) -> int:
        return self.data.batch_size

    @property
    def accumulate(self) -> int:
        return self.data.accumulate

    @property
    def num_classes(self) -> int:
        return self.data.num_classes

    @property
    def class_names(self) -> list[str]:
        return self.data.class_names

    @property
    def train_size(self) -> int:
        return self.data.train_size

    @property
    def val_size(self) -> int:
        return self.data.val_size

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        self.data.setup(stage)

    def train_dataloader(self) -> DataLoader | Ahead:
        """On a GPU with `ahead`, its batches are tokens already."""
        self.data.trainer = self.trainer
        loader = self.data.train_dataloader()
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if device.type != "cuda" or not self.ahead:
            return loader
        self.tokenizer.to(device)
        return Ahead(loader, self.encode, device)

    def val_dataloader(self) -> DataLoader:
        self.data.trainer = self.trainer
        return self.data.val_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self.data.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        fresh = isinstance(batch, Mapping) and "image" in batch and "tokens" not in batch
        if fresh:
            counters.count("tokens.in_turn")
        training = self.trainer is None or self.trainer.training
        return self.encode(batch, training=training) if fresh else batch

    @torch.no_grad()
    def encode(self, batch: Mapping[str, Tensor], *, training: bool = True) -> dict[str, Tensor]:
        """{"image", "label", "key", "index"} to {"tokens", "label", "key", "index"}, on the images' device.

        Images are uint8 [B, H, W, 3], as the loader gives them, or float [B, 3, H, W] in [-1, 1]; kept ones are float.
        training: whether the batch is trained on; held-out ones get no corrections.
        """
        batch = float_images(batch)
        images = batch["image"]
        if next(self.tokenizer.parameters()).device != images.device:
            self.tokenizer.to(images.device)
        noise = SampleNoise(batch["key"])
        # without autocast: the ids must not depend on the precision in which the generator trains
        if self.corrections and training:
            names, chosen = ("tokens", "corrupted", "repaired"), corrected(batch.get("host_key", batch["key"]))
            chosen = chosen.to(images.device, non_blocking=True)
            with torch.autocast(images.device.type, enabled=False):
                rows = dict(zip(names, self.tokenizer.corrupted(images.float(), noise, chosen)))
        else:
            rows = {"tokens": encode_images(self.tokenizer, images.float(), noise=noise)}
        kept = {k: v for k, v in batch.items() if k != "image" or self.keep_images}
        return {**rows, **kept}


def corrected(key: Tensor | np.ndarray) -> Tensor:
    """Which of the samples int64 [B] get corrections: their rows, on the host. Keys on a GPU are waited for."""
    share = host_uniforms(torch.as_tensor(key).cpu().numpy(), 1, CORRECTION_STREAM)[:, 0]
    return torch.from_numpy((share < CORRECTED).nonzero()[0])


class Codes(StepData):
    """Cached tokens of scripts/cache_codes.py: folder/train and folder/val.

    tokenizer: run directory, .ckpt, shared folder or Tokenizer that must be the one of the shards; null takes the copy
    that lies beside them. crops: of which the training codes must be, by their name in scripts/cache_codes.py; null
    takes any. verify: compute every shard's CRC first. A training item's crop is drawn by (seed, epoch, index);
    held-out items are the centre crop.
    """

    def __init__(
        self,
        *,
        folder: str,
        tokenizer: str | Tokenizer | None = None,
        weights: Weights = "ema",
        batch_size: int = 64,
        accumulate: int = 1,
        workers: int = 0,
        seed: int = 0,
        crops: Crops | None = None,
        verify: bool = False,
        limit_train: int | None = None,
        limit_val: int | None = None,
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__(batch_size=batch_size, accumulate=accumulate, workers=workers, seed=seed)
        check_limits(limit_train, limit_val)
        if crops not in (None, *get_args(Crops)):
            raise ValueError(f"data.crops={crops}: choose {', '.join(get_args(Crops))}, or null to take any")
        if not Path(folder).is_dir():
            raise CheckpointError(
                f"data.folder={folder} does not exist; make it with scripts/cache_codes.py out={folder}"
            )
        self.train, self.val = (open_split(Path(folder) / split, verify=verify) for split in ("train", "val"))
        made = self.train.manifest["crops"]["name"]
        if crops not in (None, made):
            raise CheckpointError(
                f"data.folder={folder} holds codes of crops={made}, data.crops={crops} is asked for: make them with "
                f"scripts/cache_codes.py crops={crops}, or take these with data.crops=null"
            )
        for name in ("tokenizer", "spec", "class_names", "image_size"):
            if self.train.manifest[name] != self.val.manifest[name]:
                raise CheckpointError(f"{folder}: train/ and val/ differ in {name}; extract both again")
        source = Path(folder) / "tokenizer" if tokenizer is None else tokenizer
        self.tokenizer = frozen(source, weights, trust=trust)
        check_hash(self.train.manifest, self.tokenizer, folder, source)
        self.image_size = int(self.train.manifest["image_size"])
        self.spec = spec_at(self.tokenizer, self.image_size)
        check_spec(self.train.manifest, self.tokenizer, self.spec, folder)
        self.class_names = list(self.train.manifest["class_names"])
        self.limit_train, self.limit_val = limit_train, limit_val

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def train_dataset(self) -> KeyedCodes:
        return KeyedCodes(self.train, seed=self.seed, augment=True, limit=self.limit_train)

    def val_dataset(self) -> KeyedCodes:
        return KeyedCodes(self.val, seed=self.seed, augment=False, limit=self.limit_val)


class KeyedCodes(Dataset):
    """Shards indexed by (epoch, index): {"tokens" int64 [L] or float32 [L, C], "label", "key", "index"}.

    A loader asks for whole batches (`__getitems__`, `collate`): the same numbers, computed and read together.

    The centre crop is crop 0 of `none` and `flip`, and crop 4 of `ten`; `ten` holds two sets of five.
    """

    def __init__(self, shards: Shards, *, seed: int, augment: bool, limit: int | None = None) -> None:
        self.shards, self.seed, self.augment = shards, seed, augment
        self.size = len(shards) if limit is None else min(limit, len(shards))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: Position) -> dict[str, Any]:
        epoch, index = position
        if not 0 <= index < self.size:
            raise IndexError(index)
        row = index * len(self.shards) // self.size
        sample_key = key(self.seed, epoch, index)
        crop = key(sample_key, _CROP) % self.shards.crops if self.augment else self.shards.manifest["crops"]["centre"]
        tokens = self.shards.row(row, crop)
        return {"tokens": tokens, "label": int(self.shards.labels[row]), "key": sample_key, "index": index}

    def __getitems__(self, positions: Sequence[Position]) -> dict[str, Tensor]:
        """The batch of these items: {"tokens" [B, L(, C)], "label", "key", "index" int64 [B]}."""
        epochs, indices = map(np.array, zip(*positions))
        if not ((indices >= 0) & (indices < self.size)).all():
            raise IndexError(positions)
        rows, sample_keys = indices * len(self.shards) // self.size, keys(self.seed, epochs, indices)
        if self.augment:
            crops = keys(sample_keys, _CROP) % self.shards.crops
        else:
            crops = np.full(len(rows), self.shards.manifest["crops"]["centre"])
        found = {"label": self.shards.labels[rows].astype(np.int64), "key": sample_keys, "index": indices}
        return {"tokens": self.shards.rows(rows, crops)} | {name: torch.from_numpy(x) for name, x in found.items()}

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `__getitems__` gives is a batch already."""
        return batch


def check_hash(manifest: Mapping, tokenizer: Tokenizer, folder: str | Path, source: Any) -> None:
    """Raise CheckpointError unless the weights are those that made the codes."""
    made_by, found = manifest["tokenizer"]["sha256"], weights_hash(tokenizer.state_dict())
    if made_by != found:
        name = source if isinstance(source, (str, Path)) else "the given tokenizer"
        raise CheckpointError(
            f"codes in {folder} were made by the tokenizer {made_by[:16]}, but {name} is {found[:16]}: "
            "give data.tokenizer=null to use the copy beside the codes, or extract them again with this one"
        )


def check_spec(manifest: Mapping, tokenizer: Tokenizer, spec: TokenSpec, folder: str | Path) -> None:
    """Raise CheckpointError unless a tokenizer of the same weights still means the same by these tokens: what no weight
    holds may have been set otherwise, as its scales, the scale of its latents (or of a VAE inside), the base of rotary
    positions."""
    now = describe(tokenizer)
    found = unlike(manifest["spec"], spec.to_config()) + unlike(manifest["tokenizer"].get("description", now), now)
    if found:
        said = " and ".join(sorted({f"{name}={there!r:.60} (now {here!r:.60})" for name, there, here in found}))
        raise CheckpointError(
            f"codes in {folder} were made by the same weights with another {said}: set the tokenizer as it was, or "
            "extract them again"
        )


def unlike(made: Mapping, now: Mapping) -> list[tuple[str, Any, Any]]:
    """(name, old, new) of the differences between two descriptions of a tokenizer, or two specs in plain data, that
    change what codes mean. The older one counts with the defaults of what it does not name."""
    families = imported(FAMILIES, now)
    return differences(*(meaning(completed(json.loads(json.dumps(side)), families)) for side in (made, now)))


def meaning(data: Any) -> Any:
    """Plain data without the arguments of this toolkit's tokenizers and quantizers on which no code and no decoding of
    one depends: TRAINING, places of files, and the size of the images, which the spec has."""
    if isinstance(data, list):
        return [meaning(value) for value in data]
    if not isinstance(data, Mapping):
        return data
    found = {k: meaning(v) for k, v in data.items()}
    if set(found) == {"family", "arguments"}:
        unread = {"image_size"} if ":" in found["family"] else {"image_size", "weights_path", *TRAINING}
        found["arguments"] = {k: v for k, v in found["arguments"].items() if k not in unread}
    return found
