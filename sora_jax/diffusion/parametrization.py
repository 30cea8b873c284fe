"""What a network may predict, and the conversion of every prediction into every other.

Data x_0 and unit noise eps are mixed by a process with signal alpha and noise sigma:

    (1)  x = alpha x_0 + sigma eps

    rectified flow        alpha = 1 - t            sigma = t
    variance preserving   alpha = sqrt(abar_t)     sigma = sqrt(1 - abar_t)
    variance exploding    alpha = 1                sigma = sigma

A prediction is a row (p, q) of y = p x_0 + q eps:

    (2)  x0: (1, 0)   eps: (0, 1)   v: (-sigma, alpha)   flow: (-1, 1)

Two different mixtures x and y determine x_0 and eps, hence any third mixture z = p' x_0 + q' eps:

    (3)  z = r x + s y,   r = (p' q - q' p) / det,   s = (alpha q' - sigma p') / det,
         det = alpha q - sigma p

det is -sigma for x0, alpha for eps, alpha^2 + sigma^2 for v and alpha + sigma for flow: x0 says
nothing of the noise where sigma = 0, eps nothing of the data where alpha = 0 (zero terminal SNR).

Divided by alpha + sigma, (1) is rectified flow at t = sigma / (alpha + sigma): every process has
the same paths as rectified flow, and its velocity along them is the flow prediction eps - x_0.

Source: v: Salimans and Ho, arXiv 2202.00512, appendix D; flow: Liu et al., arXiv 2209.03003.
"""

from sora_jax.core.errors import UserError

PREDICTIONS = ("x0", "eps", "v", "flow")


def mixture(kind: str, alpha, sigma):
    """(p, q) of a prediction by (2), or of x itself (kind "x"). Raises UserError on another."""
    rows = {"x0": (1.0, 0.0), "eps": (0.0, 1.0), "v": (-sigma, alpha), "flow": (-1.0, 1.0),
            "x": (alpha, sigma)}
    if kind not in rows:
        raise UserError(f"prediction {kind!r} is unknown; allowed: {', '.join(PREDICTIONS)}")
    return rows[kind]


def conversion(source: str, target: str, alpha, sigma):
    """(r, s) of (3): target = r x + s source. Exactly (0, 1) where both are the same."""
    p, q = mixture(source, alpha, sigma)
    wanted_p, wanted_q = mixture(target, alpha, sigma)
    determinant = alpha * q - sigma * p
    return (
        (wanted_p * q - wanted_q * p) / determinant,
        (alpha * wanted_q - sigma * wanted_p) / determinant,
    )


def convert(prediction, x, source: str, target: str, alpha, sigma):
    """The prediction `source` at x as the prediction `target`; alpha and sigma broadcast."""
    r, s = conversion(source, target, alpha, sigma)
    return r * x + s * prediction


def target(kind: str, x0, noise, alpha, sigma):
    """What a network of this kind is trained to give, by (2)."""
    p, q = mixture(kind, alpha, sigma)
    return p * x0 + q * noise
