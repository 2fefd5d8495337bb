"""Accuracy on gsm8k-test by how sure the latents are, from doubt.json: for each problem, in the file's order, the mean entropy of its latents,
how many there are, and whether Latent and CoT-SFT of the same seed are right.

    python results/smollm2-14min/doubt.py                                     # r = 2 and 4
    python results/smollm2-14min/doubt.py results/smollm2-variants/doubt.json  # a latent for each number, and r = 3
"""

import json
from pathlib import Path
import sys

file = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("doubt.json")
for name, problems in json.loads(file.read_text()).items():
    problems.sort(key=lambda problem: problem[0])
    for parts in (3, 6):
        print(f"{name}, in {parts} parts: entropy up to, Latent, CoT-SFT, %")
        for i in range(parts):
            part = problems[len(problems) * i // parts:len(problems) * (i + 1) // parts]
            latent, written = (100 * sum(p[j] for p in part) / len(part) for j in (2, 3))
            print(f"    {part[-1][0]:.2f} {latent:5.1f} {written:5.1f}")
