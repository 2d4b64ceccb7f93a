"""Elementary functions that Triton's language lacks, in float32, accurate near 0: derived cells are written in them."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # 2*sigmoid(2x)-1 cancels near 0 and loses 2 to 4 times in float32: a minimax polynomial serves there instead
    # (coefficients: Cephes, tanhf.c).
    y = tl.abs(x)
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = (p * z - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * y) + 1.0)
    return tl.where(y < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def log1p(x):
    # Kahan: the error of u = 1 + x cancels between log(u) and u - 1.
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, tl.log(u) * (x / (u - 1.0))))


@triton.jit
def expm1(x):
    # Kahan, too; far from 0 there is nothing to cancel.
    u = tl.exp(x)
    v = u - 1.0
    far = tl.abs(x) > 20.0
    return tl.where(u == 1.0, x, tl.where(far, v, v * (x / tl.log(tl.where(far, 2.0, u)))))


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def relu(x):
    return tl.where(x <= 0.0, 0.0, x)  # a NaN stays
