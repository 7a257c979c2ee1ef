"""Every network, sampler and pack. Knows no transport, no Ray and no service.

pack.py          a folder sealed by its pack.json: find, check, write
library.py       the packs of an installation: add, list, verify, remove
source.py        where a pack comes from
published.py     a checkpoint in diffusers' layout → what its pack will be
convert.py       old weights → safetensors, by converter.py in a locked child process
footprint.py     the memory a pack takes, before it is read
registry.py      architecture name → what loads it; writes and reads the networks of a pack
tiny.py          a complete pack of tiny random networks, for tests
toon.py          the shapes of the toon pack

drawing.py       sampling: begin, advance many drawings by one step, finish
denoiser.py      StoryGen's rules (reference levels, guidance, dropout) and its training loss
storygen.py      the UNet with reference attention, in the published layout
storygen_published.py   the same checkpoint with its files as they were published
arldm.py         AR-LDM: the context of a frame, what hides, the loss (arldm_blip.py, arldm_text.py: its encoders)
arldm_sampling.py       its stories, frame after frame
arldm_checkpoint.py     its weights: the published names, our folder
lora.py          characters' weights, a different one for every row
character.py     how such weights are named
schedule.py      noise levels; what is trained and what is sampled
samplers.py      DDIM, DPM-Solver++ 2M
vae.py           pixels ↔ latents
text_encoder.py  descriptions → vectors
tokenizer.py     one byte-level BPE for all networks of a pack

README.md        which checkpoints, which commands, which numbers

llava.py         the captioner's shape and files
captioner.py     captioners that others published: kinds and sizes (captioner_published.py: how they become packs)
remote.py        packs without weights: a model on somebody's server
writers.py       those that vLLM does not serve, in plain transformers
wording.py       how a captioner is asked, and how what it says is read
prompts.py       what the captioner is asked, as token ids
cast.py          the name lock: whom a description may name, and how its names are mended
repetition.py    the repetition guard: captions that say again what was said
thread.py        the thread guard: captions that lose sight of the hero
invention.py     the invention guard: captions that make up somebody's name
world.py         what a pack knows of the world, and what it says of the rest
familiarity.py   how familiar a picture is to a pack
errors.py        what can go wrong, by name
"""
