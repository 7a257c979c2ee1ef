"""From a published captioner in transformers' layout to a plan for adding it.

    config.json  model.safetensors, or parts and their index  tokenizer.json  preprocessor_config.json …
    adapters/story/ adapters/descriptive/      PEFT adapters of its language model, where there are any

What the manifest says is read from these files: the chat template becomes the words around a question, once, so that
nothing of a checkpoint is rendered at serving time. Reads configurations, the tokenizer and the headers of weights.
Weights are copied as they are, with one exception: transformers 5 saves LLaVA's tower under names that vLLM does not
look for, and those names are put right on the way (`RenamedSource`). Knows no network.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from services.models.captions.captioner import ADAPTERS_FOLDER, BLIP, CAUSAL_LM, FOLDER, LLAVA, VISION_LANGUAGE
from services.models.captions.llava import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, ADAPTERS
from services.models.errors import PackFileUnsafe, PackSourceInvalid, PackUnsupported
from services.models.library import PackPlan, WantedFile
from services.models.pack import Captioner, CaptionerSettings
from services.models.published import PICKLES, Told, pack_name, read_header, read_json, stored_dtype
from services.models.source import Source, SourceFile, read_start

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TOKENIZER = "tokenizer.json"
_TOKENIZER_BYTES_MAX = 64 << 20
_PLAIN = re.compile(r"[^/]+\.(json|jinja|txt)")
_SHARD = re.compile(r"[\w.-]+\.safetensors")
_LLAVA_CLASS, _BLIP_CLASS = "LlavaForConditionalGeneration", "BlipForConditionalGeneration"
_LLAVA_CHAT = ("USER: <image>\n", " ASSISTANT:")  # LLaVA-1.5's, for a copy without its chat template
_PLAIN_QUESTION = ("", "\n")  # of a language model that was never taught to chat
_MARK = "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}question\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}"
_SQUARE_PX = 448  # for models that take any size: a multiple of every patch in use
_WHOLE_PX = 1024  # longest side of a picture that a model's own preprocessor sizes
_BLIP_WORDS = "a picture of"  # what BLIP's captions begin with; they are left out of the answer
_TOWERS = ("model.vision_tower.", "vision_tower.")
_SERVED_LEVEL = "vision_model."


def is_captioner(files: Mapping[str, SourceFile]) -> bool:
    """Whether a source that is no pack looks like one: one network with its tokenizer, and no pipeline of several."""
    return CONFIG in files and "model_index.json" not in files and "unet/config.json" not in files


def plan_captioner(source: Source, files: Mapping[str, SourceFile], told: Told) -> tuple[PackPlan, Source]:
    """How to add a published captioner, and the source to add it from.

    Raises PackSourceInvalid, PackUnsupported, PackFileUnsafe, PackSourceUnreadable.
    """
    if not told.licence:
        raise PackSourceInvalid(
            f"{source.name} has no pack.json: say under which licence its weights are published, "
            "for example --licence MIT or --licence LicenseRef-name"
        )
    if told.family or told.reference_range or (told.steps, told.text_guidance, told.image_guidance) != (None,) * 3:
        raise PackSourceInvalid(f"{source.name} is a captioner: steps, guidance, family and ranges are for drawing")
    config = read_json(source, files, CONFIG)
    architecture = _architecture(source, config)
    weights = _weights(source, files)
    headers = {path: read_header(source, files, path) for path in weights}
    served, notes = source, []
    if architecture == LLAVA:
        renamed = {path: _renamed(header) for path, header in headers.items()}
        if renamed != headers:
            served = RenamedSource(source, {path: renamed[path] for path in weights if renamed[path] != headers[path]})
            files = {**files, **served.files_of(files)}
            notes.append("the vision tower's weights were given the names that vLLM looks for")
        _check_llava(source, [name for header in renamed.values() for name in header])
    adapters = _adapters(source, files)
    if adapters and architecture not in (LLAVA, VISION_LANGUAGE, CAUSAL_LM):
        raise PackUnsupported(f"{source.name}: adapters are worn by language models, and {architecture} is none")
    root = [path for path in files if _PLAIN.fullmatch(path) and path != INDEX]
    pairs = [(path, f"{FOLDER}/{path}") for path in (*root, *weights)]
    if INDEX in files and weights != [WEIGHTS]:
        pairs.append((INDEX, f"{FOLDER}/{INDEX}"))
    pairs += [
        (f"{folder}/{name}", f"{folder}/{name}")
        for folder in adapters.values()
        for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)
    ]
    taken = {path for path, _ in pairs}
    if left := sorted(set(files) - taken):
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        notes.append(f"left out, because nothing here reads it: {shown}")
    try:
        settings = CaptionerSettings(
            name=told.name or pack_name(source.name),
            architecture=architecture,
            base=told.base or source.name,
            licence=told.licence,
            made_by=told.made_by,
            dtype=stored_dtype(source, headers[weights[0]]),
            captioner=_captioner(source, files, config, architecture, adapters),
        )
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'manifest'}: {e['msg']}" for e in error.errors())
        raise PackSourceInvalid(f"{source.name}: {faults}") from None
    wanted = tuple(WantedFile(path=path, source_path=taken, file=files[taken]) for taken, path in sorted(pairs))
    plan = PackPlan(name=settings.name, architecture=architecture, files=wanted, settings=settings, notes=tuple(notes))
    return plan, served


class RenamedSource:
    """A source some of whose safetensors files come with other names for their tensors, the numbers untouched.

    Only the header of such a file changes, and with it the file's length; its data follow as they are.
    """

    def __init__(self, source: Source, headers: Mapping[str, Mapping[str, Any]]) -> None:
        """`headers` are the new ones by path, each with the old one's tensors in the old one's order."""
        self._source = source
        self._heads = {path: _head(header) for path, header in headers.items()}
        self._old: dict[str, int] = {}
        for path in headers:
            (length,) = struct.unpack("<Q", read_start(source, path, 8))
            self._old[path] = 8 + length

    @property
    def name(self) -> str:
        """See `Source`."""
        return self._source.name

    def files(self) -> Mapping[str, SourceFile]:
        """See `Source`."""
        files = self._source.files()
        return {**files, **self.files_of(files)}

    def files_of(self, files: Mapping[str, SourceFile]) -> dict[str, SourceFile]:
        """The renamed ones among `files`, as they are said to be here. What their digest will be nobody knows yet."""
        return {
            path: replace(
                files[path],
                size_bytes=files[path].size_bytes - self._old[path] + len(head),
                version=f"{files[path].version}-renamed",
                sha256="",
            )
            for path, head in self._heads.items()
        }

    def blocks(self, path: str, start: int) -> Iterator[bytes]:
        """See `Source`."""
        head = self._heads.get(path)
        if head is None:
            yield from self._source.blocks(path, start)
            return
        if start < len(head):
            yield head[start:]
        yield from self._source.blocks(path, self._old[path] + max(0, start - len(head)))


def _head(header: Mapping[str, Any]) -> bytes:
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _renamed(header: Mapping[str, Any]) -> dict[str, Any]:
    """The names that vLLM looks for: it wants a level that transformers 5 has done away with."""
    names: dict[str, Any] = {}
    for name, values in header.items():
        for tower in _TOWERS:
            if name.startswith(tower) and not name.startswith(tower + _SERVED_LEVEL):
                name = f"{tower}{_SERVED_LEVEL}{name.removeprefix(tower)}"
        names[name] = values
    return names


def _check_llava(source: Source, names: list[str]) -> None:
    for part, forms in {
        "vision tower": tuple(f"{tower}{_SERVED_LEVEL}" for tower in _TOWERS),
        "projector": ("model.multi_modal_projector.", "multi_modal_projector."),
        "language model": ("model.language_model.", "language_model.model."),
    }.items():
        if not any(name.startswith(forms) for name in names):
            raise PackUnsupported(
                f"{source.name} has no weights of the {part} under a name that vLLM looks for ({', '.join(forms)}…). "
                "LLaVA's own repository names them otherwise: take the copy that was made for transformers (…-hf)"
            )


def _architecture(source: Source, config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    found = str(named[0]) if isinstance(named, list) and named else ""
    if found == _LLAVA_CLASS:
        return LLAVA
    if found == _BLIP_CLASS:
        return BLIP
    if "vision_config" in config and found.endswith("ForConditionalGeneration"):
        return VISION_LANGUAGE
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if "vision_config" not in config and config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return CAUSAL_LM
    raise PackUnsupported(
        f"{source.name} is a {found or 'network without a name'}; captions are written by LLaVA, BLIP, other vision "
        "models that vLLM serves, and language models of transformers. Nothing was copied"
    )


def _weights(source: Source, files: Mapping[str, SourceFile]) -> list[str]:
    if WEIGHTS in files:
        return [WEIGHTS]
    if INDEX in files:
        places = read_json(source, files, INDEX, bytes_max=_TOKENIZER_BYTES_MAX).get("weight_map")
        found = sorted({str(each) for each in places.values()}) if isinstance(places, dict) else []
        if not found or not all(_SHARD.fullmatch(path) for path in found):
            raise PackSourceInvalid(f"{INDEX} of {source.name} does not say where its weights are")
        if missing := [path for path in found if path not in files]:
            raise PackSourceInvalid(f"{source.name} has no {missing[0]}, which its {INDEX} names")
        return found
    if any(path.endswith(PICKLES) for path in files):
        raise PackFileUnsafe(
            f"the weights of {source.name} are pickles, which can run code. Make them safetensors first: "
            "`fabula pack convert FOLDER OUT`, then add OUT"
        )
    raise PackSourceInvalid(f"{source.name} has neither {WEIGHTS} nor {INDEX}")


def _adapters(source: Source, files: Mapping[str, SourceFile]) -> dict[str, str]:
    """Folders of PEFT adapters by name."""
    found = {}
    for name in ADAPTERS:
        folder = f"{ADAPTERS_FOLDER}/{name}"
        if not any(path.startswith(f"{folder}/") for path in files):
            continue
        config = read_json(source, files, f"{folder}/{ADAPTER_CONFIG_FILE}")
        if f"{folder}/{ADAPTER_WEIGHTS_FILE}" not in files:
            raise PackSourceInvalid(f"{source.name} has no {folder}/{ADAPTER_WEIGHTS_FILE}")
        odd = [key for key in ("use_dora", "modules_to_save") if config.get(key)]
        if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
            raise PackUnsupported(f"{folder} of {source.name} is no plain LoRA, and vLLM wears no other adapters")
        found[name] = folder
    return found


def _captioner(
    source: Source,
    files: Mapping[str, SourceFile],
    config: Mapping[str, Any],
    architecture: str,
    adapters: Mapping[str, str],
) -> Captioner:
    text = config.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, dict) else config
    words = read_json(source, files, TOKENIZER, bytes_max=_TOKENIZER_BYTES_MAX)
    added = words.get("added_tokens")
    tokens = {int(each["id"]): str(each["content"]) for each in added} if isinstance(added, list) else {}
    named = {content: number for number, content in tokens.items()}
    details = read_json(source, files, "tokenizer_config.json") if "tokenizer_config.json" in files else {}
    ends = read_json(source, files, "generation_config.json") if "generation_config.json" in files else {}
    context = next((inner.get(key) or config.get(key) for key in _CONTEXTS if inner.get(key) or config.get(key)), None)
    if not isinstance(context, int):
        raise PackSourceInvalid(f"{CONFIG} of {source.name} does not say how many tokens fit ({', '.join(_CONTEXTS)})")
    last = details.get("eos_token")
    last = last.get("content") if isinstance(last, dict) else last
    # BLIP ends its texts with what its tokenizer calls a separator, whatever its configuration calls the end.
    said = [inner.get("sep_token_id", 102)] if architecture == BLIP else []
    said += [ends.get("eos_token_id"), inner.get("eos_token_id"), named.get(str(last))] if not said else []
    stops = next((_numbers(each) for each in said if _numbers(each)), ())
    if not stops:
        stops = (2,) if architecture == LLAVA else ()  # Llama's, which transformers fills in
    if not stops:
        raise PackSourceInvalid(f"{source.name} does not say which token ends a text (eos_token_id)")
    if architecture == BLIP:
        side_px = _side_px(source, config)
        return Captioner(
            opening=_BLIP_WORDS,
            closing="",
            asks=False,
            image_px=side_px,
            context_tokens=context,
            stop_ids=stops,
        )
    sees = architecture != CAUSAL_LM
    number = config.get("image_token_index", config.get("image_token_id"))
    image_token = tokens.get(number, "") if sees and isinstance(number, int) else ""
    if sees and not image_token:
        raise PackSourceInvalid(f"{source.name}: its tokenizer has no token for pictures (image_token_index {number})")
    plain = _LLAVA_CHAT if architecture == LLAVA else _PLAIN_QUESTION
    opening, closing = _chat(source, files, details, sees=sees) or plain
    if image_token and image_token not in opening:
        raise PackUnsupported(f"the chat template of {source.name} does not put {image_token!r} before the question")
    return Captioner(
        opening=opening,
        closing=closing,
        image_token=image_token,
        image_px=(_WHOLE_PX if architecture == LLAVA else _side_px(source, config)) if sees else 0,
        whole_pictures=architecture == LLAVA,
        context_tokens=context,
        stop_ids=stops,
        adapters=dict(adapters),  # type: ignore[arg-type]  # its names are those of `ADAPTERS`
    )


_CONTEXTS = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length", "max_sequence_length")


def _side_px(source: Source, config: Mapping[str, Any]) -> int:
    vision = config.get("vision_config")
    side = vision.get("image_size") if isinstance(vision, dict) else None
    return side if isinstance(side, int) and side > 0 else _SQUARE_PX


def _numbers(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(each for each in values if isinstance(each, int) and not isinstance(each, bool))


def _chat(
    source: Source, files: Mapping[str, SourceFile], details: Mapping[str, Any], *, sees: bool
) -> tuple[str, str] | None:
    """What the checkpoint's chat template puts before and after one question about one picture; None without one."""
    if "chat_template.jinja" in files:
        template: Any = read_start(source, "chat_template.jinja", 1 << 20).decode(errors="replace")
    elif "chat_template.json" in files:
        template = read_json(source, files, "chat_template.json").get("chat_template")
    else:
        template = details.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((each.get("template") for each in template if each.get("name") == "default"), None)
    if not isinstance(template, str):
        return None
    content: Any = [{"type": "image"}, {"type": "text", "text": _MARK}] if sees else _MARK
    special = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in details.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    said = _rendered(source, template, {"messages": [{"role": "user", "content": content}], **special})
    opening, found, closing = said.partition(_MARK)
    if not found or _MARK in closing:
        raise PackUnsupported(f"the chat template of {source.name} does not say a question exactly once")
    return opening, closing


def _rendered(source: Source, template: str, values: Mapping[str, Any]) -> str:
    """A chat template filled in, in jinja2's sandbox and with the settings that transformers gives it."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> str:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    filters: dict[str, Callable[..., str]] = {"tojson": lambda value, **_: json.dumps(value, ensure_ascii=False)}
    environment.filters.update(filters)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(add_generation_prompt=True, **values)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise PackUnsupported(f"the chat template of {source.name} cannot be filled in: {error}") from None
