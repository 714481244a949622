"""Client library of gpuorchd: ask for GPU memory, and know why when there is none."""
