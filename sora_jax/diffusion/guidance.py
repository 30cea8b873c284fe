"""Classifier-free guidance: push the prediction away from the one without a caption."""


def guide(with_text, without_text, scale):
    """without + scale (with - without); scale 1 is the plain conditional prediction.

    Source: Ho and Salimans, arXiv 2207.12598, eq. 6 with w = scale - 1.
    """
    return without_text + scale * (with_text - without_text)
