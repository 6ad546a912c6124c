"""What a run would take on a card that is not here: no GPU, no weights."""

import lowvram

plan = lowvram.plan("t2v-a14b", size="832x480", frames=81, gpu="RTX 3060 12GB", ram="16GiB")
print(f"{plan.peak_vram_bytes / 1e9:.1f} GB of VRAM, {plan.peak_ram_bytes / 1e9:.1f} GB of RAM")
if plan.prediction is not None:
    print(f"{plan.prediction.video_s / 60:.0f} minutes, predicted")
