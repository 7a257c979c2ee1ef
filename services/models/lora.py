"""What a character changes of a pack's networks, and low-rank adapters that differ for every row of a batch.

A character is a small change of many weights: W + scale · up · down (Hu et al., "LoRA"), or, for the keys and values of
text attention, a whole difference (Kumari et al., "Custom Diffusion"); or words that the text encoder is taught (Gal
et al., "Textual Inversion"); or another UNet altogether (Ruiz et al., "DreamBooth"). The first two share a forward with
everybody else's: `AdapterSlots` keeps a few of them side by side on the device, stacked by slot, and every linear layer
and convolution adds to each row what that row's slot says. Slot 0 is nobody and adds exactly nothing. A small change of
the text encoder is the business of `services.models.text_encoder`, which reads one job's texts at a time.

There are two ways to compute it, with equal results. Added: two batched matrix products a layer more, however many
adapters there are, over factors gathered row by row; little memory, which is what counts on a GPU. Merged: rows that
wear the same go through weights that have it merged in, side by side in one batched product where that is possible,
which costs what the layer costs anyway. A pass whose weights do not fit into `merged_bytes` is computed in the other
way. On a processor the second is the faster one (`python -m tests.bench.frame.profile`). Neighbours that wear the same
need fewer weights.

    slots = AdapterSlots(unet, count=8, rank_max=16)
    slots.put(3, read_adapter(payload, unet))
    with slots.rows([(Worn(3, 1.0),), ()]):
        unet.predict(...)                       # two rows, the first one wears slot 3

The network's own weights and names stay as they are. The same form is used alone and together, so a row's numbers do
not depend on whom it is with, but for the last bits. Knows no folder, no queue and no device choice.

Shapes: B rows, M adapters a row wears at most, L positions, I inputs, O outputs, r rank, K kernel size, S slots.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from services.models.errors import (
    AdapterDamaged,
    AdapterNotWritable,
    AdapterTooLarge,
    AdapterWrongBase,
    AdapterWrongShape,
)
from services.models.lora_formats import (
    ALPHA,
    FORMS,
    NETWORKS,
    UNET,
    Changes,
    Form,
    LowRank,
    PeftConfig,
    changes_of,
    laid_out,
    peft_config,
    short,
    some,
)
from services.models.transfer import sent

BASE_DIGEST = "fabula.base_digest"  # key of a file's metadata: which UNet it was trained on
FORM = "fabula.form"  # key of a file's metadata: in whose layout we wrote it
WORDS = "words."  # a file's keys of learned words: "words.Zoe"; diffusers names them by the word alone, "<zoe>"
_WORD = re.compile(
    r"^words\.(?P<ours>\S.*)$|^(?P<theirs><[^<>]+>)$|^bundle_emb\.(?P<bundled>[^\s.][^.]*)\.string_to_param\.\*$"
)


@dataclass(frozen=True)
class Adapter:
    """A checked adapter, in float32 on the CPU. `digest` is the SHA-256 of its file."""

    digest: str
    factors: Mapping[str, LowRank]
    deltas: Mapping[str, Tensor]  # `[O, I]` by layer
    size_bytes: int
    words: Mapping[str, Tensor] = field(default_factory=dict)  # `[n, D]` in the text encoder's embedding, by word
    texts: Mapping[str, Mapping[str, LowRank]] = field(default_factory=dict)  # by text encoder and its layer
    unet: Any = None  # instead of the pack's, on its device and of its type; then there is nothing else

    @property
    def rank(self) -> int:
        """The largest of its UNet layers' ranks."""
        return max((one.rank for one in self.factors.values()), default=0)

    @property
    def needs_slot(self) -> bool:
        """It changes layers of the pack's UNet."""
        return bool(self.factors or self.deltas)


def read_adapter_file(
    path: Path,
    unet: nn.Module,
    *,
    base_digest: str = "",
    rank_max: int = 256,
    text_width: int = 0,
    texts: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Adapter:
    """Read an adapter from a file, with the alphas that PEFT keeps in an `adapter_config.json` beside it.

    Raises what `read_adapter` raises, and AdapterDamaged for a file that cannot be read.
    """
    beside = path.with_name("adapter_config.json")
    try:
        payload = path.read_bytes()
        peft = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
    except OSError as error:
        raise AdapterDamaged(f"{path.name} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterDamaged(f"{beside.name} is no JSON: {str(error)[:80]}") from None
    return read_adapter(
        payload,
        unet,
        name=path.name,
        base_digest=base_digest,
        rank_max=rank_max,
        text_width=text_width,
        texts=texts,
        peft=peft,
    )


def read_adapter(
    payload: bytes,
    unet: nn.Module,
    *,
    name: str = "the adapter",
    base_digest: str = "",
    rank_max: int = 256,
    text_width: int = 0,
    texts: Mapping[str, nn.Module] = MappingProxyType({}),
    peft: object = None,
) -> Adapter:
    """Check the bytes of a safetensors file in PEFT's, diffusers' or kohya's layout against the networks.

    A file that holds every weight of such a UNet is one. `text_width` is that of the text encoder's embedding; 0: it
    takes no words. `texts` are the text encoders that a file may change, by the names that diffusers has for them.
    `peft` is what an `adapter_config.json` says; it counts where the file says nothing of its own.

    Raises AdapterDamaged for what cannot be read or is not finite, AdapterWrongBase when it was trained on another UNet
    than `base_digest` or on another family of models, and AdapterWrongShape for layers that are not there or have
    another size there, and for what is no LoRA. Nothing of what is refused is kept.
    """
    try:
        tensors = load(payload)
        metadata = _metadata(payload)
    except (SafetensorError, ValueError) as error:
        raise AdapterDamaged(f"{name} cannot be read: {error}") from None
    told = metadata.get(BASE_DIGEST, "")
    if told and base_digest and told != base_digest:
        raise AdapterWrongBase(f"{name} was trained on the UNet {told[:12]}, this one is {base_digest[:12]}")
    _check_numbers(name, tensors)
    beside = None if peft is None else PeftConfig.from_dict(peft, f"the adapter_config.json of {name}")
    digest = hashlib.sha256(payload).hexdigest()
    if (whole := _whole_unet(name, tensors, unet)) is not None:
        size_bytes = sum(value.nbytes for value in whole.state_dict().values())
        return Adapter(digest=digest, factors={}, deltas={}, size_bytes=size_bytes, unet=whole)
    words = _words(name, tensors, text_width)
    rest = {key: value for key, value in tensors.items() if not _WORD.match(key)}
    if not rest and not words:
        raise AdapterDamaged(f"{name} is empty")
    layers = {network: adapted_layers(module) for network, module in {UNET: unet, **texts}.items()}
    changes = changes_of(name, rest, metadata, layers, beside)
    for network, one in changes.items():
        _check_shapes(name, network, layers[network], one, rank_max)
    factors, deltas = changes[UNET].factors, changes[UNET].deltas
    return Adapter(
        digest=digest,
        factors=factors,
        deltas=deltas,
        words=words,
        texts={network: one.factors for network, one in changes.items() if network != UNET and one.factors},
        size_bytes=sum(low.nbytes for one in changes.values() for low in one.factors.values())
        + sum(one.nbytes for one in (*deltas.values(), *words.values())),
    )


def write_adapter(
    adapter: Adapter,
    form: Form = "peft",
    *,
    networks: Collection[str] = NETWORKS,
    base_digest: str = "",
    dtype: torch.dtype = torch.float32,
) -> bytes:
    """A safetensors file of `adapter` as PEFT, diffusers or kohya's scripts read it; equal adapters give equal bytes.

    Read again it is the same adapter, bit for bit, unless a smaller `dtype` was asked for. `networks` are those whose
    changes are written: PEFT's files are of one, and need `adapter_config` beside them; of a UNet's and a text
    encoder's together, PEFT's form has diffusers' names. `base_digest` is kept with it. Learned words go with the UNet.
    Raises AdapterNotWritable for what the form has no place for, and ValueError for another form or network.
    """
    if form not in FORMS or not set(networks) <= set(NETWORKS):
        raise ValueError(f"a form is one of {', '.join(FORMS)}, and a network one of {', '.join(NETWORKS)}")
    if adapter.unet is not None:
        raise AdapterNotWritable("the adapter is a whole UNet and no LoRA; its file is one that diffusers reads")
    changes = {network: one for network, one in _changes(adapter).items() if network in networks}
    tensors, metadata = laid_out(form, changes, adapter.words if UNET in networks else {})
    if not tensors:
        raise AdapterNotWritable(f"the adapter changes nothing of the {', '.join(networks)}")
    kept = {
        key: value.contiguous() if key.endswith(".alpha") else value.to(dtype).contiguous()
        for key, value in tensors.items()
    }
    if broken := sorted(key for key, value in kept.items() if not bool(value.isfinite().all())):
        raise AdapterNotWritable(f"its numbers are too large for {dtype}: {some(broken)}; write it as float32")
    metadata |= {"format": "pt", FORM: form, **({BASE_DIGEST: base_digest} if base_digest else {})}
    return _with_metadata(save(kept), metadata)


def adapter_config(adapter: Adapter, network: str = UNET) -> dict[str, Any]:
    """What belongs into `adapter_config.json` beside a file of `write_adapter` in PEFT's form, for one network.

    Raises AdapterNotWritable when the adapter has no low-rank change of it.
    """
    factors = _changes(adapter).get(network, Changes()).factors
    if not factors:
        raise AdapterNotWritable(f"the adapter has no LoRA of the {network}")
    return peft_config(network, factors)


def _changes(adapter: Adapter) -> dict[str, Changes]:
    return {
        UNET: Changes(adapter.factors, adapter.deltas),
        **{network: Changes(factors) for network, factors in adapter.texts.items()},
    }


def _with_metadata(payload: bytes, metadata: Mapping[str, str]) -> bytes:
    """The same file with metadata, in one order: the library's own changes with every process."""
    length = int.from_bytes(payload[:8], "little")
    header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **json.loads(payload[8 : 8 + length])})
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload[8 + length :]


def _check_numbers(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises AdapterDamaged for numbers that are not finite, also not in float32, and for such as no weight has."""
    for key, value in tensors.items():
        if not key.endswith(".alpha") and value.dtype not in _NUMBERS:
            raise AdapterDamaged(f"{name} holds {short(key)} as {value.dtype}; export it as float16 or float32")
    broken = sorted(key for key, value in tensors.items() if not bool(value.float().isfinite().all()))
    if broken:
        raise AdapterDamaged(f"{name} holds numbers that are not finite: {some(broken)}")


_NUMBERS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _whole_unet(name: str, tensors: Mapping[str, Tensor], unet: nn.Module) -> nn.Module | None:
    """Another UNet of the same kind, with these weights; None when they are not all of one's."""
    plain = {key.removeprefix("unet."): value for key, value in tensors.items()}
    wanted = unet.state_dict()
    if plain.keys() != wanted.keys():
        return None
    faults = [
        f"{key} is {tuple(value.shape)} and should be {tuple(wanted[key].shape)}"
        for key, value in sorted(plain.items())
        if value.shape != wanted[key].shape
    ]
    if faults:
        raise AdapterWrongShape(f"{name} does not fit: {some(faults)}")
    kind: Any = type(unet)
    with torch.device("meta"):  # neither the memory nor the time of weights that are thrown away
        whole: nn.Module = kind.from_config(unet.config)
    like = next(unet.parameters())
    whole.load_state_dict({key: value.to(like) for key, value in plain.items()}, assign=True)
    return whole.requires_grad_(False).eval()


def is_whole_unet(payload: bytes, unet: nn.Module) -> bool:
    """Whether a file has the tensors of a whole UNet, by its header alone. What cannot be read is none."""
    try:
        length = int.from_bytes(payload[:8], "little")
        header = json.loads(payload[8 : 8 + length])
    except (ValueError, RecursionError):
        return False
    if not isinstance(header, dict):
        return False
    return {key.removeprefix("unet.") for key in header if key != "__metadata__"} == unet.state_dict().keys()


def _words(name: str, tensors: Mapping[str, Tensor], text_width: int) -> dict[str, Tensor]:
    """Learned words, `[n, D]` each."""
    words = {}
    for key, value in tensors.items():
        if (found := _WORD.match(key)) is None:
            continue
        vectors = value.float() if value.ndim == 2 else value.float()[None]
        if vectors.ndim != 2 or vectors.shape[1] != text_width or not len(vectors):
            raise AdapterWrongShape(
                f"{name}: {key} is {tuple(value.shape)}, the text encoder's words are {text_width} wide"
            )
        words[found["ours"] or found["theirs"] or found["bundled"]] = vectors
    return words


def _metadata(payload: bytes) -> dict[str, str]:
    """The header's free part. The format: eight bytes of length, then a JSON object."""
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    return {str(key): str(value) for key, value in header.get("__metadata__", {}).items()}


def _check_shapes(
    whose: str, network: str, layers: Mapping[str, nn.Linear | nn.Conv2d], changes: Changes, rank_max: int
) -> None:
    faults = []
    for name, one in changes.factors.items():
        if one.shape != tuple(layers[name].weight.shape):
            faults.append(f"{name} changes {one.shape}, its weight is {tuple(layers[name].weight.shape)}")
        elif one.rank > rank_max:
            faults.append(f"{name} has rank {one.rank}, at most {rank_max} is taken")
    for name, delta in changes.deltas.items():
        if network != UNET or isinstance(layers[name], nn.Conv2d):
            faults.append(f"{name} differs as a whole, which is for linear layers of the UNet")
        elif tuple(delta.shape) != tuple(layers[name].weight.shape):
            faults.append(f"{name} differs by {tuple(delta.shape)}, its weight is {tuple(layers[name].weight.shape)}")
    if faults:
        raise AdapterWrongShape(f"{whose} does not fit: {some(faults)}")


def adapted_layers(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers an adapter may change, by name: every linear layer and every ungrouped convolution."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }


Layer = Callable[[Tensor], Tensor]
MERGED_BYTES = 512 << 20  # of weights that have outfits merged in
_COPIES_MAX = 2  # of one outfit's weights in a pass, on average
_REPEATED_BYTES = 32 << 20  # of a layer's weights that are repeated row by row


class Worn(NamedTuple):
    """One adapter that a row wears: its slot, and how strongly."""

    slot: int
    scale: float


Outfit = Sequence[Worn]
"""All that a row wears. Empty: the network as it is."""
NOBODY = Worn(0, 0.0)
"""What a row wears of a character that changes no layer."""


class Merged:
    """Weights with outfits merged in, of R runs of neighbouring rows that wear the same each, by layer.

    A layer's are made when they are first asked for: not every pass goes through every layer.
    """

    def __init__(self, made: Callable[[str], Tensor], names: Collection[str], bytes_max: int) -> None:
        """`made`: what makes a layer's `[R, O, I…]`. `names`: the layers that the outfits change."""
        self.bytes_max = bytes_max  # once all of them are made
        self._made, self._names = made, frozenset(names)
        self._weights: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Of those that are made."""
        return sum(one.nbytes for one in self._weights.values())

    def of(self, name: str) -> Tensor | None:
        """A layer's, `[R, O, I…]`; None where nobody changes it."""
        if name not in self._weights and name in self._names:
            self._weights[name] = self._made(name)
        return self._weights.get(name)


@dataclass(frozen=True)
class WornRows:
    """What one pass's rows wear: by row, on the device; and merged, by run, where there is room for such weights."""

    count: int
    slots_BM: Tensor
    scales_BM: Tensor
    merged: Merged | None
    runs: tuple[int, ...] = ()  # how many rows each run of `merged` has


@dataclass
class _Stack:
    """One layer's adapters, by slot."""

    down: Tensor | None = None  # `[S, r, I]` or `[S, r, I, K, K]`
    up: Tensor | None = None  # `[S, O, r]`
    whole: Tensor | None = None  # `[S, O, I]`
    ranks: dict[int, int] = field(default_factory=dict)  # of the slots with factors; the rest of theirs is zeros
    wholes: set[int] = field(default_factory=set)  # the slots with a whole difference

    @property
    def is_used(self) -> bool:
        """Somebody changes this layer."""
        return bool(self.ranks or self.wholes)


class AdapterSlots:
    """Adapters side by side in a UNet. Not thread-safe: who steps the UNet fills its slots."""

    def __init__(
        self,
        unet: nn.Module,
        count: int,
        rank_max: int,
        *,
        merged_bytes: int = MERGED_BYTES,
        stacks_bytes_max: int | None = None,
    ) -> None:
        """Room for `count` adapters besides nobody. Layers that no adapter changes cost nothing.

        `stacks_bytes_max` is what all of them may take beside the network, on its device; None: what there is.
        Merged weights are for a processor and float32: in half precision they are another rounding than a sum.
        """
        if count < 1 or rank_max < 1:
            raise ValueError("a UNet needs at least one slot, and a rank of at least one")
        self.count, self.rank_max = count, rank_max
        first = next(unet.parameters())
        self._merged_bytes = merged_bytes if first.device.type == "cpu" and first.dtype == torch.float32 else 0
        self._stacks_bytes_max = stacks_bytes_max
        self._merged: OrderedDict[tuple[Outfit, ...], Merged] = OrderedDict()  # used longest ago first
        self._layers = adapted_layers(unet)
        self._stacks: dict[str, _Stack] = {}
        self._held: dict[int, str] = {}  # digests by slot
        self._rows: WornRows | None = None
        self._parts: frozenset[str] = frozenset()

    @property
    def held(self) -> Mapping[int, str]:
        """Digests of the adapters that lie in slots."""
        return dict(self._held)

    def put(self, slot: int, adapter: Adapter) -> None:
        """Lay an adapter into a slot, in place of what was there.

        Raises ValueError for a slot or rank out of range, and AdapterTooLarge where the stacks would outgrow their
        budget. When it fails for want of memory the slot is nobody's, and everybody else's is as it was.
        """
        if not 1 <= slot <= self.count:
            raise ValueError(f"slot {slot} is not from 1 to {self.count}")
        if adapter.rank > self.rank_max:
            raise ValueError(f"rank {adapter.rank} is above {self.rank_max}")
        self.check_room(adapter)
        self.clear(slot)
        names = (*adapter.factors, *adapter.deltas)
        before = {name: replace(stack) for name in names if (stack := self._stacks.get(name)) is not None}
        try:
            for name, factors in adapter.factors.items():
                down, up = self._low_rank(name)
                down[slot, : factors.rank] = factors.down.to(down)
                up[slot, :, : factors.rank] = factors.scaled_up.flatten(1).to(up)
                self._stacks[name].ranks[slot] = factors.rank
            for name, delta in adapter.deltas.items():
                whole = self._whole(name)
                whole[slot] = delta.to(whole)
                self._stacks[name].wholes.add(slot)
        except BaseException:
            for name in names:  # what was made for it alone goes with it; no forward has looked there
                stack, old = self._stacks.get(name), before.get(name, _Stack())
                if stack is not None:
                    stack.down, stack.up, stack.whole = old.down, old.up, old.whole
            self.clear(slot)
            raise
        self._held[slot] = adapter.digest
        self._parts = self._read()

    @property
    def stacks_bytes(self) -> int:
        """What lies beside the network's own weights, in use or not."""
        parts = [part for stack in [*self._stacks.values()] for part in (stack.down, stack.up, stack.whole)]
        return sum(part.nbytes for part in parts if part is not None)

    def check_room(self, adapter: Adapter) -> None:
        """Raises AdapterTooLarge where the stacks it needs would outgrow their budget. From any thread."""
        more = 0
        for name in adapter.factors:
            if (stack := self._stacks.get(name)) is None or stack.down is None:
                weight = self._layers[name].weight
                more += self.rank_max * (weight[0].numel() + weight.shape[0]) * weight.element_size()
        for name in adapter.deltas:
            if (stack := self._stacks.get(name)) is None or stack.whole is None:
                more += self._layers[name].weight.nbytes
        more *= self.count + 1
        if self._stacks_bytes_max is not None and self.stacks_bytes + more > self._stacks_bytes_max:
            raise AdapterTooLarge(
                f"{adapter.digest[:12]} changes layers that nobody's weights have changed yet; for {self.count} slots "
                f"that takes {more >> 20} MiB more, and at most {self._stacks_bytes_max >> 20} MiB are for all of them"
            )

    def clear(self, slot: int) -> None:
        """Make a slot nobody's. Its numbers are zeroed, so that a stale row number could only add nothing."""
        self._held.pop(slot, None)
        for outfits in [key for key in self._merged if any(worn.slot == slot for outfit in key for worn in outfit)]:
            del self._merged[outfits]
        for stack in self._stacks.values():
            if slot in stack.ranks or slot in stack.wholes:
                stack.ranks.pop(slot, None)
                stack.wholes.discard(slot)
                for part in (stack.down, stack.up, stack.whole):
                    if part is not None:
                        part[slot] = 0.0
        self._parts = self._read()

    def _read(self) -> frozenset[str]:
        used = [(name, stack) for name, stack in self._stacks.items() if stack.is_used]
        low = {f"{name}.low" for name, stack in used if stack.down is not None}
        return frozenset(low | {f"{name}.whole" for name, stack in used if stack.whole is not None})

    @property
    def parts(self) -> frozenset[str]:
        """What a forward reads of the stacks now. It stays where it is; with more of it, a forward is another one."""
        return self._parts

    @contextmanager
    def rows(self, worn: Sequence[Outfit]) -> Iterator[None]:
        """What the rows of the forwards in this block wear."""
        with self.worn(self.prepared(worn)):
            yield

    @contextmanager
    def worn(self, rows: WornRows | None) -> Iterator[None]:
        """The same, of what `prepared` made of it."""
        try:
            self._rows = rows
            yield
        finally:
            self._rows = None

    def prepared(self, outfits: Sequence[Outfit]) -> WornRows | None:
        """What rows wear, on the device; None for nothing. Raises ValueError for a slot that nobody lies in."""
        outfits = [[one for one in outfit if one.slot != NOBODY.slot] for outfit in outfits]
        most = max(map(len, outfits), default=0)
        if most == 0:
            return None
        unknown = sorted({one.slot for outfit in outfits for one in outfit} - self._held.keys())
        if unknown:
            raise ValueError(f"nobody lies in the slots {unknown}")
        whole = [[*outfit, *[NOBODY] * (most - len(outfit))] for outfit in outfits]
        device = next(iter(self._layers.values())).weight.device
        slots_BM = sent([[one.slot for one in outfit] for outfit in whole], device)
        scales_BM = sent([[one.scale for one in outfit] for outfit in whole], device)
        rows = WornRows(len(outfits), slots_BM, scales_BM, None)
        return rows if self._merged_bytes == 0 else self._side_by_side([*map(tuple, outfits)], rows)

    def _side_by_side(self, outfits: Sequence[Outfit], rows: WornRows) -> WornRows:
        """The same rows with merged weights, if these have room."""
        lengths = [sum(1 for _ in run) for _, run in groupby(outfits)]
        length = math.gcd(*lengths)
        # Runs of one length are one product. Some weights more than once are worth it, one copy for every row is not.
        runs = (length,) * (len(outfits) // length)
        if len(runs) > _COPIES_MAX * len(lengths):
            runs = tuple(lengths)
        first = [*accumulate(runs, initial=0)][:-1]
        worn = tuple(outfits[row] for row in first)
        if (merged := self._merged.get(worn)) is None:
            slots = {one.slot for outfit in worn for one in outfit}
            names = [name for name, stack in self._stacks.items() if slots & (stack.ranks.keys() | stack.wholes)]
            some = WornRows(len(worn), rows.slots_BM[first], rows.scales_BM[first], None)
            bytes_max = len(worn) * sum(self._layers[name].weight.nbytes for name in names)
            merged = Merged(partial(self._with, rows=some), names, bytes_max)
        if merged.bytes_max > self._merged_bytes:
            return rows
        self._merged.pop(worn, None)
        # Only the one that is worn grows, so it has room for all that it may come to.
        while self._merged and merged.bytes_max + sum(one.nbytes for one in self._merged.values()) > self._merged_bytes:
            self._merged.popitem(last=False)
        self._merged[worn] = merged
        return replace(rows, merged=merged, runs=runs)

    def _with(self, name: str, rows: WornRows) -> Tensor:
        """`[B, O, I…]`: a layer's weight with what each of some rows adds to it."""
        stack, weight = self._stacks[name], self._layers[name].weight.detach()
        merged_BOI = weight.flatten(1).expand(rows.count, -1, -1)
        if stack.down is not None:
            down_BRI, up_BOR = self._gathered(stack, rows)
            merged_BOI = torch.baddbmm(merged_BOI, up_BOR, down_BRI.flatten(2))
        if stack.whole is not None:
            merged_BOI = merged_BOI + self._whole_of(stack.whole, rows)
        return merged_BOI.view(rows.count, *weight.shape)

    def _stack(self, name: str) -> _Stack:
        if name not in self._stacks:
            self._stacks[name] = _Stack()
            layer = self._layers[name]
            layer.forward = _Dressed(self, name, layer, layer.forward)  # type: ignore[method-assign, assignment]
        return self._stacks[name]

    def _low_rank(self, name: str) -> tuple[Tensor, Tensor]:
        stack, weight = self._stack(name), self._layers[name].weight
        if stack.down is None or stack.up is None:
            down = weight.new_zeros((self.count + 1, self.rank_max, *weight.shape[1:]))
            stack.up = weight.new_zeros((self.count + 1, weight.shape[0], self.rank_max))
            stack.down = down  # both or none
        return stack.down, stack.up

    def _whole(self, name: str) -> Tensor:
        stack, weight = self._stack(name), self._layers[name].weight
        if stack.whole is None:
            stack.whole = weight.new_zeros((self.count + 1, *weight.shape))
        return stack.whole

    def answer(self, name: str, layer: nn.Linear | nn.Conv2d, plain: Layer, given: Tensor) -> Tensor:
        """A layer's answer with what its rows wear."""
        rows, stack = self._rows, self._stacks[name]
        if rows is None or not stack.is_used:
            return plain(given)
        if len(given) != rows.count:
            raise ValueError(f"{name} has {len(given)} rows, {rows.count} were announced")
        if rows.merged is None:
            return self._added(stack, rows, layer, given, plain(given))
        weights_ROI = rows.merged.of(name)
        return plain(given) if weights_ROI is None else run_by_run(weights_ROI, rows.runs, layer, given)

    def _added(self, stack: _Stack, rows: WornRows, layer: nn.Module, given: Tensor, answer: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            down_BRIKK, up_BOR = self._gathered(stack, rows)
            low = _convolved(layer, given, down_BRIKK).flatten(2)
            return answer + torch.bmm(up_BOR, low).view_as(answer)
        flat_BLI = given.flatten(1, -2) if given.ndim > 2 else given[:, None]
        added: Tensor | None = None
        if stack.down is not None:
            down_BRI, up_BOR = self._gathered(stack, rows)
            added = torch.bmm(torch.bmm(flat_BLI, down_BRI.transpose(1, 2)), up_BOR.transpose(1, 2))
        if stack.whole is not None:
            difference = torch.bmm(flat_BLI, self._whole_of(stack.whole, rows).transpose(1, 2))
            added = difference if added is None else added + difference
        assert added is not None
        return answer + added.view_as(answer)

    @staticmethod
    def _gathered(stack: _Stack, rows: WornRows) -> tuple[Tensor, Tensor]:
        """`[B, M·r, I…]` and `[B, O, M·r]`: what a row wears, rank beside rank, the scales in the second."""
        assert stack.down is not None
        assert stack.up is not None
        down_BMrI, up_BMOr = stack.down[rows.slots_BM], stack.up[rows.slots_BM]
        up_BMOr = up_BMOr * rows.scales_BM.to(up_BMOr.dtype)[..., None, None]
        return down_BMrI.flatten(1, 2), up_BMOr.transpose(1, 2).flatten(2)

    @staticmethod
    def _whole_of(whole_SOI: Tensor, rows: WornRows) -> Tensor:
        """`[B, O, I]`: the whole difference of what a row wears."""
        return (whole_SOI[rows.slots_BM] * rows.scales_BM.to(whole_SOI.dtype)[..., None, None]).sum(dim=1)


class _Dressed:
    """A layer's `forward` while it has adapters."""

    def __init__(self, slots: AdapterSlots, name: str, layer: nn.Linear | nn.Conv2d, plain: Layer) -> None:
        self._slots, self._name, self._layer, self._plain = slots, name, layer, plain

    def __call__(self, given: Tensor) -> Tensor:
        return self._slots.answer(self._name, self._layer, self._plain, given)


def run_by_run(weights_ROI: Tensor, runs: Sequence[int], layer: nn.Linear | nn.Conv2d, given: Tensor) -> Tensor:
    """A layer's answer, R runs of so many rows each through their own weights `[R, O, I…]` and the same bias."""
    if isinstance(layer, nn.Linear):
        return _linear_by_run(weights_ROI, runs, layer, given)
    if len(runs) == 1:
        return _convolution(layer, given, weights_ROI[0])
    is_even = len(set(runs)) == 1
    if not is_even or not _is_pointwise(layer) or runs[0] * weights_ROI.nbytes > _REPEATED_BYTES:
        parts = zip(torch.split(given, [*runs]), weights_ROI, strict=True)
        return torch.cat([_convolution(layer, part, weight) for part, weight in parts])
    weights_BOI = weights_ROI.flatten(2).repeat_interleave(runs[0], dim=0)
    given_BIL, bias = given.flatten(2), layer.bias
    answer = torch.bmm(weights_BOI, given_BIL) if bias is None else torch.baddbmm(bias[:, None], weights_BOI, given_BIL)
    return answer.view(len(given), -1, *given.shape[2:])


def _linear_by_run(weights_ROI: Tensor, runs: Sequence[int], layer: nn.Linear, given: Tensor) -> Tensor:
    bias, weights_RIO = layer.bias, weights_ROI.transpose(1, 2)
    if len(runs) == 1:
        return F.linear(given, weights_ROI[0], bias)
    if len(set(runs)) == 1:
        given_RLI = given.reshape(len(runs), -1, layer.in_features)
        answer = torch.bmm(given_RLI, weights_RIO) if bias is None else torch.baddbmm(bias, given_RLI, weights_RIO)
        return answer.view(*given.shape[:-1], -1)
    answer = given.new_empty(*given.shape[:-1], layer.out_features)
    parts = zip(torch.split(given, [*runs]), weights_RIO, torch.split(answer, [*runs]), strict=True)
    for part, weight_IO, out in parts:
        if bias is None:
            torch.mm(part.flatten(0, -2), weight_IO, out=out.flatten(0, -2))
        else:
            torch.addmm(bias, part.flatten(0, -2), weight_IO, out=out.flatten(0, -2))
    return answer


def _convolution(layer: nn.Conv2d, given: Tensor, weight: Tensor) -> Tensor:
    answer: Tensor = layer._conv_forward(given, weight, layer.bias)
    return answer


def _is_pointwise(layer: nn.Conv2d) -> bool:
    """A matrix product at every position."""
    return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)


def _convolved(layer: nn.Conv2d, given_BIHW: Tensor, down_BrIKK: Tensor) -> Tensor:
    """`[B, r, H', W']`: each row convolved with its own kernels, as groups of one convolution."""
    batch, rank = down_BrIKK.shape[:2]
    out = F.conv2d(
        given_BIHW.reshape(1, -1, *given_BIHW.shape[2:]),
        down_BrIKK.flatten(0, 1),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=batch,
    )
    return out.view(batch, rank, *out.shape[2:])


__all__ = [
    "ALPHA",
    "BASE_DIGEST",
    "FORMS",
    "NOBODY",
    "Adapter",
    "AdapterSlots",
    "Form",
    "LowRank",
    "Outfit",
    "Worn",
    "WornRows",
    "adapted_layers",
    "adapter_config",
    "is_whole_unet",
    "read_adapter",
    "read_adapter_file",
    "write_adapter",
]
