"""The rules that are tables: name, source, table. :mod:`relevance` runs them."""

from __future__ import annotations

from onnx_lrp.errors import RuleError
from onnx_lrp.modifiers import HIGH, LOW, NEGATIVE, ONE, POSITIVE, SAME, SQUARE, ZERO, Bounds, lowered, raised
from onnx_lrp.relevance import Branch, Rule, Term


def epsilon_rule(epsilon: float = 1e-6, exact: bool = False) -> Rule:
    """LRP-epsilon: z = x·w + b (Bach et al. 2015, eq. 58); epsilon = 0 is LRP-0, and for sums the proportional rule.

    With ``exact`` it is LRP-0 wherever relevance arrives as a multiple of z, so that nothing is divided.
    """
    return Rule("epsilon", (Branch((Term(),)),), epsilon, exact=exact)


def zplus_rule(epsilon: float = 1e-6, bias: bool = True) -> Rule:
    """LRP-z+, inputs of either sign (Montavon et al. 2017, eq. 11; the bias counts once, where it is positive).

    Without ``bias`` the denominators leave the biases out, as the equation does.
    """
    up = POSITIVE if bias else ZERO
    return Rule("zplus", (Branch((Term(POSITIVE, POSITIVE, up), Term(NEGATIVE, NEGATIVE, ZERO))),), epsilon)


def wplus_rule(epsilon: float = 1e-6) -> Rule:
    """LRP-w⁺: shares by positive weights, whatever the input: z+ with every input 1, and no bias.

    It keeps what lies at the pixels of a picture, which may be negative or zero, out of the map (KaiFabi,
    LayerwiseRelevancePropagation, whose first layer is propagated with x = 1).
    """
    return Rule("wplus", (Branch((Term(ONE, POSITIVE, ZERO),)),), epsilon)


def alpha_beta_rule(alpha: float = 2.0, beta: float = 1.0, epsilon: float = 1e-6, bias: bool = True) -> Rule:
    """LRP-alpha-beta (Bach et al. 2015, eq. 60); without ``bias`` the denominators leave the biases out.

    Raises:
        RuleError: alpha or beta negative, or alpha - beta not 1 (relevance would not be conserved).
    """
    if alpha < 0 or beta < 0 or abs(alpha - beta - 1) > 1e-9:
        raise RuleError(
            f"alpha_beta needs alpha, beta >= 0 and alpha - beta = 1, got alpha={alpha}, beta={beta}", key="alpha"
        )
    up, down = (POSITIVE, NEGATIVE) if bias else (ZERO, ZERO)
    excite = Branch((Term(POSITIVE, POSITIVE, up), Term(NEGATIVE, NEGATIVE, ZERO)), alpha)
    inhibit = Branch((Term(POSITIVE, NEGATIVE, down), Term(NEGATIVE, POSITIVE, ZERO)), -beta)
    return Rule("alpha_beta", (excite, inhibit) if beta else (excite,), epsilon)


def gamma_rule(gamma: float = 0.25, epsilon: float = 1e-6) -> Rule:
    """LRP-gamma, generalized to inputs and outputs of either sign (Andéol et al. 2021, app. B).

    Where the output is positive, weights are raised for positive inputs and lowered for negative ones; where it is
    negative, the other way round. For x >= 0 and z > 0 this is LRP-gamma of Montavon et al. 2019, eq. 4.
    """
    up, down = raised(gamma), lowered(gamma)
    return Rule(
        "gamma",
        (
            Branch((Term(POSITIVE, up, up), Term(NEGATIVE, down, ZERO)), where="positive"),
            Branch((Term(POSITIVE, down, down), Term(NEGATIVE, up, ZERO)), where="negative"),
        ),
        epsilon,
    )


def wsquare_rule(epsilon: float = 1e-6) -> Rule:
    """LRP-w²: shares by squared weights, whatever the input (Montavon et al. 2017, eq. 12)."""
    return Rule("wsquare", (Branch((Term(ONE, SQUARE, SQUARE),)),), epsilon)


def flat_rule(epsilon: float = 1e-6) -> Rule:
    """LRP-flat: equal shares for every input a unit sees (Lapuschkin et al. 2019, methods)."""
    return Rule("flat", (Branch((Term(ONE, ONE, ZERO),)),), epsilon)


def zbox_rule(bounds: Bounds, epsilon: float = 1e-6) -> Rule:
    """LRP-z^B for inputs in a box (Montavon et al. 2017, eq. 13): z = x·w - low·w⁺ - high·w⁻; the bias cancels."""
    return Rule(
        "zbox",
        (Branch((Term(SAME, SAME, ZERO), Term(LOW, POSITIVE, ZERO, -1.0), Term(HIGH, NEGATIVE, ZERO, -1.0))),),
        epsilon,
        bounds,
    )
