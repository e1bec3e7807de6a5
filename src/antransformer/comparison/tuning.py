"""Text on how the settings of an experiment's runs were chosen: tuned at their budget, at another one, or defaults."""

from antransformer.reporting.labels import display_name, format_count, style_of
from antransformer.results.comparison import Results, Variant


def tuning_label(results: Results, tokens: int) -> str:
    """Return ``tuned`` if the learning rates of all variants were searched at this budget, else their origin."""
    given = [variant.has_given_rates(tokens) for variant in results.variants]
    if any(given):
        return "rates given" if all(given) else "rates of some variants given"
    searches = {variant.search_budget("lr", tokens) for variant in results.variants}
    if searches == {tokens}:
        return "tuned"
    return f"rates tuned at {_list_budgets(searches)}" if any(searches) else "default rates"


def tuning_scope(results: Results) -> str:
    """Return how the learning rates of all budgets were chosen, for the scope of a finding."""
    given = [item for item in results.variants if any(map(item.has_given_rates, results.budgets))]
    if given:
        labels = ", ".join(style_of(item.name).label for item in given)
        return f"given learning rates{f' for {labels}' if len(given) < len(results.variants) else ''}"
    if {tuning_label(results, tokens) for tokens in results.budgets} == {"tuned"}:
        # A baseline whose embedding has the rate of its blocks is a weak one (docs/results.md).
        runs = [(variant, tokens) for variant in results.variants for tokens in results.budgets]
        separate = all(variant.search_budget("embed_lr", tokens) for variant, tokens in runs)
        return f"{'' if separate else 'common '}learning rates tuned at every budget"
    searches = {item.search_budget("lr", tokens) for item in results.variants for tokens in results.budgets}
    return (
        f"learning rates tuned at {_list_budgets(searches)} tokens only"
        if any(searches)
        else "untuned default learning rates"
    )


def chosen_text(variant: Variant, setting: str) -> str:
    """Return the values of a setting with the budgets at which they were found, such as ``lr 0.01 at 1.0M``."""
    chosen = [item for item in variant.chosen if setting in item.settings]
    searches = {item.tokens: variant.search_budget(setting, item.tokens) for item in chosen}
    values = ", ".join(f"{item.settings[setting]:g} at {format_count(item.tokens)}" for item in chosen)
    if all(tokens == search for tokens, search in searches.items()):
        return f"{display_name(setting)} {values}"
    if len({item.settings[setting] for item in chosen}) == 1:
        values = f"{chosen[0].settings[setting]:g}"
    if all(setting in item.given for item in chosen):
        return f"{display_name(setting)} {values} (given)"
    origin = f"found at {_list_budgets(set(searches.values()))}" if any(searches.values()) else "default"
    return f"{display_name(setting)} {values} ({origin})"


def _list_budgets(budgets: set[int]) -> str:
    return ", ".join(format_count(budget) for budget in sorted(budgets) if budget)
