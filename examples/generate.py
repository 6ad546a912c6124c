"""Generate a video within two budgets: python examples/generate.py MODEL PROMPT CLIP.mp4"""

import sys

import lowvram

model, prompt, clip = sys.argv[1:]
pipe = lowvram.load(model, vram="8GiB", ram="16GiB")
video = pipe(prompt, seed=0)
video.save(clip)
print(f"{len(video.frames)} frames in {clip}")
