"""Layouts: how tensors are named in the kinds of checkpoints, and of which kind one is.

A name is mapped by the first pattern of a table that matches it whole; a target of ``None`` means "deliberately
unused". Whatever no pattern matches is an error, and so is whatever the model needs and no tensor provides.

Knows names; knows nothing of files and of the sizes of a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm.export.contract import PROMPT_PLACEHOLDER
from mvlm.export.errors import ExportError

#: Rows of a pattern for a tensor's name, and the model's name for it.
NameTable = tuple[tuple[str, str | None], ...]

#: MobileVLM's conversation template "v1", one turn. There is no space after the last colon.
MOBILEVLM_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    f"and polite answers to the user's questions. USER: {PROMPT_PLACEHOLDER} ASSISTANT:"
)

#: LLaVA-1.5's conversation template "llava_v1", one turn.
LLAVA_TEMPLATE = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    f"and polite answers to the human's questions. USER: {PROMPT_PLACEHOLDER} ASSISTANT:"
)

#: The language model, as in Hugging Face's Llama.
LANGUAGE_MODEL_NAMES: NameTable = (
    # Old files store the rotary frequencies, which are a function of the config.
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None),
    (r"model\.((?:embed_tokens|layers|norm)\..*)", r"language_model.\1"),
    (r"(lm_head\..*)", r"language_model.\1"),
)

#: The vision tower, below its prefix.
VISION_TOWER_NAMES: NameTable = (
    (r"embeddings\.position_ids", None),
    (r"post_layernorm\..*", None),
    (r"(embeddings\..*|pre_layrnorm\..*|encoder\..*)", r"vision_tower.\1"),
)

#: What a CLIP checkpoint holds besides its vision tower.
CLIP_TEXT_NAMES: NameTable = ((r"text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale", None),)

#: Projectors by ``mm_projector_type``, below ``model.mm_projector.``.
PROJECTOR_NAMES: dict[str, NameTable] = {
    "ldpnet": (
        (r"model\.mlp\.1\.(.*)", r"mm_projector.mlp.0.\1"),
        (r"model\.mlp\.3\.(.*)", r"mm_projector.mlp.2.\1"),
        *(
            (rf"model\.mb_block\.{block + 1}\.block\.{theirs}\.(.*)", rf"mm_projector.blocks.{block}.{ours}.\1")
            for block in (0, 1)
            for theirs, ours in (
                (r"0\.0", "depthwise.conv"),
                (r"0\.1", "depthwise_norm"),
                (r"1\.fc1", "squeeze_excite.fc1"),
                (r"1\.fc2", "squeeze_excite.fc2"),
                (r"2\.0", "pointwise"),
                (r"2\.1", "pointwise_norm"),
            )
        ),
    ),
    "ldpnetv2": (
        (r"mlp\.mlp\.(.*)", r"mm_projector.mlp.\1"),
        (r"peg\.peg\.0\.(.*)", r"mm_projector.positional_encoding.conv.\1"),
    ),
    "mlp2x_gelu": ((r"(.*)", r"mm_projector.\1"),),
    "linear": ((r"(.*)", r"mm_projector.\1"),),
}

#: By which names below ``model.mm_projector.`` the kinds are told apart.
PROJECTOR_SIGNS = {
    "ldpnet": r"model\.(mlp|mb_block)\..*",
    "ldpnetv2": r"(mlp\.mlp|peg\.peg)\..*",
    "mlp2x_gelu": r"[02]\.(weight|bias)",
    "linear": r"weight|bias",
}

VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."

#: LLaVA's projector in Hugging Face's layout.
HF_PROJECTOR_NAMES: NameTable = (
    (r"linear_1\.(.*)", r"mm_projector.0.\1"),
    (r"linear_2\.(.*)", r"mm_projector.2.\1"),
)

#: The language model in Hugging Face's new layout, below ``model.language_model.``.
HF_NEW_LANGUAGE_MODEL_NAMES: NameTable = (
    (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None),
    (r"((?:embed_tokens|layers|norm)\..*)", r"language_model.\1"),
)

#: Tables with the prefix that each is below; of a name, the first that knows it counts.
NameTables = tuple[tuple[NameTable, str], ...]

#: Hugging Face's LLaVA: names have changed with the versions of transformers, and all are read.
HF_LLAVA_TABLES: NameTables = (
    (LANGUAGE_MODEL_NAMES, "language_model."),
    (HF_NEW_LANGUAGE_MODEL_NAMES, "model.language_model."),
    (((r"(lm_head\..*)", r"language_model.\1"),), ""),
    (HF_PROJECTOR_NAMES, "multi_modal_projector."),
    (HF_PROJECTOR_NAMES, "model.multi_modal_projector."),
    (VISION_TOWER_NAMES, "vision_tower.vision_model."),
    (VISION_TOWER_NAMES, "vision_tower."),
    (VISION_TOWER_NAMES, "model.vision_tower.vision_model."),
    (VISION_TOWER_NAMES, "model.vision_tower."),
)

#: A CLIP checkpoint. transformers 5 writes a CLIPVisionModel's names without the prefix, older files have it.
CLIP_TABLES: NameTables = (
    (VISION_TOWER_NAMES, "vision_model."),
    (VISION_TOWER_NAMES, ""),
    (CLIP_TEXT_NAMES, ""),
)

LLAMA_TABLES: NameTables = ((LANGUAGE_MODEL_NAMES, ""),)


def original_tables(projector_type: str) -> NameTables:
    """Names of MobileVLM and of the original LLaVA."""
    return (
        (LANGUAGE_MODEL_NAMES, ""),
        (PROJECTOR_NAMES[projector_type], PROJECTOR_PREFIX),
        (VISION_TOWER_NAMES, VISION_PREFIX),
    )


def map_name(name: str, tables: NameTables) -> tuple[bool, str | None]:
    """Looks a tensor's name up: (is it known, the model's name for it or None if it is deliberately unused)."""
    for table, prefix in tables:
        if not name.startswith(prefix):
            continue
        for pattern, target in table:
            match = re.fullmatch(pattern, name[len(prefix) :])
            if match:
                return True, match.expand(target) if target is not None else None
    return False, None


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint.

    Attributes:
        name: for people.
        example: a hub id of one.
        model_types: ``model_type`` in its config.json.
        projector_types: projectors that it may have; none for a language model alone.
        template: what it was trained to converse in.
        base_model: a hub id that has the same tokenizer.model.
        tower: where its vision tower is, for people.
    """

    name: str
    example: str
    model_types: tuple[str, ...]
    projector_types: tuple[str, ...]
    template: str
    base_model: str
    tower: str


MOBILEVLM = Layout(
    "MobileVLM",
    "mtgv/MobileVLM_V2-1.7B",
    ("mobilevlm",),
    tuple(PROJECTOR_NAMES),
    MOBILEVLM_TEMPLATE,
    "mtgv/MobileLLaMA-1.4B-Chat",
    "V1 (ldpnet): --vision-tower; V2 (ldpnetv2): its own",
)
LLAVA = Layout(
    "LLaVA-1.5, original",
    "liuhaotian/llava-v1.5-7b",
    ("llava", "llava_llama"),
    ("mlp2x_gelu", "linear"),
    LLAVA_TEMPLATE,
    "liuhaotian/llava-v1.5-7b",
    "--vision-tower",
)
LLAVA_HF = Layout(
    "LLaVA-1.5, Hugging Face",
    "llava-hf/llava-1.5-7b-hf",
    ("llava",),
    ("mlp2x_gelu",),
    LLAVA_TEMPLATE,
    "llava-hf/llava-1.5-7b-hf",
    "its own",
)
LLAMA = Layout(
    "MobileLLaMA, text only",
    "mtgv/MobileLLaMA-1.4B-Chat",
    ("llama",),
    (),
    MOBILEVLM_TEMPLATE,
    "mtgv/MobileLLaMA-1.4B-Chat",
    "-",
)

LAYOUTS = (MOBILEVLM, LLAVA, LLAVA_HF, LLAMA)

#: Starts of names that only Hugging Face's LLaVA has.
_HF_PREFIXES = (
    "language_model.",
    "multi_modal_projector.",
    "vision_tower.",
    "model.language_model.",
    "model.multi_modal_projector.",
)
#: Starts of names that only MobileVLM and the original LLaVA have.
_ORIGINAL_PREFIXES = (PROJECTOR_PREFIX, VISION_PREFIX)


def _first(names: Iterable[str], prefixes: tuple[str, ...]) -> str | None:
    return next((name for name in names if name.startswith(prefixes)), None)


def detect_layout(config: Mapping[str, Any], names: Iterable[str], where: Path) -> Layout:
    """The layout that config.json states, after a look at whether the tensors' names agree.

    Args:
        config: config.json.
        names: of all tensors.
        where: path of config.json, for messages.

    Raises:
        ExportError: the kind is not supported, or config.json and names disagree.
    """
    names = list(names)
    model_type = config.get("model_type")
    is_nested = "text_config" in config or "vision_config" in config
    if model_type == "llava" and (is_nested or config.get("architectures") == ["LlavaForConditionalGeneration"]):
        layout = LLAVA_HF
    else:
        found = [layout for layout in LAYOUTS if layout is not LLAVA_HF and model_type in layout.model_types]
        if not found:
            supported = dict.fromkeys(kind for layout in LAYOUTS for kind in layout.model_types)
            raise ExportError(
                f"{where}: model_type is {model_type!r}; supported: {', '.join(supported)} "
                "(python -m mvlm.export --list says more)"
            )
        [layout] = found
        if is_nested:
            raise ExportError(
                f"{where}: model_type is {model_type!r}, which has no text_config and vision_config, "
                "but this config.json has"
            )

    hf_name, original_name = _first(names, _HF_PREFIXES), _first(names, _ORIGINAL_PREFIXES)
    if layout is not LLAVA_HF and hf_name:
        raise ExportError(
            f"{where}: is that of {layout.name} (model_type {model_type!r}), but the weights are named as in "
            f"{LLAVA_HF.name}: {hf_name}; fetch the config.json that belongs to them"
        )
    if layout in (LLAVA_HF, LLAMA) and original_name:
        raise ExportError(
            f"{where}: is that of {layout.name} (model_type {model_type!r}), but the weights are named as in "
            f"{MOBILEVLM.name} and {LLAVA.name}: {original_name}; fetch the config.json that belongs to them"
        )
    if layout is LLAMA and "mm_projector_type" in config:
        raise ExportError(
            f"{where}: model_type 'llama' is a language model alone, but mm_projector_type is "
            f"{config['mm_projector_type']!r}"
        )
    return layout


def detect_projector(layout: Layout, config: Mapping[str, Any], names: Iterable[str], where: Path) -> str:
    """The projector of a checkpoint in an original layout: what config.json and the tensors' names agree on.

    Raises:
        ExportError: they disagree, or the kind is not supported.
    """
    names = list(names)
    inner = [name.removeprefix(PROJECTOR_PREFIX) for name in names if name.startswith(PROJECTOR_PREFIX)]
    by_names = {kind: [name for name in inner if re.fullmatch(signs, name)] for kind, signs in PROJECTOR_SIGNS.items()}
    by_names = {kind: found for kind, found in by_names.items() if found}
    stated = config.get("mm_projector_type")
    if stated is None and len(by_names) == 1:
        [stated] = by_names
    if stated not in PROJECTOR_NAMES:
        raise ExportError(f"{where}: mm_projector_type is {stated!r}; supported: {', '.join(PROJECTOR_NAMES)}")
    if stated not in layout.projector_types:
        raise ExportError(
            f"{where}: model_type {config['model_type']!r} ({layout.name}) and mm_projector_type {stated!r} do not go "
            f"together; its projectors are {', '.join(layout.projector_types)}"
        )
    if names and not inner:
        raise ExportError(
            f"{where}: mm_projector_type is {stated!r}, but the weights hold no projector "
            f"({PROJECTOR_PREFIX}*); a language model alone has a config.json with model_type 'llama'"
        )
    if by_names and stated not in by_names:
        [(kind, found), *_] = by_names.items()
        raise ExportError(
            f"{where}: mm_projector_type is {stated!r}, but the weights hold the projector {kind!r}: "
            f"{PROJECTOR_PREFIX}{found[0]}"
        )
    return stated
