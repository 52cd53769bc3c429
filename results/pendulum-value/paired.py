"""What each guide adds to the score: per seed, the mean over the other guide's weights; 95 %
interval of the mean over seeds (Student's t).

python results/pendulum-value/paired.py
"""

import json
from pathlib import Path

import numpy as np

final = json.loads((Path(__file__).parent / "final.json").read_text())
at = {(p["guidance"], p["value_guidance"]): np.array(p["scores"]) for p in final["sweep"]}
added = {
    "policy": [at[0.25, v] - at[0.0, v] for v in (0.0, 0.25)],
    "critic": [at[g, 0.25] - at[g, 0.0] for g in (0.0, 0.25)],
}
for name, differences in added.items():
    seeds = np.mean(differences, axis=0)
    half = 3.182 * seeds.std(ddof=1) / len(seeds) ** 0.5  # t of 3 degrees of freedom
    print(f"{name}: {seeds.mean():+.1f} ({seeds.mean() - half:.1f} to {seeds.mean() + half:.1f})")
