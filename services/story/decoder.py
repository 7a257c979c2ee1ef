"""Decodes untrusted pictures one by one, in a child process with hard limits. Run by `sandbox.py`, never imported.

Speaks length-prefixed messages on standard input and output: picture bytes in, a JSON header and PNG bytes out; the
header repeats the number of the request it answers. It gets no environment, can write no file, and the kernel bounds
its memory and CPU time. If a picture kills it, it is replaced, and nothing else notices.
"""

import io
import json
import math
import resource
import struct
import sys
import warnings
from typing import Any

MEMORY_BYTES = 1 << 30
CPU_S = 20  # for one picture
MOST_PIXELS = 50_000_000  # larger than any phone's picture; 200 MB decoded
LEAST_SIDE_PX = 16
MOST_SIDE_PX = 1024  # of what is kept: no model here looks at more
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF")  # Pillow knows forty more, several of them with a history


class Refused(Exception):
    """A picture that is not taken: reason and message for the caller."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def clean_png(data: bytes) -> tuple[bytes, int, int]:
    """A plain 8-bit RGB PNG without metadata, at most 1024 px a side, upright; and its width and height.

    Of an animation the first frame is taken; transparency goes on white. Raises Refused.
    """
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image: Any = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception as error:  # noqa: BLE001 - a damaged file can make a parser raise anything
            if "exceeds limit" in str(error):
                raise Refused("IMAGE_TOO_LARGE", "the picture has too many pixels") from None
            raise Refused("IMAGE_UNREADABLE", "this is not a complete PNG, JPEG, WebP, GIF or TIFF picture") from None
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise Refused(
                "IMAGE_TOO_LARGE",
                f"the picture has {width} × {height} px; at most {MOST_PIXELS // 1_000_000} million are taken",
            )
        if min(width, height) < LEAST_SIDE_PX:
            raise Refused(
                "IMAGE_TOO_SMALL", f"the picture has {width} × {height} px; each side needs at least {LEAST_SIDE_PX}"
            )
        try:
            image.seek(0)
            # A JPEG can be decoded at a fraction of its size, which saves most of the memory and time.
            image.draft("RGB", (MOST_SIDE_PX * 2, MOST_SIDE_PX * 2))
            image.load()
        except Exception as error:  # noqa: BLE001 - as above
            raise Refused("IMAGE_UNREADABLE", f"the picture is damaged or cut off ({type(error).__name__})") from None
        image = ImageOps.exif_transpose(image)
        image = _rgb(image)
    scale = MOST_SIDE_PX / max(image.size)
    if scale < 1:
        size = tuple(max(LEAST_SIDE_PX, math.floor(side * scale + 0.5)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    plain = Image.frombytes("RGB", image.size, image.tobytes())  # carries pixels and nothing else
    out = io.BytesIO()
    plain.save(out, "PNG", optimize=False)
    return out.getvalue(), plain.width, plain.height


def _rgb(image: Any) -> Any:
    """Any mode as 8-bit RGB."""
    from PIL import Image

    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        # 16 bits a pixel: keep the upper eight. A float picture is taken as 0..1 if it stays in that range.
        low, high = image.getextrema()
        full = 1.0 if image.mode == "F" and high <= 1.0 else (255.0 if high <= 255 else 65535.0)
        image = image.convert("F").point(lambda value: value * (255.0 / full)).convert("L")
        del low
    if image.mode == "P" or image.mode == "PA" or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "La", "RGBa"):
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))


def _allow_cpu() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime) + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _read(count: int) -> bytes:
    data = sys.stdin.buffer.read(count)
    if len(data) < count:
        sys.exit(0)  # the story process is gone
    return data


def _answer(header: dict[str, Any], payload: bytes) -> None:
    head = json.dumps(header).encode()
    sys.stdout.buffer.write(struct.pack(">II", len(head), len(payload)) + head + payload)
    sys.stdout.buffer.flush()


def main() -> None:
    """Answers until standard input ends."""
    from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

    plugins = (GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
    Image.preinit()
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS * 8  # our own cap answers below it with a size; this one is behind it
    _limit()
    _answer({"ready": [plugin.__name__ for plugin in plugins]}, b"")
    while True:
        number, size = struct.unpack(">QI", _read(12))
        data = _read(size)
        _allow_cpu()
        header: dict[str, Any] = {"request": number}
        png = b""
        try:
            png, width, height = clean_png(data)
            header |= {"width_px": width, "height_px": height}
        except Refused as refused:
            header |= {"reason": refused.reason, "message": refused.message}
        except MemoryError:
            header |= {"reason": "IMAGE_TOO_LARGE", "message": "the picture needs too much memory"}
        except Exception as error:  # noqa: BLE001 - as above
            header |= {"reason": "IMAGE_UNREADABLE", "message": f"the picture is damaged ({type(error).__name__})"}
        _answer(header, png)


if __name__ == "__main__":
    main()
