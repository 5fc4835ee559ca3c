"""Cold against warm

``erllama bench tiny`` takes the demo model, ``erllama bench --model FILE`` one of yours: prompts
for the first time, again, longer and from disk, and agents that share what they begin with.
"""

import json
import subprocess
import sys

command = [sys.executable, "-m", "erllama_core", "bench", "--model", "model.gguf"]
command += ["--tokens", "256", "--agents", "2", "--repeat", "1", "--json"]
run = subprocess.run(command, capture_output=True, text=True, check=True)
for figure in json.loads(run.stdout)["figures"]:
    sooner = "sooner" if figure["speed_up"] > 1 else "the measure"
    print(f"{figure['scenario']}: {sooner}")
