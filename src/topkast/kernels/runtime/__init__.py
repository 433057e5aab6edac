"""The runtime of the kernels: compilation, threads, arguments and vector instructions."""
