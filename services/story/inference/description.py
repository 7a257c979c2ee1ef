"""What a model says about itself: ModelMetadata and ModelConfig. Pure.

Metadata can name one datatype for an input; REFERENCE_IMAGES and EDIT_IMAGE also take UINT8 pixels (`frame.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

from tritonclient.grpc import model_config_pb2 as config_pb
from tritonclient.grpc import service_pb2 as pb

from services.story.inference import caption, frame
from services.story.inference.catalog import VERSION, Kind, Model
from services.story.inference.tensors import BYTES, UINT8, TensorSpec

SERVER = "fabula"
EXTENSIONS = ("model_repository", "model_configuration", "schedule_policy", "parameters")  # as Triton names them
BACKEND = "fabula"
OUTPUTS: dict[Kind, Sequence[TensorSpec]] = {"frame": frame.OUTPUTS, "caption": caption.OUTPUTS}
DATATYPES = {BYTES: config_pb.TYPE_STRING, UINT8: config_pb.TYPE_UINT8}
FRAME_FACTS = (  # fields of the frame service's Pack that a client may want before it asks for a picture
    "width_px",
    "height_px",
    "default_steps",
    "default_text_guidance",
    "default_image_guidance",
    "max_references",
    "min_side_px",
    "side_multiple_px",
    "max_area_px",
    "max_steps",
)


def server_metadata() -> pb.ServerMetadataResponse:
    """The server's name and version."""
    return pb.ServerMetadataResponse(name=SERVER, version=metadata.version(SERVER), extensions=EXTENSIONS)


def inputs(model: Model) -> Sequence[TensorSpec]:
    """What a model takes."""
    return frame.inputs(model.pack) if model.name.kind == "frame" else caption.INPUTS


def model_metadata(model: Model) -> pb.ModelMetadataResponse:
    """A model's tensors; sides of any length are -1."""

    def tensors(specs: Sequence[TensorSpec]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
        return [
            pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)
            for spec in specs
        ]

    return pb.ModelMetadataResponse(
        name=str(model.name),
        versions=[VERSION],
        platform=_platform(model),
        inputs=tensors(inputs(model)),
        outputs=tensors(OUTPUTS[model.name.kind]),
    )


def model_config(model: Model) -> pb.ModelConfigResponse:
    """A model as Triton would configure it: no batches of clients' making, priorities, several responses a frame."""
    is_frame = model.name.kind == "frame"
    config = config_pb.ModelConfig(
        name=str(model.name),
        platform=_platform(model),
        backend=BACKEND,
        max_batch_size=0,  # a request is one picture or one text; those in flight together share their steps anyway
        input=[
            config_pb.ModelInput(
                name=spec.name, data_type=DATATYPES[spec.datatype], dims=spec.shape, optional=spec.optional
            )
            for spec in inputs(model)
        ],
        output=[
            config_pb.ModelOutput(name=spec.name, data_type=DATATYPES[spec.datatype], dims=spec.shape)
            for spec in OUTPUTS[model.name.kind]
        ],
        model_transaction_policy=config_pb.ModelTransactionPolicy(decoupled=is_frame),  # previews come before a frame
    )
    facts = {"digest": model.pack.digest}
    if is_frame:
        config.dynamic_batching.priority_levels = len(frame.PRIORITIES)
        config.dynamic_batching.default_priority_level = frame.DEFAULT_PRIORITY
        facts |= {name: f"{getattr(model.pack, name):.12g}" for name in FRAME_FACTS}
        if model.pack.base_digest:
            facts["base_digest"] = model.pack.base_digest
    for name, value in facts.items():
        config.parameters[name].string_value = value
    return pb.ModelConfigResponse(config=config)


def _platform(model: Model) -> str:
    return f"{BACKEND}_{model.pack.architecture}" if model.pack.architecture else BACKEND
