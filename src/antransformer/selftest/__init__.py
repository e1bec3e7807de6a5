"""Self-test on one machine: correctness, speed and a training comparison, in parts that each take minutes.

``program.py`` runs the parts. Each is a list of functions in this package that yield checks (``checks.py``). A part
runs at full size on a CUDA device, and in miniature elsewhere, which tests the program itself. This file imports no
torch.
"""

PARTS = {
    "kernels": "Triton kernels and FP8 against plain torch on the CPU",
    "models": "Architectures eager, compiled and on the CPU; bounds; drift in bfloat16; folding",
    "checkpoints": "Resumed runs bit for bit; checkpoints on a CPU",
    "processes": "Two processes against one",
    "speed-125m": "Training steps at 125m",
    "speed-0.5b": "Training steps at 0.5b",
    "speed": "Other libraries, FP8, CUDA graphs, optimizer",
    "generation": "Prefill and decode at 125m",
    "training": "GPT+ against anGPT at 32m, at three budgets",
}
