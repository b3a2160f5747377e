"""Random weights of a named shape, made tensor by tensor: for benchmarks and tests at true size without a download."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from mvlm.export import demo
from mvlm.export.checkpoint.checkpoint import Checkpoint, parameter_shapes
from mvlm.export.checkpoint.configs import ImagePreprocessing
from mvlm.export.checkpoint.named_models import NAMED_MODELS
from mvlm.export.checkpoint.tokenizer import TOKENIZER_MODEL, with_filler
from mvlm.export.errors import ExportError
from mvlm.export.models import CLIPVisionConfig, MobileLlamaConfig, MobileVLMConfig

#: Changes whenever the same name and seed give other weights; part of the checkpoint's id.
GENERATOR_VERSION = 1

#: Values that are made at once. They stay in the processor's cache while they are scaled and rounded.
_CHUNK = 2**18

#: Seeds that torch.Generator takes are below this.
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class RandomWeights:
    """Weights drawn from normal distributions, so that activations stay of the order of 1 through the network.

    A tensor depends on seed and name alone: not on the order of reading and not on the number of threads. Values are
    rounded to float16, as those of real checkpoints are.

    Attributes:
        name: of the model.
        config: its sizes.
        seed: another one, other weights.
    """

    name: str
    config: MobileVLMConfig
    seed: int

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        mean, std = self._distribution(name, shape)
        digest = hashlib.sha256(f"{GENERATOR_VERSION}\0{self.seed}\0{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & MAX_SEED)
        tensor = torch.empty(shape)
        for chunk in tensor.view(-1).split(_CHUNK):
            chunk.normal_(mean, std, generator=generator)
            chunk.copy_(chunk.half())
        return tensor

    def fingerprint(self) -> str:
        content = [self.name, self.seed, GENERATOR_VERSION, asdict(self.config), list(parameter_shapes(self.config))]
        return f"sha256:{hashlib.sha256(json.dumps(content).encode()).hexdigest()}"

    def _distribution(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Mean and standard deviation of a parameter's values."""
        if name.endswith("embed_tokens.weight"):
            return 0.0, 0.02  # of the order of a trained Llama's
        if re.search(r"(class|position)_embedding(\.weight)?$", name):
            return 0.0, 0.25
        if name.endswith(".bias"):
            return 0.0, 0.02
        if len(shape) == 1:
            return 1.0, 0.1  # of a norm
        std = math.prod(shape[1:]) ** -0.5
        # What is added to the residual stream is made smaller with the number of additions, of which each block makes
        # two, so that the stream's variance does not grow with depth (as GPT-2 is initialized).
        if re.search(r"\.(o_proj|down_proj)\.weight$", name):
            std *= (2 * self.config.text.num_hidden_layers) ** -0.5
        elif re.search(r"\.(out_proj|fc2)\.weight$", name) and name.startswith("vision_tower."):
            std *= (2 * self.config.vision.num_hidden_layers) ** -0.5
        return 0.0, std


def random_checkpoint(name: str, seed: int = 0, **sizes: int | float | str) -> Checkpoint:
    """A checkpoint of a published model's shape with random weights.

    Its tokenizer is the bundled demo model's, with filler up to the model's vocabulary.

    Args:
        name: one of :data:`NAMED_MODELS`.
        seed: a whole number from 0 on.
        sizes: other sizes than the published ones, for tests: fields of :class:`MobileLlamaConfig`, those of
            :class:`CLIPVisionConfig` with ``vision_`` before them, and ``vision_select_layer``.

    Raises:
        ExportError: an unknown name, size or an unusable seed.
    """
    if name not in NAMED_MODELS:
        raise ExportError(f"random weights of {name!r}: no such model; supported: {', '.join(NAMED_MODELS)}")
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ExportError(f"seed {seed!r}: a whole number from 0 to {MAX_SEED} is expected")
    model = NAMED_MODELS[name]
    config = _with_sizes(model.config, sizes)
    return Checkpoint(
        name=f"{name} (random weights, seed {seed})",
        config=config,
        preprocessing=ImagePreprocessing(),
        tokenizer=with_filler((demo.CHECKPOINT / TOKENIZER_MODEL).read_bytes(), config.text.vocab_size),
        bos_id=1,
        eos_ids=(2,),
        prompt_template=model.prompt_template,
        unused=(),
        size=0,
        weights=RandomWeights(name, config, seed),
    )


def _with_sizes(config: MobileVLMConfig, sizes: dict[str, int | float | str]) -> MobileVLMConfig:
    parts = {
        "": {field.name for field in fields(MobileLlamaConfig)},
        "vision_": {field.name for field in fields(CLIPVisionConfig)} if config.vision is not None else set(),
    }
    given: dict[str, dict[str, int | float | str]] = {prefix: {} for prefix in parts}
    top = {}
    for key, value in sizes.items():
        if key == "vision_select_layer":
            top[key] = value
        elif key in parts[""]:
            given[""][key] = value
        elif key.removeprefix("vision_") in parts["vision_"]:
            given["vision_"][key.removeprefix("vision_")] = value
        else:
            raise ExportError(f"{key}: no such size; those of MobileLlamaConfig and, after vision_, CLIPVisionConfig")
    try:
        config = replace(config, text=replace(config.text, **given[""]), **top)
        if config.vision is not None:
            config = replace(config, vision=replace(config.vision, **given["vision_"]))
        parameter_shapes(config)
    except ValueError as error:
        raise ExportError(str(error)) from error
    return config
