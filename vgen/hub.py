"""Our own models on the Hugging Face hub: push_to_hub, from_pretrained and save_pretrained, with a model card.

    HubPipeline(generator, tokenizer).push_to_hub("name/model")
    HubPipeline.from_pretrained("name/model")          # or a folder; to be saved again: packed=False
    python sample.py from=hf:name/model

A repository is an exported folder: config.json, model.safetensors, tokenizer/, and README.md, the card. Imported only
where the hub is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from vgen.generator import Generator
from vgen.pipeline import Pipeline
from vtok.checkpoint import CheckpointError, save_folder
from vtok.tokenizer import Tokenizer

FILES = ["config.json", "model.safetensors", "tokenizer/config.json", "tokenizer/model.safetensors", "README.md"]


def download(name: str, **options: Any) -> Path:
    """Folder of a repository on the hub, "hf:<owner>/<name>" or without the prefix. options: of snapshot_download."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository = str(name).removeprefix("hf:")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{name!r} is no repository of the hub: write hf:<owner>/<name>")
    try:
        return Path(snapshot_download(repository, allow_patterns=FILES, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"huggingface.co/{repository} could not be downloaded ({type(error).__name__}): check the name and the "
            f"network, or fetch {', '.join(FILES[:4])} elsewhere and pass from=<that folder>"
        ) from None


class HubPipeline(Pipeline, ModelHubMixin, library_name="vtok-vgen", tags=["image-generation", "autoregressive"]):
    """A Pipeline that the hub's client can save, load and upload. card: more facts for the model card, by title."""

    def __init__(
        self,
        generator: Any,
        tokenizer: Any,
        *,
        chunk: int | None = None,
        class_names: list[str] | None = None,
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(generator, tokenizer, chunk=chunk, class_names=class_names)
        self.card = dict(card or {})

    def _save_pretrained(self, save_directory: Path) -> None:
        extra = {"class_names": self.class_names} if self.class_names else {}
        save_folder(self.generator, save_directory, **extra)
        save_folder(self.tokenizer, Path(save_directory) / "tokenizer")
        (Path(save_directory) / "README.md").write_text(model_card(self.generator, self.tokenizer, self.card))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        chunk: int | None = None,
        device: str = "cpu",
        packed: bool | None = None,
        class_names: list[str] | None = None,
        card: dict[str, Any] | None = None,
    ) -> HubPipeline:
        hub = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download, "token": token}
        folder = model_id
        if not Path(model_id).is_dir():
            folder = download(model_id, local_files_only=local_files_only, **hub)
        loaded = Pipeline.load(folder, chunk=chunk, device=device, packed=packed)
        return cls(loaded.generator, loaded.tokenizer, chunk=chunk, class_names=loaded.class_names, card=card)


def model_card(generator: Generator, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> str:
    """README.md of a repository: what the model is, how to sample from it, and `facts` by title."""
    spec, count = generator.spec, sum(p.numel() for p in generator.parameters())
    kinds = ", ".join("continuous" if part.vocab_size is None else f"{part.vocab_size:,} codes" for part in spec.parts)
    lines = [
        "---",
        "library_name: vtok-vgen",
        "pipeline_tag: unconditional-image-generation",
        "tags: [image-generation, autoregressive]",
        "---",
        f"# {type(generator).__name__} on {type(tokenizer).__name__}",
        "",
        f"- generator: {type(generator).__name__}, {count:,} parameters, {generator.layout.steps} steps",
        f"- tokenizer: {type(tokenizer).__name__}, {spec.layout.length} tokens ({kinds}), {spec.image_size} px",
        f"- classes: {generator.num_classes or 'none'}",
        *(f"- {title}: {value if isinstance(value, str) else json.dumps(value)}" for title, value in facts.items()),
        "",
        "```bash",
        "python sample.py from=hf:<owner>/<name> out=grid.png",
        "```",
        "",
        "```python",
        "import torch",
        "from vgen import Pipeline",
        "",
        'pipeline = Pipeline.load("hf:<owner>/<name>")',
        "images = pipeline(torch.tensor([0]), torch.tensor([0]))  # labels, seeds to uint8 [N, H, W, 3]",
        "```",
        "",
    ]
    return "\n".join(lines)
