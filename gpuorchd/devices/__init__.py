"""Where GPUs, their readings and the processes on them come from. Imports nothing by itself."""
