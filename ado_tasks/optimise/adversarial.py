"""An adversarial term for distribution matching: what the teacher does not know, real images say.

Yin et al. 2024b (DMD2, arXiv:2405.14867), §4.3: matching alone ends at the teacher's distribution, its errors included.
A logistic head on the middle features of the critic learns to tell noised real images from noised samples, and the
student is drawn to where the two cannot be told apart. Noise at every level is what keeps the two apart from being told
by single pixels, and few images from being learned by heart (Wang et al. 2023, "Diffusion-GAN").
"""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from ado_tasks.backend import mx
from ado_tasks.config import config
from ado_tasks.models.unet import UNet2D
from ado_tasks.parallel import Tree

Weight = Annotated[float, Field(ge=0)]
Judge = Callable[[mx.array], tuple[mx.array, mx.array]]  # noisy images (B, …) → their x̂ (B, …), their logits (B,)


@config
class AdversarialConfig:
    """How much real images have to say. Yin et al. 2024b: 3e-3 and 1e-2 on ImageNet, of means over pixels too."""

    weight: Weight | tuple[Weight, ...] = 0.03  # of the student's logistic loss; one number, or one a student; 0: none
    critic_weight: Annotated[float, Field(gt=0)] = 0.1  # of the head's logistic loss beside the critic's own


def new_head(net: UNet2D, shape: tuple[int, ...]) -> Tree:
    """A head that says 0, a coin toss, of every image (H, W, C): the term grows as fast as it is learned."""
    labels = mx.zeros(1, dtype=mx.int32) if net.config.has_classes else None
    middle = net.with_middle(mx.zeros((1, *shape)), mx.zeros(1), labels)[1]  # lazy: only its shape is asked for
    return {"weight": mx.zeros(middle.shape[1:]), "bias": mx.zeros(1)}


def logits(head: Tree, middle: mx.array) -> mx.array:
    """D = ⟨w, h⟩/√n + b of middle features (B, h, w, c), n = hwc; (B,).

    √n: a step of Adam moves every weight by as much, and the logit then by as much in networks of every size.
    """
    n = middle[0].size
    return mx.sum((middle * head["weight"]).reshape(-1, n), axis=1) / n**0.5 + head["bias"]


def head_loss(real: mx.array, fake: mx.array) -> mx.array:
    """softplus(−D(real)) + softplus(D(fake)), (B,) each: the logistic loss (Goodfellow et al. 2014, eq. 1)."""
    return mx.logaddexp(-real, 0.0) + mx.logaddexp(fake, 0.0)


def student_slope(judge: Judge, noisy: mx.array) -> tuple[mx.array, mx.array]:
    """x̂ of noisy samples, and the gradient by them of softplus(−D), the non-saturating loss; (B, …) each.

    −sigmoid(−D) ∂D/∂z (Goodfellow et al. 2014, §3). With the best D, log(p/q) for real images p and samples q, that
    moves samples up the ratio, and is 0 everywhere once q = p.
    """

    def loss(z: mx.array) -> tuple[mx.array, mx.array]:
        x_hat, logit = judge(z)
        return mx.sum(mx.logaddexp(-logit, 0.0)), x_hat

    (_, x_hat), slope = mx.value_and_grad(loss)(noisy)
    return x_hat, slope
