"""The toon world: a procedurally drawn cartoon universe with its truth, its words and its splits.

`world` samples frames and stories, `render` draws them, `grammar` describes them and reads descriptions back.
It knows nothing about tensors, models or training loops: numpy, skia and the standard library only.
"""
