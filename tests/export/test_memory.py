"""The exporter's memory does not grow with the number of layers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from mvlm.export.checkpoint import parameter_shapes, random_checkpoint

MIB = 1 << 20

#: Wide enough that a layer weighs something and narrow enough to be quick: 12 million weights in a decoder layer.
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 600,
    "vision_num_hidden_layers": 2,
}
LAYERS = (2, 16)

#: Quantizes random weights and prints what it left and the peak of its resident memory. Of Linux's counters this one
#: begins anew with the program; ru_maxrss would begin with what the process that started it had.
PROGRAM = """
import json, sys
from pathlib import Path
from mvlm.export.checkpoint import random_checkpoint
from mvlm.export.progress import Progress
from mvlm.export.quantize import quantize_checkpoint
from mvlm.export.recipe import Recipe
from mvlm.export.spool import Spool

checkpoint = random_checkpoint("mobilevlm-1.7b", **json.loads(sys.argv[1]))
with Spool(Path(sys.argv[2])) as spool:
    quantized = quantize_checkpoint(checkpoint, Recipe(), spool, Progress(quiet=True))
    stacked = len(quantized.stacks["language_model.layers"])
    [peak] = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    print(json.dumps({"layers": stacked, "spool": spool.size, "peak": int(peak) * 1024}))
"""


def quantize_in_a_process(folder, num_layers: int) -> dict[str, int]:
    sizes = json.dumps(SIZES | {"num_hidden_layers": num_layers})
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, sizes, str(folder)]
    # glibc gives large tensors back to the system at once, always: else its heap keeps some by chance, 50 MiB and more.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def num_weights(num_layers: int) -> int:
    config = random_checkpoint("mobilevlm-1.7b", **SIZES, num_hidden_layers=num_layers).config
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    few, many = (quantize_in_a_process(tmp_path, layers) for layers in LAYERS)
    assert (few["layers"], many["layers"]) == LAYERS
    more_weights = num_weights(LAYERS[1]) - num_weights(LAYERS[0])
    more_float32, more_memory = 4 * more_weights, many["peak"] - few["peak"]
    peaks = " and ".join(f"{which['peak'] / MIB:.0f}" for which in (few, many))
    print(f"{LAYERS} layers: {peaks} MiB; as float32 they differ by {more_float32 / MIB:.0f} MiB")
    assert more_float32 >= 600 * MIB
    assert many["spool"] - few["spool"] > 0.5 * more_weights  # the weights went to the disk
    assert more_memory < 60 * MIB  # not even the quantized ones would fit, half a byte each
