"""The stock Triton client, our edge, and the real captioner: the words of one are those of the other.

The name comes before `test_caption_service`, whose last test kills the engine that both share.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from services.runtime.channel import ServiceChannel
from services.story.api_grpc import GrpcEdge
from services.story.inference.servicer import InferenceServicer
from services.story.sandbox import Sandbox
from tests.contract.caption.conftest import TOKEN, Service, picture

pytestmark = pytest.mark.asyncio(loop_scope="session")


def strings(name: str, *values: bytes) -> InferInput:
    tensor = InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array(values, dtype=np.object_))
    return tensor


@pytest_asyncio.fixture(loop_scope="session")
async def client(service: Service) -> AsyncIterator[InferenceServerClient]:
    sandbox = Sandbox()
    channel = ServiceChannel(service.address, application="caption", token=TOKEN)
    servicer = InferenceServicer(
        caption_channel=channel, frame_channel=channel, sandbox=sandbox, caption_timeout_s=60, frame_timeout_s=60
    )
    no_stories = None
    edge = GrpcEdge(no_stories, host="127.0.0.1", port=0, inference_servicer=servicer)  # type: ignore[arg-type]
    await edge.start()
    await edge.serving(True)
    async with InferenceServerClient(f"127.0.0.1:{edge.port}") as stock:
        yield stock
    await edge.stop(0)
    await channel.close()
    await sandbox.close()


@pytest.mark.parametrize("adapter", ["story", "descriptive"])
async def test_a_text_is_written(client: InferenceServerClient, service: Service, adapter: str) -> None:
    inputs = [strings("IMAGE", picture(1)), strings("CAPTIONS", b"Momo found a red kite.", b"She let it fly.")]
    asked = {"adapter": adapter, "seed": 3, "temperature": 0.5, "max_tokens": 8}
    first, again = [await client.infer("caption/tiny", inputs, parameters=asked) for _ in range(2)]
    assert first.as_numpy("TEXT")[0].decode().strip()
    assert first.as_numpy("TEXT")[0] == again.as_numpy("TEXT")[0]
    told = first.get_response().parameters
    assert told["adapter"].string_param == adapter
    assert told["finish_reason"].string_param in ("stop", "length")
    assert told["prompt_tokens"].int64_param > 0
    assert 0 < told["completion_tokens"].int64_param <= 8
    assert told["pack_digest"].string_param == service.pack.manifest.digest


@pytest.mark.parametrize(
    ("parameters", "start"),
    [({"max_tokens": 1000}, "VALUE_OUT_OF_RANGE: max_tokens"), ({"top_p": 0.0}, "VALUE_OUT_OF_RANGE: top_p")],
)
async def test_the_captioners_own_refusals_name_our_parameters(
    client: InferenceServerClient, parameters: dict[str, float], start: str
) -> None:
    inputs = [strings("IMAGE", picture(1)), strings("CAPTIONS", b"Momo found a red kite.")]
    with pytest.raises(InferenceServerException) as refused:
        await client.infer("caption/tiny", inputs, parameters=parameters)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert refused.value.message().startswith(start)
