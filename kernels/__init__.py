"""The Triton kernels of persistrnn, installed as ``persistrnn.kernels``."""
