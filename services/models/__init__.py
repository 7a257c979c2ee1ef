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

drawing.py       a picture's beginning and its end
step.py          one denoising step of many drawings
references.py    what earlier frames left, in pages
graphs.py        forwards that are recorded once and replayed
denoiser.py      StoryGen's rules (reference levels, guidance, dropout) and its training loss
storygen.py      the UNet with reference attention, in the published layout
storygen_published.py   the same checkpoint with its files as they were published
arldm/ flux2/ stable_diffusion/   the other families
lora.py          characters' weights, a different one for every row
character.py     how such weights are named
schedule.py      noise levels; what is trained and what is sampled
samplers.py      DDIM, DPM-Solver++ 2M
vae.py           pixels ↔ latents
cost.py          what a row costs, and what the machine does at best
transfer.py      small tensors on their way to a device
text_encoder.py  descriptions → vectors
tokenizer.py     one byte-level BPE for all networks of a pack

README.md        which checkpoints, which commands, which numbers

captions/        what writes captions: our LLaVA and others', how they are asked, the guards of what they say
remote.py        packs without weights: a model on somebody's server
world.py         what a pack knows of the world, and what it says of the rest
likeness.py      how alike two looks are, as phrases
eyes.py          what a picture shows, read off it (glimpse.py: a preview off latents)
familiarity.py   how familiar a picture is to a pack
errors.py        what can go wrong, by name
"""
