"""Summary of a diagnosis in sentences, for people."""

from collections.abc import Mapping

from antransformer.diagnostics.diagnosis import EFFECTIVE, NEAR_BOUND, Diagnosis, FactorError, mean_abs_error

# Thresholds of the words "compact", "accurate" and "concentrated".
MAX_COMPACT_RATIO = 4.0  # largest over smallest mean norm of the residual stream
MAX_FACTOR_ERROR = 0.05
MAX_NORM_SPREAD = 0.2  # standard deviation over mean of a norm; 32 random coordinates give 0.125


def summarize(diagnosis: Diagnosis) -> list[str]:
    """Sentences about the residual stream, factors, alpha and weight vectors, where the model has them."""
    sentences = [_residual_stream(diagnosis)]
    if diagnosis.factors:
        sentences += _factors(diagnosis.factors)
    if diagnosis.alpha:
        alphas = [value for layer in diagnosis.alpha for value in layer]
        sentences.append(
            f"The residual steps alpha started at {diagnosis.alpha_start:.2f}; their means per layer are now "
            f"{min(alphas):.2f} to {max(alphas):.2f}."
        )
    return [*sentences, _weight_vectors(diagnosis)]


def format_number(value: float, precision_of: float | None = None) -> str:
    """Format a positive number with three significant digits and at most three decimals.

    Args:
        value: number to format.
        precision_of: number whose number of decimals is used instead.
    """
    exponent = int(f"{precision_of or value:.2e}".partition("e")[2])
    return f"{value:,.{min(max(2 - exponent, 0), 3)}f}"


def _residual_stream(diagnosis: Diagnosis) -> str:
    means = [spread.mean for spread in diagnosis.residual_norm["text"]]
    ratio = means[-1] / diagnosis.residual_norm["repeated"][-1].mean
    same_on_repeats = 1 / MAX_COMPACT_RATIO <= ratio <= MAX_COMPACT_RATIO
    compact = max(means) / min(means) <= MAX_COMPACT_RATIO and same_on_repeats
    return (
        f"The residual stream {'is' if compact else 'is not'} compact: its mean norm on text goes from "
        f"{format_number(means[0])} after the embedding to {format_number(means[-1])} after the last block, "
        f"{format_number(ratio)} times the norm on a repeated token."
    )


def _factors(by_map: Mapping[str, Mapping[str, list[FactorError]]]) -> list[str]:
    random = {name: mean_abs_error(kinds["random"]) for name, kinds in by_map.items()}
    text = {name: mean_abs_error(kinds["text"]) for name, kinds in by_map.items()}
    spread = {name: max(layer.spread for layer in kinds["random"]) for name, kinds in by_map.items()}
    failing = [name for name in by_map if random[name] > MAX_FACTOR_ERROR or spread[name] > MAX_NORM_SPREAD]
    worst_random, widest, worst_text = (max(values, key=values.__getitem__) for values in (random, spread, text))
    effective = {name: text[name] for name in EFFECTIVE if name in text}
    worst_effective = max(effective, key=effective.__getitem__)
    return [
        f"On random inputs, the factors match the weights to within {random[worst_random]:.1%} (worst: {worst_random}) "
        f"and norms vary by up to {spread[widest]:.0%} ({widest}). Errors above "
        f"{MAX_FACTOR_ERROR:.0%} or spreads above {MAX_NORM_SPREAD:.0%}: {', '.join(failing) or 'none'}.",
        f"On text, the largest mean error over layers is {text[worst_text]:.0%} ({worst_text}). Among the factors that "
        f"no exact norm cancels ({', '.join(effective)}), it is {effective[worst_effective]:.0%} ({worst_effective}).",
    ]


def _weight_vectors(diagnosis: Diagnosis) -> str:
    rows = diagnosis.row_norm
    if diagnosis.bound == "none":
        low, high = format_number(rows["min"]), format_number(rows["max"])
        return f"Weight vectors have no bound: their norms are between {low} and {high}."
    if diagnosis.bound == "exactly 1":
        return f"Weight vectors are held at norm 1, to within {max(rows['max'] - 1, 1 - rows['min']):.0e}."
    return (
        f"Weight vectors are bounded by norm 1: their mean norm is {rows['mean']:.3f}, the smallest {rows['min']:.2f}, "
        f"and {rows['near_bound']:.0%} have a norm of at least {NEAR_BOUND}."
    )
