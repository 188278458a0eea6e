"""SiLU and powers of two by polynomials: without `exp`, without branches."""

import math
from typing import Any

from ado_tasks.backend import mx

# Adding 1.5·2^23 gives a float32 whose spacing is 1: the sum is rounded to an integer, which sits in its lowest bits.
ROUND = 12582912.0
# Taylor coefficients of 2^f, (ln 2)^k / k!. At |f| <= 1/2 what is left out is (ln 2 / 2)^7 / 7! = 1.2e-7.
EXP2 = tuple(math.log(2.0) ** k / math.factorial(k) for k in range(7))

# sigmoid(x) = 1/2 + x P(x²)/Q(x²) for |x| <= 18, where float32's sigmoid has become 0 or 1. Fitted by iterated
# weighted least squares to tanh(x/2)/2x in float64 (largest error 9e-9; 2.2e-7 when evaluated in float32).
SATURATED = 18.0
SIGMOID_P = (0.249999977, 0.00835824554, 5.4477754e-05, 7.9967741e-08, 1.2875106e-11)
SIGMOID_Q = (1.0, 0.116766224, 0.00161512234, 5.11152552e-06, 3.00883384e-09)
ALMOST_HALF = (
    0.5 - 2.0**-24
)  # so that rounding never leaves a positive sigmoid beyond -18, which a huge x would blow up


def _quartic(c: tuple[float, ...], t: mx.array) -> mx.array:
    """c_0 + c_1 t + ... + c_4 t⁴ by Estrin's scheme: few operations deep, so that MLX fuses it into one kernel."""
    square = t * t
    return (c[0] + c[1] * t) + square * ((c[2] + c[3] * t) + square * c[4])


def first(outputs: Any) -> mx.array:
    """The value of a custom function; the other outputs are what its gradient saves."""
    return outputs[0]


def _unfolded(value: float) -> mx.array:
    """A number that the C++ compiler does not know when it compiles a fused kernel.

    It specialises the path on which a minimum is its known second argument, and a loop with two paths stays scalar.
    """
    return mx.array([value]).reshape(())


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x) with an absolute error below 3e-7. NaN stays NaN."""
    t = mx.minimum(x * x, _unfolded(SATURATED**2))
    # Beyond ±18 the quotient stays and x grows: the result leaves [0, 1] and is cut.
    return mx.minimum(mx.maximum(x * _quartic(SIGMOID_P, t) / _quartic(SIGMOID_Q, t) + ALMOST_HALF, 0.0), 1.0)


@mx.custom_function
def _silu(x: mx.array) -> tuple[mx.array, mx.array]:
    s = sigmoid(x)
    return x * s, s


@_silu.vjp
def _silu_vjp(primal, cotangents, outputs):
    """d(x s)/dx = s + x s (1 - s), from the saved sigmoid: no second polynomial."""
    y, s = outputs
    return cotangents[0] * (s + y * (1 - s))


def silu(x: mx.array) -> mx.array:
    """The product x · sigmoid(x), error below 3e-7 · max(|x|, 1)."""
    return first(_silu(x))


def exp2_of_nonpositive(z: mx.array) -> mx.array:
    """2^z for z <= 0, relative error below 3e-7; below 2^-126 it stays 2^-126 (denormals are slow). NaN stays NaN."""
    z = mx.maximum(z, -126.0)
    rounded = z + ROUND
    power = ((rounded.view(mx.int32) << 23) + (127 << 23)).view(mx.float32)  # n in the exponent's bits is 2^n
    f = z - (rounded - ROUND)
    f2 = f * f
    high = (EXP2[4] + EXP2[5] * f) + f2 * EXP2[6]
    return ((EXP2[0] + EXP2[1] * f) + f2 * ((EXP2[2] + EXP2[3] * f) + f2 * high)) * power
