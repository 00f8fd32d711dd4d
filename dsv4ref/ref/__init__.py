"""The PyTorch reference: one readable function per operation, the specification in code. Never imports kernels."""
