"""Captioners in plain transformers: for networks that vLLM does not serve. One token at a time, one request a row.

    writer = load_writer("causal-lm", folder, dtype=torch.float32, device="cpu")
    state = writer.begin(ids, picture)
    logits_V = writer.logits(state)          # of the next token
    state.take(token)                        # and so on

A request's numbers do not depend on its neighbours, because it has none: what is drawn from them depends on its own
seed alone. `choose` draws. Knows no service, no prompt and no thread.

Shapes: V words of the vocabulary, N tokens, C colour channels, H and W pixels, P patches, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from services.models.captions.captioner import BLIP, CAUSAL_LM
from services.models.errors import PackUnsupported, PackWeightsMismatch


@dataclass
class State:
    """One answer that is being written."""

    new_ids: list[int]  # that the network has not read yet
    seen_PD: Tensor | None  # what a picture became; None where there is none
    cache: Any = None  # keys and values of what it has read

    def take(self, token: int) -> None:
        """The next token is settled."""
        self.new_ids = [token]


class Writer(Protocol):
    """A network that writes."""

    def begin(self, ids: Sequence[int], picture: Image.Image | None) -> State:
        """What is known before the first token."""

    def logits(self, state: State) -> Tensor:
        """`[V]` in float32, of the token after all that `state` holds; reads what is new in it."""


class CausalWriter:
    """Any language model of transformers. It sees no picture."""

    def __init__(self, network: Any) -> None:
        self._network = network

    def begin(self, ids: Sequence[int], picture: Image.Image | None) -> State:
        """See `Writer`."""
        return State(new_ids=list(ids), seen_PD=None)

    def logits(self, state: State) -> Tensor:
        """See `Writer`."""
        out = self._network(
            input_ids=_row(self._network, state.new_ids), past_key_values=state.cache, use_cache=True, return_dict=True
        )
        state.cache, state.new_ids = out.past_key_values, []
        return _last(out.logits)


class BlipWriter:
    """BLIP, which says what is in a picture."""

    def __init__(self, network: Any, processor: Any) -> None:
        self._network = network
        self._processor = processor

    def begin(self, ids: Sequence[int], picture: Image.Image | None) -> State:
        """See `Writer`. Raises ValueError without a picture."""
        if picture is None:
            raise ValueError("BLIP says what is in a picture, and none came")
        pixels_1CHW = self._processor(images=picture, return_tensors="pt")["pixel_values"]
        network = self._network
        seen = network.vision_model(pixel_values=pixels_1CHW.to(device=network.device, dtype=network.dtype))[0]
        return State(new_ids=list(ids), seen_PD=seen[0])

    def logits(self, state: State) -> Tensor:
        """See `Writer`."""
        if state.seen_PD is None:
            raise ValueError("a state of another writer")
        seen_1PD = state.seen_PD[None]
        out = self._network.text_decoder(
            input_ids=_row(self._network, state.new_ids),
            encoder_hidden_states=seen_1PD,
            encoder_attention_mask=torch.ones(seen_1PD.shape[:2], dtype=torch.long, device=seen_1PD.device),
            past_key_values=state.cache,
            use_cache=True,
            return_dict=True,
        )
        state.cache, state.new_ids = out.past_key_values, []
        return _last(out.logits)


def load_writer(architecture: str, folder: Path, *, dtype: torch.dtype, device: str) -> Writer:
    """The network of a pack's folder. Raises PackUnsupported for an architecture that is none of `WRITERS`.

    What transformers raises for weights that do not fit is not caught here.
    """
    make = WRITERS.get(architecture)
    if make is None:
        raise PackUnsupported(f"{architecture!r} is not served by transformers alone; known: {', '.join(WRITERS)}")
    return make(folder, dtype, device)


def choose(
    logits_V: Tensor, *, temperature: float, top_p: float, generator: torch.Generator, forbidden: Sequence[int] = ()
) -> int:
    """The next token: the likeliest at temperature 0, else drawn from the likeliest that hold `top_p` together."""
    logits_V = logits_V.to(device="cpu", dtype=torch.float64)
    if forbidden:
        logits_V[list(forbidden)] = -torch.inf
    if temperature == 0.0:
        return int(logits_V.argmax())
    probabilities_V, order_V = (logits_V / temperature).softmax(0).sort(descending=True, stable=True)
    kept_V = probabilities_V.cumsum(0) - probabilities_V < top_p  # always the likeliest
    return int(order_V[torch.multinomial(probabilities_V * kept_V, 1, generator=generator)])


def _causal(folder: Path, dtype: torch.dtype, device: str) -> Writer:
    from transformers import AutoModelForCausalLM

    return CausalWriter(_loaded(AutoModelForCausalLM, folder, dtype, device))


def _blip(folder: Path, dtype: torch.dtype, device: str) -> Writer:
    from transformers import AutoImageProcessor, BlipForConditionalGeneration

    processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return BlipWriter(_loaded(BlipForConditionalGeneration, folder, dtype, device), processor)


def _loaded(kind: Any, folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Raises PackWeightsMismatch when a weight is missing: transformers would make one up and only warn."""
    network, report = kind.from_pretrained(
        str(folder),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=dtype,
        output_loading_info=True,
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        missing = sorted(map(str, report["missing_keys"])) + sorted(map(str, report["mismatched_keys"]))
        raise PackWeightsMismatch(f"weights of {kind.__name__} are missing or of another shape: {missing[:5]}")
    return network.requires_grad_(False).eval().to(device)


def _row(network: Any, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], dtype=torch.long, device=network.device)


def _last(logits_1NV: Tensor) -> Tensor:
    return logits_1NV[0, -1].float()


WRITERS: dict[str, Callable[[Path, torch.dtype, str], Writer]] = {CAUSAL_LM: _causal, BLIP: _blip}
"""Architecture name in a captioner's manifest → what loads it here."""
