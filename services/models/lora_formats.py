"""LoRA files as other tools write and read them: which layer a tensor's name means, and how strongly it counts.

    form       a layer's name                                            how strongly it counts
    peft       the network's own, behind `base_model.model.`             `adapter_config.json` beside the file
    diffusers  the same behind `unet.` or `text_encoder.`; in older      JSON in the metadata
               files `….processor.to_q_lora.down` and the like
    kohya      `lora_unet_…`, `lora_te_…`, underscores for points; of    a tensor `….alpha` for each
               SDXL the names of its first code, `input_blocks_4_1_…`

A name is looked up among the layers that a network has, so an underscore that was a point is never guessed. Knows no
file, no slot and no device; `services.models.lora` reads and writes with it.

Shapes: I inputs, O outputs, r rank, K kernel size.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from services.models.errors import AdapterDamaged, AdapterNotWritable, AdapterWrongBase, AdapterWrongShape

Form = Literal["peft", "diffusers", "kohya"]
FORMS: tuple[Form, ...] = ("peft", "diffusers", "kohya")

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
NETWORKS = (UNET, TEXT, TEXT_2)
"""The networks that a file may change, as diffusers calls them."""

ALPHA = "lora_alpha"  # one for all layers: a key of our metadata, and PEFT's of its configuration
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # diffusers' key of a file's metadata: PEFT's configurations as JSON
KOHYA_ALPHA, KOHYA_ARGUMENTS = "ss_network_alpha", "ss_network_args"
_KOHYA_NOTHING = frozenset({"", "None", "Dynamic"})  # what kohya's scripts write where there is no one number
_PATTERNS_MAX = 10_000  # of one PEFT configuration: as many as the largest networks have layers, and more

_KOHYA = {"lora_unet_": UNET, "lora_te_": TEXT, "lora_te1_": TEXT, "lora_te2_": TEXT_2}
_DOTTED = {
    "unet.": UNET,
    "transformer.": UNET,
    "diffusion_model.": UNET,
    "text_encoder.": TEXT,
    "text_encoder_2.": TEXT_2,
}
_WRAPPED = "base_model.model."  # PEFT's own, around whatever it adapts
_TENSOR = re.compile(
    r"^(?P<module>.+?)(?:"
    r"(?P<down>\.lora_A|\.lora_down|\.lora\.down|\.lora_linear_layer\.down|_lora\.down)"
    r"|(?P<up>\.lora_B|\.lora_up|\.lora\.up|\.lora_linear_layer\.up|_lora\.up)"
    r")(?:\.\w+)?\.weight$"
    r"|^(?P<whole>.+?)\.(?:delta|diff)$|^(?P<scaled>.+?)\.alpha$"
)
# What other methods leave in a file, and what they are called. The first that is found is named.
_FOREIGN = (
    (re.compile(r"lora_magnitude_vector|dora_scale"), "DoRA"),
    (re.compile(r"\.hada_"), "LoHa"),
    (re.compile(r"\.lokr_"), "LoKr"),
    (re.compile(r"\.lora_mid\."), "LoCon with a core tensor (Tucker decomposition)"),
    (re.compile(r"lora_embedding_[AB]"), "LoRA of an embedding"),
    (re.compile(r"\.oft_|\.oft_blocks|\.boft_"), "OFT"),
    (re.compile(r"\.on_input$|\.ia3_l"), "IA3"),
    (re.compile(r"\.glora_|\.[ab][12]\.weight$"), "GLoRA"),
    (re.compile(r"\.diff_b$|\.lora_[AB]\.(?:\w+\.)?bias$|\.lora_(?:up|down)\.bias$"), "a change of biases"),
    (re.compile(r"\.[wb]_norm$"), "a change of norms"),
)
_CROSS = re.compile(r"attn2[._](?:processor[._])?to_[kv]\b|attn2[._](?:processor[._])?to_[kv](?=_lora\.down)")
# By the width of the texts that a UNet's cross attention reads.
_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}
_ELSEWHERE = (
    (re.compile(r"double_blocks|single_blocks|single_transformer_blocks"), "FLUX"),
    (re.compile(r"joint_blocks|(?:^|\.)transformer\.transformer_blocks"), "a diffusion transformer"),
    (re.compile(r"(?:^|\.)model\.layers\.\d+\."), "a language model"),
)


@dataclass(frozen=True)
class LowRank:
    """One layer's change: `down` is `[r, I]` or `[r, I, K, K]`, `up` `[O, r]` or `[O, r, 1, 1]`, times alpha / r."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return int(self.down.shape[0])

    @property
    def scaled_up(self) -> Tensor:
        """`up` with the factor alpha / r in it."""
        return self.up * (self.alpha / self.rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def nbytes(self) -> int:
        """Of both factors."""
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True)
class Changes:
    """What a file changes of one network, by the network's own names of layers."""

    factors: Mapping[str, LowRank] = field(default_factory=dict)
    deltas: Mapping[str, Tensor] = field(default_factory=dict)  # `[O, I]`


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What PEFT says beside its tensors about one network's: `adapter_config.json`, or diffusers' copy of it."""

    alpha: float
    rank: int | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False  # Kalajdzievski, arXiv 2312.03732: the scale is alpha / √r

    @classmethod
    def from_dict(cls, values: object, whose: str) -> PeftConfig:
        """Read an `adapter_config.json`. Raises AdapterDamaged, or AdapterWrongShape for what is no plain LoRA."""
        if not isinstance(values, Mapping):
            raise AdapterDamaged(f"{whose} is no JSON object")
        kind = values.get("peft_type") or "LORA"
        if kind != "LORA" or values.get("use_dora"):
            raise _foreign(whose, "DoRA" if kind == "LORA" else str(kind)[:40], "peft_type or use_dora")
        rank = values.get("r")
        rank_pattern = _numbers(values.get("rank_pattern"), f"rank_pattern of {whose}")
        return cls(
            alpha=_number(values.get(ALPHA), f"{ALPHA} of {whose}"),
            rank=None if rank is None else _whole_number(rank, f"r of {whose}"),
            rank_pattern={key: _whole_number(one, f"rank_pattern of {whose}") for key, one in rank_pattern.items()},
            alpha_pattern=_numbers(values.get("alpha_pattern"), f"alpha_pattern of {whose}"),
            use_rslora=bool(values.get("use_rslora")),
        )

    def alpha_of(self, names: Sequence[str], rank: int, whose: str) -> float:
        """Of a layer with these names, so that alpha / r is its scale. Raises AdapterDamaged for another rank."""
        told = _first(self.rank_pattern, names, whose)
        told = self.rank if told is None else told
        if told is not None and told != rank:
            raise AdapterDamaged(
                f"{whose} holds {names[0]} with rank {rank}, and its configuration says {told}: they are of two files"
            )
        own = _first(self.alpha_pattern, names, whose)
        alpha = self.alpha if own is None else own
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


class Names:
    """What the layers of one network are called in files of all forms."""

    def __init__(self, network: str, layers: Iterable[str]) -> None:
        """`layers` are the network's own names of all that can be changed."""
        own = frozenset(layers)
        aliases = [(layer, alias) for layer in sorted(own) for alias in _aliases(network, layer)]
        if network == UNET:
            aliases += _first_codes_names(own)
        self.with_points: dict[str, set[str]] = {}
        self.with_underscores: dict[str, set[str]] = {}
        for layer, alias in aliases:
            self.with_points.setdefault(alias, set()).add(layer)
            self.with_underscores.setdefault(alias.replace(".", "_"), set()).add(layer)

    def find(self, told: str, whose: str, *, has_points: bool = True) -> str | None:
        """The layer that a file calls so. Raises AdapterWrongShape when it could be two."""
        table = self.with_points if has_points else self.with_underscores
        found = table.get(told.replace(".processor.", "."), set())
        if len(found) > 1:
            raise AdapterWrongShape(
                f"{whose}: {short(told)} could be {' or '.join(sorted(found))}; export it with PEFT's names"
            )
        return next(iter(found), None)


class _Part(NamedTuple):
    """What one tensor's name says."""

    network: str  # empty: it does not say
    module: str
    kind: str  # "down", "up", "whole" or "alpha"
    has_points: bool  # the module's name, and not underscores for them


def changes_of(
    whose: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    networks: Mapping[str, Mapping[str, nn.Linear | nn.Conv2d]],
    beside: PeftConfig | None = None,
) -> dict[str, Changes]:
    """What the tensors of a file change of each of `networks`: their layers that can be changed, by name.

    Alpha is that of the tensor; without one the metadata's, without that the one of `beside`, or else the rank. The
    factors are float32. Raises AdapterWrongBase for a file of another family of models, AdapterWrongShape for layers
    that are not there and for what is no LoRA, and AdapterDamaged for halves and for numbers that are none.
    """
    parts = {key: _part(whose, key) for key in tensors}
    _check_family(whose, parts, tensors, metadata, networks)
    names = {network: Names(network, layers) for network, layers in networks.items()}
    placed: dict[tuple[str, str], dict[str, Tensor]] = {}
    unknown = []
    for key, part in parts.items():
        if part.network and part.network not in networks:
            raise AdapterWrongShape(
                f"{whose} changes the {part.network.replace('_', ' ')} ({short(key)}), which cannot be changed here"
            )
        where = [part.network] if part.network else list(networks)
        found = next(((one, name) for one in where if (name := _find(names[one], part, whose))), None)
        if found is None:
            unknown.append(part.module)
        elif part.kind in placed.setdefault(found, {}):
            raise AdapterDamaged(f"{whose} says the {part.kind} of {found[1]} twice")
        else:
            placed[found][part.kind] = tensors[key]
    if unknown:
        raise _unknown(whose, sorted(set(unknown)), list(tensors), metadata)
    strength = _Strength(whose, metadata, beside)
    factors: dict[str, dict[str, LowRank]] = {network: {} for network in networks}
    deltas: dict[str, dict[str, Tensor]] = {network: {} for network in networks}
    for (network, layer), part_of in placed.items():
        if "whole" in part_of:
            if len(part_of) > 1:
                raise AdapterDamaged(f"{whose} holds factors and a whole difference of {layer}")
            deltas[network][layer] = part_of["whole"].float()
        else:
            factors[network][layer] = _low_rank(whose, strength, network, layer, networks[network][layer], part_of)
    return {network: Changes(factors[network], deltas[network]) for network in networks}


def some(faults: Sequence[str]) -> str:
    """The first few of many faults."""
    more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
    return f"{'; '.join(short(fault) for fault in faults[:5])}{more}"


def short(told: str) -> str:
    """A name from a file, cut to what a message can hold."""
    return told if len(told) <= 160 else f"{told[:160]}…"


# -- names


def _aliases(network: str, layer: str) -> Iterator[str]:
    """What a layer is called, with points."""
    yield layer
    if layer.endswith(".to_out.0"):
        yield layer.removesuffix(".0")  # diffusers' attention processors: to_out_lora
    if network == UNET:
        return
    for name in {layer, published_name(network, layer), layer.removeprefix("text_model.")}:
        yield name
        if (found := re.fullmatch(r"(.+\.self_attn)\.(q|k|v|out)_proj", name)) is not None:
            yield f"{found[1]}.to_{found[2]}"  # diffusers' first text encoders: self_attn.to_q_lora


def published_name(network: str, layer: str) -> str:
    """A layer's name in published files: `text_model.` before a text encoder's, which transformers 5 left out."""
    if network == UNET or layer.startswith(("text_model.", "text_projection")):
        return layer
    return f"text_model.{layer}"


_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def _first_codes_names(layers: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Layers of a UNet and their names in Stability's first code, which numbers blocks through: `input_blocks.4.1.…`.

    The numbers follow from which blocks there are, not from a table for one size of network.
    """
    places = dict(_sgm_places(layers))
    for layer in layers:
        if layer in _ENDS:
            yield layer, _ENDS[layer]
        elif layer in places:
            yield layer, places[layer]
        else:
            block = ".".join(layer.split(".")[: 4 if not layer.startswith("mid_block") else 3])
            inner = layer.removeprefix(f"{block}.")
            if block in places:
                yield layer, f"{places[block]}.{_RESNET.get(inner, inner)}"


def _sgm_places(layers: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Blocks with their numbered names: `down_blocks.1.attentions.0`, `input_blocks.4.1`."""
    number = 1  # input_blocks.0 is conv_in
    for block in _counted("down_blocks.{}.resnets.0.conv1", layers):
        for depth in _counted(f"down_blocks.{block}.resnets.{{}}.conv1", layers):
            yield f"down_blocks.{block}.resnets.{depth}", f"input_blocks.{number}.0"
            yield f"down_blocks.{block}.attentions.{depth}", f"input_blocks.{number}.1"
            number += 1
        if f"down_blocks.{block}.downsamplers.0.conv" in layers:
            yield f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    for depth in _counted("mid_block.resnets.{}.conv1", layers):
        yield f"mid_block.resnets.{depth}", f"middle_block.{2 * depth}"
        yield f"mid_block.attentions.{depth}", f"middle_block.{2 * depth + 1}"
    number = 0
    for block in _counted("up_blocks.{}.resnets.0.conv1", layers):
        for depth in _counted(f"up_blocks.{block}.resnets.{{}}.conv1", layers):
            yield f"up_blocks.{block}.resnets.{depth}", f"output_blocks.{number}.0"
            yield f"up_blocks.{block}.attentions.{depth}", f"output_blocks.{number}.1"
            number += 1
        attends = any(layer.startswith(f"up_blocks.{block}.attentions.") for layer in layers)
        yield f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{number - 1}.{1 + attends}.conv"


def _counted(pattern: str, layers: frozenset[str]) -> Iterator[int]:
    number = 0
    while pattern.format(number) in layers:
        yield number
        number += 1


def _part(whose: str, key: str) -> _Part:
    for foreign, method in _FOREIGN:
        if foreign.search(key):
            raise _foreign(whose, method, key)
    found = _TENSOR.match(key)
    if found is None:
        raise AdapterWrongShape(f"{whose} holds {short(key)}, which is no part of an adapter of a UNet")
    module = found["module"] or found["whole"] or found["scaled"]
    kind = "down" if found["down"] else "up" if found["up"] else "whole" if found["whole"] else "alpha"
    for prefix, network in _KOHYA.items():
        if module.startswith(prefix):
            return _Part(network, module.removeprefix(prefix), kind, has_points=False)
    module = module.removeprefix(_WRAPPED)
    network = ""
    for prefix, meant in _DOTTED.items():
        if module.startswith(prefix):
            network, module = meant, module.removeprefix(prefix)
            break
    return _Part(network, module.removeprefix(_WRAPPED), kind, has_points=True)


def _find(names: Names, part: _Part, whose: str) -> str | None:
    return names.find(part.module, whose, has_points=part.has_points)


def _foreign(whose: str, method: str, key: str) -> AdapterWrongShape:
    return AdapterWrongShape(
        f"{whose} is {method} ({short(key)}), which is not drawn here; train it as plain LoRA, or let the tool that "
        "made it merge it into its base and extract a LoRA from the difference"
    )


def _unknown(
    whose: str, unknown: Sequence[str], keys: Sequence[str], metadata: Mapping[str, str]
) -> AdapterWrongBase | AdapterWrongShape:
    for pattern, family in _ELSEWHERE:
        if (key := next((key for key in keys if pattern.search(key)), None)) is not None:
            return AdapterWrongBase(
                f"{whose} looks like a LoRA of {family}: it has {short(key)}; train one on this pack's UNet"
            )
    told = _told_base(metadata)
    faults = [f"{name} is no layer of this UNet" for name in unknown]
    return AdapterWrongShape(f"{whose} does not fit: {some(faults)}{f'; it {told}' if told else ''}")


def _told_base(metadata: Mapping[str, str]) -> str:
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if metadata.get(key, "") not in _KOHYA_NOTHING:
            return f"says that its base is {metadata[key][:60]}"
    return ""


def _check_family(
    whose: str,
    parts: Mapping[str, _Part],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    networks: Mapping[str, Mapping[str, nn.Linear | nn.Conv2d]],
) -> None:
    """Raises AdapterWrongBase when the file is about another family of models than `networks` are."""
    widths = {
        int(tensors[key].shape[1])
        for key, part in parts.items()
        if part.kind == "down" and tensors[key].ndim == 2 and _CROSS.search(key)
    }
    own = {layer.weight.shape[1] for name, layer in networks.get(UNET, {}).items() if _CROSS.search(name)}
    evidence = []
    second = next((key for key, part in parts.items() if part.network == TEXT_2), None)
    if second is not None and TEXT_2 not in networks:
        evidence.append(f"it has {'lora_te2' if second.startswith('lora_te2_') else TEXT_2} keys")
    if len(widths) == 1 and own and not widths & own:
        evidence.append(
            f"its cross attention is {next(iter(widths))} wide, this UNet's is {', '.join(map(str, sorted(own)))}"
        )
    if not evidence:
        return
    family = "SDXL" if second is not None else _WIDTHS.get(next(iter(widths)), "another model")
    told = _told_base(metadata)
    raise AdapterWrongBase(
        f"{whose} looks like a LoRA of {family}: {'; '.join([*evidence, f'it {told}'] if told else evidence)}; "
        "train one on this pack's UNet"
    )


# -- numbers


class _Strength:
    """Where alphas come from that are no tensors of the file."""

    def __init__(self, whose: str, metadata: Mapping[str, str], beside: PeftConfig | None) -> None:
        self._whose = whose
        self._configs = _diffusers_configs(whose, metadata)
        self._one = _number(metadata[ALPHA], f"{ALPHA} of {whose}") if ALPHA in metadata else None
        self._kohya = _kohya_number(whose, metadata.get(KOHYA_ALPHA), KOHYA_ALPHA)
        arguments = _json(metadata.get(KOHYA_ARGUMENTS) or "{}", f"{KOHYA_ARGUMENTS} of {whose}")
        of_kernels = arguments.get("conv_alpha") if isinstance(arguments, Mapping) else None
        self._kohya_kernels = _kohya_number(whose, of_kernels, f"conv_alpha in {KOHYA_ARGUMENTS}")
        self._beside = beside

    def of(self, network: str, layer: str, low: tuple[Tensor, Tensor]) -> float:
        """Of a layer with these factors."""
        rank, kernel = int(low[0].shape[0]), low[0].shape[2:]
        names = (layer, published_name(network, layer))
        config = self._configs.get(network) or self._configs.get("")
        if config is not None:
            return config.alpha_of(names, rank, self._whose)
        if self._one is not None:
            return self._one
        if self._kohya is not None or self._kohya_kernels is not None:
            of_kernel = self._kohya_kernels if kernel.numel() > 1 else None
            one = self._kohya if of_kernel is None else of_kernel
            return float(rank) if one is None else one
        return float(rank) if self._beside is None else self._beside.alpha_of(names, rank, self._whose)


def _low_rank(
    whose: str,
    strength: _Strength,
    network: str,
    layer: str,
    module: nn.Linear | nn.Conv2d,
    part: Mapping[str, Tensor],
) -> LowRank:
    if "down" not in part or "up" not in part:
        raise AdapterDamaged(f"{whose} holds only half of {layer}")
    down, up = _as_in(module, part["down"].float()), _as_in(module, part["up"].float())
    if (
        down.ndim not in (2, 4)
        or down.ndim != up.ndim
        or not len(down)
        or up.shape[1] != down.shape[0]
        or up.shape[2:].numel() != 1
    ):
        raise AdapterWrongShape(f"{whose}: {layer} is {tuple(up.shape)} after {tuple(down.shape)}")
    if "alpha" not in part:
        alpha = strength.of(network, layer, (down, up))
    elif part["alpha"].numel() != 1:
        raise AdapterDamaged(f"{whose}: the alpha of {layer} is {tuple(part['alpha'].shape)} and should be one number")
    else:
        alpha = part["alpha"].double().item()
    if not math.isfinite(alpha) or alpha == 0.0:
        # Of zero, PEFT makes a change of nothing, and kohya's scripts make the rank.
        raise AdapterDamaged(f"{whose}: the alpha of {layer} is {alpha:g}; export it with another")
    low = LowRank(down, up, alpha)
    if not bool(low.scaled_up.isfinite().all()):
        raise AdapterDamaged(f"{whose}: {layer} with the alpha {alpha:g} is not finite")
    return low


def _as_in(module: nn.Linear | nn.Conv2d, factor: Tensor) -> Tensor:
    """A linear layer's factor may be written as a convolution's of one pixel, and the other way round."""
    if isinstance(module, nn.Linear) and factor.ndim == 4 and factor.shape[2:].numel() == 1:
        return factor.flatten(1)
    if isinstance(module, nn.Conv2d) and factor.ndim == 2:
        return factor[:, :, None, None]
    return factor


def _diffusers_configs(whose: str, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """PEFT's configurations by network, "" for one that is about all of them."""
    if DIFFUSERS_CONFIG not in metadata:
        return {}
    told = _json(metadata[DIFFUSERS_CONFIG], f"{DIFFUSERS_CONFIG} of {whose}")
    if not isinstance(told, Mapping):
        raise AdapterDamaged(f"{DIFFUSERS_CONFIG} of {whose} is no JSON object")
    by_network: dict[str, dict[str, Any]] = {}
    for key, value in told.items():
        network = next((one for one in NETWORKS if key.startswith(f"{one}.")), "")
        by_network.setdefault(network, {})[key.removeprefix(f"{network}.") if network else key] = value
    return {
        network: PeftConfig.from_dict(values, f"the {DIFFUSERS_CONFIG} of {whose}")
        for network, values in by_network.items()
    }


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise AdapterDamaged(f"{what} is no JSON") from None


def _number(value: object, what: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise AdapterDamaged(f"the {what} is no number: {str(value)[:20]!r}") from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise AdapterDamaged(f"the {what} is no number: {str(value)[:20]!r}")
    return number


def _whole_number(value: object, what: str) -> int:
    number = _number(value, what)
    if number != int(number):
        raise AdapterDamaged(f"the {what} is no whole number: {str(value)[:20]!r}")
    return int(number)


def _numbers(values: object, what: str) -> dict[str, float]:
    if values is None:
        return {}
    if not isinstance(values, Mapping) or len(values) > _PATTERNS_MAX:
        raise AdapterDamaged(f"the {what} is no JSON object of at most {_PATTERNS_MAX} names")
    return {str(key): _number(value, what) for key, value in values.items()}


def _kohya_number(whose: str, value: object, key: str) -> float | None:
    return None if value is None or str(value) in _KOHYA_NOTHING else _number(value, f"{key} of {whose}")


def _first(patterns: Mapping[str, float], names: Sequence[str], whose: str) -> Any:
    """The value of the first pattern that means one of `names`."""
    return next((value for pattern, value in patterns.items() if _means(pattern, names, whose)), None)


def _means(pattern: str, names: Sequence[str], whose: str) -> bool:
    """PEFT's patterns are regular expressions for the end of a name, behind a point.

    A foreign file's are not run: a name, or one with `.*` in it, is understood.
    """
    plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    told = plain.replace(".*", "*")
    if re.search(r"[^\w.*-]", told) or "*" in plain.replace(".*", ""):
        raise AdapterDamaged(f"{whose}: the pattern {short(pattern)!r} is not understood; write the layers' names out")
    if "*" not in told:
        if pattern.startswith("^"):
            return told in names
        return any(name == told or name.endswith(f".{told}") for name in names)
    return any(
        fnmatchcase(name, told) or (not pattern.startswith("^") and fnmatchcase(name, f"*.{told}")) for name in names
    )


# -- writing


def peft_config(network: str, factors: Mapping[str, LowRank]) -> dict[str, Any]:
    """What PEFT's `LoraConfig` must say of these factors: the `adapter_config.json` of a file in PEFT's form."""
    # In one order, which decides between what is equally common.
    lows = sorted(factors.items())
    ranks = {layer: one.rank for layer, one in lows}
    alphas = {layer: int(one.alpha) if one.alpha.is_integer() else one.alpha for layer, one in lows}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    # A name alone would also mean the layers that end like it. A text encoder's may come behind `text_model.`.
    begin = "^" if network == UNET else ""
    return {
        "peft_type": "LORA",
        "r": rank,
        ALPHA: alpha,
        "rank_pattern": {f"{begin}{layer}": one for layer, one in ranks.items() if one != rank},
        "alpha_pattern": {f"{begin}{layer}": one for layer, one in alphas.items() if one != alpha},
        "target_modules": sorted(factors),
        "bias": "none",
    }


def laid_out(
    form: Form, changes: Mapping[str, Changes], words: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file in `form`. Raises AdapterNotWritable for what the form has no name for."""
    changed = {network: one for network, one in changes.items() if one.factors or one.deltas}
    if form == "kohya":
        return _kohya_tensors(changed, words), _kohya_metadata(changed)
    if words or any(one.deltas for one in changed.values()):
        what = "learned words" if words else "whole differences"
        raise AdapterNotWritable(f"{form} has no place for {what}; write it as kohya")
    tensors = {}
    for network, one in changed.items():
        # PEFT's files are of one network; of two there are only diffusers' names.
        prefix = _WRAPPED if form == "peft" and len(changed) == 1 else f"{network}."
        for layer, low in one.factors.items():
            name = layer if form == "peft" else published_name(network, layer)
            tensors[f"{prefix}{name}.lora_A.weight"] = low.down
            tensors[f"{prefix}{name}.lora_B.weight"] = low.up
    told = {
        f"{network}.{key}": value
        for network, one in changed.items()
        for key, value in peft_config(network, one.factors).items()
    }
    return tensors, {DIFFUSERS_CONFIG: json.dumps(told, sort_keys=True)}


def _kohya_tensors(changed: Mapping[str, Changes], words: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first = "lora_te1_" if TEXT_2 in changed else "lora_te_"
    prefixes = {UNET: "lora_unet_", TEXT: first, TEXT_2: "lora_te2_"}
    tensors: dict[str, Tensor] = {}
    for network, one in changed.items():
        for layer in (*one.factors, *one.deltas):
            name = f"{prefixes[network]}{published_name(network, layer).replace('.', '_')}"
            if f"{name}.alpha" in tensors or f"{name}.diff" in tensors:
                raise AdapterNotWritable(f"kohya's names do not tell two layers {name} apart; write it as peft")
            if layer in one.deltas:
                tensors[f"{name}.diff"] = one.deltas[layer]
                continue
            low = one.factors[layer]
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = low.down, low.up
            alpha = torch.tensor(low.alpha, dtype=torch.float32)
            exact = alpha.item() == low.alpha
            tensors[f"{name}.alpha"] = alpha if exact else torch.tensor(low.alpha, dtype=torch.float64)
    for word, vectors in words.items():
        if "." in word:
            raise AdapterNotWritable(f"kohya's form has no place for a word with a point in it: {word}")
        tensors[f"bundle_emb.{word}.string_to_param.*"] = vectors
    return tensors


def _kohya_metadata(changed: Mapping[str, Changes]) -> dict[str, str]:
    """What kohya's scripts and their readers show. Each layer's own rank and alpha are in its tensors."""
    lows = [low for one in changed.values() for low in one.factors.values()]
    plain = [low for low in lows if low.down.shape[2:].numel() == 1]
    kernels = [low for low in lows if low.down.shape[2:].numel() > 1]

    def one_of(values: Iterable[float]) -> str:
        told = set(values)
        return "Dynamic" if len(told) > 1 else f"{next(iter(told)):.17g}" if told else "None"

    told = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": one_of(low.rank for low in plain),
        KOHYA_ALPHA: one_of(low.alpha for low in plain),
    }
    if kernels:
        told[KOHYA_ARGUMENTS] = json.dumps(
            {"conv_dim": one_of(low.rank for low in kernels), "conv_alpha": one_of(low.alpha for low in kernels)}
        )
    return told
