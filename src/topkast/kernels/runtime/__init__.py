"""What kernels are made of and run on: compilation, threads, arguments, vector instructions."""
